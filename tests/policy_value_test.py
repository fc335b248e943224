"""Estimators of a policy's value against naive forms and against each other where they must agree; `bandit_test.py` has the true values."""

from __future__ import annotations

import dataclasses
import math

import bandit
import numpy as np
import pytest
import scipy.stats

from rec_jax.eval import policy_value
from rec_jax.eval.policy_value import Interval
from rec_jax.types import RecJaxError

WORLD = bandit.make(3)
LOGS = WORLD.draw(400, seed=0)
POLICY = bandit.better(WORLD)[LOGS.contexts]  # [B, A]
TARGET = policy_value.probability_of(POLICY, LOGS.actions)
GUESS = np.random.default_rng(0).random(POLICY.shape)  # poor predictions


def test_naive_forms():
    weights = [t / p for t, p in zip(TARGET, LOGS.propensities, strict=True)]
    terms = [w * r for w, r in zip(weights, LOGS.rewards, strict=True)]
    n = len(terms)
    plain = policy_value.ips(LOGS.rewards, TARGET, LOGS.propensities)
    assert plain.value == pytest.approx(sum(terms) / n, rel=1e-12)
    variance = sum((t - sum(terms) / n) ** 2 for t in terms) / (n - 1)
    assert plain.standard_error == pytest.approx(math.sqrt(variance / n), rel=1e-12)
    z = scipy.stats.norm.ppf(0.975)
    assert (plain.low, plain.high) == pytest.approx((plain.value - z * plain.standard_error, plain.value + z * plain.standard_error))
    assert plain.effective_sample_size == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-12)
    assert plain.mean_weight == pytest.approx(sum(weights) / n, rel=1e-12)

    clipped = policy_value.clipped_ips(LOGS.rewards, TARGET, LOGS.propensities, cap=2)
    assert clipped.value == pytest.approx(sum(min(w, 2) * r for w, r in zip(weights, LOGS.rewards, strict=True)) / n, rel=1e-12)
    assert clipped.mean_weight == plain.mean_weight
    assert clipped.effective_sample_size > plain.effective_sample_size

    ratio = policy_value.snips(LOGS.rewards, TARGET, LOGS.propensities)
    value = sum(terms) / sum(weights)
    assert ratio.value == pytest.approx(value, rel=1e-12)
    squares = sum(w * w * (r - value) ** 2 for w, r in zip(weights, LOGS.rewards, strict=True))
    assert ratio.standard_error == pytest.approx(math.sqrt(squares) / sum(weights), rel=1e-12)

    direct = [sum(p * q for p, q in zip(*row, strict=True)) for row in zip(POLICY, GUESS, strict=True)]
    assert policy_value.direct_method(GUESS, POLICY).value == pytest.approx(sum(direct) / n, rel=1e-12)
    rows = zip(direct, weights, LOGS.rewards, LOGS.actions, GUESS, strict=True)
    robust = sum(d + w * (r - q[a]) for d, w, r, a, q in rows) / n
    got = policy_value.doubly_robust(LOGS.rewards, LOGS.actions, LOGS.propensities, GUESS, POLICY)
    assert got.value == pytest.approx(robust, rel=1e-12)


def test_values_by_hand():
    rewards, target, propensities = np.array([1, 0, 1]), np.array([0.5, 0.2, 0.1]), np.array([0.25, 0.4, 0.1])  # weights 2, 1/2, 1
    assert policy_value.ips(rewards, target, propensities).value == 1
    assert policy_value.snips(rewards, target, propensities).value == pytest.approx(3 / 3.5)
    assert policy_value.clipped_ips(rewards, target, propensities, cap=1).value == pytest.approx(2 / 3)
    assert policy_value.effective_sample_size(np.array([2, 0.5, 1])) == pytest.approx(3.5**2 / 5.25)
    assert policy_value.effective_sample_size(np.zeros(3)) == 0


