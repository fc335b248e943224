"""Cold targets: who counts as one, and the metrics against a plain loop."""

import math

import numpy as np
import pytest

from rec_jax.eval import cold
from rec_jax.types import EvalSet, Ragged


@pytest.mark.parametrize(
    ("counts", "most"),
    [(range(20), 1), ([5] * 10, 5), ([0, 0, 0, *range(1, 18)], 0), ([7], 7), ([3, 1, 2], 1)],
)
def test_a_tenth_of_the_catalogue_is_cold_and_what_was_seen_as_often(counts, most):
    assert cold.most_seen(np.asarray(list(counts))) == most


def test_only_cold_targets_count_and_only_users_who_have_one():
    rng = np.random.default_rng(0)
    n, users = 50, 30
    counts = rng.integers(0, 12, n)
    targets = [rng.permutation(n)[: rng.integers(1, 5)] for _ in range(users)]
    ranks = np.zeros((users, 4), np.int32)
    for u, row in enumerate(targets):
        ranks[u, : len(row)] = rng.permutation(n)[: len(row)] + 1
    ranks[3, 0] = 0  # a target that stood there before
    eval_set = EvalSet(np.arange(users), Ragged.from_rows([[]] * users), Ragged.from_rows(targets), n)
    found = cold.measure(ranks, eval_set, counts, ks=(5, 20), name="test")
    most, hits, gains = np.sort(counts)[4], [], []
    for u, row in enumerate(targets):
        mine = [int(r) for r, t in zip(ranks[u], row, strict=False) if counts[t] <= most and r > 0]
        if mine:
            hits.append(any(r <= 5 for r in mine))
            best = sum(1 / math.log2(2 + i) for i in range(min(20, len(mine))))
            gains.append(sum(1 / math.log2(1 + r) for r in mine if r <= 20) / best)
    assert 0 < len(hits) < users
    assert found["test_cold/users"] == len(hits)
    assert found["test_cold/hr@5"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert found["test_cold/ndcg@20"] == pytest.approx(np.mean(gains), abs=1e-12)


def test_without_a_cold_target_only_their_number_is_told():
    counts = np.arange(1, 11)
    eval_set = EvalSet(np.arange(1), Ragged.from_rows([[]]), Ragged.from_rows([[9]]), 10)
    assert cold.measure(np.array([[1]]), eval_set, counts, ks=(10,), name="valid") == {"valid_cold/users": 0}
