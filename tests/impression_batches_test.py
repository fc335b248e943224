"""Batches of impressions: every one once an epoch, the same batches in any number of processes, and a place to go on from."""

from __future__ import annotations

import collections
import dataclasses

import jax
import numpy as np
import pytest

from rec_jax.data import impression_batches, pipeline
from rec_jax.data.impression_batches import ImpressionBatches, ImpressionSpec
from rec_jax.data.impressions import Impressions
from rec_jax.types import Ragged, RecJaxError

N_ITEMS, N = 30, 237
TEXTS = ("frozen", "tokens")


def impressions(n=N, seed=0):
    """Impressions whose time is their number."""
    random = np.random.default_rng(seed)
    context = np.stack([random.integers(-1, size, n) for size in (3, 5)], axis=1).astype(np.int32)
    labels = np.where(random.random((n, 2)) < 0.2, np.nan, random.integers(0, 2, (n, 2))).astype(np.float32)
    return Impressions(
        user=random.integers(20, size=n).astype(np.int32),
        item=random.integers(N_ITEMS, size=n).astype(np.int32),
        context=context,
        labels=labels,
        propensity=random.uniform(0.01, 1, n).astype(np.float32),
        time=np.arange(n),
        categories={"f": ["a", "b", "c"], "g": list("abcde")},
        tasks=("click", "like"),
    )


def tokens():
    random = np.random.default_rng(1)
    return Ragged.from_rows([[1, *random.integers(3, 50, random.integers(1, 14)), 2] for _ in range(N_ITEMS)])


def make(source="frozen", n=N, seed=3, shards=None, queries=12):
    """Four shards; where texts are encoded, items wait for rows that are too short for all of them."""
    spec = ImpressionSpec(4, queries, source == "tokens", text_rows=2, row_tokens=24)
    return ImpressionBatches(impressions(n), spec, seed=seed, texts=tokens(), shards=shards)


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def contents(batch, g):
    """The impressions of a shard, as tuples."""
    real = batch.weights[g] > 0
    items = batch.item_ids[g][batch.targets[g]][real]
    columns = [batch.user_ids[g][real], items, *batch.context[g][real].T, *np.nan_to_num(batch.labels[g][real], nan=-1).T]
    return list(zip(*(c.tolist() for c in columns), batch.propensities[g][real].tolist(), strict=True))


def expected(rows):
    data = impressions()
    columns = [data.user, data.item, *data.context.T, *np.nan_to_num(data.labels, nan=-1).T]
    return list(zip(*(c[rows].tolist() for c in columns), data.propensity[rows].tolist(), strict=True))


