"""The running mean of weights: what it is, that it is what is validated and kept, where it lies, what a killed run does."""

import jax
import numpy as np
import pytest
import tiny
from loop_test import Killed, Valid, assert_same, kill, lines, run

from rec_jax import mesh as mesh_lib
from rec_jax.checkpoint import Checkpoints
from rec_jax.eval.workdir import best_params
from rec_jax.train import adapt, loop
from rec_jax.train import state as state_lib
from rec_jax.types import RecJaxError

EVERY = {
    "optimizer.average": 0.5,
    "train.duration": "12 steps",
    "train.eval_every": "1 steps",
    "train.checkpoint_every": "4 steps",
    "train.log_every": "1 steps",
}


class Seen(Valid):
    """A validation that also keeps the parameters it was given."""

    def __init__(self, values, **more):
        super().__init__(values, **more)
        self.params = []

    def __call__(self, params, *, step):
        self.params.append(jax.device_get(params))
        return super().__call__(params, step=step)


def test_it_is_a_plain_mean_up_to_the_horizon_and_then_decays():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(9, 3)).astype(np.float32)
    mean = {"w": np.full(3, 100, np.float32)}  # of the start nothing is left
    expected = np.zeros(3)
    for step, new in enumerate(weights):
        mean = state_lib.mean_of(mean, {"w": new}, step, 4)
        expected = weights[: step + 1].mean(axis=0) if step < 4 else 0.75 * expected + 0.25 * new
        np.testing.assert_allclose(mean["w"], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_is_what_is_validated_and_kept(tmp_path):
    values = [0.1] * 10 + [0.5, 0.2]
    plain, averaged = Seen(values), Seen(values)
    run(tmp_path / "plain", plain, **{**EVERY, "optimizer.average": 0.0})
    progress = run(tmp_path / "mean", averaged, **EVERY)
    assert [row.get("train/loss") for row in lines(tmp_path / "plain")] == [row.get("train/loss") for row in lines(tmp_path / "mean")]
    mean = jax.tree.leaves(plain.params[0])
    for step, (weights, found) in enumerate(zip(plain.params, averaged.params, strict=True), 1):
        mean = [old + (new - old) / min(step, 6) for old, new in zip(mean, jax.tree.leaves(weights), strict=True)]
        for a, b in zip(jax.tree.leaves(found), mean, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain.params[-1], averaged.params[-1])
    assert max(jax.tree.leaves(far)) > 1e-3
    kept, step = best_params(tmp_path / "mean")
    assert step == progress.best_step == 11
    assert_same(kept, averaged.params[10])


def test_a_killed_run_has_the_same_mean(tmp_path):
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99]
    run(tmp_path / "whole", Valid(values), **EVERY)
    with pytest.raises(Killed):
        run(tmp_path / "parts", Valid(values, at_call=8, hook=kill), **EVERY)
    run(tmp_path / "parts", Valid(values[7:]), **EVERY)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert_same(best_params(tmp_path / "parts")[0], best_params(tmp_path / "whole")[0])
    with pytest.raises(RecJaxError, match=r"average/.* is .* in it, but the config makes it absent"):
        run(tmp_path / "whole", Valid(values), **{**EVERY, "optimizer.average": 0.0, "train.duration": "14 steps"})


def test_a_stage_that_makes_nothing_better_leaves_the_weights_as_they_were(tmp_path):
    changes = {**EVERY, "train.duration": "2 steps"}
    run(tmp_path / "first", Valid([0.1, 0.2]), **changes)
    before, _ = best_params(tmp_path / "first")
    run(tmp_path / "second", Valid([0.3, 0.2, 0.1]), last=before, **changes)
    after, step = best_params(tmp_path / "second")
    assert step == 0
    assert_same(after, before)


def test_the_mean_lies_as_its_parameters(tmp_path):
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8})
    c = tiny.config(**{"mesh.rules": (("item/project/kernel", ("fsdp",)), (".*", ())), "optimizer.average": 0.1})
    _, shardings = loop.state_shardings(tiny.task(c, tmp_path, mesh=mesh), mesh)
    split = {
        mesh_lib.path_name(path)
        for path, s in jax.tree_util.tree_leaves_with_path(shardings)
        if s.spec == jax.sharding.PartitionSpec("fsdp")
    }
    assert {"params/item/project/kernel", "average/item/project/kernel"} < split
    assert len(split) == 4, split  # beside them two moments


def test_without_it_there_is_no_second_copy(tmp_path):
    run(tmp_path, Valid([0.1]), **{**EVERY, "optimizer.average": 0.0, "train.duration": "1 steps"})
    names = Checkpoints(tmp_path / "checkpoints", read_only=True).arrays(1)
    assert not any(name.startswith("average") for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.average": 1.5}, r"config.optimizer.average=1.5: must be between 0 .* and 1"),
        ({"optimizer.average": -0.1}, r"config.optimizer.average=-0.1: must be between 0 .* and 1"),
        ({"optimizer.average": 0.1, "optimizer.rows": "adam"}, r"average=0.1 moves the mean of every row .*rows='adam' is for"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**changes)


def test_dense_data_has_a_longer_mean():
    lengths, items = {10: np.full(100, 1 + 1_000), 290: np.full(100, 1 + 29_000)}, 10_000
    given = tiny.config(**{"optimizer.average": 0.2, "train.adapt": True})
    said: list[str] = []
    found = {times: adapt.adapted(given, n, items, said.append).optimizer.average for times, n in lengths.items()}
    assert found == {10: 0.0, 290: pytest.approx(0.2 * (1 - 0.2951), abs=1e-3)}
    assert len(said) == 1, "where nothing is chosen, nothing is said"
    assert "290.0 times" in said[0]
    assert "optimizer.average=0.141" in said[0]
