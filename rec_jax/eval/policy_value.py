"""The value of a policy from what another one logged: importance weighting, the direct method, doubly robust, each with an interval.

The rows are independent: the logging policy saw a context, took an action with probability `propensities`, and was given a reward. Asked is
what the target policy would have earned per row. Without true propensities nothing of this holds: `Estimate.mean_weight` is near 1 where
they are true and every action that the target policy takes could be logged.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.special

from rec_jax.types import Array, RecJaxError

INTERVALS = ("normal", "bootstrap")


@dataclasses.dataclass(frozen=True)
class Interval:
    """How an interval is made.

    Attributes:
      kind: "normal": value +- z standard errors; "bootstrap": quantiles of the estimate over rows drawn with replacement.
      level: share of repetitions that should hold the true value.
      draws: of the bootstrap.
      seed: of the bootstrap.
    """

    kind: str = "normal"
    level: float = 0.95
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in INTERVALS:
            raise RecJaxError(f"interval kind {self.kind!r} does not exist; there are {', '.join(INTERVALS)}")
        if not 0 < self.level < 1 or self.draws < 1:
            raise RecJaxError(f"interval level={self.level}, draws={self.draws}: expected a level between 0 and 1 and at least one draw")


NORMAL = Interval()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A policy's value.

    Attributes:
      value: mean reward per row.
      standard_error: of the value, by the normal approximation.
      low, high: ends of the interval.
      effective_sample_size: rows that carry the estimate: (sum of weights)^2 / sum of squared weights; B where no row is weighted.
      mean_weight: mean importance weight, before any cap; 1 where no row is weighted.
    """

    value: float
    standard_error: float
    low: float
    high: float
    effective_sample_size: float
    mean_weight: float


def ips(rewards: Array, target: Array, propensities: Array, *, interval: Interval = NORMAL) -> Estimate:
    """rewards [B], target [B], propensities [B] -> Estimate: mean of weight * reward, weight = target / propensity. Unbiased.

    Args:
      rewards: what was observed.
      target: the target policy's probability of the logged action.
      propensities: the logging policy's.

    Raises:
      RecJaxError: sizes that do not fit, no row, a number that is not finite, a propensity outside (0, 1], a target outside [0, 1].

    Reference: Horvitz and Thompson 1952, A generalization of sampling without replacement from a finite universe.
    """
    rewards, weights = _weighted(rewards, target, propensities)
    return _estimate(weights * rewards, None, weights, weights, interval)


def clipped_ips(rewards: Array, target: Array, propensities: Array, *, cap: float, interval: Interval = NORMAL) -> Estimate:
    """rewards [B], target [B], propensities [B] -> Estimate: mean of min(weight, cap) * reward. Biased towards 0, of less variance.

    The interval is that of the capped mean: it knows nothing of the bias. Args and Raises as in `ips`.

    Args:
      cap: the largest weight, > 0.

    Reference: Ionides 2008, Truncated importance sampling.
    """
    _check_cap(cap)
    rewards, weights = _weighted(rewards, target, propensities)
    capped = np.minimum(weights, cap)
    return _estimate(capped * rewards, None, capped, weights, interval)


def snips(rewards: Array, target: Array, propensities: Array, *, interval: Interval = NORMAL) -> Estimate:
    """rewards [B], target [B], propensities [B] -> Estimate: sum of weight * reward over the sum of weights; bias of order 1 / B.

    Adding a constant to all rewards adds it to the value, which is not so with `ips`. The standard error is the delta method's.
    Args and Raises as in `ips`; moreover a target policy that takes none of the logged actions.

    Reference: Swaminathan and Joachims 2015, The self-normalized estimator for counterfactual learning, section 5.
    """
    rewards, weights = _weighted(rewards, target, propensities)
    if not weights.sum() > 0:
        raise RecJaxError(f"snips: the target policy takes none of the {len(weights):,} logged actions, so they say nothing of its value")
    return _estimate(weights * rewards, weights, weights, weights, interval)


def direct_method(predictions: Array, target_probabilities: Array, *, interval: Interval = NORMAL) -> Estimate:
    """predictions [B, A], target_probabilities [B, A] -> Estimate: mean over rows of the predicted reward under the target policy.

    As biased as the predictions, which should come from other rows than these. The interval knows nothing of that bias.

    Args:
      predictions: predicted reward q(x, a) of every action.
      target_probabilities: the target policy's; each row sums to 1.

    Raises:
      RecJaxError: sizes that do not fit, a number that is not finite, rows of probabilities that do not sum to 1.

    Reference: Dudik, Langford and Li 2011, Doubly robust policy evaluation and learning, section 2.
    """
    q, pi = _policy(predictions, target_probabilities)
    ones = np.ones(len(q))
    return _estimate(np.einsum("ba,ba->b", pi, q), None, ones, ones, interval)


def doubly_robust(
    rewards: Array,
    actions: Array,
    propensities: Array,
    predictions: Array,
    target_probabilities: Array,
    *,
    cap: float | None = None,
    interval: Interval = NORMAL,
) -> Estimate:
    """rewards, actions, propensities [B], predictions, target_probabilities [B, A] -> Estimate: `direct_method` and weighted residuals.

    Unbiased where the propensities are true, whatever the predictions (which must come from other rows), and where the predictions are
    true, whatever the propensities.

    Args:
      actions: [B] int, the logged action, a column of the [B, A].
      cap: the largest weight; None = no cap. With a cap the residuals are biased.
      rewards, propensities: as in `ips`; predictions, target_probabilities: as in `direct_method`.

    Raises:
      RecJaxError: as in `ips` and `direct_method`; an action that is no column.

    Reference: Dudik, Langford and Li 2011, Doubly robust policy evaluation and learning, section 2.
    """
    q, pi = _policy(predictions, target_probabilities)
    rewards, weights = _weighted(rewards, probability_of(target_probabilities, actions), propensities)
    used = weights
    if cap is not None:
        _check_cap(cap)
        used = np.minimum(weights, cap)
    residual = rewards - q[np.arange(len(q)), np.asarray(actions)]
    return _estimate(np.einsum("ba,ba->b", pi, q) + used * residual, None, used, weights, interval)


