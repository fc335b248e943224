"""Batches of texts: each once an epoch, the same after a resume and in several processes, whatever is hidden in them."""

from __future__ import annotations

import collections

import jax
import numpy as np
import pytest
import tiny

from rec_jax.data import pipeline, text_batches
from rec_jax.data.augment import Corruption, Deletion, Masking, Words, corrupt
from rec_jax.types import Ragged, RecJaxError

CONTINUES = np.arange(tiny.VOCAB) >= 30
WORDS = Words(tiny.VOCAB, 3, (0, 1, 2, 3), CONTINUES)
BOTH = Corruption(WORDS, Masking(whole_words=True), Deletion())
TRAIN = np.array([i for i in range(tiny.N_ITEMS) if i % 5])
HELD_OUT = np.arange(0, tiny.N_ITEMS, 5)


def texts(n=400, seed=0):
    random = np.random.default_rng(seed)
    return Ragged.from_rows([[1, *random.integers(4, tiny.VOCAB, random.integers(1, 15)), 2] for _ in range(n)])


def spec(**changes):
    return text_batches.text_spec(
        tiny.config(**{"batch.text_rows": 4, "batch.row_tokens": 32, "data.text.max_tokens": 32, "batch.max_items": 12, **changes})
    )


def make(tokens=None, rows=None, *, seed=3, corruption=BOTH, shards=None, **changes):
    tokens = texts() if tokens is None else tokens
    rows = np.arange(len(tokens)) if rows is None else rows
    return text_batches.TextBatches(tokens, rows, spec(**changes), seed=seed, corruption=corruption, shards=shards)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def texts_of(batch, g, per_row):
    """(text, its tokens) of a shard, by the places of the flattened rows."""
    for local in np.flatnonzero(batch.item_ids[g] >= 0):
        row, segment = divmod(int(batch.item_places[g, local]), per_row)
        yield int(batch.item_ids[g, local]), batch.item_tokens[g, row][batch.item_segments[g, row] == segment + 1]


def test_shapes_and_what_stands_where():
    tokens, batches = texts(), make()
    iterator = iter(batches)
    for _ in range(3):
        batch = next(iterator)
        assert batch.item_ids.shape == batch.item_places.shape == batch.examples.shape == (8, 12)
        for name in ("item_tokens", "item_segments", "masked_tokens", "noisy_tokens", "noisy_segments"):
            assert getattr(batch, name).shape == (8, 4, 32)
            assert getattr(batch, name).dtype == np.int32
        assert batch.masked_places.shape == (8, 20)  # ceil(.15 x 4 x 32)
        assert batch.targets.tolist() == [[-1]] * 8
        assert batch.weights.tolist() == [[0.0]] * 8
        assert batch.history is None
        assert batch.user_tokens is None
        np.testing.assert_array_equal(batch.examples, batch.item_ids)
        for g in range(8):
            there = dict(texts_of(batch, g, per_row=4))
            assert len(there) == (batch.item_ids[g] >= 0).sum() > 4
            for text, ids in there.items():
                np.testing.assert_array_equal(ids, tokens[text])
            assert (batch.item_segments[g] > 0).sum() == sum(len(ids) for ids in there.values())
            places = batch.masked_places[g][batch.masked_places[g] >= 0]
            assert len(places) > 5
            changed = np.flatnonzero(batch.masked_tokens[g] != batch.item_tokens[g])
            assert set(changed.tolist()) <= set(places.tolist())
            assert (batch.item_tokens[g].reshape(-1)[places] > 3).all()
            assert (batch.noisy_segments[g] > 0).sum() < (batch.item_segments[g] > 0).sum()
            assert set(np.unique(batch.noisy_segments[g])) == set(np.unique(batch.item_segments[g]))


def test_only_what_is_asked_for():
    batch = next(iter(make(corruption=None)))
    assert batch.masked_tokens is batch.masked_places is batch.noisy_tokens is batch.noisy_segments is None
    batch = next(iter(make(corruption=Corruption(WORDS, Masking(places=7)))))
    assert batch.masked_places.shape == (8, 7)
    assert batch.noisy_tokens is None


def test_each_text_comes_once_an_epoch_or_waits():
    batches = make(rows=np.arange(0, 400, 2))
    iterator, seen = iter(batches), collections.Counter()
    for _ in range(9):
        batch = next(iterator)
        seen.update(batch.item_ids[batch.item_ids >= 0].tolist())
    expected = collections.Counter(
        batches.example(number * 8 + int(shard))
        for shard, place in iterator.get_state()["shards"].items()
        for number in set(range(place["next"])) - set(place["waiting"])
    )
    assert seen == expected
    for epoch in range(3):
        assert sorted(batches.example(epoch * 200 + i) for i in range(200)) == list(range(0, 400, 2))
    assert [batches.example(i) for i in range(200)] != [batches.example(200 + i) for i in range(200)]
    assert batches.examples_per_epoch == 200


def test_rows_are_nearly_full():
    iterator = iter(make(texts(3000), **{"batch.text_rows": 16, "batch.row_tokens": 64, "batch.max_items": 128}))
    assert np.mean([(next(iterator).item_segments > 0).mean() for _ in range(5)]) > 0.93


def test_goes_on_where_it_was():
    iterator = iter(make())
    for _ in range(4):
        next(iterator)
    place = iterator.get_state()
    assert any(shard["waiting"] for shard in place["shards"].values())
    expected = [next(iterator) for _ in range(4)]
    other = iter(make())
    other.set_state(place)
    assert all(same(next(other), e) for e in expected)


