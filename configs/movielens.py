"""The main job: MovieLens latest-small (embedded) through all-MiniLM-L6-v2, in two stages.

    ./launch/local.sh
    python -m rec_jax.train --config=configs/movielens.py --workdir=runs/movielens

1. `frozen`: the titles' vectors are made once; head, item vectors and history tower learn on them, each place against all 9,724 films.
2. `finetune`: the same towers with the encoder in the step, a short while. Candidates are the catalogue as the stage found it. Its start is
   validated too: if nothing becomes better, the weights stay as they were.

On two CPU cores about 6 minutes; test NDCG@10 .048, HR@10 .093 with the history's items removed (README.md, "What comes out").
"""

from ml_collections import ConfigDict

from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: both stages in seconds, on few users and steps."""
    c = defaults()
    c.data.reader = "movielens"
    c.data.path = "builtin:ml-latest-small"
    c.data.text.template = "{title} ({year}). {genres}"
    c.data.text.max_tokens = 32

    c.towers.item.ids = True
    c.train.duration = "1100 steps"
    c.train.log_every = "100 steps"
    c.eval.examples = (
        ("Toy Story (1995)", "Finding Nemo (2003)"),
        ("Alien (1979)", "Blade Runner (1982)"),
        ("Pride & Prejudice (2005)", "Notting Hill (1999)"),
    )

    c.stages = ("frozen", "finetune")
    c.stage.frozen = ConfigDict()
    c.stage.finetune = ConfigDict(
        {
            "towers": {"text": {"source": "tokens"}},
            # The encoder costs 60 times a step of the first stage, so: short windows, few of them.
            "batch": {"shards": 4, "history_rows": 3, "history_length": 16, "text_rows": 12, "max_items": 64},
            "eval": {"history_length": 64},
            "optimizer": {
                "learning_rate": 5e-5,
                "scale": (("text/.*", 0.2),),
                "freeze": ("text/embeddings/.*",),
                "warmup": "20 percent",
            },
            "train": {"duration": "24 steps", "log_every": "4 steps", "eval_every": "100 percent", "checkpoint_every": "100 percent"},
        }
    )
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.train.eval_every = "10 steps"
        c.batch.history_length = 16
        c.eval.max_users = 64
        c.eval.baselines = ("popularity",)
        c.stage.finetune.train.duration = "2 steps"
    return c
