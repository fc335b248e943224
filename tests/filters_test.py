"""Filters against naive Python on random events."""

import numpy as np
import pytest

from rec_jax.data import filters


def random_events(seed, n=300, users=40, items=25):
    rng = np.random.default_rng(seed)
    return rng.integers(0, users, n).astype(np.int32), (items * rng.random(n) ** 2).astype(np.int32)


def naive_k_core(user, item, k):
    left = list(range(len(user)))
    while True:
        fewer = [e for e in left if sum(user[o] == user[e] for o in left) >= k and sum(item[o] == item[e] for o in left) >= k]
        if len(fewer) == len(left):
            return left
        left = fewer


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [2, 5, 8])
def test_k_core(seed, k):
    user, item = random_events(seed)
    assert np.flatnonzero(filters.k_core(user, item, 40, 25, k)).tolist() == naive_k_core(user.tolist(), item.tolist(), k)


def test_k_core_off_chain_and_empty():
    user, item = random_events(0)
    assert filters.k_core(user, item, 40, 25, 0).all()
    assert filters.k_core(user, item, 40, 25, 1).all()
    chain = np.arange(50, dtype=np.int32)  # each end drops its neighbour: 25 rounds until nothing is left
    assert not filters.k_core(np.repeat(chain, 2)[1:], np.repeat(chain, 2)[:-1], 50, 50, 2).any()
    assert len(filters.k_core(user[:0], item[:0], 40, 25, 5)) == 0


@pytest.mark.parametrize("seed", range(6))
def test_duplicates(seed):
    user, item = random_events(seed)
    seen, expected = set(), []
    for pair in zip(user.tolist(), item.tolist(), strict=True):
        expected.append(pair in seen)
        seen.add(pair)
    assert filters.duplicates(user, item).tolist() == expected
    assert any(expected)
    assert filters.duplicates(user[:0], item[:0]).tolist() == []


def test_min_rating():
    rating = np.asarray([0.0, -1.0, 3.4, 3.5, 5.0], np.float32)
    assert filters.min_rating(rating, 3.5).tolist() == [False, False, False, True, True]
    assert filters.min_rating(rating, 0.0).all()
    assert filters.min_rating(np.asarray([0.1], np.float32), 0.1).all()  # the minimum in the rating's own precision


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("low", "high"), [(0, 5), (-100, 100), (-(2**31), 2**31 - 1)])
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_stable_argsort(dtype, low, high, n):
    values = np.random.default_rng(n).integers(low, high, n).astype(dtype)
    np.testing.assert_array_equal(filters.stable_argsort(values), np.argsort(values, kind="stable"))


def test_stable_argsort_of_wide_values():
    values = np.random.default_rng(0).integers(-(2**62), 2**62, 1000)
    values[500:] = values[:500]
    np.testing.assert_array_equal(filters.stable_argsort(values), np.argsort(values, kind="stable"))


def test_dense():
    codes, kept = filters.dense(np.asarray([5, 2, 5, 9], np.int32), 11)
    assert codes.tolist() == [1, 0, 1, 2]
    assert kept.tolist() == [2, 5, 9]
    assert codes.dtype == np.int32


@pytest.mark.parametrize("ordered", ["no", "times", "users"])
@pytest.mark.parametrize("seed", range(3))
def test_time_order_and_the_events_that_go_back(seed, ordered):
    """`times`: the file is a log, oldest first; `users`: only one user's events are out of order."""
    user, time = random_events(seed)[0], np.random.default_rng(seed + 10).integers(-20, 20, 300)
    if ordered == "times":
        time.sort()
    if ordered == "users":
        time = np.where(user == 7, time, np.arange(300))
    before, back = {}, []
    for u, t in zip(user.tolist(), time.tolist(), strict=True):
        if u in before and t < before[u]:
            back.append(u)
        before[u] = t
    order, (events, users) = filters.in_time_order(user, time)
    np.testing.assert_array_equal(order, np.lexsort((np.arange(300), time, user)))
    assert (events, users) == (len(back), len(set(back)))
    assert {"no": users > 20, "times": users == 0, "users": users == 1}[ordered]


def test_time_order_of_nothing():
    order, back = filters.in_time_order(np.zeros(0, np.int32), np.zeros(0, np.int64))
    assert (len(order), back) == (0, (0, 0))