def test_prefetching_gives_the_same_batches_and_places():
    plain, ahead = iter(make()), pipeline.prefetched(make(), 2)
    for _ in range(5):
        assert same(next(plain), next(ahead))
        assert plain.get_state() == ahead.get_state()
    ahead.close()


def test_two_processes_make_the_halves_of_one_batch():
    whole, first, second = iter(make()), iter(make(shards=range(4))), iter(make(shards=range(4, 8)))
    for _ in range(3):
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), next(first), next(second))
        assert same(next(whole), both)
    joined = {"shards": {**first.get_state()["shards"], **second.get_state()["shards"]}}
    assert joined == whole.get_state()
    part = iter(make(shards=range(2, 4)))
    part.set_state(joined)
    assert same(next(part), jax.tree.map(lambda x: x[2:4], next(whole)))


def test_what_is_hidden_is_another_draw_each_epoch_shard_and_seed():
    tokens = Ragged.from_rows([[1, *range(4, 34)[:28], 2]] * 8)  # alike, one a row
    hidden = set()
    for seed in (1, 2):
        iterator = iter(make(tokens, seed=seed, **{"batch.text_rows": 1}))
        for _ in range(3):
            hidden |= {places.tobytes() for places in next(iterator).masked_places}
    assert len(hidden) == 2 * 3 * 8


def test_a_corpus_smaller_than_a_batch():
    batches = make(texts(3))
    iterator, seen = iter(batches), collections.Counter()
    for _ in range(4):
        batch = next(iterator)
        for g in range(8):
            ids = batch.item_ids[g][batch.item_ids[g] >= 0].tolist()
            assert 0 < len(ids) == len(set(ids)), "each once a shard"
            seen.update(ids)
    assert min(seen[i] for i in range(3)) > 20
    assert batches.examples_per_step() > 0


def test_examples_per_step_is_what_batches_take():
    batches = make(texts(2000))
    iterator = iter(batches)
    taken = np.mean([(next(iterator).examples >= 0).sum() for _ in range(20)])
    assert abs(batches.examples_per_step() / taken - 1) < 0.05


def test_the_budget_of_texts_is_kept():
    batch = next(iter(make(**{"batch.max_items": 3})))
    assert (batch.item_ids >= 0).sum() == 24


def test_text_spec_has_one_query_that_is_none():
    s = spec(**{"towers.user.kind": "history", "towers.text.source": "frozen"})
    assert (s.shards, s.text_rows, s.row_tokens, s.items, s.queries) == (8, 4, 32, 12, 1)
    assert s.encode_items


def test_held_out_texts_once_and_the_same_each_time():
    tokens = tiny.tokens()
    run = lambda seed=5: list(text_batches.held_out_batches(tokens, HELD_OUT, spec(**{"batch.max_items": 5}), seed=seed, corruption=BOTH))
    batches = run()
    seen = [text for b in batches for text, ids in texts_of(b, 0, per_row=4) if ids.tolist() == tokens[text].tolist()]
    assert sorted(seen) == HELD_OUT.tolist()
    assert len(batches) == 3
    assert all(b.item_ids.shape == (1, 5) and b.masked_places.shape == (1, 20) for b in batches)
    assert all(same(a, b) for a, b in zip(batches, run(), strict=True))
    assert not same(batches[0], run(seed=6)[0])
    trained = iter(make(tokens, TRAIN))
    assert not {int(i) for _ in range(5) for i in next(trained).item_ids.reshape(-1)} & set(HELD_OUT.tolist())


@pytest.mark.parametrize("max_items", [12, 100])
def test_many_held_out_texts(max_items):
    tokens = texts(700)
    ids = [b.item_ids[0] for b in text_batches.held_out_batches(tokens, range(700), spec(**{"batch.max_items": max_items}), seed=0)]
    ids = np.concatenate(ids)
    assert sorted(ids[ids >= 0]) == list(range(700))


def test_batches_of_users_are_corrupted_by_the_same_function():
    c = tiny.config(**{"towers.text.source": "tokens"})
    world = tiny.World()
    batches = pipeline.Batches(world.source(), world.train_lengths(), pipeline.BatchSpec.from_config(c), seed=0, texts=tiny.tokens())
    part = jax.tree.map(lambda x: x[0], next(iter(batches)))
    out = corrupt(part, BOTH, np.random.default_rng(0))
    assert out.masked_places.shape == (77,)  # ceil(.15 x 8 x 64)
    assert out.noisy_segments.shape == part.item_segments.shape
    np.testing.assert_array_equal(out.history, part.history)


def test_bad_input():
    with pytest.raises(RecJaxError, match="no text here"):
        make(rows=[])
    with pytest.raises(RecJaxError, match="no text here"):
        next(text_batches.held_out_batches(texts(), [], spec(), seed=0))
    long = Ragged.from_rows([[1, 2], [1, *[7] * 40, 2]])
    with pytest.raises(RecJaxError, match=r"text 1 has 42 tokens, but batch.row_tokens=32"):
        make(long)
    make(long, rows=[0])
    with pytest.raises(RecJaxError, match=r"batch.shards was changed"):
        iter(make()).set_state({"shards": {"0": {"next": 0, "waiting": []}}})
