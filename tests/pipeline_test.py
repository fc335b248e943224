import collections

import jax
import numpy as np
import pytest
import scipy.stats
import tiny

from rec_jax.data import draft, pipeline, windows
from rec_jax.data.augment import kept_events, uniform_by_place
from rec_jax.types import Ragged, RecJaxError

KINDS = [("history", "frozen"), ("history", "tokens"), ("text", "tokens")]


def make(kind="history", source="frozen", shards=None, seed=3, negatives=None, **changes):
    c = tiny.config(**{"towers.user.kind": kind, "towers.text.source": source, **changes})
    world = tiny.World()
    spec = pipeline.BatchSpec.from_config(c)
    lengths, texts = world.train_lengths(), tiny.tokens()
    return pipeline.Batches(world.source(), lengths, spec, seed=seed, texts=texts, negatives=negatives, shards=shards)


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
            user, items, _ = batches.example(number * 8 + int(shard))
            expected_users[user] += 1
            expected_pairs.update(zip(items[:-1].tolist(), items[1:].tolist(), strict=True))
    assert users == expected_users
    assert pairs == expected_pairs


def test_how_many_examples_a_step_takes_is_told_right_where_rows_hold_few():
    """The longest histories fill a row, the shortest share it with a dozen: an epoch has the steps that it is said to have."""
    random = np.random.default_rng(0)
    lengths = np.where(random.random(20_000) < 0.1, 16, random.integers(2, 5, 20_000))
    c = tiny.config(**{"batch.history_rows": 1, "batch.history_length": 16})
    histories = Ragged.from_rows([random.integers(0, tiny.N_ITEMS, n) for n in lengths])
    batches = pipeline.Batches(histories, lengths, pipeline.BatchSpec.from_config(c), seed=0, texts=tiny.tokens(), shards=None)
    steps, taken, iterator = 0, 0, iter(batches)
    while taken < batches.examples_per_epoch:
        taken += int((next(iterator).examples >= 0).sum())
        steps += 1
    assert batches.examples_per_epoch / batches.examples_per_step() == pytest.approx(steps, rel=0.03)
    assert batches.examples_per_epoch / batches.examples_per_step(least=0) != pytest.approx(steps, rel=0.05)


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


def test_events_are_left_out_anew_each_epoch_and_by_the_position_alone():
    whole, parts = make(), make(**{"batch.drop_events": 0.3})
    kept, events = 0, 0
    for position in range(3 * whole.examples_per_epoch):
        (user, items, _), (same_user, some, _) = whole.example(position), parts.example(position)
        assert user == same_user
        rest = iter(items.tolist())
        assert all(i in rest for i in some.tolist()), "those that stay are in their order"
        assert len(some) >= 2
        kept, events = kept + len(some), events + len(items)
    assert 0.65 < kept / events < 0.8  # short windows keep two
    by_user = collections.defaultdict(set)
    for position in range(6 * parts.examples_per_epoch):
        user, some, _ = parts.example(position)
        by_user[user].add(tuple(some.tolist()))
    assert np.mean([len(found) for found in by_user.values()]) > 4, "other ones each epoch"
    again = make(**{"batch.drop_events": 0.3})
    np.testing.assert_array_equal(again.example(7)[1], parts.example(7)[1])


def test_of_a_window_of_which_fewer_than_two_events_would_stay_all_do():
    kept = kept_events(np.asarray([0.1, 0.1, 0.95, 0.1, 0.95, 0.95]), np.asarray([1, 2, 3]), 0.9)
    assert kept.tolist() == [True, True, True, False, True, True]


def test_draws_by_place_are_uniform_and_go_by_seed_position_place_and_stream():
    lengths, positions = np.asarray([3, 0, 2]), np.asarray([7, 8, 9])
    draws = uniform_by_place(5, positions, lengths, 0)
    np.testing.assert_array_equal(draws[3:], uniform_by_place(5, positions[2:], lengths[2:], 0))
    for seed, moved, stream in ((6, 0, 0), (5, 1, 0), (5, 0, 1)):
        assert (uniform_by_place(seed, positions + moved, lengths, stream) != draws).all()
    many = uniform_by_place(0, np.arange(1000), np.full(1000, 100), 0)
    assert scipy.stats.kstest(many, "uniform").pvalue > 0.01
    square = many.reshape(1000, 100)
    between = [np.corrcoef(square[:-1].ravel(), square[1:].ravel())[0, 1], np.corrcoef(square[:, :-1].ravel(), square[:, 1:].ravel())[0, 1]]
    assert np.abs(between).max() < 0.02


