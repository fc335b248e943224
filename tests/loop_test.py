"""The loop: resume bit for bit, best and latest, early stopping, a clean stop, a loss that is not finite."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.checkpoint import Checkpoints
from rec_jax.eval.workdir import best_params
from rec_jax.train import log as log_lib
from rec_jax.train import loop
from rec_jax.types import RecJaxError


class Valid:
    """Stands for the validation: a scripted metric, and a hook at each call."""

    def __init__(self, values, at_call=None, hook=None):
        self.values, self.at_call, self.hook, self.calls = values, at_call, hook, 0

    def __call__(self, params, *, step):
        self.calls += 1
        if self.calls == self.at_call:
            self.hook()
        return {"valid/ndcg@10": self.values[min(self.calls, len(self.values)) - 1]}


class Killed(Exception):
    pass


def kill():
    raise Killed


def run(folder, evaluate, mesh=None, last=None, **changes):
    mesh = mesh or tiny.one_device()
    return loop.train(tiny.task(tiny.config(**changes), folder, mesh=mesh, evaluate=evaluate, last=last), mesh)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("source", ["frozen", pytest.param("tokens", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, source):
    changes = {
        "towers.text.source": source,
        "train.eval_every": "4 steps",
        "train.checkpoint_every": "4 steps",
        "train.log_every": "3 steps",
    }
    if source == "tokens":
        changes |= {"objectives.info_nce.candidates": "batch", "train.duration": "12 steps"}
    values = [0.1, 0.3, 0.2, 0.2, 0.2]
    whole = run(tmp_path / "whole", Valid(values), **changes)

    with pytest.raises(Killed):
        run(tmp_path / "parts", Valid(values, at_call=3, hook=kill), **changes)
    again = run(tmp_path / "parts", Valid(values[2:]), **changes)
    assert again == whole
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert_same(best_params(tmp_path / "parts")[0], best_params(tmp_path / "whole")[0])
    assert best_params(tmp_path / "parts")[1] == 8


@pytest.mark.parametrize(("total", "steps"), [(42, [20, 40, 42]), (41, [20, 41]), (40, [20, 40]), (5, [5])])
def test_the_end_is_not_evaluated_twice(tmp_path, total, steps):
    """A tenth of 14,531 steps is 1,453: the last two evaluations would be one step apart. Here 40 and 41 are, but not 40 and 42."""
    run(tmp_path, Valid([0.1] * 5), **{"train.duration": f"{total} steps", "train.eval_every": "20 steps"})
    assert [row["step"] for row in lines(tmp_path) if "valid/ndcg@10" in row] == steps


def test_text_vectors_are_refreshed_and_a_killed_run_has_the_same(tmp_path):
    """Made anew at 5, 10, 15 and 20 steps; the checkpoint that the run goes on from is of 8, so that it reads those of 5 from disk."""
    changes = {"towers.text.source": "tokens", "objectives.info_nce.candidates": "catalogue", "towers.text.refresh": "5 steps"}
    changes |= {
        "train.duration": "22 steps",
        "train.eval_every": "8 steps",
        "train.checkpoint_every": "8 steps",
        "train.log_every": "1 steps",
    }
    made = []

    def encode(params):
        made.append(tiny.table() + 5 * np.float32(params["text"]["embeddings"]["word"]["embedding"][:40].sum()))
        return made[-1]

    def run(folder, evaluate, **more):
        task = tiny.task(tiny.config(**{**changes, **more}), folder, evaluate=evaluate)
        return loop.train(dataclasses.replace(task, encode=encode), tiny.one_device())

    run(tmp_path / "whole", Valid([0.1, 0.2, 0.3]))
    assert len(made) == 4
    with pytest.raises(Killed):
        run(tmp_path / "parts", Valid([0.1, 0.2], at_call=2, hook=kill))
    assert sorted(f.name for f in (tmp_path / "parts").glob("*.npy")) == [f"text_vectors-{n}.npy" for n in (10, 15, 5)]
    run(tmp_path / "parts", Valid([0.2, 0.3]))
    assert len(made) == 4 + 3 + 3
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert not (tmp_path / "whole" / "text_vectors-10.npy").exists(), "no resume asks for it"
    run(tmp_path / "never", Valid([0.1, 0.2, 0.3]), **{"towers.text.refresh": "100 steps"})
    losses = [[row["train/loss"] for row in lines(tmp_path / name) if "train/loss" in row] for name in ("whole", "never")]
    assert losses[0][:5] == losses[1][:5]
    assert losses[0][5] != losses[1][5]
    assert len(made) == 10
    with pytest.raises(Killed):
        run(tmp_path / "lost", Valid([0.1, 0.2], at_call=2, hook=kill))
    (tmp_path / "lost" / "text_vectors-5.npy").unlink()
    with pytest.raises(RecJaxError, match=r"text_vectors-5\.npy is missing"):
        run(tmp_path / "lost", Valid([0.2]))
    with pytest.raises(RecJaxError, match=r"towers\.text\.refresh='5 steps'.*: set it to ''"):
        tiny.config(**{"towers.text.refresh": "5 steps"})


def test_resumes_on_more_devices(tmp_path):
    changes = {
        "train.duration": "8 steps",
        "train.eval_every": "4 steps",
        "train.checkpoint_every": "4 steps",
        "train.log_every": "1 steps",
    }
    run(tmp_path / "one", Valid([0.1, 0.2]), **changes)

    with pytest.raises(Killed):
        run(tmp_path / "both", Valid([0.1], at_call=2, hook=kill), **changes)
    run(tmp_path / "both", Valid([0.2]), mesh=mesh_lib.make_mesh({"data": 8}), **changes)
    losses = [[row["train/loss"] for row in lines(tmp_path / name) if "train/loss" in row] for name in ("one", "both")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_a_finished_run_does_nothing_more(tmp_path):
    changes = {"train.duration": "4 steps", "train.eval_every": "2 steps", "train.checkpoint_every": "2 steps"}
    run(tmp_path, Valid([0.1, 0.2]), **changes)
    before = (tmp_path / "metrics.jsonl").read_text()
    evaluate = Valid([0.9])
    progress = run(tmp_path, evaluate, **changes)
    assert evaluate.calls == 0
    assert progress.best == 0.2
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_early_stopping_keeps_the_best(tmp_path):
    changes = {"train.duration": "40 steps", "train.eval_every": "4 steps", "train.patience": 2}
    progress = run(tmp_path, Valid([0.2, 0.5, 0.4, 0.3, 0.9]), **changes)
    assert progress.stopped
    assert (progress.best, progress.best_step) == (0.5, 8)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps() == [8, 16]
    assert best_params(tmp_path)[1] == 8
    evaluate = Valid([1.0])
    assert run(tmp_path, evaluate, **changes).best_step == 8
    assert evaluate.calls == 0, "a run that stopped early is finished"


def test_a_stage_that_makes_nothing_better_leaves_the_weights_as_they_were(tmp_path):
    changes = {"train.duration": "4 steps", "train.eval_every": "2 steps", "train.checkpoint_every": "2 steps"}
    run(tmp_path / "first", Valid([0.3]), **changes)
    before, _ = best_params(tmp_path / "first")
    progress = run(tmp_path / "second", Valid([0.3, 0.2, 0.1]), last=before, **changes)
    assert (progress.best, progress.best_step) == (0.3, 0)
    assert [row["step"] for row in lines(tmp_path / "second") if "valid/ndcg@10" in row] == [0, 2, 4]
    after, step = best_params(tmp_path / "second")
    assert step == 0
    assert_same(after, before)
    assert run(tmp_path / "second", Valid([0.9]), last=before, **changes) == progress


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    changes = {"train.eval_every": "5 steps", "train.checkpoint_every": "100 steps"}
    hook = Valid([0.1], at_call=1, hook=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(loop.Interrupted, match=r"stopped at step 5 of 20; the state is saved: the same command goes on"):
        run(tmp_path, hook, **changes)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest_step() == 5
    assert run(tmp_path, Valid([0.0]), **changes).best_step == 5


def test_a_loss_that_is_not_finite_stops_with_the_users(tmp_path):
    task = tiny.task(tiny.config(), tmp_path)
    task.params["item"]["project"]["kernel"] = task.params["item"]["project"]["kernel"] * np.nan
    with pytest.raises(RecJaxError, match=r"step 1: loss is nan. Users of the batch .*: \d+, .*lower optimizer.learning_rate"):
        loop.train(task, tiny.one_device())


def test_an_unknown_monitor_names_the_metrics(tmp_path):
    with pytest.raises(RecJaxError, match=r"config.train.monitor='valid/mrr' is not measured; there are valid/ndcg@10"):
        run(tmp_path, Valid([0.1]), **{"train.monitor": "valid/mrr"})


def test_optimizer_state_is_sharded_as_its_parameters(tmp_path):
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8})
    c = tiny.config(**{"mesh.rules": (("item/project/kernel", ("fsdp",)), (".*", ()))})
    shapes, shardings = loop.state_shardings(tiny.task(c, tmp_path, mesh=mesh), mesh)
    split = [
        mesh_lib.path_name(path)
        for path, s in jax.tree_util.tree_leaves_with_path(shardings)
        if s.spec == jax.sharding.PartitionSpec("fsdp")
    ]
    assert len(split) == 3, split  # the parameter and its two moments
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)


def test_metrics_log_goes_on_after_a_cut_line(tmp_path, capsys):
    log = log_lib.MetricsLog(tmp_path, stage="s", step=None)
    log.write(1, {"train/loss": 1.5})
    log.write(2, {"train/loss": 1.25})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "tra')
    log = log_lib.MetricsLog(tmp_path, stage="s", step=1)
    log.write(2, {"train/loss": 1.125})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "stage": "s", "train/loss": 1.5}, {"step": 2, "stage": "s", "train/loss": 1.125}]
    assert "left out a broken line" in capsys.readouterr().err
    assert list((tmp_path / "tensorboard").iterdir())
    with pytest.raises(RecJaxError, match="step 4: train/loss is nan"):
        log_lib.MetricsLog(tmp_path, stage="s", step=2).write(4, {"train/loss": float("nan")})


def test_plain_progress_lines(capsys):
    display = log_lib.Display("test", start=0, total=10)
    display.tick(1)
    display.tick(2)
    display.train(2, {"train/loss": 1.5, "train/examples": 8.0})
    out = capsys.readouterr().out
    assert "test: steps 0 to 10" in out
    assert "step 2/10  loss 1.5000" in out
    assert "examples/s" in out
    assert "left" in out


@pytest.mark.parametrize(("seconds", "text"), [(5.2, "5 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_durations_for_people(seconds, text):
    assert log_lib.duration(seconds) == text
