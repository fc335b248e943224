"""Configs: loading `configs/x.py:preset`, locking, checks, durations.

A config file is Python code and runs when it is loaded: load only files that you trust. A workdir keeps the config as JSON.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from rec_jax.config_features import check_features, check_stage
from rec_jax.config_flags import override
from rec_jax.config_histories import check_histories
from rec_jax.config_optimizer import check_optimizer
from rec_jax.config_places import check_places
from rec_jax.defaults import defaults
from rec_jax.types import RecJaxError


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs `get_config(arg)` of "file.py" or "file.py:arg" and applies (dotted key, text) overrides; the result is locked and checked.

    The file's `PRESETS = ("", "smoke")` names the args that it takes; without it the file takes none.

    Raises:
      RecJaxError: no such file or preset, an unknown key, a value of another type.
    """
    file, _, arg = spec.partition(":")
    path = Path(file)
    if not path.is_file():
        near = [str(p) for p in Path("configs").glob("*.py")]
        raise RecJaxError(f"config file {file!r} does not exist; here are: {', '.join(sorted(near)) or 'none'}")
    loader = importlib.util.spec_from_file_location(f"rec_jax_config_{path.stem}", path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise RecJaxError(f"{file} has no function get_config(arg)")
    presets = vars(module).get("PRESETS", ("",))
    if arg not in presets:
        raise RecJaxError(f"{spec}: no preset {arg!r}; {file} has: {', '.join(name for name in presets if name) or 'none'}")
    config = module.get_config(arg or None)
    for key, text in overrides:
        override(config, key, text)
    check(config)
    return config.lock()


# What rec_jax.eval.baselines can fit
BASELINES = ("popularity", "recent_popularity", "item_knn", "sequence_knn", "ease", "ials", "bpr", "text_knn")
PLUS = "+"  # between the names of config.eval.fuse
CHOICES = {
    "batch.kind": ("histories", "impressions", "texts", "pairs"),
    "batch.event_weight": ("", "rating", "log_rating"),
    "data.split.kind": ("leave_one_out", "temporal", "ratio", "random", "cold_item", "impressions"),
    "data.split.history": ("earlier", "train"),
    "data.impressions.split": ("", "random", "temporal", "events"),
    "towers.text.pooling": ("mean", "cls", "max"),
    "towers.text.source": ("frozen", "tokens"),
    "towers.text.dtype": ("float32", "bfloat16"),
    "towers.text.remat": ("none", "full", "dots"),
    "towers.item.head": ("linear", "mlp"),
    "towers.item.fusion": ("sum", "concat", "gate"),
    "towers.item.features.numeric": ("buckets", "periodic"),
    "towers.text.catalogue": ("start", "step"),
    "towers.user.kind": ("history", "text", "id"),
    "towers.user.layer": ("attention", "hstu"),
    "towers.user.positions": ("learned", "rotary", "relative", "none"),
    "towers.user.readout": ("last", "mean"),
    "towers.task.kind": ("dot", "mlp", "dcn"),
    "towers.task.sharing": ("bottom", "mmoe", "ple"),
    "teacher.source": ("stored", "online"),
    "train.monitor_goal": ("max", "min"),
    "eval.rank_by": ("vectors", "task"),
    "objectives.info_nce.candidates": ("batch", "catalogue"),
    "optimizer.schedule": ("cosine", "constant", "plateau"),
    "optimizer.rows": ("dense", "adam", "adagrad"),
}
POSITIVE = (
    "batch.shards", "batch.history_rows", "batch.history_length", "batch.max_items", "batch.text_rows", "batch.row_tokens",
    "batch.impressions", "batch.pair_negatives", "batch.user_history",
    "towers.dim", "towers.item.features.buckets", "towers.item.features.frequencies", "towers.item.features.sigma",
    "objectives.info_nce.temperature", "optimizer.learning_rate", "optimizer.cooldown", "optimizer.accumulate", "eval.users_per_block",
    "eval.items_per_block", "data.text.max_tokens", "train.prefetch",
)  # fmt: skip


def fused(config: ConfigDict) -> tuple[str, ...]:
    """The baselines whose scores are added to the last stage's."""
    return tuple(config.eval.fuse.split(PLUS)) if config.eval.fuse else ()


def check(config: ConfigDict) -> None:
    """Checks the values that types cannot: choices, signs, shapes of rules, durations.

    Raises:
      RecJaxError: with the key, the value and what was expected.
    """
    reference = defaults()
    _check_keys(config, reference, "config")
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value not in choices:
            raise RecJaxError(f"config.{key}={value!r}: expected one of {', '.join(choices)}")
    for key in POSITIVE:
        if not get(config, key) > 0:
            raise RecJaxError(f"config.{key}={get(config, key)!r}: must be above 0")
    check_optimizer(config)
    for name in fused(config):
        if name not in BASELINES:
            raise RecJaxError(f"config.eval.fuse={config.eval.fuse!r}: expected names of {', '.join(BASELINES)}, with '+' between, or ''")
    if len(set(fused(config))) < len(fused(config)):
        raise RecJaxError(f"config.eval.fuse={config.eval.fuse!r} names a baseline twice")
    for name in config.eval.baselines:
        if name not in BASELINES:
            raise RecJaxError(f"config.eval.baselines names {name!r}: expected some of {', '.join(BASELINES)}")
    for key, value in config.data.on_bad.items():
        allowed = ("error", "skip", "keep") if key in ("empty_text", "duplicate_event") else ("error", "skip")
        if value not in allowed:
            raise RecJaxError(f"config.data.on_bad.{key}={value!r}: expected one of {', '.join(allowed)}")
    if config.towers.dim % config.towers.user.heads:
        raise RecJaxError(f"config.towers.dim={config.towers.dim} is not divisible by config.towers.user.heads={config.towers.user.heads}")
    text, item, width = config.towers.text, config.towers.item, config.towers.text.width or config.towers.text.scratch.width
    if text.path == "scratch" and text.source == "frozen" and item.text and item.whiten and width < config.towers.dim:
        raise RecJaxError(
            f"config.towers.item.whiten=True makes config.towers.dim={config.towers.dim} numbers of text vectors of {width} "
            "(config.towers.text.width or scratch.width): set dim to as many at most, or whiten=False"
        )
    check_histories(config)
    if config.data.text.max_tokens > config.batch.row_tokens:
        raise RecJaxError(
            f"config.data.text.max_tokens={config.data.text.max_tokens} does not fit a row of "
            f"config.batch.row_tokens={config.batch.row_tokens}"
        )
    if config.towers.user.kind == "text" and config.towers.text.source != "tokens":
        raise RecJaxError("config.towers.user.kind='text' encodes texts in the step: set config.towers.text.source='tokens'")
    if config.batch.kind == "texts" and config.towers.text.source != "tokens":
        raise RecJaxError("config.batch.kind='texts' trains the encoder: set config.towers.text.source='tokens'")
    if config.batch.kind == "pairs":
        _check_pairs(config)
    if not config.towers.item.text:
        _check_ids_alone(config)
    if config.eval.rerank < 0:
        raise RecJaxError(f"config.eval.rerank={config.eval.rerank}: must be at least 0, which ranks nothing anew")
    if config.eval.top_n < -1:
        raise RecJaxError(f"config.eval.top_n={config.eval.top_n}: expected how many positives are ranked, 0 for none, or -1 for all")
    if config.towers.user.kind == "id" and config.batch.kind == "histories":
        raise RecJaxError("config.towers.user.kind='id' knows no histories: set config.batch.kind='impressions', or another user tower")
    if config.batch.kind == "impressions" and config.towers.user.kind != "id":
        raise RecJaxError(f"config.batch.kind='impressions' needs config.towers.user.kind='id'; it is {config.towers.user.kind!r}")
    if config.batch.kind == "impressions" and config.towers.item.id_shrinkage:
        raise RecJaxError(
            f"config.towers.item.id_shrinkage={config.towers.item.id_shrinkage!r} is for the ranking of a catalogue, and impressions are "
            "scored with whole vectors: set it to 0"
        )
    if not any(o.weight > 0 for o in config.objectives.values()):
        raise RecJaxError(f"no objective has a weight above 0; set one of config.objectives.{{{', '.join(config.objectives)}}}.weight")
    refresh = ("towers.text.refresh",) if config.towers.text.refresh else ()
    if refresh and (config.towers.text.source != "tokens" or config.towers.text.catalogue != "start"):
        raise RecJaxError(
            f"config.towers.text.refresh={config.towers.text.refresh!r} is of an encoder that is trained while the catalogue's vectors are "
            "those of a moment before: set it to '', or config.towers.text.source='tokens' and catalogue='start'"
        )
    for key in ("train.duration", "train.log_every", "train.eval_every", "train.checkpoint_every", "optimizer.warmup", *refresh):
        if key == "train.duration" and config.train.duration == AUTO:
            continue
        steps(get(config, key), f"config.{key}", steps_per_epoch=1, examples_per_step=1, total=1)
    if str(config.train.duration).strip().endswith("percent"):
        raise RecJaxError(f"config.train.duration={config.train.duration!r}: expected steps, epochs or examples, e.g. '30 epochs'")
    if config.train.duration == AUTO and (config.batch.kind != "histories" or config.batch.cloze):
        other = f"batch.kind is {config.batch.kind!r}" if config.batch.kind != "histories" else f"batch.cloze is {config.batch.cloze}"
        raise RecJaxError(
            f"config.train.duration='{AUTO}' counts the next items of histories; config.{other}: give steps, epochs or examples, "
            "e.g. '3 epochs'"
        )
    start = config.start
    if not 0 <= start.replay <= 1:
        raise RecJaxError(f"config.start.replay={start.replay!r}: must be between 0 (only new data) and 1 (all data as it comes)")
    if not start.path and (start.stage or start.replay != 1):
        raise RecJaxError("config.start.stage and config.start.replay belong to a trained workdir: set config.start.path")
    check_features(config)
    check_places(config)
    for name in config.stages:
        stage = for_stage(config, name)  # checks it now, not after hours of the stages before
        check_stage(config, name, stage)


def _check_pairs(config: ConfigDict) -> None:
    """Raises RecJaxError where a key does not go with batches of pairs."""
    kind = "config.batch.kind='pairs'"
    if config.towers.text.source != "tokens":
        raise RecJaxError(f"{kind} trains the encoder: set config.towers.text.source='tokens'")
    if config.batch.chunk_rows or config.towers.text.lora.rank:
        key = "batch.chunk_rows" if config.batch.chunk_rows else "towers.text.lora.rank"
        raise RecJaxError(f"{kind} knows neither chunks nor adapters: set config.{key}={get(config, key)} to 0")
    if not config.train.monitor.startswith("valid/pair_"):
        raise RecJaxError(
            f"{kind} measures valid/pair_mrr and valid/pair_accuracy: config.train.monitor={config.train.monitor!r} is neither"
        )


def _check_ids_alone(config: ConfigDict) -> None:
    """Raises RecJaxError where a key does not go with items that have no text."""
    alone = "config.towers.item.text=False"
    if not config.towers.item.ids:
        raise RecJaxError(f"{alone} leaves an item its own vector alone: set config.towers.item.ids=True")
    if config.batch.kind in ("texts", "pairs"):
        return  # a stage that makes no item vectors
    if config.towers.text.source != "frozen":
        raise RecJaxError(f"{alone} has no use for a trained encoder: set config.towers.text.source='frozen'")
    if is_student(config):
        raise RecJaxError(f"{alone} has no use for a student's encoder: leave config.towers.text.layers, width and static alone")
    for name in ("distill_vectors", "distill_relations"):
        if config.objectives[name].weight > 0 and config.objectives[name].of == "text":
            raise RecJaxError(f"{alone} has no text vectors: set config.objectives.{name}.of to 'item' or 'user'")


def _check_keys(config: ConfigDict, reference: ConfigDict, place: str) -> None:
    for key, value in config.items():
        if place == "config.stage":
            _check_keys(value, defaults(), f"{place}.{key}")
            continue
        if key not in reference:
            near = difflib.get_close_matches(key, list(reference), n=3) or list(reference)
            raise RecJaxError(f"{place}.{key}: no such key; nearest: {', '.join(near)}")
        if isinstance(reference[key], ConfigDict) and key not in ("columns",):
            if not isinstance(value, ConfigDict):
                raise RecJaxError(f"{place}.{key}={value!r}: expected a group of keys ({', '.join(reference[key])})")
            _check_keys(value, reference[key], f"{place}.{key}")


def get(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config


def for_stage(config: ConfigDict, name: str) -> ConfigDict:
    """The config of one stage: the whole with `config.stage[name]` laid over it; locked and checked.

    Raises:
      RecJaxError: no such stage, or a bad value in it.
    """
    if name not in config.stage:
        raise RecJaxError(f"no stage {name!r}: config.stage has {', '.join(config.stage) or 'nothing'}")
    out = ConfigDict(config.to_dict()).unlock()
    try:
        out.update(out.stage[name])
    except TypeError as e:
        raise RecJaxError(f"config.stage.{name}: a value of another type than the config has: {e}") from e
    out.stages, out.stage = (), ConfigDict()
    check(out)
    return out.lock()


def is_student(config: Any) -> bool:
    """Whether a stage's encoder is made smaller than the one it was given."""
    t = config.towers.text
    return t.layers >= 0 or t.width > 0 or t.static


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, keys sorted (what a workdir keeps)."""
    return json.dumps(json.loads(config.to_json()), indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """A locked config from `to_json` text; lists become tuples, as configs have them.

    Raises:
      RecJaxError: no JSON, an unknown key, a value of another type.
    """

    def tuples(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: tuples(v) for k, v in x.items()}
        return tuple(tuples(v) for v in x) if isinstance(x, list) else x

    config = defaults()
    try:
        raw = tuples(json.loads(text))
        stage = raw.pop("stage", {})
        config.update(raw)
        config.stage = ConfigDict(stage)
    except (TypeError, AttributeError, json.JSONDecodeError) as e:
        raise RecJaxError(f"this is no config as a workdir keeps it (config.json): {e}") from e
    check(config)
    return config.lock()


def read_config(workdir: epath.PathLike, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """The config that a workdir keeps, with (dotted key, text) overrides laid over it.

    Raises:
      RecJaxError: no such workdir, an unknown key, a bad value.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise RecJaxError(
            f"{workdir} is no workdir: it has no config.json; train first: python -m rec_jax.train --config=... --workdir={workdir}"
        )
    config = from_json(file.read_text())
    if overrides:
        with config.unlocked():
            for key, text in overrides:
                override(config, key, text)
        check(config)
    return config


def stage_with_towers(whole: ConfigDict, stage: str | None, workdir: epath.PathLike, *, key: str = "") -> tuple[str | None, ConfigDict]:
    """The stage of a trained workdir that has a name, or the last one, -> (its name, None where there are no stages; its config).

    Args:
      whole: of `read_config`.
      stage: a name; None or "" = the last.
      workdir: for messages.
      key: the config key that names the stage, for messages.

    Raises:
      RecJaxError: no such stage, or one that trained no towers.
    """
    place = f"{key}: " if key else ""
    name = stage or (whole.stages[-1] if whole.stages else None)
    if name is not None and name not in whole.stages:
        raise RecJaxError(f"{place}{workdir} has no stage {name!r}; it has {', '.join(whole.stages) or 'none'}")
    config = for_stage(whole, name) if name else whole
    other = {"texts": "an encoder on texts", "pairs": "a cross-encoder on pairs"}.get(config.batch.kind)
    if other:
        raise RecJaxError(f"{place}stage {name!r} of {workdir} trained {other}, and no towers: name another stage")
    return name, config


UNITS = ("steps", "epochs", "examples", "percent")
AUTO = "auto"  # as train.duration: by the data (rec_jax.train.adapt)


def steps(duration: str, place: str, *, steps_per_epoch: float, examples_per_step: float, total: int) -> int:
    """ "N steps|epochs|examples|percent" -> whole steps, at least 1 (0 for "0 ..."); percent is of `total` steps.

    Raises:
      RecJaxError: text of another form.
    """
    number, _, unit = str(duration).strip().partition(" ")
    unit = unit.strip() if unit.strip() in UNITS else unit.strip() + "s"
    try:
        n = float(number)
    except ValueError:
        n = -1.0
    if not 0 <= n < math.inf or unit not in UNITS:
        raise RecJaxError(f"{place}={duration!r}: expected a number and one of {', '.join(UNITS)}, e.g. '30 epochs'")
    per = {"steps": 1.0, "epochs": steps_per_epoch, "examples": 1 / examples_per_step, "percent": total / 100}[unit]
    return max(1, round(n * per)) if n else 0


def cache_dir(config: ConfigDict) -> epath.Path:
    """Where prepared data is kept: config.data.cache, else $REC_JAX_CACHE, else ~/.cache/rec_jax."""
    return epath.Path(config.data.cache or os.environ.get("REC_JAX_CACHE") or "~/.cache/rec_jax").expanduser()


def model_folder(path: str) -> Path:
    """The folder of a Hugging Face model: a local folder, "package:NAME" (an installed Python package that carries one), or a hub id.

    Raises:
      RecJaxError: nothing of that name; says what was tried.
    """
    if path.startswith("package:"):
        name = path.removeprefix("package:")
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise RecJaxError(f"{path}: the Python package {name!r} is not installed; run ./launch/setup.sh") from None
        for file in files:
            if file.name == "model.safetensors":
                return Path(str(file.locate())).parent
        raise RecJaxError(f"{path}: the package {name!r} carries no model.safetensors")
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise RecJaxError(f"{path!r} is no folder here and no hub id (user/model); give a folder with config.json and model.safetensors")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as e:
        raise RecJaxError(f"{path!r} is no folder here, and its download from the hub failed: {type(e).__name__}: {e}") from e
