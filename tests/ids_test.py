"""Items' own vectors in hashed tables: which rows an item has, on both sides of a loss, in a student's start, and when going on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax.towers import ids, two_tower
from rec_jax.train import carry
from rec_jax.types import RecJaxError

ALONE = {"towers.item.text": False, "towers.item.ids": True}
WORD = 0xFFFFFFFF


def naive_places(index, buckets, hashes):
    """MurmurHash3's finalizer with Python's whole numbers."""
    out = []
    for k in range(hashes):
        x = (index + 0x9E3779B9 * (k + 1)) & WORD
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
        out.append((x ^ (x >> 16)) % buckets)
    return out


def towers_of(n_items=tiny.N_ITEMS, **changes):
    return two_tower.make_spec(tiny.config(**{**ALONE, **changes}).towers, tiny.bert_spec(), texts_per_row=8, n_items=n_items)


def test_rows_of_an_item_are_the_documented_hashes():
    items = np.array([0, 1, 2, 59, 10**6, 2**31 - 1], np.int32)
    found = jax.jit(lambda x: ids.places(x, buckets=1000, hashes=3))(items)
    np.testing.assert_array_equal(found, [naive_places(int(i), 1000, 3) for i in items])
    # What checkpoints stand on: written down, so that no change goes unseen.
    assert found[:2].tolist() == [[854, 19, 756], [11, 336, 964]]
    assert ids.places(np.array([-1, 4]), buckets=0, hashes=2).tolist() == [[-1], [4]]
    assert ids.places(np.array([-1]), buckets=9, hashes=2).tolist() == [[-1, -1]]


def test_buckets_are_filled_evenly_and_hashes_differ():
    found = np.asarray(ids.places(np.arange(100_000, dtype=np.int32), buckets=100, hashes=2))
    counts = np.stack([np.bincount(column, minlength=100) for column in found.T])
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(1000)
    assert (found[:, 0] == found[:, 1]).mean() == pytest.approx(0.01, abs=0.003)


def test_an_item_is_the_sum_of_its_rows():
    spec = towers_of(**{"towers.item.id_buckets": 40, "towers.normalize": False})
    params = two_tower.init(jax.random.key(0), spec)
    table = np.asarray(params["ids"]["embedding"])
    assert table.shape == (256, 8)
    expected = np.stack([table[naive_places(i, 40, 2)].sum(0) for i in range(tiny.N_ITEMS)])
    assert np.std(expected) == pytest.approx(ids.ID_SCALE, rel=0.2)
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, None), expected, atol=1e-7)
    some = np.array([[3, 59], [3, 0]])
    np.testing.assert_allclose(two_tower.some_items(params, spec, None, some), expected[some], atol=1e-7)
    assert two_tower.init(jax.random.key(0), towers_of(**{"towers.item.id_buckets": 300}))["ids"]["embedding"].shape == (512, 8)


def test_rows_alone_give_the_vectors_of_the_whole_table():
    """What a step of a row-wise optimizer holds; the whole catalogue is refused there."""
    table = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    items = np.array([7, 2, 7, 30])
    for buckets in (0, 40):
        at = np.unique(ids.places(items, buckets=buckets, hashes=2))
        part = {"embedding": jnp.asarray(table[at]), "rows": jnp.asarray(at)}
        options = {"buckets": buckets, "hashes": 2}
        whole = ids.vectors({"embedding": jnp.asarray(table)}, items, **options)
        np.testing.assert_array_equal(ids.vectors(part, items, **options), whole)
        with pytest.raises(RecJaxError, match=r"set config.optimizer.rows='dense', or batch candidates"):
            ids.all_vectors(part, 60, **options)


def test_an_item_is_dropped_alone_and_everywhere():
    table = {"embedding": jnp.ones((256, 8))}
    dropped = ids.without_some(table, jax.random.key(1), rate=0.3, buckets=40)
    found = jax.jit(lambda x: ids.vectors(dropped, x, buckets=40, hashes=2))
    items = np.arange(2000)
    kept = np.asarray(found(items))[:, 0] > 0
    assert kept.mean() == pytest.approx(0.7, abs=0.04)  # of items: rows that they share are there for the others
    again = np.asarray(found(items[::-1].reshape(40, 50)))[..., 0] > 0
    np.testing.assert_array_equal(again.ravel()[::-1], kept)


def test_a_table_is_fitted_as_near_as_its_rows_allow():
    random = np.random.default_rng(0)
    wanted = random.normal(size=(30, 4)).astype(np.float32)
    exact = ids.fitted(np.full((256, 4), 7.0, np.float32), wanted, buckets=0, hashes=2)
    np.testing.assert_array_equal(exact[:30], wanted)
    assert (exact[30:] == 7).all()
    for items, buckets in ((30, 200), (200, 40)):
        wanted = random.normal(size=(items, 4)).astype(np.float32)
        matrix = np.zeros((items, 256))
        for i in range(items):
            for row in naive_places(i, buckets, 2):
                matrix[i, row] += 1
        found = np.asarray(ids.fitted(np.ones((256, 4), np.float32), wanted, buckets=buckets, hashes=2))
        expected = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert items > buckets or np.abs(matrix @ found - wanted).max() < 1e-3


def test_going_on_needs_items_that_have_kept_their_numbers():
    spec = lambda n: towers_of(n, **{"towers.item.id_buckets": 40})
    old, fresh = (jax.device_get(two_tower.init(jax.random.key(seed), spec(n))) for seed, n in ((0, 60), (1, 300)))
    rows = np.concatenate([np.arange(60), np.full(240, -1)])
    carried = carry.Carried(old, {"items": rows, "users": np.zeros(0, int)}, "runs/old", hashed=True)
    np.testing.assert_array_equal(carry.laid_out(carried, fresh)["ids"]["embedding"], old["ids"]["embedding"])
    moved = dataclasses.replace(carried, rows={**carried.rows, "items": np.roll(rows, 2)})
    with pytest.raises(RecJaxError, match=r"item 2 of this data is item 0 in that of runs/old .* and 59 more have moved.* come last"):
        carry.laid_out(moved, fresh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id_buckets": -1}, r"id_buckets=-1: must be at least 0, a row for each item"),
        ({"id_hashes": 0}, r"id_hashes=0: must be at least 1"),
        ({"id_buckets": 10, "ids": False, "text": True}, r"id_buckets=10 is of items' own vectors: set config.towers.item.ids=True"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(RecJaxError, match=message):
        towers_of(**{f"towers.item.{key}": value for key, value in changes.items()})
