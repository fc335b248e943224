"""Metrics against values by hand and against trec_eval."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from rec_jax import topk
from rec_jax.eval import metrics
from rec_jax.types import RecJaxError

KS = (1, 3, 5, 10, 20)


def test_values_by_hand():
    ranks = np.array([[1, 4, 0], [7, 2, 3], [9, 0, -1]])
    values = metrics.per_user(ranks, ks=(3,))
    second = (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3) + 1 / np.log2(4))
    expected = {
        "hr@3": [1, 1, 0],
        "recall@3": [1 / 2, 2 / 3, 0],
        "precision@3": [1 / 3, 2 / 3, 0],
        "mrr@3": [1, 1 / 2, 0],
        "map@3": [1 / 2, (1 / 2 + 2 / 3) / 3, 0],
        "ndcg@3": [1 / (1 + 1 / np.log2(3)), second, 0],
    }
    assert set(values) == set(expected)
    for name, want in expected.items():
        np.testing.assert_allclose(values[name], want, rtol=1e-12, err_msg=name)
        assert values[name].dtype == np.float64


def test_several_targets_as_recbole_counts_them():
    """Recall and NDCG as `recbole.evaluator.metrics` has them: hits over targets; DCG over that of min(k, targets) hits in front."""
    rng, k = np.random.default_rng(1), 10
    rows = [np.sort(rng.permutation(40)[: rng.integers(1, 16)] + 1) for _ in range(50)]
    ranks = np.stack([np.pad(row, (0, 15 - len(row))) for row in rows])
    ours = metrics.per_user(ranks, ks=(k,))
    for user, row in enumerate(rows):
        hit = [place + 1 in row for place in range(k)]
        gain = sum(h / np.log2(place + 2) for place, h in enumerate(hit))
        best = sum(1 / np.log2(place + 2) for place in range(min(k, len(row))))
        np.testing.assert_allclose(ours["recall@10"][user], sum(hit) / len(row))
        np.testing.assert_allclose(ours["ndcg@10"][user], gain / best)


def test_same_as_trec_eval_on_scores_without_ties():
    """ndcg_cut, recall and P agree at every k. recip_rank has no cut: ours is its value where it is at least 1 / k, else 0.
    map_cut divides by the number of targets, ours by at most k: so theirs x targets = ours x min(k, targets)."""
    rng = np.random.default_rng(0)
    users, items = 60, 200
    scores = np.stack([rng.permutation(items) for _ in range(users)]).astype(np.float32)
    counts = rng.integers(1, 16, users)
    target = np.stack([np.where(np.arange(15) < n, rng.permutation(items)[:15], -1) for n in counts])
    ours = metrics.per_user(topk.ranks_from_scores(scores, target), ks=KS)
    cuts = ",".join(map(str, KS))
    judge = pytrec_eval.RelevanceEvaluator(
        {str(u): {str(i): 1 for i in target[u] if i >= 0} for u in range(users)},
        {f"ndcg_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", f"map_cut.{cuts}", "recip_rank"},
    )
    theirs = judge.evaluate({str(u): {str(i): float(s) for i, s in enumerate(scores[u])} for u in range(users)})

    def column(name):
        return np.array([theirs[str(u)][name] for u in range(users)])

    for k in KS:
        for name, other in (("ndcg", "ndcg_cut"), ("recall", "recall"), ("precision", "P")):
            np.testing.assert_allclose(ours[f"{name}@{k}"], column(f"{other}_{k}"), atol=1e-6, err_msg=f"{name}@{k}")
        np.testing.assert_allclose(ours[f"map@{k}"] * np.minimum(k, counts), column(f"map_cut_{k}") * counts, atol=1e-6)
        first = column("recip_rank")
        np.testing.assert_allclose(ours[f"mrr@{k}"], np.where(first > 1 / (k + 0.5), first, 0), atol=1e-6)
        np.testing.assert_array_equal(ours[f"hr@{k}"], column(f"recall_{k}") > 0)
    assert 0.01 < ours["ndcg@10"].mean() < 0.9


def test_coverage_counts_distinct_items():
    ids = np.array([[3, 1, 5], [3, 2, -1]])
    assert metrics.coverage(ids, k=2, n_items=10) == 0.3
    assert metrics.coverage(ids, k=3, n_items=10) == 0.4
    with pytest.raises(RecJaxError, match="coverage@4"):
        metrics.coverage(ids, k=4, n_items=10)


def test_paired_bootstrap_finds_a_difference_and_no_difference():
    rng = np.random.default_rng(0)
    a = rng.random(400)
    better = metrics.paired_bootstrap(a + 0.05 + 0.1 * rng.normal(size=400), a, seed=1)
    assert 0 < better["low"] < better["difference"] < better["high"] < 0.1
    assert 0 < better["p"] < 0.01
    noise = metrics.paired_bootstrap(a, a + 0.1 * np.tile([1, -1], 200), seed=1)
    assert noise["low"] < 0 < noise["high"]
    assert noise["p"] > 0.5
    assert metrics.paired_bootstrap(a, a, seed=1) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert metrics.paired_bootstrap(a, a**2, seed=5) == metrics.paired_bootstrap(a, a**2, seed=5)


def test_bad_input_is_refused():
    with pytest.raises(RecJaxError, match="row 1 of 2 has no target"):
        metrics.per_user(np.array([[1], [0]]), ks=(5,))
    with pytest.raises(RecJaxError, match="there are hr, ndcg"):
        metrics.per_user(np.array([[1]]), ks=(5,), names=("auc",))
    with pytest.raises(RecJaxError, match="at least 1"):
        metrics.per_user(np.array([[1]]), ks=(0,))
    with pytest.raises(RecJaxError, match="same users"):
        metrics.paired_bootstrap(np.zeros(3), np.zeros(4), seed=0)