@pytest.mark.parametrize("source", TEXTS)
def test_places_hold_the_impressions_of_the_order(source):
    batches, texts = make(source), tokens()
    iterator, seen, waited = iter(batches), collections.defaultdict(list), False
    for _ in range(12):
        batch = next(iterator)
        assert batch.item_ids.shape == batch.targets.shape == batch.weights.shape == batch.examples.shape == (4, 12)
        assert (batch.context.shape, batch.labels.shape, batch.propensities.shape) == ((4, 12, 2), (4, 12, 2), (4, 12))
        assert [x.dtype for x in (batch.item_ids, batch.targets, batch.user_ids, batch.context)] == [np.int32] * 4
        assert [x.dtype for x in (batch.weights, batch.labels, batch.propensities)] == [np.float32] * 3
        for g in range(4):
            seen[g] += contents(batch, g)
            ids = batch.item_ids[g][batch.item_ids[g] >= 0]
            assert len(set(ids.tolist())) == len(ids), "each item of a shard once"
            empty = batch.weights[g] == 0
            assert (batch.targets[g][empty] == -1).all()
            assert (batch.user_ids[g][empty] == -1).all()
            assert np.isnan(batch.labels[g][empty]).all()
            assert (batch.propensities[g][empty] == 1).all()
            np.testing.assert_array_equal(batch.examples[g], batch.user_ids[g])
            waited |= bool(empty.any())
            if source == "tokens":
                for local, item in enumerate(ids):
                    row, segment = divmod(int(batch.item_places[g, local]), 24 // 8)
                    here = batch.item_segments[g, row] == segment + 1
                    np.testing.assert_array_equal(batch.item_tokens[g, row][here], texts[int(item)])
    assert waited == (source == "tokens"), "only texts leave places empty"
    for g, place in iterator.get_state()["shards"].items():
        numbers = [n for n in range(place["next"]) if n not in place["waiting"]]
        assert bool(place["waiting"]) <= (source == "tokens")
        assert collections.Counter(seen[int(g)]) == collections.Counter(expected(batches.rows(np.array(numbers) * 4 + int(g))))


def test_an_epoch_holds_every_impression_once():
    batches = make()
    assert batches.examples_per_epoch == N
    epochs = [batches.rows(np.arange(e * N, (e + 1) * N)).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != make(seed=4).rows(np.arange(N)).tolist()
    # Positions in any order, across the ends of epochs.
    positions = np.array([3 * N - 1, 0, N, 2 * N + 5, N - 1])
    assert batches.rows(positions).tolist() == [epochs[2][-1], epochs[0][0], epochs[1][0], epochs[2][5], epochs[0][-1]]
    batch, seen = iter(make(n=48)), []
    for _ in range(3):  # a batch is one epoch
        part = next(batch)
        seen.append(sorted(item for g in range(4) for item in part.item_ids[g][part.targets[g]].tolist()))
    assert seen == [sorted(impressions(48).item.tolist())] * 3


@pytest.mark.parametrize("source", TEXTS)
def test_goes_on_where_it_was(source):
    iterator = iter(make(source))
    for _ in range(7):
        next(iterator)
    place = iterator.get_state()
    expected_batches = [next(iterator) for _ in range(5)]
    other = iter(make(source))
    other.set_state(place)
    assert all(same(next(other), e) for e in expected_batches)


@pytest.mark.parametrize("source", TEXTS)
def test_prefetching_gives_the_same_batches_and_places(source):
    plain, ahead = iter(make(source)), pipeline.prefetched(make(source), 2)
    for _ in range(6):
        assert same(next(plain), next(ahead))
        assert plain.get_state() == ahead.get_state()
    ahead.close()


@pytest.mark.parametrize("source", TEXTS)
def test_two_processes_make_the_halves_of_one_batch(source):
    whole, first, second = iter(make(source)), iter(make(source, shards=range(2))), iter(make(source, shards=range(2, 4)))
    for _ in range(4):
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), next(first), next(second))
        assert same(next(whole), both)
    joined = {"shards": {**first.get_state()["shards"], **second.get_state()["shards"]}}
    assert joined == whole.get_state()
    first.set_state(joined)


def test_examples_per_step():
    assert make().examples_per_step() == 48
    iterator, batches = iter(make("tokens")), make("tokens")
    taken = [int((next(iterator).weights[0] > 0).sum()) for _ in range(3)]
    assert batches.examples_per_step(probe=3, least=0) == 4 * np.mean(taken) < 48


@pytest.mark.parametrize(("n", "shards"), [(1, 1), (10, 2), (11, 2), (20, 2), (23, 1)])
def test_blocks_hold_a_part_in_order(n, shards):
    data = impressions(n)
    made = list(impression_batches.blocks(data, 5, shards=shards))
    assert len(made) == -(-n // (5 * shards))
    assert {batch.targets.shape for batch in made} == {(shards, 5)}
    flat = [x for batch in made for g in range(shards) for x in contents(batch, g)]
    columns = [data.user, data.item, *data.context.T, *np.nan_to_num(data.labels, nan=-1).T, data.propensity]
    assert flat == list(zip(*(c.tolist() for c in columns), strict=True))
    weights = np.concatenate([batch.weights.reshape(-1) for batch in made])
    assert weights[:n].all()
    assert not weights[n:].any()


def test_what_impressions_lack_is_none():
    bare = dataclasses.replace(impressions(), context=np.zeros((N, 0), np.int32), categories={}, propensity=None)
    batch = next(iter(ImpressionBatches(bare, ImpressionSpec(2, 3), seed=0)))
    assert batch.context is None
    assert batch.propensities is None
    assert batch.item_tokens is None
    assert list(impression_batches.blocks(bare[:0], 5)) == []


def test_bad_input():
    spec = ImpressionSpec(2, 3, encode_items=True, text_rows=2, row_tokens=8)
    with pytest.raises(RecJaxError, match="there are no impressions to train on"):
        ImpressionBatches(impressions(0), spec, seed=0)
    with pytest.raises(RecJaxError, match="0 impressions a shard: expected at least 1"):
        ImpressionBatches(impressions(), ImpressionSpec(2, 0), seed=0)
    with pytest.raises(RecJaxError, match="no catalogue tokens were given"):
        ImpressionBatches(impressions(), spec, seed=0)
    with pytest.raises(RecJaxError, match=r"an item text has 15 tokens, but batch.row_tokens=8"):
        ImpressionBatches(impressions(), spec, seed=0, texts=tokens())
    with pytest.raises(RecJaxError, match=r"batch.shards was changed"):
        iter(make()).set_state({"shards": {"0": {"next": 0, "waiting": []}}})
