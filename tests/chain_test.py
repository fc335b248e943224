"""Stages on disk: what is done stays, what has changed is only made again where that is asked for, nothing is lost silently."""

import json

import pytest
import tiny
from etils import epath

from rec_jax.train import chain
from rec_jax.types import RecJaxError

NAMES = ("first", "second", "third")


@pytest.fixture
def epath_tmp(tmp_path):
    return epath.Path(tmp_path)


def begin_all(workdir, configs, chosen=None, *, finish=True):
    """Goes through the stages as a run does -> names of those that were to be trained."""
    stages, mark, trained, planned = chain.Stages(workdir, NAMES, chosen), "data", [], []
    for name in NAMES:
        config = configs.get(name, tiny.config())
        mark = chain.fingerprint(config, mark)
        planned.append((name, config, mark))
    stages.check(planned)
    for name, config, mark in planned:
        if stages.begin(name, config, mark):
            trained.append(name)
            (workdir / name / "weights").write_text(mark)
            if finish:
                stages.done(name, mark, {"seconds": 1.0})
    return trained


def test_what_is_done_is_not_done_again(epath_tmp):
    assert begin_all(epath_tmp, {}) == list(NAMES)
    assert begin_all(epath_tmp, {}) == []
    assert begin_all(epath_tmp, {}, ["second", "third"]) == []
    assert json.loads((epath_tmp / "second" / "stage.json").read_text())["cost"] == {"seconds": 1.0}


def test_what_was_begun_goes_on(epath_tmp):
    begin_all(epath_tmp, {}, finish=False)
    assert begin_all(epath_tmp, {}) == list(NAMES)


def test_a_changed_stage_is_an_error_until_it_is_chosen_and_then_its_followers_too(epath_tmp):
    begin_all(epath_tmp, {})
    changed = {"second": tiny.config(**{"optimizer.learning_rate": 0.5})}
    message = r"second was made otherwise \(config.optimizer.learning_rate: 0.01 there, 0.5 now\).*--stages=second,third"
    with pytest.raises(RecJaxError, match=message):
        begin_all(epath_tmp, changed)
    assert (epath_tmp / "second" / "weights").exists()
    before = (epath_tmp / "second" / "weights").read_text()
    with pytest.raises(RecJaxError, match=r"third was made otherwise \(it started from another second\).*--stages=second,third"):
        begin_all(epath_tmp, changed, ["second"])
    assert (epath_tmp / "second" / "weights").read_text() == before, "nothing is taken away before all is known to fit"
    assert begin_all(epath_tmp, changed, ["second", "third"]) == ["second", "third"]
    assert begin_all(epath_tmp, changed) == []


def test_keys_that_change_no_result_do_not_count(epath_tmp):
    begin_all(epath_tmp, {})
    assert begin_all(epath_tmp, {name: tiny.config(**{"mesh.data": 1, "train.prefetch": 5}) for name in NAMES}) == []


def test_a_part_needs_what_comes_before_it(epath_tmp):
    with pytest.raises(RecJaxError, match="stage 'first' is not done in .*: run it first, or add it to --stages"):
        begin_all(epath_tmp, {}, ["second"])


def test_an_unknown_stage_is_named(epath_tmp):
    with pytest.raises(RecJaxError, match="--stages=fourth: no stage 'fourth'; the config has first, second, third"):
        chain.Stages(epath_tmp, NAMES, ["fourth"])


def test_a_run_without_stages_keeps_its_config(epath_tmp):
    chain.check_config(tiny.config(), epath_tmp)
    chain.write_config(tiny.config(), epath_tmp)
    chain.check_config(tiny.config(**{"mesh.data": 1}), epath_tmp)
    with pytest.raises(RecJaxError, match="begun with another config .config.seed: 0 there, 7 now"):
        chain.check_config(tiny.config(seed=7), epath_tmp)
