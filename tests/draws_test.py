"""Items drawn for each query: exactly uniform over what is not in its window, whatever the packing and the number of devices."""

import jax
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.train.draws import unseen_items
from rec_jax.train.state import RNG
from rec_jax.types import Batch

KEY = jax.random.key(0, impl=RNG)
draw = jax.jit(unseen_items, static_argnames=("n_items", "draws"))


def batch_of(windows, n_items, length):
    """Windows of one row (lists of items) -> a batch of one shard, packed one after the other; each item has a local index of its own."""
    history, segments, targets = (np.full((1, 1, length), fill, np.int32) for fill in (-1, 0, -1))
    item_ids = np.random.default_rng(0).permutation(n_items).astype(np.int32)
    local = {int(item): n for n, item in enumerate(item_ids)}
    at = 0
    for number, window in enumerate(windows, 1):
        here = slice(at, at + len(window) - 1)
        history[0, 0, here] = [local[i] for i in window[:-1]]
        targets[0, 0, here] = [local[i] for i in window[1:]]
        segments[0, 0, here] = number
        at += len(window) - 1
    targets = targets.reshape(1, -1)
    weights = (targets >= 0).astype(np.float32)
    return Batch(item_ids[None], targets, weights, np.zeros((1, 1), np.int32), history=history, history_segments=segments)


def test_draws_are_uniform_over_what_the_window_does_not_hold():
    windows, n = [[0, 3, 4, 3], [7, 2, 2], [5, 0]], 9  # an item twice; ends of the catalogue; three windows in a row
    batch = batch_of(windows, n, length=8)
    drawn = np.asarray(draw(KEY, batch, n_items=n, draws=6000))[0]
    place = 0
    for window in windows:
        left = sorted(set(range(n)) - set(window))
        for _ in window[1:]:
            found, counts = np.unique(drawn[place], return_counts=True)
            assert found.tolist() == left
            np.testing.assert_allclose(counts / 6000, 1 / len(left), atol=5 * np.sqrt(0.25 / 6000))
            place += 1
    assert len({tuple(row) for row in drawn[:6].tolist()}) == 6  # each place has draws of its own


def test_one_item_is_left_or_none():
    whole, all_but_one = batch_of([[0, 1, 2, 3, 4]], 5, length=4), batch_of([[0, 1, 3, 4]], 5, length=4)
    assert (np.asarray(draw(KEY, whole, n_items=5, draws=3)) == -1).all()
    assert (np.asarray(draw(KEY, all_but_one, n_items=5, draws=50))[0, :3] == 2).all()


def test_a_query_without_history_does_not_get_its_target():
    batch = batch_of([[0, 3, 4, 3]], 5, length=3)
    batch.history = batch.history_segments = None
    drawn = np.asarray(draw(KEY, batch, n_items=5, draws=2000))[0]
    for place, target in enumerate((3, 4, 3)):
        assert np.unique(drawn[place]).tolist() == [i for i in range(5) if i != target]
    assert (np.asarray(draw(KEY, batch, n_items=1, draws=2)) == -1).all()


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_draws_are_the_same_on_any_number_of_devices(devices):
    world = tiny.World()
    batch = next(iter(Batches(world.source(), world.train_lengths(), BatchSpec.from_config(tiny.config()), seed=0)))
    found = []
    for mesh in (tiny.one_device(), mesh_lib.make_mesh({"data": devices}, devices=jax.devices()[:devices])):
        with jax.set_mesh(mesh):
            key = mesh_lib.put(KEY, mesh_lib.replicated(mesh))
            found.append(np.asarray(draw(key, mesh_lib.to_global(batch, mesh), n_items=tiny.N_ITEMS, draws=5)))
    np.testing.assert_array_equal(*found)
    for g in range(8):
        segments, row_items = batch.history_segments[g], batch.item_ids[g]
        targets = batch.targets[g].reshape(segments.shape)
        for row, place in np.argwhere(segments > 0):
            same = segments[row] == segments[row, place]
            own = row_items[np.concatenate([batch.history[g, row][same], targets[row][same]])]
            drawn = found[0].reshape(8, *segments.shape, 5)[g, row, place]
            assert not np.isin(drawn, own).any()
            assert ((drawn >= 0) & (drawn < tiny.N_ITEMS)).all()
