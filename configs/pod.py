"""A TPU slice: BERT in the step, trained by InfoNCE over every target of the global batch, which goes round a ring of all chips.

    ./launch/tpu.sh train --name=bert --type=v5litepod-256 --config=configs/pod.py:v5e_16x16 --workdir=gs://BUCKET/bert
    python -m rec_jax.train --config=configs/pod.py:smoke --workdir=DIR        # here, in a minute: MiniLM on a part of MovieLens

The data are one user a line and a table of item texts (configs/sequences.py), given by --config.data.path and --config.data.items. A preset
is a slice, with the global batch and D that it takes (SLICES); with `_large`, BERT-large instead of BERT-base. All have been compiled for
their slices and fit their chips (tests/bench/tpu_compile.py, with goldens of memory and collectives). No pod has run any: there is no
figure.
"""

from ml_collections import ConfigDict

from rec_jax.defaults import defaults

# Preset -> shards (one a chip), history rows of 64 places in each, D, devices along fsdp. Global batch: shards x rows x 64.
SLICES = {
    "": (8, 64, 256, -1),  # one host of eight chips or fewer: 32,768
    "v5e_4x4": (16, 32, 256, 4),  # 32,768
    "v5e_16x16": (256, 64, 768, 16),  # 1,048,576
    "v5p_4x4x4": (64, 64, 512, 16),  # 262,144
    "v6e_16x16": (256, 64, 256, 16),  # 1,048,576
}
ENCODERS = {"": "google-bert/bert-base-uncased", "_large": "google-bert/bert-large-uncased"}
PRESETS = ("", "smoke", *(f"{name}{size}" for name in SLICES for size in ENCODERS if name))


def get_config(arg=None):
    """`smoke`: the same step, small, in chunks, on eight shards and a catalogue of a few hundred films."""
    c = defaults()
    c.data.reader = "sequences"
    c.data.on_bad.empty_text = "keep"
    c.towers.text.source = "tokens"
    c.towers.text.dtype = "bfloat16"
    c.towers.text.scan = True
    c.towers.item.whiten = False  # D may be wider than the text vectors' useful directions, and the head learns with the encoder

    c.objectives.info_nce.candidates = "batch"
    c.objectives.info_nce.temperature = 0.05
    c.mesh.data, c.mesh.fsdp = -1, 1
    c.mesh.layout = "sharded"
    c.optimizer.weight_decay = 0.01
    if arg == "smoke":
        return _smoke(c)

    name, large, _ = (arg or "").partition("_large")
    shards, rows, dim, fsdp = SLICES[name]
    c.towers.text.path = ENCODERS[large]
    c.towers.dim = dim
    c.towers.user.update({"heads": dim // 64, "mlp": 4 * dim, "dropout": 0.1})
    # Items come once in a shard, however many histories they are in: about one a place, of 24 tokens in the mean.
    c.batch.update({"shards": shards, "history_rows": rows, "max_items": 64 * rows, "text_rows": 12 * rows, "row_tokens": 128})
    # The layers' inputs are kept and the rest is computed again; in chunks the inputs too, where they do not fit (16 GB a chip).
    c.towers.text.remat = "full"
    c.batch.chunk_rows = 256 if arg == "v5e_16x16_large" else 0
    c.mesh.data, c.mesh.fsdp = (1, -1) if fsdp == -1 else (-1, fsdp)
    c.optimizer.update({"learning_rate": 1e-3, "scale": ((r"text/.*", 0.1),)})
    c.train.duration = "5 epochs"
    c.train.eval_every = "5 percent"
    c.eval.max_users = 10_000
    c.eval.baselines = ("popularity",)
    return c


def _smoke(c: ConfigDict) -> ConfigDict:
    c.data.reader, c.data.path = "movielens", "builtin:ml-latest-small"
    c.data.text.template = "{title} ({year}). {genres}"
    c.data.text.max_tokens = 32
    c.data.filter.k_core = 40
    c.towers.text.dtype = "float32"  # a CPU computes bfloat16 more slowly
    c.batch.update({"history_rows": 1, "history_length": 4, "max_items": 8, "text_rows": 4, "chunk_rows": 2})
    c.train.duration, c.train.log_every, c.train.eval_every, c.train.checkpoint_every = "4 steps", "1 steps", "4 steps", "4 steps"
    c.eval.max_users = 64
    c.eval.baselines = ("popularity",)
    return c
