"""Own vectors of items at the places of histories alone (towers.user.ids): what they change, training, ranking, going on."""

import functools

import jax
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.pipeline import BatchSpec
from rec_jax.towers import two_tower
from rec_jax.towers.batches import encode_batch
from rec_jax.train import carry, loop, stages
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train.step import loss_and_metrics, make_train_step
from rec_jax.types import RecJaxError

BOTH = {"towers.item.ids": True, "towers.user.ids": True, "towers.user.layers": 1, "towers.user.dropout": 0.0, "batch.history_rows": 1}
WORLDS = {"rows": BOTH, "hashed": {**BOTH, "towers.item.id_buckets": 40}}


def world(folder, **changes):
    task = tiny.task(tiny.config(**changes), folder)
    params = {**task.params, "history_ids": {"embedding": 0.3 * jax.random.normal(jax.random.key(4), (256, 8))}}
    return task, params, next(iter(task.batches))


@pytest.mark.parametrize("kind", WORLDS)
def test_a_history_sees_them_and_a_candidate_does_not(kind, tmp_path):
    task, params, batch = world(tmp_path, **WORLDS[kind])

    @functools.partial(jax.jit, static_argnames="spec")
    def encode(p, spec):
        return encode_batch(p, spec, batch, table=tiny.table(), catalogue=True, keys=None)

    towers = task.spec.towers
    fresh, trained, plain = encode(task.params, towers), encode(params, towers), encode(task.params, _spec(kind, False))
    np.testing.assert_allclose(fresh.user, plain.user, atol=1e-6)
    np.testing.assert_array_equal(fresh.catalogue, trained.catalogue)
    assert np.abs(np.asarray(fresh.user - trained.user)).max() > 0.1
    # The ranking reads them as training does, by the items' places in the catalogue.
    segment = batch.history_segments[0, 0] == 1
    ids = batch.item_ids[0][batch.history[0, 0][segment]]
    ranked = jax.jit(lambda p: two_tower.user_vectors(p, towers, trained.catalogue, np.asarray(ids)[None]))(params)
    np.testing.assert_allclose(ranked[0], trained.user[0][np.flatnonzero(segment)[-1]], atol=1e-5)


def _spec(kind, history_ids):
    c = tiny.config(**{**WORLDS[kind], "towers.user.ids": history_ids})
    return two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS)


def test_only_items_of_histories_have_a_gradient(tmp_path):
    task, params, batch = world(tmp_path, **BOTH)
    loss = lambda p: loss_and_metrics(p, task.spec, batch, task.constants, jax.random.key(0))[0]
    moved = np.flatnonzero(np.abs(jax.jit(jax.grad(loss))(params)["history_ids"]["embedding"]).max(1))
    there = np.concatenate([row[places[segments > 0]] for row, places, segments in _rows(batch)])
    assert set(moved) <= set(there.tolist())
    assert len(moved) > 30


def _rows(batch):
    for items, places, segments in zip(batch.item_ids, batch.history, batch.history_segments, strict=True):
        yield from ((items, p, s) for p, s in zip(places, segments, strict=True))


def test_they_move_by_the_row_too(tmp_path):
    changes = {
        "objectives.info_nce.candidates": "batch",
        "optimizer.rows": "adam",
        "optimizer.warmup": "0 steps",
        "train.duration": "9 steps",
    }
    task = tiny.task(tiny.config(**BOTH, **changes), tmp_path)
    assert task.spec.row_tables == ("ids", "history_ids")
    mesh, tx = tiny.one_device(), optimizer_lib.make_optimizer(task.optimizer)
    _, shardings = loop.state_shardings(task, mesh)
    state = jax.jit(lambda p: loop.create_state(task, p, tx), out_shardings=shardings)(mesh_lib.put(task.params, shardings.params))
    step, batch = make_train_step(task.spec, tx, mesh, shardings), next(iter(task.batches))
    with jax.set_mesh(mesh):
        state, _ = step(state, mesh_lib.to_global(batch, mesh), mesh_lib.put(task.constants, mesh_lib.replicated(mesh)))
    moved = np.flatnonzero(np.abs(state.params["history_ids"]["embedding"]).max(1))
    assert len(moved) > 20
    assert set(moved) <= set(np.unique(batch.item_ids).tolist())


def test_they_go_with_their_items_to_a_larger_catalogue():
    c = tiny.config(**BOTH)
    old = stages.fresh(c, stages.make_step(c, _spec("rows", True), BatchSpec.from_config(c)), None, tiny.table())
    old["history_ids"]["embedding"] = jax.random.normal(jax.random.key(5), (256, 8))
    larger = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=300)
    fresh = stages.fresh(c, stages.make_step(c, larger, BatchSpec.from_config(c)), None, None)
    items = np.concatenate([np.full(240, -1), np.arange(60)])
    table = carry.laid_out(carry.Carried(old, {"items": items}, "runs/old"), fresh)["history_ids"]["embedding"]
    assert table.shape == (512, 8)
    np.testing.assert_array_equal(table[240:300], old["history_ids"]["embedding"][:60])
    assert not np.any(table[:240])
    # A run that has them goes on from one that has none.
    without = {name: value for name, value in old.items() if name != "history_ids"}
    assert "history_ids" not in carry.laid_out(carry.Carried(without, {"items": items}, "runs/old"), fresh)


def test_they_are_beside_items_own_vectors():
    with pytest.raises(RecJaxError, match=r"config.towers.user.ids=True is beside items' own vectors: set config.towers.item.ids=True"):
        tiny.config(**{"towers.user.ids": True})
