"""Objectives, optimizer and the step: against naive sums, on one and on eight devices, one trace, donated state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.train import loop, objectives
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train import state as state_lib
from rec_jax.train import step as step_lib
from rec_jax.train.objectives import info_nce
from rec_jax.types import RecJaxError

FROZEN = {"towers.text.source": "frozen", "towers.user.dropout": 0.2, "towers.item.ids": True}
TOKENS = {"towers.text.source": "tokens", "objectives.info_nce.candidates": "batch", "towers.text.dropout": 0.1}
WRITTEN = {**TOKENS, "towers.user.kind": "text"}
BCE = {**TOKENS, "objectives.bce.weight": 0.5, "objectives.info_nce.symmetric": True}
VARIANTS = {"frozen": FROZEN, "tokens": TOKENS, "written": WRITTEN, "bce": BCE}


def run(task, mesh, steps):
    """Losses and the first gradient norm of a few steps on a mesh."""
    tx = optimizer_lib.make_optimizer(task.optimizer)
    _, shardings = loop.state_shardings(task, mesh)
    params = mesh_lib.put(task.params, shardings.params)
    state = jax.jit(lambda p: state_lib.create(jax.tree.map(jnp.copy, p), tx, seed=0), out_shardings=shardings)(params)
    step, iterator = step_lib.make_train_step(task.spec, tx, mesh, shardings), iter(task.batches)
    constants = mesh_lib.put(task.constants, mesh_lib.replicated(mesh))
    out = []
    for _ in range(steps):
        state, metrics = step(state, mesh_lib.to_global(next(iterator), mesh), constants)
        out.append(jax.device_get(metrics))
    return out, state, step


@pytest.mark.parametrize("variant", ["frozen", *(pytest.param(v, marks=pytest.mark.slow) for v in ("tokens", "written", "bce"))])
def test_eight_devices_train_as_one_does(variant, tmp_path):
    c = tiny.config(**VARIANTS[variant])
    one, eight = tiny.one_device(), mesh_lib.make_mesh({"data": 8})
    task = tiny.task(c, tmp_path)
    batch, key = next(iter(task.batches)), jax.random.key(0)

    def grads(mesh):
        arrays, whole = mesh_lib.to_global(batch, mesh), mesh_lib.replicated(mesh)
        f = jax.jit(jax.value_and_grad(lambda p, b, k: step_lib.loss_and_metrics(p, task.spec, b, k, key)[0]))
        return jax.device_get(f(mesh_lib.put(task.params, whole), arrays, mesh_lib.put(task.constants, whole)))

    (loss_one, grads_one), (loss_eight, grads_eight) = grads(one), grads(eight)
    assert loss_eight == pytest.approx(loss_one, rel=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads_one))
    for a, b in zip(jax.tree.leaves(grads_one), jax.tree.leaves(grads_eight), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * scale)
    losses = [[m["loss"] for m in run(task, mesh, 20)[0]] for mesh in (one, eight)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_one_trace_donated_state_and_no_transfer(tmp_path):
    task, mesh = tiny.task(tiny.config(**FROZEN), tmp_path), tiny.one_device()
    _, state, step = run(task, mesh, 3)
    assert step._cache_size() == 1
    constants = mesh_lib.put(task.constants, mesh_lib.replicated(mesh))
    batch = mesh_lib.to_global(next(iter(task.batches)), mesh)
    old = jax.tree.leaves(state.params)
    with jax.transfer_guard("disallow"):
        new, _ = step(state, batch, constants)
    assert all(x.is_deleted() for x in old)
    assert int(new.step) == 4
    assert step._cache_size() == 1


def test_info_nce_against_a_naive_sum(tmp_path):
    changes = {**TOKENS, "objectives.info_nce.learn_temperature": False, "objectives.info_nce.temperature": 0.2}
    task = tiny.task(tiny.config(**changes), tmp_path)
    batch = next(iter(task.batches))
    loss, metrics = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    from rec_jax.towers import batches

    out = batches.encode_batch(task.params, task.spec.towers, batch, table=None, catalogue=False, keys=None)
    there = batch.weights.reshape(-1) > 0
    query = np.asarray(out.user, np.float64).reshape(-1, 8)[there]
    item = np.concatenate([np.asarray(out.item[g], np.float64)[batch.targets[g]] for g in range(8)])[there]
    ids = np.concatenate([batch.item_ids[g][batch.targets[g]] for g in range(8)])[there]
    logits = query @ item.T / 0.2
    n, total = len(ids), 0.0
    for i in range(n):
        # Negatives are corrected by the number of times that they are expected among the other candidates; the positive is not.
        others = [j for j in range(n) if ids[j] != ids[i]]
        correction = np.asarray(task.constants.log_q, np.float64)[ids[others]] + np.log(n - 1)
        total += np.logaddexp.reduce([logits[i, i], *(logits[i, others] - correction)]) - logits[i, i]
    assert float(loss) == pytest.approx(total / n, rel=1e-5)
    assert float(metrics["temperature"]) == pytest.approx(0.2)


def test_the_loss_does_not_depend_on_deduplication(tmp_path):
    task = tiny.task(tiny.config(**TOKENS), tmp_path)
    batch = next(iter(task.batches))
    loss, _ = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    # The same batch with a place of its own for each use of an item: every text is written and encoded as often as it is used.
    texts, spec = tiny.tokens(), task.batches.spec
    per_row, places = spec.row_tokens // 8, spec.history_rows * spec.history_length
    rows, copies = 2 * places, 2 * places
    shape = (8, rows, spec.row_tokens)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ids, history, targets = np.full((8, copies), -1, np.int32), batch.history.copy(), batch.targets.copy()
    for g in range(8):
        used = 0
        for array in (history[g].reshape(-1), targets[g]):
            for place in np.flatnonzero(array >= 0):
                item = batch.item_ids[g][array[place]]
                tokens[g, used, : len(texts[item])], segments[g, used, : len(texts[item])] = texts[item], 1
                ids[g, used], array[place], used = item, used, used + 1
    item_places = np.broadcast_to(np.arange(copies, dtype=np.int32) * per_row, (8, copies))
    changes = {"item_ids": ids, "item_tokens": tokens, "item_segments": segments, "item_places": item_places}
    copied = dataclasses.replace(batch, history=history, targets=targets, **changes)
    again, _ = step_lib.loss_and_metrics(task.params, task.spec, copied, task.constants, None)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)


def test_overfits_one_batch(tmp_path):
    c = tiny.config(**{"towers.user.dropout": 0.0, "towers.dim": 16, "towers.user.mlp": 64, "train.duration": "300 steps"})
    task, mesh = tiny.task(c, tmp_path), tiny.one_device()
    tx = optimizer_lib.make_optimizer(task.optimizer)
    _, shardings = loop.state_shardings(task, mesh)
    state = jax.jit(lambda p: state_lib.create(jax.tree.map(jnp.copy, p), tx, seed=0), out_shardings=shardings)(task.params)
    step = step_lib.make_train_step(task.spec, tx, mesh, shardings)
    batch, constants = mesh_lib.to_global(next(iter(task.batches)), mesh), mesh_lib.put(task.constants, mesh_lib.replicated(mesh))
    losses = []
    for _ in range(300):
        state, metrics = step(state, batch, constants)
        losses.append(float(metrics["loss"]))
    # Places with the same short past and different nexts cannot be told apart, so the floor is above zero.
    assert losses[0] > 3.5
    assert losses[-1] < 0.6


def test_temperature_has_a_floor():
    spec = info_nce.InfoNCESpec("batch", 0.05, True, 1.0, True, False, 0.0)
    assert float(info_nce.temperature({"info_nce_log_temperature": jnp.log(0.05)}, spec)) == pytest.approx(0.05)
    assert float(info_nce.temperature({"info_nce_log_temperature": jnp.float32(-20.0)}, spec)) == pytest.approx(0.01)


def test_bad_objectives():
    keys = tiny.config().objectives.to_dict()
    with pytest.raises(RecJaxError, match="no such objective; there are info_nce, bce, sigmoid"):
        objectives.make_objectives({"infonce": {"weight": 1.0}})
    with pytest.raises(RecJaxError, match="needs batch candidates"):
        objectives.make_objectives({"info_nce": {**keys["info_nce"], "symmetric": True}})
    with pytest.raises(RecJaxError, match="label_smoothing=1.5"):
        objectives.make_objectives({"info_nce": {**keys["info_nce"], "label_smoothing": 1.5}})


def spec(**changes):
    values = {
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup": 0,
        "total": 100,
        "final": 0.0,
        "beta1": 0.9,
        "beta2": 0.98,
        "weight_decay": 0.0,
        "no_decay": (),
        "freeze": (),
        "scale": (),
        "clip": 0.0,
        "accumulate": 1,
    }
    return optimizer_lib.OptimizerSpec(**{**values, **changes})


PARAMS = {"text": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "item": {"kernel": jnp.ones(3)}}


def updates(s, grads=None):
    tx = optimizer_lib.make_optimizer(s)
    out, _ = tx.update(grads or jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    return jax.tree.map(lambda x: float(np.asarray(x)[0]), out)


def test_freeze_scale_and_decay_by_regex():
    plain = updates(spec())
    assert plain["item"]["kernel"] == pytest.approx(-0.1, rel=1e-4)
    frozen = updates(spec(freeze=("text/.*",)))
    assert frozen["text"] == {"kernel": 0.0, "bias": 0.0}
    assert frozen["item"]["kernel"] == pytest.approx(-0.1, rel=1e-4)
    scaled = updates(spec(scale=(("text/.*", 0.1),)))
    assert scaled["text"]["kernel"] == pytest.approx(-0.01, rel=1e-4)
    decayed = updates(spec(weight_decay=0.5, no_decay=(".*bias",)))
    assert decayed["text"]["bias"] == pytest.approx(-0.1, rel=1e-4)
    assert decayed["text"]["kernel"] == pytest.approx(-0.15, rel=1e-4)
    frozen_state = optimizer_lib.make_optimizer(spec(freeze=("text/.*",))).init(PARAMS)
    assert sum(x.size for x in jax.tree.leaves(frozen_state)) < 3 * 3 + 3, "frozen parameters have no moments"


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(RecJaxError, match=r"optimizer.freeze: 'bert/.\*' matches no parameter"):
        optimizer_lib.check_patterns(PARAMS, spec(freeze=("bert/.*",)))
    with pytest.raises(RecJaxError, match=r"optimizer.scale: 'nothing' matches no parameter"):
        optimizer_lib.check_patterns(PARAMS, spec(scale=(("nothing", 2.0),)))


def test_schedule():
    s = optimizer_lib.schedule(spec(schedule="cosine", warmup=10, total=100, final=0.1))
    assert float(s(0)) == 0.0
    assert float(s(5)) == pytest.approx(0.05)
    assert float(s(10)) == pytest.approx(0.1)
    assert float(s(100)) == pytest.approx(0.01)


def test_accumulation_is_the_mean_gradient():
    tx = optimizer_lib.make_optimizer(spec(accumulate=2, clip=1.0))
    state = tx.init(PARAMS)
    grads = [jax.tree.map(lambda x, n=n: x * n, PARAMS) for n in (1.0, 3.0)]
    first, state = tx.update(grads[0], state, PARAMS)
    assert all(float(np.abs(x).max()) == 0 for x in jax.tree.leaves(first))
    second, _ = tx.update(grads[1], state, PARAMS)
    one = optimizer_lib.make_optimizer(spec(clip=1.0))
    expected, _ = one.update(jax.tree.map(lambda x: x * 2, PARAMS), one.init(PARAMS), PARAMS)
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
