"""Several tasks' losses as one: by hand, naive float64, tasks that were not observed, bad input."""

import float64
import jax
import numpy as np
import pytest

from rec_jax.losses import bce, fixed_weights, observed, task_means, uncertainty_weights
from rec_jax.types import RecJaxError

L = 4
THERE = np.array([True, True, False, True])
SQUARED = (False, True, True, False)


def data():
    rng = np.random.default_rng(0)
    return {"losses": np.float32(rng.random(L)), "log_variances": np.float32(rng.normal(size=L))}


def test_by_hand():
    losses = np.float32([2, 3])
    np.testing.assert_allclose(fixed_weights(losses, weights=(1, 0.5)), 3.5)  # 2 + 1.5
    # s = 0: 2 + 3 = 5. s = log 2: (2 + 3) / 2 + log 2 / 2 each. The second squared: halved once more.
    np.testing.assert_allclose(uncertainty_weights(losses, log_variances=np.zeros(2)), 5)
    s = np.full(2, np.log(2), np.float32)
    np.testing.assert_allclose(uncertainty_weights(losses, log_variances=s), 2.5 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(uncertainty_weights(losses, log_variances=s, squared=(False, True)), 1 + 0.75 + np.log(2), rtol=1e-6)
    # d/ds = -exp(-s) loss + 1/2: zero at s = log 2 loss, at s = log loss for a squared error
    best = np.log(np.float32([4, 3]))
    gradient = jax.grad(lambda s: uncertainty_weights(losses, log_variances=s, squared=(False, True)))(best)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("there", [None, THERE])
def test_equal_naive_float64(there):
    kept = range(L) if there is None else np.flatnonzero(there)

    def naive(losses, log_variances):
        return sum((0.5 if SQUARED[i] else 1) * losses[i] / np.exp(log_variances[i]) + log_variances[i] / 2 for i in kept)

    float64.assert_equal(
        lambda losses, log_variances: uncertainty_weights(losses, log_variances=log_variances, squared=SQUARED, observed=there),
        naive,
        data(),
    )
    weights = (0.5, 1, 2, 0)
    float64.assert_equal(
        lambda losses: fixed_weights(losses, weights=weights, observed=there),
        lambda losses: sum(weights[i] * losses[i] for i in kept),
        {"losses": data()["losses"]},
    )


def test_a_task_that_was_not_observed_adds_nothing_at_all():
    losses, log_variances = data().values()
    losses = np.where(THERE, losses, np.nan).astype(np.float32)

    def total(losses, log_variances):
        return uncertainty_weights(losses, log_variances=log_variances, observed=THERE) + fixed_weights(
            losses, weights=np.ones(L), observed=THERE
        )

    value, (d_losses, d_log_variances) = jax.value_and_grad(total, (0, 1))(losses, log_variances)
    kept = losses[THERE]
    want = uncertainty_weights(kept, log_variances=log_variances[THERE]) + fixed_weights(kept, weights=np.ones(3))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert d_losses[2] == d_log_variances[2] == 0
    nothing = jax.grad(lambda s: uncertainty_weights(losses, log_variances=s, observed=np.zeros(L, bool)))(log_variances)
    np.testing.assert_array_equal(nothing, 0)


def test_means_go_over_what_was_observed():
    nan = np.nan
    labels = np.float32([[1, nan, 0], [0, nan, nan], [nan, nan, 1]])
    logits = np.float32([[0, 1, 2], [3, 4, 5], [nan, 6, -1]])
    weights = observed(labels) * np.float32([[1], [3], [2]])
    means, there = task_means(bce(logits, labels), weights)
    # (log 2 + 3 softplus(3)) / 4 over the first two rows; nothing; (softplus(2) + 2 softplus(1)) / 3
    softplus = lambda x: np.log1p(np.exp(x))
    np.testing.assert_allclose(means, [(np.log(2) + 3 * softplus(3)) / 4, 0, (softplus(2) + 2 * softplus(1)) / 3], rtol=1e-6)
    np.testing.assert_array_equal(there, [True, False, True])
    # a NaN loss under weight 0, and leading axes [G, Q]
    losses = np.float32([[1, nan], [3, nan]])
    again, _ = task_means(losses.reshape(2, 1, 2), np.float32([[1, 0], [1, 0]]).reshape(2, 1, 2))
    np.testing.assert_array_equal(again, [2, 0])
    gradient = jax.grad(lambda x: task_means(x, np.float32([[1, 0], [1, 0]]))[0].sum())(losses)
    np.testing.assert_array_equal(gradient, [[0.5, 0], [0.5, 0]])

    wide = np.float32(np.random.default_rng(0).random((5, L)))
    float64.assert_equal(
        lambda losses: task_means(losses, wide)[0],
        lambda losses: (wide * losses).sum(0) / wide.sum(0, dtype=np.float64),
        {"losses": wide + 1},
    )


ONES = np.ones(2, np.float32)
BAD = {
    "means": (lambda: task_means(np.ones((3, 2)), np.ones((3, 1))), r"losses has shape \(3, 2\) and weights \(3, 1\)"),
    "losses": (lambda: fixed_weights(np.ones((3, 2)), weights=ONES), r"losses has shape \(3, 2\); expected \[L\]"),
    "weights": (lambda: fixed_weights(ONES, weights=(1,)), r"weights has shape \(1,\); expected \(2,\), one per task"),
    "negative": (lambda: fixed_weights(ONES, weights=(1, -1)), r"weights is \(1, -1\); expected numbers >= 0"),
    "observed": (lambda: fixed_weights(ONES, weights=ONES, observed=np.ones(3, bool)), r"observed has shape \(3,\)"),
    "log_variances": (lambda: uncertainty_weights(ONES, log_variances=np.ones(3)), r"log_variances has shape \(3,\)"),
    "squared": (lambda: uncertainty_weights(ONES, log_variances=ONES, squared=(True,)), r"squared has shape \(1,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        call()
