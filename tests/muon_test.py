"""Muon: its steps against a singular value decomposition, which parameters it moves, where its state lies, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from loop_test import Killed, Valid, assert_same, kill, lines, run
from meshes_test import losses, mesh_of
from step_test import spec

from rec_jax import mesh as mesh_lib
from rec_jax.eval.workdir import best_params
from rec_jax.train import loop, muon
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.types import RecJaxError

RNG = np.random.default_rng(0)
PARAMS = {
    "user": {
        "in": {"kernel": RNG.normal(size=(12, 20)), "bias": RNG.normal(size=20)},
        "layer_0": {"query": {"kernel": RNG.normal(size=(12, 3, 4))}, "out": {"kernel": RNG.normal(size=(3, 4, 12))}},
    },
    "ids": {"embedding": RNG.normal(size=(30, 12))},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
ALL = ("user/.*",)


def updates(s, *gradients):
    """What the optimizer answers to the last of the gradients, by name."""
    tx = optimizer_lib.make_optimizer(s)
    state = tx.init(PARAMS)
    for g in gradients:
        out, state = tx.update(g, state, PARAMS)
    return {mesh_lib.path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(out)}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), PARAMS)


def matrices(name, x):
    """A kernel as the matrices that go their own ways [M, in, out]."""
    if name == "user/layer_0/query/kernel":
        return np.moveaxis(np.asarray(x), 1, 0)
    return np.asarray(x) if x.ndim == 3 else np.asarray(x)[None]


def test_a_step_is_the_nearest_orthogonal_matrix_of_the_momentum():
    first, second = drawn(1), drawn(2)
    found = updates(spec(muon=ALL, learning_rate=0.1), first, second)
    for name in ("user/in/kernel", "user/layer_0/query/kernel", "user/layer_0/out/kernel"):
        a, b = (matrices(name, functools.reduce(lambda tree, key: tree[key], name.split("/"), tree)) for tree in (first, second))
        mean = 0.95 * (0.05 * a) + 0.05 * b  # of the gradients, each decaying by .95; Nesterov looks one step ahead
        ahead = 0.95 * mean / (1 - 0.95**3) + 0.05 * b / (1 - 0.95**2)
        for of_head, step in zip(ahead, matrices(name, found[name]), strict=True):
            left, _, right = np.linalg.svd(of_head, full_matrices=False)
            turned = left.T @ step @ right.T / (-0.1 * muon.SCALE * max(step.shape) ** 0.5)
            # Some iterations bring singular values near 1, not to it; the preconditioner turns the vectors a little.
            assert 0.6 < np.diagonal(turned).min() <= np.diagonal(turned).max() < 1.3, name
            assert np.abs(turned - np.diag(np.diagonal(turned))).max() < 0.3, name
            assert np.abs(np.linalg.svd(turned)[1] - 0.92).max() < 0.3, name
        assert np.sqrt(np.mean(found[name] ** 2)) == pytest.approx(0.1 * muon.SCALE, rel=0.25)


def test_all_others_move_as_without_it():
    gradients = drawn(1), drawn(2), drawn(3)
    plain, found = updates(spec(), *gradients), updates(spec(muon=ALL), *gradients)
    kernels = {"user/in/kernel", "user/layer_0/query/kernel", "user/layer_0/out/kernel"}
    for name, expected in plain.items():
        if name in kernels:
            assert np.abs(found[name] - expected).max() > 1e-3, name
        else:
            np.testing.assert_array_equal(found[name], expected, err_msg=name)
    some = updates(spec(muon=("user/in/.*",)), *gradients)
    np.testing.assert_array_equal(some["user/layer_0/out/kernel"], plain["user/layer_0/out/kernel"])
    np.testing.assert_allclose(some["user/in/kernel"], found["user/in/kernel"], atol=1e-6)


def test_with_frozen_parameters_factors_and_tables_by_the_row():
    s = spec(muon=ALL, freeze=(".*/in/.*",), scale=((".*/out/.*", 0.5),), rows="adam", weight_decay=0.1)
    found, whole = updates(s, drawn(1)), updates(spec(muon=ALL, weight_decay=0.1), drawn(1))
    assert np.abs(found["user/in/kernel"]).max() == 0
    np.testing.assert_allclose(found["user/layer_0/out/kernel"], 0.5 * whole["user/layer_0/out/kernel"], rtol=1e-5)
    np.testing.assert_allclose(found["ids/embedding"], whole["ids/embedding"], rtol=1e-5)


def test_a_kernel_keeps_one_number_each_and_not_two():
    count = lambda s: sum(x.size for x in jax.tree.leaves(optimizer_lib.make_optimizer(s).init(PARAMS)))
    kernels = 12 * 20 + 2 * 12 * 12
    assert count(spec()) - count(spec(muon=ALL)) == kernels - 4  # beside it a count and three coefficients of the iteration


def test_a_pattern_without_a_kernel_and_a_kernel_that_is_no_matrix():
    with pytest.raises(RecJaxError, match=r"optimizer.muon: 'ids/.\*' matches no kernel; there are, e.g., user/in/kernel"):
        optimizer_lib.check_patterns(PARAMS, spec(muon=("ids/.*",)))
    experts = {"task": {"experts": {"kernel": jnp.zeros((4, 3, 2))}}}
    with pytest.raises(RecJaxError, match=r"optimizer.muon: task/experts/kernel \(4, 3, 2\) is no matrix"):
        optimizer_lib.check_patterns(experts, spec(muon=(".*",)))


CHANGES = {"optimizer.muon": ALL, "towers.user.kind": "history", "towers.user.heads": 2}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    values = [0.1, 0.2, 0.3, 0.4]
    changes = {**CHANGES, "train.duration": "8 steps", "train.eval_every": "2 steps", "train.checkpoint_every": "2 steps"}
    run(tmp_path / "whole", Valid(values), **changes)
    with pytest.raises(Killed):
        run(tmp_path / "parts", Valid(values, at_call=3, hook=kill), **changes)
    run(tmp_path / "parts", Valid(values[2:]), **changes)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert_same(best_params(tmp_path / "parts")[0], best_params(tmp_path / "whole")[0])
    with pytest.raises(RecJaxError, match=r"opt_state/.* is .* but the config makes it"):
        run(tmp_path / "whole", Valid(values), **{**changes, "optimizer.muon": (), "train.duration": "10 steps"})


def test_devices_that_share_kernels_train_as_one_does(tmp_path):
    """The momentum of a kernel lies as the kernel; the iteration is over the whole matrix, wherever its parts are."""
    mesh = mesh_of((2, 2, 2))
    changes = {**CHANGES, "mesh.layout": "sharded"}
    shapes, shardings = loop.state_shardings(tiny.task(tiny.config(**changes), tmp_path, mesh=mesh), mesh)
    placed = {mesh_lib.path_name(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    kernel = "user/layer_0/mlp_in/kernel"
    momenta = [s for name, s in placed.items() if name.startswith("opt_state") and name.endswith(kernel)]
    assert momenta == [placed[f"params/{kernel}"]] == [jax.sharding.PartitionSpec("fsdp", "tensor")]
    assert isinstance(shapes.opt_state, tuple)
    expected = losses(tiny.task(tiny.config(**changes), tmp_path), tiny.one_device(), 6)
    np.testing.assert_allclose(losses(tiny.task(tiny.config(**changes), tmp_path, mesh=mesh), mesh, 6), expected, rtol=1e-4)
    assert expected[-1] < expected[0]


def test_it_is_the_librarys():
    """Against optax's own whole rule, on matrices of two axes."""
    params = {"a": {"kernel": PARAMS["user"]["in"]["kernel"]}, "b": {"kernel": PARAMS["user"]["in"]["kernel"][:, :8]}}
    ours = optimizer_lib.make_optimizer(spec(muon=(".*",), learning_rate=0.1))
    theirs = optax.contrib.muon(0.1, consistent_rms=muon.SCALE, ns_steps=muon.ITERATIONS, preconditioning="aol")
    states = ours.init(params), theirs.init(params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        g = jax.tree.map(lambda x, r=rng: jnp.asarray(r.normal(size=x.shape), jnp.float32), params)
        (a, first), (b, second) = ours.update(g, states[0], params), theirs.update(g, states[1], params)
        states = first, second
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