def test_windows_read_from_records_on_disk_are_those_in_memory():
    world, c = tiny.World(), tiny.config(**{"batch.drop_events": 0.3})
    spec, lengths = pipeline.BatchSpec.from_config(c), world.train_lengths()
    memory, disk = (iter(pipeline.Batches(x, lengths, spec, seed=3)) for x in (world.train_histories(), world.source()))
    assert all(same(next(memory), next(disk)) for _ in range(5))


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_windows_are_shuffled_anew_each_epoch_and_by_the_position_alone(drop):
    plain = make(**{"batch.drop_events": drop})
    changes = {"batch.drop_events": drop, "batch.shuffle_events": True, "towers.user.positions": "none"}
    shuffled, again = make(**changes), make(**changes)
    orders, first = collections.defaultdict(set), 0
    for position in range(6 * plain.examples_per_epoch):
        (user, items, _), (same_user, mixed, _) = plain.example(position), shuffled.example(position)
        assert user == same_user
        assert sorted(items.tolist()) == sorted(mixed.tolist()), "the events of the window, each as often"
        orders[user].add(tuple(mixed.tolist()))
        first += items[0] == mixed[0]
        np.testing.assert_array_equal(again.example(position)[1], mixed)
    assert np.mean([len(found) for found in orders.values()]) > 4, "another order each epoch"
    assert first < 0.5 * 6 * plain.examples_per_epoch, "the first event is moved too"
    iterator, other = iter(shuffled), iter(again)
    for _ in range(3):
        next(iterator)
    other.set_state(iterator.get_state())
    assert same(next(iterator), next(other)), "a resume draws the same"


def test_windows():
    w = windows.Windows.of(np.array([0, 1, 2, 5, 9]), 4)
    assert list(zip(w.user.tolist(), w.start.tolist(), w.stop.tolist(), strict=True)) == [(2, 0, 2), (3, 0, 5), (4, 4, 9), (4, 0, 5)]
    covered = sorted(t for u, a, b in zip(w.user, w.start, w.stop, strict=True) if u == 4 for t in range(a + 1, b))
    assert covered == list(range(1, 9)), "each event but the first is a target once"
    one = windows.Windows.of(np.array([0, 1, 2, 5]), None)
    assert list(zip(one.user.tolist(), one.start.tolist(), one.stop.tolist(), strict=True)) == [(2, 0, 2), (3, 0, 5)]


def test_history_text_names_the_newest_first_and_is_cut():
    texts = Ragged.from_rows([[1, 10, 2], [1, 11, 12, 2], [1, 13, 2]])
    np.testing.assert_array_equal(draft.history_text(texts, [0, 1, 2], 20), [1, 13, 2, 11, 12, 2, 10, 2])
    np.testing.assert_array_equal(draft.history_text(texts, [0, 1, 2], 5), [1, 13, 2, 11, 2])


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


def mined(k=4, seed=0):
    """Negatives of the tiny world's users: some are items of their own windows, some are none."""
    random = np.random.default_rng(seed)
    table = np.stack([random.permutation(tiny.N_ITEMS)[:k] for _ in range(tiny.N_USERS)]).astype(np.int32)
    table[::3, -1] = -1
    table[5] = -1
    return table


def expected_negatives(table, user, window):
    """What each query place of a window carries, as catalogue indices, item by item."""
    return [-1 if item in window else item for item in table[user].tolist()]


@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_each_place_carries_its_users_negatives_but_those_of_its_window(kind, source):
    table = mined()
    batches = make(kind, source, negatives=table, **{"batch.text_rows": 16})
    users = {g: _Windows(batches, g) for g in range(8)}
    iterator, seen = iter(batches), 0
    for _ in range(4):
        batch = next(iterator)
        assert batch.negatives.shape == (*batch.targets.shape, 4)
        assert batch.negatives.dtype == np.int32
        for g in range(8):
            ids = batch.item_ids[g]
            named = np.append(ids, -1)[batch.negatives[g]]  # local -> catalogue, -1 stays
            assert ((batch.negatives[g] < (ids >= 0).sum()) & (named >= -1)).all()
            assert (batch.negatives[g][batch.weights[g] == 0] == -1).all(), "padding carries none"
            for places, user, window in users[g].of(batch, g):
                for place in places:
                    assert named[place].tolist() == expected_negatives(table, user, window)
                    assert ids[batch.targets[g, place]] not in named[place]
                    seen += (named[place] >= 0).sum()
            if source == "tokens":
                per_row, texts = batches.spec.row_tokens // 8, tiny.tokens()
                for local, item in enumerate(ids[ids >= 0]):
                    row, segment = divmod(int(batch.item_places[g, local]), per_row)
                    here = batch.item_segments[g, row] == segment + 1
                    np.testing.assert_array_equal(batch.item_tokens[g, row][here], texts[int(item)])
    assert seen > 500


