"""Click baselines: against naive forms and scikit-learn, and on data whose structure is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize

from rec_jax.eval import ctr_baselines, pointwise_metrics
from rec_jax.types import RecJaxError

SIZES = (7, 5, 3)


def true_logit(fields: np.ndarray, interaction: float) -> np.ndarray:
    """A sum of the fields' effects, and `interaction` times a sign that fields 0 and 1 make together."""
    random = np.random.default_rng(0)
    effects = [random.normal(size=s) for s in SIZES]
    logit = sum(effect[column] for effect, column in zip(effects, fields.T, strict=True))
    return logit + interaction * np.where(fields[:, :2].sum(1) % 2, 1, -1)


def sample(rows: int, seed: int, *, interaction: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Fields [rows, 3] and labels drawn by the true logit."""
    random = np.random.default_rng((seed, 1))
    fields = np.stack([random.integers(0, s, rows) for s in SIZES], 1)
    return fields, (random.random(rows) < 1 / (1 + np.exp(-true_logit(fields, interaction)))).astype(np.float64)


def one_hot(fields: np.ndarray) -> np.ndarray:
    return np.concatenate([np.eye(s)[column] * (column >= 0)[:, None] for s, column in zip(SIZES, fields.T, strict=True)], 1)


def test_logistic_is_the_minimum_of_the_dense_loss():
    fields, labels = sample(200, 1)
    x = one_hot(fields)

    def loss(w):
        z = w[0] + x @ w[1:]
        return (np.logaddexp(0, z) - labels * z).sum() + 0.7 / 2 * (w[1:] ** 2).sum()

    model = ctr_baselines.fit_logistic(fields, labels, SIZES, l2=(0.7,), tolerance=1e-7)
    found = np.concatenate([[model.bias], model.linear])
    dense = scipy.optimize.minimize(loss, np.zeros(16), method="BFGS", options={"gtol": 1e-6})
    assert loss(found) <= dense.fun * (1 + 1e-8)
    np.testing.assert_allclose(found, dense.x, atol=2e-3)
    np.testing.assert_allclose(model(fields), 1 / (1 + np.exp(-(found[0] + x @ found[1:]))), rtol=1e-12)
    assert (model.l2, model.valid_log_loss, model.factors.shape) == (0.7, {}, (15, 0))


def test_logistic_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    fields, labels = sample(500, 2)
    for l2 in (0.1, 1.0, 20.0):
        theirs = linear_model.LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(one_hot(fields), labels)
        ours = ctr_baselines.fit_logistic(fields, labels, SIZES, l2=(l2,), tolerance=1e-7)
        np.testing.assert_allclose(ours(fields), theirs.predict_proba(one_hot(fields))[:, 1], atol=2e-4)


def test_the_usual_tolerance_moves_no_probability_by_more_than_a_thousandth():
    fields, labels = sample(2000, 2)
    usual, exact = (ctr_baselines.fit_logistic(fields, labels, SIZES, l2=(1.0,), **options) for options in ({}, {"tolerance": 1e-7}))
    assert np.abs(usual(fields) - exact(fields)).max() < 1e-3


def test_penalty_with_the_lowest_validation_loss_is_taken():
    fields, labels = sample(120, 3)
    valid = sample(400, 4)
    grid = (0.01, 1.0, 100.0)
    model = ctr_baselines.fit_logistic(fields, labels, SIZES, valid=valid, l2=grid, tolerance=1e-7)
    alone = {l2: ctr_baselines.fit_logistic(fields, labels, SIZES, l2=(l2,), tolerance=1e-7) for l2 in grid}
    losses = {l2: pointwise_metrics.log_loss(m(valid[0]), valid[1]) for l2, m in alone.items()}
    assert model.l2 == min(losses, key=losses.get) == 1.0
    assert model.valid_log_loss == pytest.approx(losses, abs=1e-5)
    np.testing.assert_allclose(model(valid[0]), alone[1.0](valid[0]), atol=1e-3)


def test_machine_finds_an_interaction_that_the_regression_cannot():
    train, valid, test = (sample(n, seed, interaction=2.5) for n, seed in ((4000, 5), (1000, 6), (4000, 7)))
    logistic = ctr_baselines.fit_logistic(*train, SIZES, valid=valid)
    machine = ctr_baselines.fit_fm(*train, SIZES, valid=valid, dim=4, batch_size=256, l2=(0.3, 3.0))
    score = {name: pointwise_metrics.auc(m(test[0]), test[1]) for name, m in (("logistic", logistic), ("machine", machine))}
    best = pointwise_metrics.auc(true_logit(test[0], 2.5), test[1])
    assert score["logistic"] < best - 0.15
    assert score["machine"] > best - 0.01
    assert set(machine.valid_log_loss) == {0.3, 3.0}
    assert min(machine.valid_log_loss.values()) == pytest.approx(pointwise_metrics.log_loss(machine(valid[0]), valid[1]), rel=1e-9)
    again = ctr_baselines.fit_fm(*train, SIZES, valid=valid, dim=4, batch_size=256, l2=(0.3, 3.0))
    np.testing.assert_array_equal(again(test[0]), machine(test[0]))
    other = ctr_baselines.fit_fm(*train, SIZES, valid=valid, dim=4, batch_size=256, l2=(0.3, 3.0), seed=1)
    assert np.abs(other(test[0]) - machine(test[0])).max() > 1e-6


def test_without_an_interaction_the_machine_is_no_better():
    train, valid, test = (sample(n, seed) for n, seed in ((4000, 5), (1000, 6), (4000, 7)))
    logistic = ctr_baselines.fit_logistic(*train, SIZES, valid=valid)
    machine = ctr_baselines.fit_fm(*train, SIZES, valid=valid, dim=4, batch_size=256, l2=(3.0,))
    loss = [pointwise_metrics.log_loss(m(test[0]), test[1]) for m in (logistic, machine)]
    assert loss[0] < loss[1] < loss[0] + 0.02


def random_model(seed: int, dim: int) -> ctr_baselines.ClickModel:
    random = np.random.default_rng(seed)
    return ctr_baselines.ClickModel(SIZES, random.normal(), random.normal(size=15), random.normal(size=(15, dim)), 1.0, {})


def test_logits_are_the_sum_over_pairs():
    model = random_model(0, 3)
    fields = np.array([[6, 0, 2], [-1, 4, 1], [3, -1, -1], [-1, -1, -1]])
    want = []
    for row in fields:
        places = [offset + c for offset, c in zip((0, 7, 12), row, strict=True) if c >= 0]
        pairs = sum(model.factors[i] @ model.factors[j] for i, j in itertools.combinations(places, 2))
        want.append(model.bias + sum(model.linear[places]) + pairs)
    np.testing.assert_allclose(model.logits(fields), want, rtol=1e-12)


def test_one_epoch_on_one_batch_is_a_step_of_adam_down_the_penalised_loss():
    """Adam's first step goes learning_rate against the gradient's sign, whose values are those of finite differences."""
    fields, labels = sample(64, 8)
    fields[::5, 1] = -1
    options = {"valid": (fields, labels), "dim": 2, "l2": (0.5,), "learning_rate": 1e-3, "max_epochs": 1}
    model = ctr_baselines.fit_fm(fields, labels, SIZES, **options)
    start = np.random.default_rng((0, 0)).normal(scale=0.01, size=(15, 2))
    before = np.concatenate([np.zeros((15, 1)), start], 1).astype(np.float32).astype(np.float64)

    def loss(table):
        z = ctr_baselines.ClickModel(SIZES, 0.0, table[:, 0], table[:, 1:], 0.5, {}).logits(fields)
        return (np.logaddexp(0, z) - labels * z).mean() + 0.5 / 2 / 64 * (table**2).sum()

    after = np.concatenate([model.linear[:, None], model.factors], 1)
    checked = 0
    for place in np.ndindex(before.shape):
        nudge = np.zeros_like(before)
        nudge[place] = 1e-4
        slope = (loss(before + nudge) - loss(before - nudge)) / 2e-4
        if abs(slope) > 1e-5:
            assert after[place] - before[place] == pytest.approx(-1e-3 * np.sign(slope), rel=0.01)
            checked += 1
    assert checked > 30


def test_rows_whose_label_was_not_observed_do_not_count_and_an_unseen_category_weighs_nothing():
    fields, labels = sample(300, 9)
    fields[fields[:, 0] == 6, 0] = 5
    missing = np.where(np.arange(300) % 3, labels, np.nan)
    kept = ~np.isnan(missing)
    for fit, options in ((ctr_baselines.fit_logistic, {}), (ctr_baselines.fit_fm, {"dim": 2, "max_epochs": 2})):
        options |= {"l2": (1.0,), "valid": (fields, labels)}
        a = fit(fields, missing, SIZES, **options)
        b = fit(fields[kept], labels[kept], SIZES, **options)
        np.testing.assert_array_equal(a(fields), b(fields))
    model = ctr_baselines.fit_logistic(fields, labels, SIZES, l2=(1.0,))
    row = np.array([[6, 2, 1], [-1, 2, 1]])
    assert model(row)[0] == pytest.approx(model(row)[1], abs=1e-6)


FIELDS, LABELS = sample(20, 10)
VALID = (FIELDS, LABELS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS, SIZES), "`valid` rows to choose one of several by"),
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS, SIZES, l2=(0.0,)), "penalties above 0"),
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS[:-1], SIZES, l2=(1,)), r"train fields have shape \(20, 3\), labels \(19,\)"),
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS, (7, 5), l2=(1,)), "a column for each size"),
        (lambda: ctr_baselines.fit_logistic(FIELDS * 1.0, LABELS, SIZES, l2=(1,)), "float64; expected whole numbers"),
        (
            lambda: ctr_baselines.fit_logistic(FIELDS, LABELS, (7, 5, 2), l2=(1,)),
            r"train fields: row \d+ has 2 in field 2; expected 0 to 1",
        ),
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS, SIZES, valid=(FIELDS - 2, LABELS)), "valid fields: row .* or -1 for unknown"),
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS + 1, SIZES, l2=(1,)), "train labels go from 1 to 2"),
        (lambda: ctr_baselines.fit_logistic(FIELDS, LABELS * np.nan, SIZES, l2=(1,)), "none of 20 labels was observed"),
        (lambda: ctr_baselines.fit_fm(FIELDS, LABELS, SIZES, valid=VALID, dim=0), "dim=0"),
        (lambda: ctr_baselines.fit_fm(FIELDS, LABELS, SIZES, valid=VALID, l2=()), r"l2=\(\)"),
        (lambda: ctr_baselines.fit_fm(FIELDS, LABELS, SIZES, valid=VALID, learning_rate=1e30, batch_size=10), "finite validation log loss"),
        (lambda: random_model(0, 2)(FIELDS + 7), "fields: row 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(RecJaxError, match=message):
        call()
