"""Metrics of single predictions against values by hand, against brute force, and against scikit-learn where it is installed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rec_jax.eval import pointwise_metrics as metrics
from rec_jax.types import RecJaxError


def sample(seed: int, n: int = 300):
    """Probabilities with many ties, labels that follow them with some unobserved, users, weights with some zeros."""
    random = np.random.default_rng(seed)
    p = np.round(random.beta(1.2, 3, n), 2)
    labels = (random.random(n) < p**1.3).astype(float)
    labels[random.random(n) < 0.1] = np.nan
    return p, labels, random.integers(0, 25, n), random.choice([0, 0.5, 1, 3], n)


def auc_by_pairs(scores, labels, weights):
    won = total = 0.0
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if labels[i] == 1 and labels[j] == 0:
            total += weights[i] * weights[j]
            won += weights[i] * weights[j] * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
    return won / total if total else math.nan


def test_values_by_hand():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 1, 0, 1])
    assert metrics.auc(scores, labels) == 3.5 / 4
    assert metrics.log_loss(np.array([0.5, 0.25]), np.array([1, 0])) == pytest.approx((math.log(2) - math.log(0.75)) / 2, rel=1e-14)
    rate = np.full(4, 0.25)
    assert metrics.normalized_entropy(rate, np.array([1, 0, 0, 0])) == pytest.approx(1, rel=1e-14)
    # Bins (0, .5] and (.5, 1]: |.2 - 0| with weight 1/4, |.75 - 1/3| with 3/4.
    p, y = np.array([0.2, 0.6, 0.8, 0.85]), np.array([0, 0, 0, 1])
    assert metrics.calibration_error(p, y, bins=2) == pytest.approx(0.2 / 4 + (0.75 - 1 / 3) * 3 / 4, rel=1e-14)
    # Equal mass: {.2, .6} and {.8, .85}.
    assert metrics.calibration_error(p, y, bins=2, equal="mass") == pytest.approx(0.4 / 2 + (0.825 - 0.5) / 2, rel=1e-14)
    assert metrics.calibration_ratio(p, y) == pytest.approx(2.45, rel=1e-14)
    assert metrics.rmse(np.array([1.0, 4.0]), np.array([1, 2])) == pytest.approx(math.sqrt(2), rel=1e-14)
    assert metrics.mae(np.array([1.0, 4.0]), np.array([1, 2])) == 1
    grouped = metrics.gauc(np.array([1, 2, 3, 1, 2, 5.0]), np.array([0, 1, 0, 1, 0, 1]), np.array(["a", "a", "a", "b", "b", "c"]))
    assert grouped.value == pytest.approx((3 * 0.5 + 2 * 0) / 5)
    assert (list(grouped.users), list(grouped.per_user), list(grouped.impressions)) == (["a", "b"], [0.5, 0], [3, 2])
    assert grouped.left_out == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_against_brute_force(seed, weighted):
    p, y, users, w = sample(seed, 150)
    w = w if weighted else np.ones(len(p))
    given = {"weights": w} if weighted else {}
    seen = ~np.isnan(y)
    ps, ys, us, ws = p[seen], y[seen], users[seen], w[seen]
    assert metrics.auc(p, y, **given) == pytest.approx(auc_by_pairs(ps, ys, ws), rel=1e-12)
    each = {u: (auc_by_pairs(ps[us == u], ys[us == u], ws[us == u]), ws[us == u].sum()) for u in np.unique(us)}
    both = {u: v for u, v in each.items() if not math.isnan(v[0])}
    grouped = metrics.gauc(p, y, users, **given)
    assert grouped.value == pytest.approx(sum(a * n for a, n in both.values()) / sum(n for _, n in both.values()), rel=1e-12)
    assert list(grouped.users) == list(both)
    np.testing.assert_allclose(grouped.per_user, [a for a, _ in both.values()], rtol=1e-12)
    assert grouped.left_out == len(each) - len(both) > 0
    loss = 0.0
    for q, label, weight in zip(ps, ys, ws, strict=True):
        q = min(max(q, metrics.EPSILON), 1 - metrics.EPSILON)
        loss -= weight * math.log(q if label else 1 - q) / ws.sum()
    rate = (ws * ys).sum() / ws.sum()
    assert metrics.log_loss(p, y, **given) == pytest.approx(loss, rel=1e-12)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert metrics.normalized_entropy(p, y, **given) == pytest.approx(loss / entropy, rel=1e-12)
    error = 0.0
    for low in np.arange(5) / 5:
        place = (ps > low) & (ps <= low + 0.2 + 1e-9) | ((ps == 0) & (low == 0))
        if ws[place].sum():
            error += abs((ws[place] * (ps[place] - ys[place])).sum()) / ws.sum()
    assert metrics.calibration_error(p, y, bins=5, **given) == pytest.approx(error, rel=1e-9)
    assert metrics.calibration_ratio(p, y, **given) == pytest.approx((ws * ps).sum() / (ws * ys).sum(), rel=1e-12)
    assert metrics.rmse(p, y, **given) == pytest.approx(math.sqrt((ws * (ps - ys) ** 2).sum() / ws.sum()), rel=1e-12)
    assert metrics.mae(p, y, **given) == pytest.approx((ws * abs(ps - ys)).sum() / ws.sum(), rel=1e-12)


def test_a_whole_weight_is_that_many_examples():
    p, y, users, _ = sample(5)
    times = np.random.default_rng(5).integers(0, 4, len(p))
    again = [np.repeat(x, times) for x in (p, y, users)]
    for equal in metrics.BINNINGS:
        weighted = metrics.calibration_error(p, y, equal=equal, weights=times)
        assert weighted == pytest.approx(metrics.calibration_error(*again[:2], equal=equal), rel=1e-12)
    assert metrics.gauc(p, y, users, weights=times).value == pytest.approx(metrics.gauc(*again).value, rel=1e-12)


def test_equal_mass_bins_hold_equal_shares_and_never_split_equal_probabilities():
    p = np.random.default_rng(0).permutation(1000) / 1000
    y = np.zeros(1000)
    by_bin = np.sort(p).reshape(10, 100)
    assert metrics.calibration_error(p, y, equal="mass") == pytest.approx(by_bin.mean(1).mean(), rel=1e-12)
    constant = np.full(10, 0.5)
    assert metrics.calibration_error(constant, np.arange(10) % 2, equal="mass") == 0
    assert metrics.calibration_error(constant, np.arange(10) % 2, bins=3) == 0


def test_calibration_error_of_calibrated_predictions_is_small():
    random = np.random.default_rng(1)
    p = random.random(200_000)
    y = random.random(200_000) < p
    for equal in metrics.BINNINGS:
        assert metrics.calibration_error(p, y, equal=equal) < 0.006
        assert metrics.calibration_error(p**2, y, equal=equal) > 0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_same_as_scikit_learn(weighted):
    pytest.importorskip("sklearn")
    from sklearn import calibration
    from sklearn import metrics as theirs

    for seed in range(5):
        p, y, _, w = sample(seed, 2000)
        seen = ~np.isnan(y)
        ps, ys = np.clip(p[seen], 1e-6, 1 - 1e-6), y[seen]
        ours, sk = ({"weights": w}, {"sample_weight": w[seen]}) if weighted else ({}, {})
        assert metrics.auc(p, y, **ours) == pytest.approx(theirs.roc_auc_score(ys, ps, **sk), rel=1e-10)
        p = np.clip(p, 1e-6, 1 - 1e-6)
        loss = theirs.log_loss(ys, ps, **sk)
        assert metrics.log_loss(p, y, **ours) == pytest.approx(loss, rel=1e-10)
        base = theirs.log_loss(ys, np.full(len(ys), np.average(ys, weights=sk.get("sample_weight"))), **sk)
        assert metrics.normalized_entropy(p, y, **ours) == pytest.approx(loss / base, rel=1e-10)
        assert metrics.rmse(p, y, **ours) == pytest.approx(theirs.root_mean_squared_error(ys, ps, **sk), rel=1e-10)
        assert metrics.mae(p, y, **ours) == pytest.approx(theirs.mean_absolute_error(ys, ps, **sk), rel=1e-10)
    if weighted:
        return  # its calibration curve takes no weights
    random = np.random.default_rng(9)
    p = random.random(2000)
    y = (random.random(2000) < p**2).astype(float)
    for equal, strategy in (("width", "uniform"), ("mass", "quantile")):
        observed, predicted = calibration.calibration_curve(y, p, n_bins=8, strategy=strategy)
        edges = np.linspace(0, 1, 9) if equal == "width" else np.quantile(p, np.linspace(0, 1, 9))
        share = np.histogram(p, edges)[0] / 2000
        want = (share * abs(observed - predicted)).sum()
        assert metrics.calibration_error(p, y, bins=8, equal=equal) == pytest.approx(want, rel=1e-10)


def test_gauc_is_the_weighted_mean_of_scikit_learns_aucs():
    theirs = pytest.importorskip("sklearn.metrics")
    p, y, users, _ = sample(7, 2000)
    seen = ~np.isnan(y)
    p, y, users = p[seen], y[seen], users[seen]
    values = [theirs.roc_auc_score(y[users == u], p[users == u]) for u in np.unique(users)]
    counts = [(users == u).sum() for u in np.unique(users)]
    assert metrics.gauc(p, y, users).value == pytest.approx(np.average(values, weights=counts), rel=1e-10)


def test_binary_metrics_takes_logits_and_survives_extreme_ones():
    logits = np.array([-800, -3, 0, 2, 800], np.float32)
    labels, users = np.array([0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 1])
    values = metrics.binary_metrics(logits, labels, users=users)
    p = 1 / (1 + np.exp(-logits[1:4].astype(float)))
    want = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(p[2])) / 5
    assert values["log_loss"] == pytest.approx(want, rel=1e-12)
    assert values["auc"] == pytest.approx(5 / 6)
    assert values["gauc"] == 1
    assert values["gauc_users"] == 2
    assert values["calibration_ratio"] == pytest.approx((p.sum() + 1) / 3)
    assert all(isinstance(v, float) for v in values.values())
    assert set(metrics.binary_metrics(logits, labels)) == set(values) - {"gauc", "gauc_users"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc(np.ones(3), np.ones(3)), "3 observed labels, all of one class"),
        (lambda: metrics.auc(np.ones(3), np.array([0, 1, 1]), weights=np.array([0, 1, 1])), "all of one class"),
        (lambda: metrics.auc(np.ones(3), np.array([0, 1, 2])), "label 2.0: expected 0, 1 or NaN"),
        (lambda: metrics.auc(np.array([0, np.nan]), np.array([0, 1])), "example 1 has nan .* finite prediction"),
        (lambda: metrics.auc(np.ones(3), np.ones(2)), r"predictions \(3,\), labels \(2,\)"),
        (lambda: metrics.gauc(np.ones(3), np.array([0, 1, 1]), np.arange(3)), "none of 3 users"),
        (lambda: metrics.gauc(np.ones(3), np.array([0, 1, 1]), np.arange(2)), r"users has shape \(2,\)"),
        (lambda: metrics.log_loss(np.array([1.5]), np.array([1])), "probabilities has 1.5"),
        (lambda: metrics.log_loss(np.array([0.5]), np.array([-1])), "labels has -1"),
        (lambda: metrics.log_loss(np.array([0.5]), np.array([np.nan])), "none of 1 labels was observed"),
        (lambda: metrics.mae(np.array([0.5]), np.array([1]), weights=np.array([-1])), "example 0 has -1.0 .* finite weight >= 0"),
        (lambda: metrics.normalized_entropy(np.array([0.5]), np.array([1])), "labels' mean is 1"),
        (lambda: metrics.calibration_error(np.array([0.5]), np.array([1]), bins=0), "bins is 0"),
        (lambda: metrics.calibration_error(np.array([0.5]), np.array([1]), equal="count"), "it takes width, mass"),
        (lambda: metrics.calibration_ratio(np.array([0.5]), np.array([0])), "sum is 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(RecJaxError, match=message):
        call()
