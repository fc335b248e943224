"""Objectives: each trains in one trace; queue, momentum, chunks and several positives against slow Python."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.pipeline import Batches
from rec_jax.towers.batches import encode_batch
from rec_jax.train import loop, objectives, stages
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train import state as state_lib
from rec_jax.train import step as step_lib
from rec_jax.train.objectives import base, info_nce
from rec_jax.types import RecJaxError

TOKENS = {"towers.text.source": "tokens", "objectives.info_nce.candidates": "batch", "towers.text.dropout": 0.1}
FROZEN = {"objectives.info_nce.candidates": "batch"}
BATCH = 8 * 2 * 16  # places of tiny's batch
ALONE = {**FROZEN, "objectives.info_nce.weight": 0.0}
VARIANTS = {
    "moco": {**FROZEN, "objectives.info_nce.queue": 2 * BATCH, "objectives.info_nce.momentum": 0.9, "objectives.info_nce.symmetric": True},
    "mixed": {**FROZEN, "objectives.info_nce.uniform": 32, "objectives.info_nce.queue": BATCH},
    "debiased": {
        **FROZEN,
        "objectives.info_nce.form": "debiased",
        "objectives.info_nce.positive_prior": 0.01,
        "objectives.info_nce.positives": 3,
        "objectives.info_nce.matryoshka": (2, 4),
    },
    "catalogue": {"objectives.info_nce.positives": 3},
    "neighbours": {"objectives.info_nce.neighbour_share": 0.3, "objectives.info_nce.matryoshka": (4,)},
    "sharded_catalogue": {"objectives.info_nce.shard_catalogue": True, "towers.item.ids": True},
    "pairs": {**FROZEN, "objectives.info_nce.weight": 0.0, "objectives.sigmoid.weight": 1.0, "objectives.triplet.weight": 1.0},
    "views": {
        **TOKENS,
        "objectives.info_nce.weight": 0.0,
        "objectives.simcse.weight": 1.0,
        "objectives.simclr.weight": 0.1,
        "objectives.simclr.ramp": 4,
    },
    "everything": {
        **FROZEN,
        "objectives.info_nce.queue": 2 * BATCH,
        "objectives.info_nce.momentum": 0.9,
        "objectives.info_nce.uniform": 32,
        "objectives.info_nce.positives": 2,
        "objectives.info_nce.matryoshka": (4,),
        "objectives.info_nce.form": "decoupled",
        "objectives.sigmoid.weight": 0.1,
        "objectives.triplet.weight": 0.1,
    },
}


def start(task, mesh):
    """(state, step, constants) of a task on a mesh."""
    tx = optimizer_lib.make_optimizer(task.optimizer)
    _, shardings = loop.state_shardings(task, mesh)
    params = mesh_lib.put(task.params, shardings.params)
    state = jax.jit(lambda p: loop.create_state(task, jax.tree.map(jnp.copy, p), tx), out_shardings=shardings)(params)
    return state, step_lib.make_train_step(task.spec, tx, mesh, shardings), mesh_lib.put(task.constants, mesh_lib.replicated(mesh))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "everything"])
def test_an_objective_learns_a_batch_in_one_trace_with_donated_state(variant, tmp_path):
    changes = {**VARIANTS[variant], "train.duration": "30 steps", "towers.user.dropout": 0.0, "optimizer.schedule": "constant"}
    task, mesh = tiny.task(tiny.config(**changes), tmp_path), tiny.one_device()
    state, step, constants = start(task, mesh)
    batch = mesh_lib.to_global(next(iter(task.batches)), mesh)
    losses = []
    for _ in range(20):
        old = jax.tree.leaves(state)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch, constants)
        losses.append(metrics["loss"])
    assert step._cache_size() == 1
    assert all(x.is_deleted() for x in old)
    # The loss of the first steps has fewer candidates where a queue fills, or a weight that still rises.
    assert np.isfinite(losses).all()
    assert float(losses[-1]) < float(losses[6])


SLOW = ("moco", "views", "catalogue", "everything")  # composition_test, meshes_test and step_test have the parts


@pytest.mark.parametrize("variant", [*(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), "sharded_catalogue"])
def test_eight_devices_have_the_losses_and_the_state_of_one(variant, tmp_path):
    task = tiny.task(tiny.config(**VARIANTS[variant]), tmp_path)
    results = []
    for mesh in (tiny.one_device(), mesh_lib.make_mesh({"data": 4, "fsdp": 2})):
        (state, step, constants), iterator, losses = start(task, mesh), iter(task.batches), []
        for _ in range(3):
            state, metrics = step(state, mesh_lib.to_global(next(iterator), mesh), constants)
            losses.append(float(metrics["loss"]))
        results.append((losses, jax.device_get((state.momentum, state.queue))))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)


def test_the_queue_is_first_in_first_out_and_momentum_a_running_mean(tmp_path):
    task, mesh = tiny.task(tiny.config(**VARIANTS["moco"]), tmp_path), tiny.one_device()
    (state, step, constants), iterator = start(task, mesh), iter(task.batches)
    followed = jax.device_get(state_lib.tower_params(state.params))
    fifo = []
    for n in range(5):
        batch = next(iterator)
        before = jax.device_get(state.momentum)
        out = jitted(before, task.spec.towers, batch, table=task.constants.table, catalogue=False, keys=None)
        places = np.maximum(batch.targets, 0)
        keys = np.stack([np.asarray(out.item[g])[places[g]] for g in range(8)])
        ids = np.stack([np.where(batch.weights[g] > 0, batch.item_ids[g][places[g]], -1) for g in range(8)])
        fifo = [*fifo, (keys, ids)][-2:]
        state, _ = step(state, mesh_lib.to_global(batch, mesh), constants)
        followed = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, followed, jax.device_get(state_lib.tower_params(state.params)))
        for a, b in zip(jax.tree.leaves(state.momentum), jax.tree.leaves(followed), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        held = jax.device_get(state.queue)
        newest = n % 2
        np.testing.assert_array_equal(held["ids"][:, newest], fifo[-1][1])
        np.testing.assert_allclose(held["vectors"][:, newest], fifo[-1][0], atol=1e-5)
        if n == 0:
            assert (held["ids"][:, 1] == -1).all()
        else:
            np.testing.assert_array_equal(held["ids"][:, 1 - newest], fifo[-2][1])
            np.testing.assert_allclose(held["vectors"][:, 1 - newest], fifo[-2][0], atol=1e-5)


def test_queue_and_uniform_negatives_against_a_naive_sum(tmp_path):
    changes = {**VARIANTS["mixed"], "objectives.info_nce.learn_temperature": False, "objectives.info_nce.temperature": 0.2}
    task = tiny.task(tiny.config(**changes, **{"towers.user.dropout": 0.0}), tmp_path)
    batch, random = next(iter(task.batches)), np.random.default_rng(0)
    vectors = random.normal(size=(8, 1, 32, 8)).astype(np.float32)
    queue = {"vectors": vectors, "ids": random.integers(-1, tiny.N_ITEMS, (8, 1, 32)).astype(np.int32)}
    loss, _ = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None, queue=queue)

    drawn = jax.random.randint(step_lib.fold(jax.random.key(0, impl=state_lib.RNG), "uniform"), (32,), 0, tiny.N_ITEMS)
    table = task.constants.table
    out = jitted(task.params, task.spec.towers, batch, table=table, catalogue=True, keys=None)
    there = batch.weights.reshape(-1) > 0
    query = np.asarray(out.user, np.float64).reshape(-1, 8)[there]
    everything = np.asarray(out.catalogue, np.float64)
    ids = np.concatenate([batch.item_ids[g][batch.targets[g]] for g in range(8)])[there]
    full = queue["ids"].reshape(-1) >= 0
    queued, drawn = queue["ids"].reshape(-1)[full], np.asarray(drawn)
    candidates = np.concatenate([everything[ids], vectors.reshape(-1, 8)[full], everything[drawn]])
    names = np.concatenate([ids, queued, drawn])
    popular, total = len(ids) + len(queued), len(names)
    share = (popular * np.exp(np.asarray(task.constants.log_q, np.float64)) + 32 / tiny.N_ITEMS) / total
    expected = 0.0
    for i, own in enumerate(ids):
        others = names != own
        logits = candidates[others] @ query[i] / 0.2 - np.log(share[names[others]]) - np.log(total - 1)
        positive = everything[own] @ query[i] / 0.2
        expected += np.logaddexp.reduce([positive, *logits]) - positive
    assert float(loss) == pytest.approx(expected / len(ids), rel=1e-5)


def test_next_items_are_positives_within_their_own_history(tmp_path):
    batch = next(iter(tiny.task(tiny.config(**FROZEN), tmp_path).batches))
    places = np.asarray(info_nce.next_places(batch, 3))
    assert places.shape == (8, 32, 3)
    for g in range(8):
        for place in range(32):
            row, column = divmod(place, 16)
            segment = batch.history_segments[g, row]
            for k in range(3):
                same = segment[column] > 0 and column + k < 16 and segment[column + k] == segment[column]
                assert places[g, place, k] == (place + k if same else -1)
    there = batch.weights > 0
    assert (places[..., 0][there] == np.broadcast_to(np.arange(32), (8, 32))[there]).all()


jitted = jax.jit(encode_batch, static_argnames=("spec", "catalogue"))


def test_chunks_change_no_gradient(tmp_path):
    task = tiny.task(tiny.config(**TOKENS, **{"towers.user.kind": "text", "towers.item.ids": True}), tmp_path)
    batch, key = next(iter(task.batches)), jax.random.key(3, impl=state_lib.RNG)

    def gradients(mesh, chunk_rows):
        spec, whole = dataclasses.replace(task.spec, chunk_rows=chunk_rows), mesh_lib.replicated(mesh)
        function = jax.jit(jax.grad(lambda p, b, c: step_lib.loss_and_metrics(p, spec, b, c, key, mesh=mesh)[0]))
        arguments = mesh_lib.put(task.params, whole), mesh_lib.to_global(batch, mesh), mesh_lib.put(task.constants, whole)
        found = jax.device_get(function(*arguments))
        return np.concatenate([x.ravel() for x in jax.tree.leaves(found)])

    one, eight = tiny.one_device(), mesh_lib.make_mesh({"data": 4, "fsdp": 2})
    whole = gradients(one, 0)
    for mesh, chunk_rows in ((one, 3), (eight, 1)):
        np.testing.assert_allclose(gradients(mesh, chunk_rows), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


def test_writing_the_queue_and_looking_up_targets_need_no_other_device():
    mesh = mesh_lib.make_mesh({"data": 4, "fsdp": 2})
    over, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)

    def write(queue, step, item, targets, ids):
        return state_lib.push(queue, step, base.lookup(item, targets), ids)

    shape = lambda s, kind, place: jax.ShapeDtypeStruct(s, kind, sharding=place)
    queue = {"vectors": shape((8, 3, 32, 8), jnp.float32, over), "ids": shape((8, 3, 32), jnp.int32, over)}
    rest = (shape((8, 40, 8), jnp.float32, over), shape((8, 32), jnp.int32, over), shape((8, 32), jnp.int32, over))
    lowered = jax.jit(write, out_shardings=over, donate_argnums=0).lower(queue, shape((), jnp.int32, whole), *rest)
    text = lowered.compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    assert "input_output_alias" in text


def test_a_queue_and_momentum_go_on_bit_for_bit(tmp_path):
    changes = {**VARIANTS["moco"], "train.duration": "6 steps", "train.eval_every": "3 steps", "train.checkpoint_every": "3 steps"}
    changes |= {"train.log_every": "1 steps"}

    class Killed(Exception):
        pass

    def run(folder, kill_at=None):
        def evaluate(params, *, step):
            if step == kill_at:
                raise Killed
            return {"valid/ndcg@10": float(step)}

        return loop.train(tiny.task(tiny.config(**changes), folder, evaluate=evaluate), tiny.one_device())

    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", kill_at=6)
    run(tmp_path / "parts")
    read = lambda name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert read("parts") == read("whole")


def test_parts_that_nobody_wants_are_not_in_a_checkpoint(tmp_path):
    task = tiny.task(tiny.config(**FROZEN), tmp_path)
    state, _, _ = start(task, tiny.one_device())
    assert set(loop.as_tree(state)) == {"step", "params", "opt_state", "rng"}


def test_a_learned_temperature_stays_in_bounds_and_comes_back():
    grad = jax.grad(lambda x, sign: sign * base.bounded(x, 0.01, 1.0))
    assert float(base.bounded(jnp.float32(2.0), 0.01, 1.0)) == 1.0
    assert [float(grad(x, 1.0)) for x in (0.001, 0.5, 2.0)] == [0.0, 1.0, 1.0]
    assert [float(grad(x, -1.0)) for x in (0.001, 0.5, 2.0)] == [-1.0, -1.0, 0.0]


def test_a_weight_rises_from_zero():
    values = [float(base.ramp_up(n, 10)) for n in range(12)]
    assert values[0] == 0.0
    assert values[5] == pytest.approx(np.exp(-1.25))
    assert values[10:] == [1.0, 1.0]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.info_nce.queue": BATCH // 2}, r"info_nce.queue=128 is shorter than a batch of 8 shards x 32 places; set it to 256"),
        ({"objectives.info_nce.queue": BATCH + 1}, r"info_nce.queue=257 is no whole number of batches"),
        ({"objectives.info_nce.matryoshka": (8,)}, r"matryoshka has the width 8; .* config.towers.dim=8"),
        ({"objectives.info_nce.uniform": 9}, r"uniform=9 does not divide over config.batch.shards=8"),
        ({"objectives.info_nce.form": "hard"}, r"form='hard': expected one of standard"),
        ({"objectives.info_nce.positive_prior": 0.1}, r"positive_prior=0.1 acts with form='debiased' only"),
        ({"objectives.info_nce.min_temperature": 0.0}, r"min_temperature=0.0: must be above 0"),
        ({"objectives.info_nce.max_temperature": 0.05}, r"temperature=0.07 is outside of its bounds"),
        ({"objectives.info_nce.momentum": 1.0}, r"momentum=1.0: must be at least 0 and below 1"),
        ({"objectives.info_nce.positives": 2, "objectives.info_nce.symmetric": True}, r"symmetric=True needs positives=1"),
        ({"objectives.info_nce.candidates": "catalogue", "objectives.info_nce.queue": BATCH}, r"queue=256 needs batch candidates"),
        ({"objectives.simcse.weight": 1.0}, r"objectives.simcse encodes texts in the step: set config.towers.text.source='tokens'"),
        ({**TOKENS, "objectives.simclr.weight": 1.0, "towers.text.dropout": 0.0}, r"objectives.simclr needs dropout"),
        ({**TOKENS, "towers.user.kind": "text", "objectives.info_nce.positives": 2}, r"positives=2 are next items of a packed history"),
        ({"objectives.triplet.weight": 1.0, "objectives.triplet.margin": 0.0}, r"triplet.margin=0.0: must be above 0"),
        ({"objectives.triplet.weight": 1.0, "objectives.triplet.mining": "soft"}, r"triplet.mining='soft': expected one of hard"),
        ({"objectives.sigmoid.weight": 1.0, "objectives.sigmoid.scale": -1.0}, r"sigmoid.scale=-1.0: must be above 0"),
        ({"batch.chunk_rows": -1}, r"config.batch.chunk_rows=-1: must be at least 0"),
    ],
)
def test_bad_values_are_said_before_anything_is_compiled(changes, message, tmp_path):
    with pytest.raises(RecJaxError, match=message):
        tiny.task(tiny.config(**{**FROZEN, **changes}), tmp_path)


def test_hard_negatives_need_a_file_of_them(tmp_path):
    task = tiny.task(tiny.config(**FROZEN, **{"objectives.info_nce.hard": True}), tmp_path)
    batch = next(iter(task.batches))
    with pytest.raises(RecJaxError, match=r"hard=True, but batches have no mined negatives: set config.data.negatives"):
        step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    plain, _ = step_lib.loss_and_metrics(task.params, tiny.task(tiny.config(**FROZEN), tmp_path).spec, batch, task.constants, None)
    batch.negatives = np.full((8, 32, 2), -1, np.int32)
    empty, _ = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    assert float(empty) == pytest.approx(float(plain), rel=1e-6)
    batch.negatives[:, :, 0] = batch.targets  # a query's own target is no negative of it
    own, _ = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    assert float(own) == pytest.approx(float(plain), rel=1e-6)
    batch.negatives[:, :, 1] = np.random.default_rng(0).integers(0, 5, (8, 32))
    more, _ = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    assert float(more) > float(plain) + 1e-4


def test_mined_negatives_of_the_pipeline_reach_the_loss(tmp_path):
    """A step on batches that carry a file's negatives has the loss of a naive sum with them."""
    task = tiny.task(tiny.config(**FROZEN, **{"objectives.info_nce.hard": True, "objectives.info_nce.log_q": 0.0}), tmp_path)
    world, mined = tiny.World(), np.random.default_rng(0).integers(0, tiny.N_ITEMS, (tiny.N_USERS, 3)).astype(np.int32)
    batches = Batches(world.source(), world.train_lengths(), task.batches.spec, seed=0, texts=tiny.tokens(), negatives=mined)
    batch = next(iter(batches))
    assert (batch.negatives >= 0).any()
    loss, _ = step_lib.loss_and_metrics(task.params, task.spec, batch, task.constants, None)

    out = jitted(task.params, task.spec.towers, batch, table=task.constants.table, catalogue=False, keys=None)
    users, items = np.float64(out.user).reshape(-1, 8), np.float64(out.item)
    ids = np.take_along_axis(batch.item_ids, np.maximum(batch.targets, 0), 1)
    there, flat_ids = batch.weights.reshape(-1) > 0, ids.reshape(-1)
    candidates = np.stack([items[g][np.maximum(batch.targets[g], 0)] for g in range(8)]).reshape(-1, 8)
    losses = []
    for row in np.flatnonzero(there):
        shard, place = divmod(row, batch.targets.shape[1])
        local = [n for n in batch.negatives[shard, place] if n >= 0 and batch.item_ids[shard, n] != flat_ids[row]]
        others = np.concatenate([candidates[there & (flat_ids != flat_ids[row])], items[shard][local]]) @ users[row] / 0.07
        own = candidates[row] @ users[row] / 0.07
        losses.append(np.logaddexp.reduce([own, *others]) - own)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_every_objective_of_the_defaults_can_be_made():
    keys = tiny.config().objectives.to_dict()
    assert set(keys) == set(objectives.OBJECTIVES)
    made = objectives.make_objectives({name: {**values, "weight": 1.0} for name, values in keys.items()})
    assert [o.name for o in made] == list(keys)
    assert stages.make_step(tiny.config(), tiny.task(tiny.config(), "x").spec.towers, tiny.task(tiny.config(), "x").batches.spec)
