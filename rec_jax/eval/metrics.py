"""Ranking metrics from the targets' ranks: pure functions, one value a user, reduced once by who asks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rec_jax.types import RecJaxError

Metric = Callable[..., np.ndarray]


def hr(ranks: np.ndarray, *, k: int) -> np.ndarray:
    """ranks [U, Tg] (0 = no target) -> [U]: 1 where a target is among the first k, else 0."""
    return np.asarray(_hits(ranks, k).any(axis=1), np.float64)


def recall(ranks: np.ndarray, *, k: int) -> np.ndarray:
    """ranks [U, Tg] (0 = no target) -> [U]: share of the targets that are among the first k."""
    return _hits(ranks, k).sum(1) / _targets(ranks)


def precision(ranks: np.ndarray, *, k: int) -> np.ndarray:
    """ranks [U, Tg] (0 = no target) -> [U]: share of the first k that are targets."""
    return _hits(ranks, k).sum(1) / k


def ndcg(ranks: np.ndarray, *, k: int) -> np.ndarray:
    """ranks [U, Tg] (0 = no target) -> [U]: sum of 1 / log2(1 + rank) over the targets among the first k, over its best possible value.

    The best possible has min(k, targets) targets in front.

    Reference: Jarvelin and Kekalainen 2002, Cumulated gain-based evaluation of IR techniques, with gains 0 and 1.
    """
    gain = np.where(_hits(ranks, k), 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0).sum(1)
    ideal = np.cumsum(1 / np.log2(2 + np.arange(k)))
    return gain / ideal[np.minimum(_targets(ranks), k) - 1]


def mrr(ranks: np.ndarray, *, k: int) -> np.ndarray:
    """ranks [U, Tg] (0 = no target) -> [U]: 1 / rank of the best target if it is among the first k, else 0."""
    return np.where(_hits(ranks, k), 1 / np.maximum(ranks, 1), 0.0).max(1)


def map(ranks: np.ndarray, *, k: int) -> np.ndarray:
    """ranks [U, Tg] (0 = no target) -> [U]: average precision at k, sum over hits of precision at the hit, over min(k, targets).

    So a perfect list has 1 at every k. trec_eval's map_cut divides by the number of targets instead, which differs where it is above k.
    """
    hits = _hits(ranks, k)
    up_to = (hits[:, None, :] & (ranks[:, None, :] <= ranks[:, :, None])).sum(2)  # targets at or above each target
    return np.where(hits, up_to / np.maximum(ranks, 1), 0.0).sum(1) / np.minimum(_targets(ranks), k)


METRICS: dict[str, Metric] = {"hr": hr, "ndcg": ndcg, "recall": recall, "precision": precision, "mrr": mrr, "map": map}


def per_user(ranks: np.ndarray, *, ks: tuple[int, ...], names: tuple[str, ...] = tuple(METRICS)) -> dict[str, np.ndarray]:
    """ranks [U, Tg] (0 or -1 = no target) -> {"ndcg@10": [U] float64, ...} for every metric and k.

    Raises:
      RecJaxError: an unknown metric, k below 1, a user without target.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or not np.issubdtype(ranks.dtype, np.integer):
        raise RecJaxError(f"ranks: expected integers [U, Tg], got {ranks.shape} {ranks.dtype}")
    for name in names:
        if name not in METRICS:
            raise RecJaxError(f"metric {name!r} does not exist; there are {', '.join(METRICS)}")
    for k in ks:
        if k < 1:
            raise RecJaxError(f"config.eval.k has {k}; it must be at least 1")
    ranks = np.maximum(ranks, 0)
    none = ~(ranks > 0).any(1)
    if none.any():
        raise RecJaxError(
            f"row {int(np.argmax(none))} of {len(ranks)} has no target ({int(none.sum())} rows have none); leave such users out"
        )
    return {f"{name}@{k}": METRICS[name](ranks, k=k) for name in names for k in ks}


def coverage(ids: np.ndarray, *, k: int, n_items: int) -> float:
    """ids [U, at least k] (-1 = none) -> share of the catalogue's n_items that stands in some user's first k."""
    if ids.ndim != 2 or ids.shape[1] < k:
        raise RecJaxError(f"coverage@{k} needs ids of shape [U, at least {k}], got {ids.shape}")
    shown = ids[:, :k]
    return len(np.unique(shown[shown >= 0])) / n_items


def paired_bootstrap(a: np.ndarray, b: np.ndarray, *, seed: int, n: int = 2000, level: float = 0.95) -> dict[str, float]:
    """a [U], b [U], one metric of two models for the same users -> {"difference", "low", "high", "p"} of mean(a) - mean(b).

    Users are drawn with replacement, n times. low and high bound the middle `level` of the drawn differences; p is two-sided: twice the
    smaller share of draws on either side of zero, counting the sample itself, so that it is never 0.

    Reference: Efron and Tibshirani 1993, An introduction to the bootstrap, sections 13.3 and 15.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise RecJaxError(f"a {a.shape}, b {b.shape}: expected one value each for the same users")
    difference = a - b
    rng = np.random.default_rng(seed)
    drawn = np.array([difference[rng.integers(0, len(a), len(a))].mean() for _ in range(n)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (n + 1))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "p": float(p)}


def _hits(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks > 0) & (ranks <= k)


def _targets(ranks: np.ndarray) -> np.ndarray:
    return (ranks > 0).sum(1)