def test_where_estimators_must_agree():
    own = policy_value.ips(LOGS.rewards, LOGS.propensities, LOGS.propensities)  # the logging policy itself
    assert own.value == pytest.approx(LOGS.rewards.mean())
    assert own.effective_sample_size == pytest.approx(len(LOGS.rewards))
    plain = policy_value.ips(LOGS.rewards, TARGET, LOGS.propensities)
    assert policy_value.clipped_ips(LOGS.rewards, TARGET, LOGS.propensities, cap=1e9) == plain
    nothing = policy_value.doubly_robust(LOGS.rewards, LOGS.actions, LOGS.propensities, np.zeros(POLICY.shape), POLICY)
    assert dataclasses.astuple(nothing) == pytest.approx(dataclasses.astuple(plain))
    capped = policy_value.doubly_robust(LOGS.rewards, LOGS.actions, LOGS.propensities, GUESS, POLICY, cap=1e-12)
    assert capped.value == pytest.approx(policy_value.direct_method(GUESS, POLICY).value)
    shifted = policy_value.snips(LOGS.rewards + 5, TARGET, LOGS.propensities)
    assert shifted.value == pytest.approx(policy_value.snips(LOGS.rewards, TARGET, LOGS.propensities).value + 5)


def test_bootstrap_interval_is_seeded_and_near_the_normal_one():
    for estimate in (policy_value.ips, policy_value.snips):
        normal = estimate(LOGS.rewards, TARGET, LOGS.propensities)
        drawn = estimate(LOGS.rewards, TARGET, LOGS.propensities, interval=Interval("bootstrap", draws=2000, seed=1))
        assert drawn == estimate(LOGS.rewards, TARGET, LOGS.propensities, interval=Interval("bootstrap", draws=2000, seed=1))
        assert drawn != estimate(LOGS.rewards, TARGET, LOGS.propensities, interval=Interval("bootstrap", draws=2000, seed=2))
        assert (drawn.value, drawn.standard_error) == (normal.value, normal.standard_error)
        width = normal.high - normal.low
        assert abs(drawn.low - normal.low) < 0.1 * width
        assert abs(drawn.high - normal.high) < 0.1 * width
        narrow = estimate(LOGS.rewards, TARGET, LOGS.propensities, interval=Interval(level=0.5))
        assert narrow.high - narrow.low == pytest.approx(width * scipy.stats.norm.ppf(0.75) / scipy.stats.norm.ppf(0.975))


def test_one_row_has_no_standard_error():
    assert policy_value.ips(np.ones(1), np.ones(1), np.ones(1)).standard_error == math.inf


@pytest.mark.parametrize("propensity", [0.0, -0.1, 1.5, math.nan])
def test_a_propensity_that_is_none_is_refused(propensity):
    bad = LOGS.propensities.copy()
    bad[[7, 9]] = propensity
    for estimate in (policy_value.ips, policy_value.snips):
        with pytest.raises(RecJaxError, match=r"row 7 has propensity .*2 such of 400.*above 0 and at most 1"):
            estimate(LOGS.rewards, TARGET, bad)
    with pytest.raises(RecJaxError, match="row 7 has propensity"):
        policy_value.doubly_robust(LOGS.rewards, LOGS.actions, bad, GUESS, POLICY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy_value.ips(np.ones(3), np.ones(2), np.ones(3)), r"rewards \(3,\), target \(2,\)"),
        (lambda: policy_value.ips(np.ones(0), np.ones(0), np.ones(0)), "B > 0"),
        (lambda: policy_value.ips(np.array([np.nan]), np.ones(1), np.ones(1)), "row 0 has reward nan"),
        (lambda: policy_value.ips(np.ones(1), np.array([1.1]), np.ones(1)), "row 0 has target probability 1.1"),
        (lambda: policy_value.clipped_ips(np.ones(1), np.ones(1), np.ones(1), cap=0), "cap is 0"),
        (lambda: policy_value.snips(np.ones(1), np.zeros(1), np.ones(1)), "none of the 1 logged actions"),
        (
            lambda: policy_value.direct_method(np.ones((2, 2)), np.array([[0.5, 0.5], [0.5, 0.4]])),
            "row 1 of target_probabilities sums to 0.9",
        ),
        (lambda: policy_value.direct_method(np.ones((2, 3)), np.ones((2, 2))), r"\(2, 3\), target_probabilities \(2, 2\)"),
        (lambda: policy_value.direct_method(np.array([[0, 0], [0, np.inf]]), np.full((2, 2), 0.5)), "row 1 of predictions"),
        (lambda: policy_value.probability_of(np.ones((2, 3)), np.array([0, 3])), "row 1 took action 3; there are 0 to 2"),
        (lambda: policy_value.probability_of(np.ones((2, 3)), np.array([0.0, 1.0])), "whole numbers"),
        (lambda: Interval("exact"), "there are normal, bootstrap"),
        (lambda: Interval(level=95), "level=95"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(RecJaxError, match=message):
        call()