def probability_of(probabilities: Array, actions: Array) -> np.ndarray:
    """probabilities [B, A], actions [B] int -> [B]: the probability of each row's action.

    Raises:
      RecJaxError: sizes that do not fit, an action that is no column.
    """
    probabilities, actions = np.asarray(probabilities, np.float64), np.asarray(actions)
    if probabilities.ndim != 2 or actions.shape != probabilities.shape[:1] or not np.issubdtype(actions.dtype, np.integer):
        raise RecJaxError(
            f"probabilities {probabilities.shape}, actions {actions.shape} {actions.dtype}: expected [B, A] and whole numbers [B]"
        )
    bad = (actions < 0) | (actions >= probabilities.shape[1])
    if bad.any():
        row = int(np.argmax(bad))
        raise RecJaxError(f"row {row} took action {actions[row]}; there are 0 to {probabilities.shape[1] - 1}")
    return probabilities[np.arange(len(actions)), actions]


def effective_sample_size(weights: Array) -> float:
    """weights [B] -> (sum of weights)^2 / sum of squared weights; B where all are equal, 0 where all are 0.

    Reference: Kish 1965, Survey sampling (the design effect of weights).
    """
    weights = np.asarray(weights, np.float64)
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def _estimate(terms: np.ndarray, divisors: np.ndarray | None, used: np.ndarray, weights: np.ndarray, interval: Interval) -> Estimate:
    """Estimate of mean(terms), or of sum(terms) / sum(divisors); `used` are the weights after a cap, `weights` those before."""
    n = len(terms)
    if divisors is None:
        value = float(terms.mean())
        error = float(terms.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    else:
        value = float(terms.sum() / divisors.sum())
        error = float(np.sqrt(((terms - value * divisors) ** 2).sum()) / divisors.sum())
    if interval.kind == "normal":
        half = float(scipy.special.ndtri((1 + interval.level) / 2)) * error
        low, high = value - half, value + half
    else:
        low, high = _bootstrap(terms, divisors, interval)
    return Estimate(value, error, low, high, effective_sample_size(used), float(weights.mean()))


def _bootstrap(terms: np.ndarray, divisors: np.ndarray | None, interval: Interval) -> tuple[float, float]:
    random, n = np.random.default_rng(interval.seed), len(terms)
    drawn = np.empty(interval.draws)
    for draw in range(interval.draws):
        rows = random.integers(0, n, n)
        total = n if divisors is None else divisors[rows].sum()
        # A draw without weight says nothing; NaN, and left out of the quantiles.
        drawn[draw] = terms[rows].sum() / total if total > 0 else np.nan
    low, high = np.nanquantile(drawn, [(1 - interval.level) / 2, (1 + interval.level) / 2])
    return float(low), float(high)


def _weighted(rewards: Array, target: Array, propensities: Array) -> tuple[np.ndarray, np.ndarray]:
    """Checked -> (rewards [B], importance weights [B])."""
    rewards, target, propensities = (np.asarray(x, np.float64) for x in (rewards, target, propensities))
    if rewards.ndim != 1 or not rewards.shape == target.shape == propensities.shape or not len(rewards):
        raise RecJaxError(
            f"rewards {rewards.shape}, target {target.shape}, propensities {propensities.shape}: expected one [B] each, B > 0"
        )
    for name, values, good, expected in (
        ("reward", rewards, np.isfinite(rewards), "a finite number"),
        ("propensity", propensities, (propensities > 0) & (propensities <= 1), "above 0 and at most 1, the probability of what was done"),
        ("target probability", target, (target >= 0) & (target <= 1 + 1e-6), "a probability"),
    ):
        if not good.all():
            row = int(np.argmin(good))
            raise RecJaxError(f"row {row} has {name} {values[row]} ({int((~good).sum())} such of {len(good)}); expected {expected}")
    return rewards, target / propensities


def _policy(predictions: Array, target_probabilities: Array) -> tuple[np.ndarray, np.ndarray]:
    q, pi = np.asarray(predictions, np.float64), np.asarray(target_probabilities, np.float64)
    if q.ndim != 2 or q.shape != pi.shape or not q.size:
        raise RecJaxError(f"predictions {q.shape}, target_probabilities {pi.shape}: expected [B, A] both, B > 0")
    if not np.isfinite(q).all():
        raise RecJaxError(f"row {int(np.argmin(np.isfinite(q).all(1)))} of predictions has a number that is not finite")
    good = (pi >= 0).all(1) & (np.abs(pi.sum(1) - 1) <= 1e-4)
    if not good.all():
        row = int(np.argmin(good))
        raise RecJaxError(
            f"row {row} of target_probabilities sums to {pi[row].sum():.6g} (smallest {pi[row].min():.3g}); expected probabilities"
        )
    return q, pi


def _check_cap(cap: float) -> None:
    if not cap > 0:
        raise RecJaxError(f"cap is {cap!r}; expected a weight above 0")
