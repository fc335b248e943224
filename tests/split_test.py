"""Splits against naive Python on random events, and their bad input."""

import itertools
import math

import numpy as np
import pytest

from rec_jax import config as config_lib
from rec_jax.data import split as split_lib
from rec_jax.types import RecJaxError

USERS, ITEMS = 30, 40


def random_events(seed, n=400):
    """Events sorted by (user, time), with users of 0, 1, 2 and more events and equal times."""
    rng = np.random.default_rng(seed)
    user = np.sort((USERS * rng.random(n) ** 3).astype(np.int32))
    time = rng.integers(0, 200, n)
    return user, rng.integers(0, ITEMS, n).astype(np.int32), time[np.lexsort((time, user))][np.argsort(user, kind="stable")]


def run(kind, events, valid=0.1, test=0.1, **kwargs):
    spec = config_lib.defaults().data.split
    spec.kind, spec.valid, spec.test = kind, valid, test
    return split_lib.split(*events, USERS, ITEMS, spec, **kwargs)


def naive_per_user(events, parts):
    """parts(n) -> (validation, test) counts of a user with n events."""
    user = events[0].tolist()
    out = []
    for u in sorted(set(user)):
        n = user.count(u)
        valid, test = parts(n)
        out += [0] * (n - valid - test) + [1] * valid + [2] * test
    return out


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out(seed):
    events = random_events(seed)
    assert run("leave_one_out", events).tolist() == naive_per_user(events, lambda n: (int(n >= 3), int(n >= 2)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.1), (0.29, 0.3), (0.0, 0.2), (0.2, 0.0), (0.05, 0.9), (0.9, 0.05)])
def test_ratio(seed, valid, test):
    def parts(n):
        if n < 3:
            return 0, 0
        n_test = min(max(1, math.floor(test * n + 1e-9)), n - 2 if valid else n - 1) if test else 0
        n_valid = min(max(1, math.floor(valid * n + 1e-9)), n - 1 - n_test) if valid else 0
        assert n_test + n_valid < n
        assert n_valid or not valid
        assert n_test or not test
        return n_valid, n_test

    events = random_events(seed)
    assert run("ratio", events, valid, test).tolist() == naive_per_user(events, parts)


def test_ratio_rounds_products_that_fall_just_short():
    events = (np.zeros(100, np.int32), np.zeros(100, np.int32), np.arange(100))
    assert (run("ratio", events, 0.0, 0.29) == 2).sum() == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.1), (0.3, 0.0), (0.0, 0.3)])
def test_temporal(seed, valid, test):
    events = random_events(seed)
    times = sorted(events[2].tolist())
    n_test, n_valid = math.floor(test * len(times) + 1e-9), math.floor((valid + test) * len(times) + 1e-9)
    test_from = times[-n_test] if n_test else math.inf
    valid_from = times[-n_valid]
    expected = [2 if t >= test_from else 1 if t >= valid_from else 0 for t in events[2].tolist()]
    out = run("temporal", events, valid, test)
    assert out.tolist() == expected
    later = [events[2][out == s] for s in range(3)]
    assert all(a.max() < b.min() for a, b in itertools.pairwise(later) if len(a) and len(b))  # no training event is later


def test_temporal_without_held_out_shares_is_all_train():
    assert not run("temporal", random_events(0), 0.0, 0.0).any()


@pytest.mark.parametrize("seed", range(3))
def test_cold_item(seed):
    events = random_events(seed)
    out = run("cold_item", events, 0.1, 0.2, seed=seed)
    part = {}
    for item, code in zip(events[1].tolist(), out.tolist(), strict=True):
        assert part.setdefault(item, code) == code  # all events of an item lie in one part
    there = set(events[1].tolist())
    assert len(there) == ITEMS
    assert sorted(part.values()) == [0] * 28 + [1] * 4 + [2] * 8
    assert np.array_equal(out, run("cold_item", events, 0.1, 0.2, seed=seed))
    assert not np.array_equal(out, run("cold_item", events, 0.1, 0.2, seed=seed + 1))


def of_recbole(n, valid, test):
    """Events of each part, as RecBole counts them (`Dataset._calcu_split_ids`)."""
    shares = (1 - valid - test, valid, test)
    counts = [math.floor(share * n + 1e-9) for share in shares]
    counts[0] = n - sum(counts[1:])
    for i in range(1, 3):
        if counts[0] <= 1:
            break
        if 0 < shares[-i] * n < 1:
            counts[-i] += 1
            counts[0] -= 1
    return counts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.1), (0.29, 0.3), (0.0, 0.2), (0.2, 0.0), (0.05, 0.9), (0.9, 0.05)])
def test_random(seed, valid, test):
    events = random_events(seed)
    out = run("random", events, valid, test, seed=seed)
    for user in set(events[0].tolist()):
        mine = out[events[0] == user]
        assert np.bincount(mine, minlength=3).tolist() == of_recbole(len(mine), valid, test)
    assert np.array_equal(out, run("random", events, valid, test, seed=seed))
    assert not np.array_equal(out, run("random", events, valid, test, seed=seed + 1))


def test_random_takes_every_place_as_often():
    """Of a user with ten events each place is the test's in about a tenth of the draws."""
    events = (np.zeros(10, np.int32), np.arange(10, dtype=np.int32), np.arange(10))
    drawn = np.stack([run("random", events, seed=seed) for seed in range(600)])
    for part in (1, 2):
        share = (drawn == part).mean(0)
        assert 0.06 < share.min() < share.max() < 0.14
    assert len({tuple(row) for row in drawn.tolist()}) == 90, "all 10 x 9 ways"


def test_cold_item_draw_is_fixed():
    one_each = (np.zeros(ITEMS, np.int32), np.arange(ITEMS, dtype=np.int32), np.arange(ITEMS))
    assert np.flatnonzero(run("cold_item", one_each, 0.0, 0.1, seed=0)).tolist() == sorted(np.random.RandomState(0).permutation(ITEMS)[:4])


def test_bad_input():
    events = random_events(0)
    for kwargs, message in (
        ({"kind": "by_luck"}, r"kind='by_luck': expected one of leave_one_out, temporal, ratio, random, cold_item"),
        ({"kind": "ratio", "valid": 0.5, "test": 0.5}, r"valid=0\.5 and test=0\.5: expected shares"),
        ({"kind": "ratio", "valid": -0.1}, r"valid=-0\.1"),
        ({"kind": "temporal", "clock": False}, r"'temporal' needs times.*use leave_one_out or ratio"),
    ):
        with pytest.raises(RecJaxError, match=message):
            run(events=events, **kwargs)
    same_time = (events[0], events[1], np.zeros_like(events[2]))
    with pytest.raises(RecJaxError, match=r"'temporal' leaves no training events \(0 validation, 400 test\)"):
        run("temporal", same_time)
