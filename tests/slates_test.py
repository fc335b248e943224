"""Metrics of impressions shown together, against MIND's own evaluation in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from rec_jax.eval import slates
from rec_jax.types import RecJaxError


def of_mind(scores, labels):
    """AUC, MRR, NDCG@5, NDCG@10 of one slate, as MIND's `evaluate.py` has them."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    y = [labels[i] for i in order]
    pairs = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i in order if labels[i] for j in order if not labels[j]]
    dcg = lambda values, k: sum(v / np.log2(n + 2) for n, v in enumerate(values[:k]))
    ndcg = [dcg(y, k) / dcg(sorted(y, reverse=True), k) for k in (5, 10)]
    return [sum(pairs) / len(pairs), sum(v / (n + 1) for n, v in enumerate(y)) / sum(y), *ndcg]


def test_against_minds_evaluation():
    rng = np.random.default_rng(0)
    slate = rng.integers(0, 60, 900)
    scores, labels = rng.permutation(900) / 900, (rng.random(900) < 0.15).astype(np.float32)
    labels[slate == 3], labels[slate == 4] = 0, 1
    labels[rng.random(900) < 0.05] = np.nan
    expected = []
    for s in range(60):
        mine = (slate == s) & ~np.isnan(labels)
        if 0 < labels[mine].sum() < mine.sum():
            expected.append(of_mind(scores[mine].tolist(), labels[mine].tolist()))
    out = slates.slate_metrics(scores, labels, slate)
    assert out.pop("slates") == len(expected) < 60
    assert list(out) == ["slate_auc", "slate_mrr", "slate_ndcg@5", "slate_ndcg@10"]
    np.testing.assert_allclose(list(out.values()), np.mean(expected, axis=0), rtol=1e-12)
    assert 0.4 < out["slate_auc"] < 0.6


def test_ties_never_count_for_the_positive():
    out = slates.slate_metrics(np.zeros(4), [1, 0, 0, 0], np.zeros(4, int))
    assert (out["slate_auc"], out["slate_mrr"]) == (0.5, 0.25)
    assert slates.slate_metrics([1.0, 2.0], [1, 1], [0, 0]) == {"slates": 0.0}
    assert slates.slate_metrics([], [], []) == {"slates": 0.0}


def test_a_slate_is_what_a_user_was_shown_at_one_time():
    out = slates.slates_of(np.array([3, 1, 3, 1, 1]), np.array([7, 7, 7, 8, 7]))
    assert out.tolist() == [2, 0, 2, 1, 0]


def test_bad_input():
    with pytest.raises(RecJaxError, match=r"scores \(2,\), labels \(1,\)"):
        slates.slate_metrics([1.0, 2.0], [1], [0, 0])
    with pytest.raises(RecJaxError, match="impression 1 has a score that is not finite"):
        slates.slate_metrics([1.0, np.nan], [1, 0], [0, 0])
