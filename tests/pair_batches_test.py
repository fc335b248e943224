"""Pairs of a history and an item: their tokens, what is drawn, and the place in the order."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny

from rec_jax.data.pair_batches import PairBatches, PairSpec, other_items, pair_text, user_room, written_out
from rec_jax.types import Ragged, RecJaxError

SPEC = PairSpec(shards=8, text_rows=6, row_tokens=40, max_pairs=20, negatives=3, user_history=4)
TEXTS = Ragged.from_rows([[1, 10, 2], [1, 11, 12, 2], [1, 13, 2], [1, 14, 15, 16, 2]])


def make(shards=None, seed=3, spec=SPEC, **changes):
    world = tiny.World()
    options = {"texts": tiny.tokens(), "seed": seed, "shards": shards, **changes}
    return PairBatches(world.source(), world.train_lengths(), spec, **options)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_pair_by_hand():
    user = written_out(TEXTS, np.array([3, 0, 1, 2]), 2, 30)
    assert user.tolist() == [1, 13, 2, 11, 12, 2]  # the two newest, newest first
    tokens, types = pair_text(user, TEXTS[3])
    assert tokens.tolist() == [1, 13, 2, 11, 12, 2, 14, 15, 16, 2]
    assert types.tolist() == [0] * 6 + [1] * 4
    assert written_out(TEXTS, np.array([0, 1, 2]), 3, 5).tolist() == [1, 13, 2, 11, 2]  # cut, and closed
    tokens, types = pair_text(written_out(TEXTS, np.array([], int), 3, 5), TEXTS[0])
    assert (tokens.tolist(), types.tolist()) == ([1, 10, 2], [0, 1, 1])


def test_the_history_has_the_same_room_beside_any_item():
    assert user_room(TEXTS, 12) == 8
    with pytest.raises(RecJaxError, match=r"batch.row_tokens=8 holds no pair of .* 5 tokens each: raise it to 9 or more"):
        user_room(TEXTS, 8)
    assert user_room(TEXTS, 9) == 5


def test_other_items_are_all_but_the_known_ones_alike():
    for seed in range(20):
        assert sorted(other_items(np.random.default_rng(seed), 4, [3, 1, 3], 6).tolist()) == [0, 2, 4, 5]
    assert sorted(other_items(np.random.default_rng(0), 4, [0, 1, 5], 7).tolist()) == [2, 3, 4, 6]
    counts, random = collections.Counter(), np.random.default_rng(1)
    for _ in range(3000):
        counts.update(other_items(random, 2, [0, 1, 4, 9], 10).tolist())
    assert set(counts) == {2, 3, 5, 6, 7, 8}
    assert all(900 < n < 1100 for n in counts.values())


def test_batches_hold_the_pairs_that_they_name():
    batches, texts, records = make(), tiny.tokens(), tiny.records()
    iterator, examples = iter(batches), 0
    for _ in range(3):
        batch = next(iterator)
        assert batch.item_ids.shape == (8, 20)
        assert batch.targets.shape == (8, 5)
        for g in range(8):
            there = batch.examples[g] >= 0
            assert ((batch.weights[g] > 0) == there).all()
            assert ((batch.targets[g] >= 0) == there).all()
            for n in np.flatnonzero(there):
                examples += 1
                record = records[batch.examples[g, n]]
                items = record["items"][record["splits"] == 0]
                assert batch.targets[g, n] == 4 * n
                positive, *others = batch.item_ids[g, 4 * n : 4 * n + 4].tolist()
                assert len({*others}) == 3
                assert not set(others) & set(items.tolist())
                possible = [pair_text(written_out(texts, items[:cut], 4, batches.room), texts[positive])
                            for cut in range(1, len(items)) if items[cut] == positive]  # fmt: skip
                found = [written(batch, g, 4 * n + k) for k in range(4)]
                assert any(np.array_equal(found[0], pair) for pair in possible)
                user = found[0][0][found[0][1] == 0]
                for k, item in enumerate(others, start=1):
                    np.testing.assert_array_equal(found[k], pair_text(user, texts[item]))
            assert (batch.item_ids[g, 4 * there.sum() :] == -1).all()
            assert ((batch.item_types[g] > 0) <= (batch.item_segments[g] > 0)).all()
    assert examples > 40


def written(batch, g, pair):
    """Tokens and types of a pair as they stand in the rows."""
    row, segment = divmod(int(batch.item_places[g, pair]), SPEC.row_tokens // 8)
    here = batch.item_segments[g, row] == segment + 1
    return batch.item_tokens[g, row][here], batch.item_types[g, row][here]


def test_every_example_of_the_order_is_handed_out_once_or_waits():
    batches = make()
    iterator, users, expected = iter(batches), collections.Counter(), collections.Counter()
    for _ in range(5):
        batch = next(iterator)
        users.update(batch.examples[batch.examples >= 0].tolist())
    for shard, place in iterator.get_state()["shards"].items():
        for number in set(range(place["next"])) - set(place["waiting"]):
            expected[batches.example(number * 8 + int(shard))[0]] += 1
    assert users == expected


def test_goes_on_where_it_was_and_draws_anew_each_epoch():
    iterator = iter(make())
    first = next(iterator)
    place = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    other = iter(make())
    other.set_state(place)
    assert all(same(next(other), e) for e in expected)
    drawn = [{int(u): b.item_ids[g, 4 * n : 4 * n + 4].tolist() for g in range(8) for n, u in enumerate(b.examples[g]) if u >= 0}
             for b in (first, expected[-1])]  # fmt: skip
    again = set(drawn[0]) & set(drawn[1])
    assert len(again) > 0
    assert any(drawn[0][user] != drawn[1][user] for user in again)


def test_two_processes_make_the_halves_of_one_batch():
    whole, first, second = iter(make()), iter(make(shards=range(4))), iter(make(shards=range(4, 8)))
    for _ in range(2):
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), next(first), next(second))
        assert same(next(whole), both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": 40}, r"knows \d+ of 60 items: batch.pair_negatives=40 others cannot be drawn"),
        ({"max_pairs": 3}, "the 4 pairs of an example, of up to 40 tokens each, do not fit one shard: raise batch.max_items=3"),
        ({"text_rows": 3}, "do not fit one shard: raise batch.max_items=20 or batch.text_rows=3"),
        ({"row_tokens": 16}, "batch.row_tokens=16 holds no pair of a history and an item of 10 tokens each: raise it to 19"),
    ],
)
def test_bad_budgets(changes, message):
    with pytest.raises(RecJaxError, match=message):
        make(spec=dataclasses.replace(SPEC, **changes))


def test_nothing_to_train_on():
    with pytest.raises(RecJaxError, match="no user has two events to train on"):
        PairBatches(tiny.records(), np.ones(40, int), SPEC, seed=0, texts=tiny.tokens())