class _Windows:
    """Of a shard's batches the examples in order: (query places, user, items of the window), read again from the endless order."""

    def __init__(self, batches, shard):
        self._batches, self._shard, self._next, self._waiting = batches, shard, 0, []

    def of(self, batch, g):
        """The examples of a batch, each found among those that have not come yet, by its user and what its places say."""
        spec, ids = self._batches.spec, batch.item_ids[g]
        if spec.user_kind == "text":
            places = [[n] for n in range((batch.examples[g] >= 0).sum())]
            inputs = [[] for _ in places]
        else:
            segments, flat = batch.history_segments[g], np.arange(spec.queries).reshape(batch.history[g].shape)
            places = [flat[row][segments[row] == s].tolist() for row in range(len(segments)) for s in range(1, segments[row].max() + 1)]
            inputs = [ids[batch.history[g].reshape(-1)[p]].tolist() for p in places]
        there = collections.Counter(batch.examples[g][batch.examples[g] >= 0].tolist())
        for here, items in zip(places, inputs, strict=True):
            targets = ids[batch.targets[g][here]].tolist()
            user, window = self._find(
                lambda user, w, i=items, t=targets: there[user] and (not i or w.tolist() == [*i, t[-1]]) and t[0] in w
            )
            there[user] -= 1
            yield here, user, set(window.tolist())
        assert not +there

    def _find(self, fits):
        for number in [*self._waiting, *range(self._next, self._next + 200)]:
            user, window, _ = self._batches.example(number * 8 + self._shard)
            if fits(user, window):
                self._waiting = [n for n in [*self._waiting, *range(self._next, number)] if n != number]
                self._next = max(self._next, number + 1)
                return user, window
        raise AssertionError("a window that is none of the order's")


@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_with_negatives_it_goes_on_where_it_was_and_loses_no_example(kind, source):
    new = lambda: make(kind, source, negatives=mined(), **{"batch.text_rows": 16})
    order = new()
    iterator, users = iter(order), collections.Counter()
    for _ in range(5):
        batch = next(iterator)
        users.update(batch.examples[batch.examples >= 0].tolist())
    place = iterator.get_state()
    taken = collections.Counter(
        order.example(number * 8 + int(shard))[0]
        for shard, p in place["shards"].items()
        for number in set(range(p["next"])) - set(p["waiting"])
    )
    assert users == taken
    expected = [next(iterator) for _ in range(3)]
    other = iter(new())
    other.set_state(place)
    assert all(same(next(other), e) for e in expected)


def test_without_negatives_nothing_is_there_and_with_none_mined_only_the_empty_places_are():
    plain, empty = make(), make(negatives=np.full((tiny.N_USERS, 2), -1, np.int32))
    assert plain.spec.items == 64
    # 32 places, windows of 9.6 places on average: 4 of them bring 2 negatives each.
    assert empty.spec.items == 64 + 4 * 2
    a, b = next(iter(plain)), next(iter(empty))
    assert a.negatives is None
    assert (b.negatives == -1).all()
    np.testing.assert_array_equal(a.item_ids, b.item_ids[:, :64])
    for name in ("history", "targets", "weights", "examples"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_budgets_that_hold_a_window_but_not_its_negatives_are_refused():
    make(source="tokens", **{"batch.max_items": 17, "batch.text_rows": 4})
    for kind, window in (("history", 17), ("text", 1)):
        with pytest.raises(RecJaxError, match=rf"a window of {window} items and 4 mined negatives .* batch.max_items={window + 3} .*--k"):
            make(kind, "tokens", negatives=mined(), **{"batch.max_items": window + 3})
    with pytest.raises(RecJaxError, match=r"batch.text_rows=1 "):
        make("text", "tokens", negatives=mined(8), **{"batch.text_rows": 1})
    with pytest.raises(RecJaxError, match=r"negatives \(39, 4\).*U = 40"):
        make(negatives=mined()[1:])
