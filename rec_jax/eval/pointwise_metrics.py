"""Metrics of single predictions (a click, a rating): ranking (AUC, per-user AUC), log loss, calibration, error. NumPy, float64.

In all of them a label that is NaN was not observed and is left out, and `weights` [B] >= 0 count an example so many times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.special

from rec_jax.types import Array, RecJaxError

EPSILON = 1e-15  # probabilities are kept that far from 0 and 1 before a logarithm


@dataclasses.dataclass(frozen=True)
class GroupedAuc:
    """AUC within each user.

    Attributes:
      value: mean of `per_user`, weighted by `impressions`.
      users: [U] ids of the users that have both classes, ascending.
      per_user: [U] AUC of each.
      impressions: [U] sum of the weights of each one's observed examples.
      left_out: number of users that have one class only, and so no AUC.
    """

    value: float
    users: np.ndarray
    per_user: np.ndarray
    impressions: np.ndarray
    left_out: int


def auc(scores: Array, labels: Array, *, weights: Array | None = None) -> float:
    """scores [B], labels [B] in {0, 1, NaN} -> probability that a positive scores above a negative; a tie counts half.

    Args:
      scores: of any scale; only their order counts.

    Raises:
      RecJaxError: sizes that do not fit, a NaN score, labels of one class only.
    """
    s, y, w = _observed(scores, labels, weights)
    _check_binary(y)
    value, _, _ = _auc_of_groups(s, y, w, np.zeros(len(s), np.int64), 1)
    if np.isnan(value[0]):
        raise RecJaxError(f"auc: {len(y):,} observed labels, all of one class; it needs a positive and a negative")
    return float(value[0])


def gauc(scores: Array, labels: Array, users: Array, *, weights: Array | None = None) -> GroupedAuc:
    """scores [B], labels [B] in {0, 1, NaN}, users [B] -> AUC within each user, and its mean weighted by the users' impressions.

    Args:
      users: id of the user of each example; any type that sorts.

    Raises:
      RecJaxError: as `auc`; no user has both classes.

    Reference: Zhou et al. 2018, Deep interest network for click-through rate prediction, section 6.3.
    """
    s, y, w = _observed(scores, labels, weights)
    users = np.asarray(users)
    if users.shape != np.shape(scores):
        raise RecJaxError(f"users has shape {users.shape}, scores {np.shape(scores)}; expected one user id for each score")
    _check_binary(y)
    ids, group = np.unique(users[~np.isnan(np.asarray(labels, np.float64))], return_inverse=True)
    value, positive, negative = _auc_of_groups(s, y, w, group, len(ids))
    both = ~np.isnan(value)
    if not both.any():
        raise RecJaxError(f"gauc: none of {len(ids):,} users has both a positive and a negative; is this the right split?")
    impressions = (positive + negative)[both]
    mean = float(np.average(value[both], weights=impressions))
    return GroupedAuc(mean, ids[both], value[both], impressions, int((~both).sum()))


def log_loss(probabilities: Array, labels: Array, *, weights: Array | None = None) -> float:
    """probabilities [B], labels [B] in [0, 1] or NaN -> mean cross-entropy in nats.

    Raises:
      RecJaxError: sizes that do not fit, a probability or label outside [0, 1].
    """
    p, labels, weights = _observed(probabilities, labels, weights)
    _check_share("probabilities", p)
    _check_share("labels", labels)
    p = np.clip(p, EPSILON, 1 - EPSILON)
    return float(np.average(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)), weights=weights))


def normalized_entropy(probabilities: Array, labels: Array, *, weights: Array | None = None) -> float:
    """probabilities [B], labels [B] in [0, 1] or NaN -> log loss over that of always predicting the labels' mean; below 1 is gain.

    Raises:
      RecJaxError: as `log_loss`; labels that are all 0 or all 1.

    Reference: He et al. 2014, Practical lessons from predicting clicks on ads at Facebook, section 2.
    """
    loss = log_loss(probabilities, labels, weights=weights)
    _, labels, weights = _observed(probabilities, labels, weights)
    rate = float(np.average(labels, weights=weights))
    if not 0 < rate < 1:
        raise RecJaxError(f"normalized_entropy: the labels' mean is {rate:g}; it needs both classes")
    return loss / float(scipy.special.entr(rate) + scipy.special.entr(1 - rate))


def _equal_width(p: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    return np.arange(1, bins) / bins


def _equal_mass(p: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    return np.unique(np.quantile(p, np.arange(1, bins) / bins, weights=weights, method="inverted_cdf"))


BINNINGS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {"width": _equal_width, "mass": _equal_mass}


def calibration_error(probabilities: Array, labels: Array, *, bins: int = 10, equal: str = "width", weights: Array | None = None) -> float:
    """probabilities [B], labels [B] in [0, 1] or NaN -> mean over bins, by weight, of |mean probability - mean label|.

    A bin holds its upper edge; equal probabilities are always in one bin.

    Args:
      bins: how many; fewer where probabilities repeat.
      equal: "width": [0, 1] is cut evenly; "mass": cut at the quantiles of the probabilities, which is the one to take for rare positives.

    Raises:
      RecJaxError: as `log_loss`; bins below 1, another word for `equal`.

    Reference: Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning (expected calibration error).
    """
    if bins < 1:
        raise RecJaxError(f"bins is {bins}; expected at least 1")
    if equal not in BINNINGS:
        raise RecJaxError(f"equal is {equal!r}; it takes {', '.join(BINNINGS)}")
    p, labels, weights = _observed(probabilities, labels, weights)
    _check_share("probabilities", p)
    _check_share("labels", labels)
    place = np.searchsorted(BINNINGS[equal](p, weights, bins), p, side="left")
    gap = np.bincount(place, weights * (p - labels))  # of a bin: its weight x (mean probability - mean label)
    return float(np.abs(gap).sum() / weights.sum())


def calibration_ratio(probabilities: Array, labels: Array, *, weights: Array | None = None) -> float:
    """probabilities [B], labels [B] >= 0 or NaN -> sum predicted over sum observed; above 1 promises too much.

    Raises:
      RecJaxError: sizes that do not fit, labels whose sum is not above 0.
    """
    p, labels, weights = _observed(probabilities, labels, weights)
    total = float((weights * labels).sum())
    if not total > 0:
        raise RecJaxError(f"calibration_ratio: the labels' sum is {total:g}; it needs a positive label")
    return float((weights * p).sum() / total)


def rmse(predictions: Array, labels: Array, *, weights: Array | None = None) -> float:
    """predictions [B], labels [B] or NaN -> root of the mean squared error, in the labels' unit."""
    predictions, labels, weights = _observed(predictions, labels, weights)
    return float(np.sqrt(np.average((predictions - labels) ** 2, weights=weights)))


