"""Metrics of impressions that were shown together, each slate for itself: AUC, MRR, NDCG at 5 and 10, and their means over slates.

Reference: Wu et al., "MIND: A Large-scale Dataset for News Recommendation" (2020), section 5.1.
"""

from __future__ import annotations

import numpy as np

from rec_jax.types import Array, RecJaxError

KS = (5, 10)


def slates_of(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """user [E], time [E] -> number of each impression's slate [E] int64, from 0: what a user was shown at one time is one."""
    _, slate = np.unique(np.stack([user.astype(np.int64), time.astype(np.int64)]), axis=1, return_inverse=True)
    return slate.reshape(-1)


def slate_metrics(scores: Array, labels: Array, slate: Array) -> dict[str, float]:
    """scores [E], labels [E] in {0, 1, NaN}, slate [E] -> means over the slates with both a positive and a negative.

    "slate_auc"; "slate_mrr", the mean of 1 / rank over a slate's positives; "slate_ndcg@5" and "@10", whose best possible has all
    positives in front; "slates", how many they are: alone where there is none. NaN labels are left out. Ties never count for a positive,
    but count half in the AUC.

    Raises:
      RecJaxError: sizes that do not fit, a score that is not finite.
    """
    scores, labels, slate = np.asarray(scores, np.float64), np.asarray(labels, np.float64), np.asarray(slate)
    if scores.ndim != 1 or not scores.shape == labels.shape == slate.shape:
        raise RecJaxError(f"scores {scores.shape}, labels {labels.shape}, slate {slate.shape}: expected one [E] each")
    if not np.isfinite(scores).all():
        raise RecJaxError(f"impression {int(np.argmin(np.isfinite(scores)))} has a score that is not finite")
    seen = ~np.isnan(labels)
    order = np.lexsort((labels[seen], -scores[seen], slate[seen]))  # best first; of equal scores the negatives first
    scores, labels, slate = (x[seen][order] for x in (scores, labels, slate))
    starts = np.flatnonzero(np.diff(slate, prepend=slate[:1] - 1)) if len(slate) else np.zeros(0, np.int64)
    found: list[list[float]] = []
    for start, stop in zip(starts, np.append(starts, len(slate))[1:], strict=True):
        y = labels[start:stop]
        positives = int(y.sum())
        if not 0 < positives < len(y):
            continue
        places = np.flatnonzero(y) + 1
        above = scores[start:stop][:, None] > scores[start:stop][y == 0]
        same = scores[start:stop][:, None] == scores[start:stop][y == 0]
        auc = float((above + 0.5 * same)[y == 1].mean())
        row = [auc, float((1 / places).mean())]
        for k in KS:
            best = (1 / np.log2(1 + np.arange(1, min(k, positives) + 1))).sum()
            row.append(float((1 / np.log2(1 + places[places <= k])).sum() / best))
        found.append(row)
    out = {"slates": float(len(found))}
    if found:
        names = ("slate_auc", "slate_mrr", *(f"slate_ndcg@{k}" for k in KS))
        out |= dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))
    return out
