"""Replay: an epoch takes what is new, and a share of what an earlier run was trained on."""

import collections
import json

import jax
import numpy as np
import pytest
import tiny

from rec_jax.data import pipeline, windows
from rec_jax.types import RecJaxError


def batches(share, new=None, seed=3, **changes):
    world = tiny.World()
    lengths = world.train_lengths()
    if new is None:  # the newest train event of every third user
        new = np.zeros(lengths.sum(), bool)
        new[np.cumsum(lengths)[::3] - 1] = True
    spec = pipeline.BatchSpec.from_config(tiny.config(**changes))
    return pipeline.Batches(world.source(), lengths, spec, seed=seed, replay=windows.Replay(share, new))


def is_new(user, items, _):
    world = tiny.World()
    train = world.source()[user]["items"][world.source()[user]["splits"] == 0]
    return user % 3 == 0 and len(train) > 1 and np.array_equal(items, train[-len(items) :])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_an_epoch_takes_every_new_window_and_a_share_of_the_others(share):
    b, all_windows = batches(share), windows.Windows.of(tiny.World().train_lengths(), 16)
    new = sum(n > 1 for n in tiny.World().train_lengths()[::3])
    others = len(all_windows) - new
    taken = round(share * others)
    assert b.examples_per_epoch == new + taken
    seen: collections.Counter = collections.Counter()
    for epoch in range(7):
        window = [b.example(epoch * b.examples_per_epoch + n) for n in range(b.examples_per_epoch)]
        flags = [is_new(*w) for w in window]
        assert sum(flags) == new, "each of the new ones once"
        if epoch == 0:  # a later one may meet the end of a turn
            assert len({(u, tuple(i)) for u, i, _ in window}) == len(window)
        seen.update((u, tuple(i)) for (u, i, _), flag in zip(window, flags, strict=True) if not flag)
    if share:
        assert len(seen) == others, "all have had their turn"
        assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_how_often_an_event_is_predicted_is_what_the_order_gives(share):
    b, lengths = batches(share), tiny.World().train_lengths()
    counted, epochs = np.zeros(tiny.N_ITEMS), 40
    for n in range(epochs * b.examples_per_epoch):
        np.add.at(counted, b.example(n)[1][1:], 1)
    train = np.concatenate([r["items"][r["splits"] == 0] for r in tiny.World().source()])
    expected = np.bincount(train, weights=b.times_predicted(), minlength=tiny.N_ITEMS)
    np.testing.assert_allclose(counted / epochs, expected, atol=0.06)
    assert b.times_predicted()[0] == 0
    assert len(b.times_predicted()) == lengths.sum()


def test_all_data_as_it_comes_is_what_it_was_without_replay():
    world, spec = tiny.World(), pipeline.BatchSpec.from_config(tiny.config())
    plain = pipeline.Batches(world.source(), world.train_lengths(), spec, seed=3)
    whole = batches(1.0)
    assert whole.examples_per_epoch == plain.examples_per_epoch
    for n in range(200):
        (a, x, _), (b, y, _) = plain.example(n), whole.example(n)
        assert a == b
        np.testing.assert_array_equal(x, y)


def test_a_replay_goes_on_from_its_place_to_the_bit():
    whole = iter(batches(0.4))
    for _ in range(5):
        next(whole)
    again = iter(batches(0.4))
    again.set_state(json.loads(json.dumps(whole.get_state())))
    for _ in range(5):
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(next(whole)), jax.tree.leaves(next(again)), strict=True))


def test_nothing_new_is_an_error_unless_all_comes():
    none = np.zeros(tiny.World().train_lengths().sum(), bool)
    with pytest.raises(RecJaxError, match="start.replay=0.5: no window predicts an event"):
        batches(0.5, none)
    assert batches(1.0, none).examples_per_epoch > 0