def mae(predictions: Array, labels: Array, *, weights: Array | None = None) -> float:
    """predictions [B], labels [B] or NaN -> mean absolute error, in the labels' unit."""
    predictions, labels, weights = _observed(predictions, labels, weights)
    return float(np.average(np.abs(predictions - labels), weights=weights))


def binary_metrics(logits: Array, labels: Array, *, users: Array | None = None, weights: Array | None = None) -> dict[str, float]:
    """logits [B], labels [B] in {0, 1, NaN}, users [B] -> the metrics of clicks by name, of sigmoid(logits).

    "auc", "log_loss", "normalized_entropy", "calibration_error", "calibration_ratio"; "calibration_error_mass" (bins of equal mass);
    with users also "gauc" and "gauc_users", the number that it is a mean over.

    Raises:
      RecJaxError: as the metrics; above all labels of one class only.
    """
    p = scipy.special.expit(np.asarray(logits, np.float64))
    values = {
        "auc": auc(logits, labels, weights=weights),
        "log_loss": log_loss(p, labels, weights=weights),
        "normalized_entropy": normalized_entropy(p, labels, weights=weights),
        "calibration_error": calibration_error(p, labels, weights=weights),
        "calibration_error_mass": calibration_error(p, labels, equal="mass", weights=weights),
        "calibration_ratio": calibration_ratio(p, labels, weights=weights),
    }
    if users is not None:
        grouped = gauc(logits, labels, users, weights=weights)
        values |= {"gauc": grouped.value, "gauc_users": float(len(grouped.users))}
    return values


def _auc_of_groups(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, group: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples [B] in `groups` groups -> (AUC, positive weight, negative weight) of each, by one sort; NaN where a class has no weight."""
    order = np.lexsort((scores, group))
    scores, group = scores[order], group[order]
    positive, negative = (weights * labels)[order], (weights * (1 - labels))[order]
    new = np.ones(len(order), bool)  # first example of a run of equal scores within a group
    new[1:] = (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])
    start = np.flatnonzero(new)
    run_positive, run_negative, run_group = np.add.reduceat(positive, start), np.add.reduceat(negative, start), group[start]
    total_positive, total_negative = np.bincount(group, positive, groups), np.bincount(group, negative, groups)
    first = np.searchsorted(run_group, np.arange(groups))  # every group has at least one example
    before = np.cumsum(run_negative) - run_negative
    below = before - before[first][run_group]  # negative weight of the group under the run
    won = np.bincount(run_group, run_positive * (below + run_negative / 2), groups)
    pairs = total_positive * total_negative
    value = np.divide(won, pairs, out=np.full(groups, np.nan), where=pairs > 0)
    return value, total_positive, total_negative


def _observed(predictions: Array, labels: Array, weights: Array | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The examples whose label was observed, as float64, checked."""
    p, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    w = np.ones(y.shape) if weights is None else np.asarray(weights, np.float64)
    if p.ndim != 1 or not p.shape == y.shape == w.shape:
        raise RecJaxError(f"predictions {p.shape}, labels {y.shape}, weights {w.shape}: expected one [B] each")
    kept = ~np.isnan(y)
    for name, values, good in (("prediction", p, np.isfinite(p)), ("weight >= 0", w, np.isfinite(w) & (w >= 0))):
        bad = kept & ~good
        if bad.any():
            place = int(np.argmax(bad))
            raise RecJaxError(f"example {place} has {values[place]} ({int(bad.sum())} such of {len(p)}); expected a finite {name}")
    p, y, w = p[kept], y[kept], w[kept]
    if not w.sum() > 0:
        raise RecJaxError(f"none of {len(kept)} labels was observed (all NaN, or of weight 0): there is nothing to measure")
    return p, y, w


def _check_binary(labels: np.ndarray) -> None:
    other = (labels != 0) & (labels != 1)
    if other.any():
        raise RecJaxError(f"label {labels[np.argmax(other)]}: expected 0, 1 or NaN (not observed)")


def _check_share(name: str, values: np.ndarray) -> None:
    outside = (values < 0) | (values > 1)
    if outside.any():
        raise RecJaxError(f"{name} has {values[np.argmax(outside)]}; expected numbers from 0 to 1 (a logit goes through a sigmoid first)")
