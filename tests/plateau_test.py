"""The schedule that ends a run when validation stands still: when its way down begins, how long it is, what a killed run does."""

import jax
import numpy as np
import pytest
from loop_test import Killed, Valid, assert_same, kill, lines, run

from rec_jax.checkpoint import Checkpoints
from rec_jax.eval.workdir import best_params
from rec_jax.train.state import cooled

PLATEAU = {
    "optimizer.schedule": "plateau",
    "optimizer.warmup": "2 steps",
    "optimizer.cooldown": 0.5,
    "train.duration": "60 steps",
    "train.eval_every": "4 steps",
    "train.checkpoint_every": "6 steps",
    "train.log_every": "1 steps",
    "train.patience": 2,
}


def rates(folder):
    return [row["train/learning_rate"] for row in lines(folder) if "train/learning_rate" in row]


def test_the_factor_goes_down_in_a_line():
    assert [float(cooled(step, [-1, -1])) for step in (0, 5, 10**6)] == [1, 1, 1]
    assert [float(cooled(step, [4, 8])) for step in (0, 3, 4, 5, 6, 7, 8, 9)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_two_evaluations_without_improvement_begin_the_end(tmp_path, capsys):
    progress = run(tmp_path, Valid([0.2, 0.5, 0.4, 0.3, 0.6, 0.1]), **PLATEAU)
    assert (progress.cooldown, progress.stopped) == ([16, 24], False)
    assert (progress.best, progress.best_step) == (0.6, 20)
    top = 1e-2
    expected = [0, top / 2, *[top] * 14, *(top * np.linspace(1, 0, 9)[:-1])]
    np.testing.assert_allclose(rates(tmp_path), expected, rtol=1e-6)
    assert "step 16: the learning rate goes down from here to step 24, the last" in capsys.readouterr().out
    evaluate = Valid([1.0])
    assert run(tmp_path, evaluate, **PLATEAU) == progress
    assert evaluate.calls == 0, "it is finished"


def test_the_steps_on_the_way_down_are_smaller(tmp_path):
    values, every = [0.5, 0.1, 0.1, 0.1, 0.9], {"train.eval_every": "2 steps"}
    down = run(tmp_path / "down", Valid(values), **{**PLATEAU, **every})
    assert (down.cooldown, down.best_step) == ([6, 9], 9)
    run(
        tmp_path / "even",
        Valid(values),
        **{**PLATEAU, **every, "optimizer.schedule": "constant", "train.duration": "9 steps", "train.patience": 0},
    )
    losses = [[row["train/loss"] for row in lines(tmp_path / name) if "train/loss" in row] for name in ("down", "even")]
    assert losses[0][:8] == losses[1][:8]  # the first step of the way down is still a whole one
    assert losses[0][8] != losses[1][8]
    ends = [jax.tree.leaves(best_params(tmp_path / name)[0]) for name in ("down", "even")]
    assert max(np.abs(a - b).max() for a, b in zip(*ends, strict=True)) > 1e-4


def test_the_duration_is_the_most(tmp_path):
    values = list(np.linspace(0.1, 0.9, 30))
    progress = run(tmp_path, Valid(values), **{**PLATEAU, "train.duration": "30 steps"})
    assert progress.cooldown == [20, 30]
    assert len(rates(tmp_path)) == 30
    assert progress.best_step == 30


@pytest.mark.parametrize("call", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_finds_its_end_again(tmp_path, call):
    values = [0.2, 0.5, 0.4, 0.3, 0.6, 0.1]
    whole = run(tmp_path / "whole", Valid(values), **PLATEAU)

    with pytest.raises(Killed):
        run(tmp_path / "parts", Valid(values, at_call=call, hook=kill), **PLATEAU)
    saved = Checkpoints(tmp_path / "parts" / "checkpoints", read_only=True).latest_step()
    again = run(tmp_path / "parts", Valid(values[saved // 4 :]), **PLATEAU)
    assert again == whole
    assert rates(tmp_path / "parts") == rates(tmp_path / "whole")
    assert_same(best_params(tmp_path / "parts")[0], best_params(tmp_path / "whole")[0])


def test_a_run_killed_after_the_last_step_for_it_goes_down_as_well(tmp_path):
    """Step 20 is the best so far and the last at which the way down can begin: what is saved there knows that it has begun."""
    changes = {**PLATEAU, "train.duration": "30 steps", "train.checkpoint_every": "100 steps"}
    values = list(np.linspace(0.1, 0.9, 30))
    whole = run(tmp_path / "whole", Valid(values), **changes)
    with pytest.raises(Killed):
        run(tmp_path / "parts", Valid(values, at_call=6, hook=kill), **changes)
    assert Checkpoints(tmp_path / "parts" / "checkpoints", read_only=True).latest_step() == 20
    assert run(tmp_path / "parts", Valid(values[5:]), **changes) == whole
    assert rates(tmp_path / "parts") == rates(tmp_path / "whole")
