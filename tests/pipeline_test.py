import collections

import jax
import numpy as np
import pytest
import tiny

from rec_jax.data import pipeline
from rec_jax.types import Ragged, RecJaxError

KINDS = [("history", "frozen"), ("history", "tokens"), ("text", "tokens")]


def make(kind="history", source="frozen", shards=None, seed=3, **changes):
    c = tiny.config(**{"towers.user.kind": kind, "towers.text.source": source, **changes})
    world = tiny.World()
    spec = pipeline.BatchSpec.from_config(c)
    return pipeline.Batches(world.source(), world.train_lengths(), spec, seed=seed, texts=tiny.tokens(), shards=shards)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_indices_point_to_the_items_of_the_histories(kind, source):
    batches, texts = make(kind, source), tiny.tokens()
    iterator = iter(batches)
    for _ in range(4):
        batch = next(iterator)
        for g in range(8):
            ids = batch.item_ids[g][batch.item_ids[g] >= 0]
            assert len(set(ids.tolist())) == len(ids), "each item of a shard once"
            assert ((batch.targets[g] >= 0) == (batch.weights[g] > 0)).all()
            assert (batch.targets[g] < len(ids)).all()
            if source == "tokens":
                per_row = batches.spec.row_tokens // 8
                for local, item in enumerate(ids):
                    row, segment = divmod(int(batch.item_places[g, local]), per_row)
                    here = batch.item_segments[g, row] == segment + 1
                    np.testing.assert_array_equal(batch.item_tokens[g, row][here], texts[int(item)])
            if kind == "history":
                targets = batch.targets[g].reshape(batch.history[g].shape)
                for row in range(len(targets)):
                    for segment in range(1, int(batch.history_segments[g, row].max()) + 1):
                        here = batch.history_segments[g, row] == segment
                        # The target of a place is the item of the next place of the same window.
                        np.testing.assert_array_equal(targets[row][here][:-1], batch.history[g, row][here][1:])


@pytest.mark.parametrize("source", ["frozen", "tokens"])
def test_every_example_of_the_order_is_handed_out_once_or_waits(source):
    batches = make(source=source)
    iterator, users, pairs = iter(batches), collections.Counter(), collections.Counter()
    for _ in range(6):
        batch = next(iterator)
        users.update(batch.examples[batch.examples >= 0].tolist())
        for g in range(8):
            inputs, targets = batch.history[g].reshape(-1), batch.targets[g]
            ids = batch.item_ids[g]
            pairs.update(zip(ids[inputs[inputs >= 0]].tolist(), ids[targets[targets >= 0]].tolist(), strict=True))
    expected_users, expected_pairs = collections.Counter(), collections.Counter()
    for shard, place in iterator.get_state()["shards"].items():
        for number in set(range(place["next"])) - set(place["waiting"]):
            user, items = batches.example(number * 8 + int(shard))
            expected_users[user] += 1
            expected_pairs.update(zip(items[:-1].tolist(), items[1:].tolist(), strict=True))
    assert users == expected_users
    assert pairs == expected_pairs


@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_goes_on_where_it_was(kind, source):
    iterator = iter(make(kind, source))
    for _ in range(5):
        next(iterator)
    place = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    other = iter(make(kind, source))
    other.set_state(place)
    assert all(same(next(other), e) for e in expected)


def test_prefetching_gives_the_same_batches_and_places():
    plain, ahead = iter(make()), pipeline.prefetched(make(), 2)
    for _ in range(6):
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


def test_order_changes_with_seed_and_epoch():
    a, b = make(seed=1), make(seed=2)
    n = a.examples_per_epoch
    epoch = lambda x, e: [x.example(e * n + i)[0] for i in range(n)]
    assert epoch(a, 0) != epoch(b, 0)
    assert epoch(a, 0) != epoch(a, 1)
    assert sorted(epoch(a, 0)) == sorted(epoch(a, 1))


def test_windows():
    w = pipeline.Windows.of(np.array([0, 1, 2, 5, 9]), 4)
    assert list(zip(w.user.tolist(), w.start.tolist(), w.stop.tolist(), strict=True)) == [(2, 0, 2), (3, 0, 5), (4, 4, 9), (4, 0, 5)]
    covered = sorted(t for u, a, b in zip(w.user, w.start, w.stop, strict=True) if u == 4 for t in range(a + 1, b))
    assert covered == list(range(1, 9)), "each event but the first is a target once"
    one = pipeline.Windows.of(np.array([0, 1, 2, 5]), None)
    assert list(zip(one.user.tolist(), one.start.tolist(), one.stop.tolist(), strict=True)) == [(2, 0, 2), (3, 0, 5)]


def test_history_text_names_the_newest_first_and_is_cut():
    texts = Ragged.from_rows([[1, 10, 2], [1, 11, 12, 2], [1, 13, 2]])
    np.testing.assert_array_equal(pipeline.history_text(texts, [0, 1, 2], 20), [1, 13, 2, 11, 12, 2, 10, 2])
    np.testing.assert_array_equal(pipeline.history_text(texts, [0, 1, 2], 5), [1, 13, 2, 11, 2])


def test_bad_input():
    world = tiny.World()
    spec = pipeline.BatchSpec.from_config(tiny.config())
    with pytest.raises(RecJaxError, match="no user has two events"):
        pipeline.Batches(world.source(), np.ones(tiny.N_USERS, int), spec, seed=0)
    with pytest.raises(RecJaxError, match=r"does not fit one shard.*batch.max_items=10"):
        make(source="tokens", **{"batch.max_items": 10})
    with pytest.raises(RecJaxError, match=r"has 10 tokens.*row_tokens=8"):
        make(source="tokens", **{"batch.row_tokens": 8, "data.text.max_tokens": 8})
    iterator = iter(make())
    with pytest.raises(RecJaxError, match=r"batch.shards was changed"):
        iterator.set_state({"shards": {"0": {"next": 0, "waiting": []}}})
