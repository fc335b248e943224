"""Binary cross-entropy, alone and with negatives, and regression: by hand and against naive float64 forms."""

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from rec_jax.losses import bce, bce_with_negatives, calibrated_logit, gbce_weight, observed, regression, sampled_bce
from rec_jax.types import RecJaxError

B, N, K, D = 6, 15, 4, 8


def test_bce_by_hand_and_for_huge_logits():
    np.testing.assert_allclose(bce(np.float32([0, np.log(3), np.log(3)]), np.float32([1, 1, 0])), np.log([2, 4 / 3, 4]), rtol=1e-6)
    np.testing.assert_allclose(bce(np.float32([500, -500, 500, -500]), np.float32([1, 1, 0, 0])), [0, 500, 500, 0], rtol=1e-6)
    gradient = jax.grad(lambda x: bce(x, np.float32([1, 1, 0])).sum())(np.float32([500, -500, 1e30]))
    np.testing.assert_allclose(gradient, [0, -1, 1], atol=1e-6)


def test_bce_smoothing_and_positive_weight():
    x = np.linspace(-4, 4, 9)
    p = 1 / (1 + np.exp(-x))
    label = np.float32(x > 0)
    smooth = label * 0.8 + 0.1
    want = -(3 * smooth * np.log(p) + (1 - smooth) * np.log(1 - p))
    np.testing.assert_allclose(bce(np.float32(x), label, label_smoothing=0.2, positive_weight=3.0), want, rtol=1e-5)
    assert bce(jnp.bfloat16(x), label).dtype == jnp.float32


def test_bce_with_every_option_equals_naive_float64():
    rng = np.random.default_rng(0)
    label = np.float32(rng.random((3, 5)))
    label[1, 2:] = np.nan
    rate = np.linspace(0.1, 1, 5).astype(np.float32)

    def naive(logit):
        p = 1 / (1 + np.exp(-(logit - np.log(np.float64(rate)))))
        y = np.float64(label) * 0.8 + 0.1
        return np.where(np.isnan(label), 0, -3 * y * np.log(p) - 0.5 * (1 - y) * np.log(1 - p))

    options = {"label_smoothing": 0.2, "positive_weight": 3.0, "negative_weight": 0.5, "negative_rate": rate}
    float64.assert_equal(lambda logit: bce(logit, label, **options), naive, {"logit": np.float32(rng.normal(size=(3, 5)))})


def test_a_label_that_was_not_observed_has_no_loss_and_no_gradient():
    label, logit = np.float32([1, np.nan, np.nan]), np.float32([0, np.nan, np.inf])
    np.testing.assert_array_equal(observed(label), [1, 0, 0])
    for loss in (bce, regression, lambda x, y: regression(x, y, form="huber")):
        np.testing.assert_array_equal(loss(logit, label)[1:], 0)
        np.testing.assert_array_equal(jax.grad(lambda x, loss=loss: loss(x, label).sum())(logit)[1:], 0)


def test_negatives_kept_at_a_rate_give_calibrated_probabilities():
    # 1 in 10 is positive and 1 of 9 negatives is kept: among the kept half are positive. bce at rate 1/9 is best at the true log odds.
    truth, label = np.log(1 / 9), np.float32([1, 0])
    gradient = jax.grad(lambda x: bce(x, label, negative_rate=1 / 9).sum())
    np.testing.assert_allclose(gradient(np.float32(truth)), 0, atol=1e-6)
    # Without the correction the best logit is 0, to be corrected afterwards.
    np.testing.assert_allclose(jax.grad(lambda x: bce(x, label).sum())(np.float32(0)), 0, atol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(calibrated_logit(np.float32(0), negative_rate=1 / 9)), 0.1, rtol=1e-6)
    # By hand: logit 0 at rate 1/3 counts as log 3, 3/4.
    np.testing.assert_allclose(bce(np.float32([0, 0]), label, negative_rate=1 / 3), np.log([4 / 3, 4]), rtol=1e-6)

    # A logistic regression on kept negatives finds the coefficients of the full population.
    rng = np.random.default_rng(0)
    x = rng.normal(size=200_000)
    y = rng.random(x.size) < 1 / (1 + np.exp(3 - 1.2 * x))
    kept = y | (rng.random(x.size) < 0.1)
    x, y = np.float32(x[kept]), np.float32(y[kept])

    fit = jax.jit(jax.value_and_grad(lambda w: bce(w[0] + w[1] * x, y, negative_rate=0.1).mean()))
    found = minimize(lambda w: tuple(np.float64(v) for v in fit(np.float32(w))), np.zeros(2), jac=True, method="L-BFGS-B")
    np.testing.assert_allclose(found.x, [-3, 1.2], atol=0.06)


def test_regression_by_hand_and_against_naive_float64():
    # errors 0.5, -3, 0: squares; Huber with delta 2: 1/8, 2 (3 - 1), 0
    prediction, rating = np.float32([4.5, 1, 2]), np.float32([4, 4, 2])
    np.testing.assert_allclose(regression(prediction, rating), [0.25, 9, 0])
    np.testing.assert_allclose(regression(prediction, rating, form="huber", delta=2.0), [0.125, 4, 0])
    assert regression(jnp.bfloat16(prediction), rating).dtype == jnp.float32
    rng = np.random.default_rng(0)
    x, y = np.float32(3 * rng.normal(size=20)), 3 * rng.normal(size=20)
    y[3] = np.nan
    error = lambda prediction: np.where(np.isnan(y), 0, prediction - y)
    float64.assert_equal(lambda prediction: regression(prediction, y), lambda prediction: error(prediction) ** 2, {"prediction": x})

    def huber(prediction):
        e = np.abs(error(prediction))
        return np.where(e <= 1.5, e**2 / 2, 1.5 * (e - 0.75))

    float64.assert_equal(lambda prediction: regression(prediction, y, form="huber", delta=1.5), huber, {"prediction": x})
    # at the very point where it turns linear, and far beyond
    gradient = jax.grad(lambda x: regression(x, np.zeros(4), form="huber").sum())(np.float32([1, -1, 0, 1e30]))
    np.testing.assert_allclose(gradient, [1, -1, 0, 1])


def data():
    rng = np.random.default_rng(0)
    floats = {
        "query": np.float32(rng.normal(size=(B, D))),
        "item": np.float32(rng.normal(size=(N, D))),
        "scale": np.float32(1.5),
        "bias": np.float32(-0.7),
    }
    item_ids = rng.integers(0, 6, N).astype(np.int32)
    rest = {
        "target": rng.integers(0, N, B).astype(np.int32),
        "negatives": rng.integers(0, N, (B, K)).astype(np.int32),
        "item_ids": item_ids,
    }
    rest["negatives"][0, 1:] = -1
    rest["negatives"][1] = rest["target"][1]  # every negative is the target
    return floats, rest


def naive(query, item, scale, bias, *, target, negatives, item_ids=None, label_smoothing=0.0):
    """Query by query, as the words say -> list of losses."""

    def term(i, j, label):
        p = jax.nn.sigmoid(scale * query[i] @ item[j] + (bias if jnp.ndim(bias) == 0 else bias[j]))
        label = label * (1 - label_smoothing) + label_smoothing / 2
        return -label * jnp.log(p) - (1 - label) * jnp.log1p(-p)

    losses = []
    for i in range(len(query)):
        others = [j for j in negatives[i] if j >= 0 and j != target[i] and (item_ids is None or item_ids[j] != item_ids[target[i]])]
        losses.append(term(i, target[i], 1) + sum(term(i, j, 0) for j in others) / max(len(others), 1))
    return jnp.stack(losses)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("bias_per_item", [False, True])
def test_negatives_equal_naive_float64(ids, bias_per_item):
    floats, rest = data()
    if not ids:
        del rest["item_ids"]
    if bias_per_item:
        floats["bias"] = np.linspace(-1, 1, N).astype(np.float32)
    weights = np.linspace(0.5, 1, B)

    def run(function, dtype):
        def total(floats):
            losses = function(**floats, **rest, label_smoothing=0.1)
            return weights @ losses, losses

        return jax.jit(jax.value_and_grad(total, has_aux=True))({k: jnp.asarray(v, dtype) for k, v in floats.items()})

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(naive, jnp.float64))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), run(bce_with_negatives, jnp.float32), want)
    eager = bce_with_negatives(**floats, **rest, label_smoothing=0.1)
    np.testing.assert_allclose(eager, want[0][1], rtol=1e-5)


def test_padding_and_broken_indices():
    floats, rest = data()
    rest["target"][:2] = -1, N
    floats["query"][0] = np.nan
    loss = bce_with_negatives(**floats, **rest)
    assert loss[0] == 0
    assert np.isnan(loss[1])
    assert np.isfinite(loss[2:]).all()
    gradient = jax.grad(lambda q: bce_with_negatives(**(floats | {"query": q}), **rest)[jnp.r_[0, 2:B]].sum())(floats["query"])
    np.testing.assert_array_equal(gradient[0], 0)


def test_equal_query_ids_are_masked():
    floats, rest = data()
    item_ids = rest["item_ids"]
    got = bce_with_negatives(**floats, **rest, query_ids=item_ids[rest["target"]])
    np.testing.assert_array_equal(got, bce_with_negatives(**floats, **rest))
    nobody = bce_with_negatives(**floats, **rest, query_ids=np.full(B, 99))
    del rest["item_ids"]
    np.testing.assert_array_equal(nobody, bce_with_negatives(**floats, **rest))


BAD = {
    "widths": ({"item": np.zeros((N, D + 1), np.float32)}, "one width"),
    "negatives": ({"negatives": np.zeros((B, 0), np.int32)}, r"negatives has shape \(6, 0\)"),
    "target": ({"target": np.zeros(B + 1, np.int32)}, "target has shape"),
    "scale": ({"scale": np.ones(3)}, "scale has shape"),
    "bias": ({"bias": np.ones(3)}, "bias has shape"),
    "smoothing": ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
    "ids": ({"item_ids": None, "query_ids": np.zeros(B, np.int32)}, "without item_ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    floats, rest = data()
    change, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        bce_with_negatives(**(floats | rest | change))


ONE = np.zeros(1, np.float32)
BAD_OPTIONS = {
    "positive_weight": (lambda: bce(ONE, ONE, positive_weight=0), "positive_weight is 0"),
    "negative_weight": (lambda: bce(ONE, ONE, negative_weight=-1), "negative_weight is -1"),
    "rate": (lambda: bce(ONE, ONE, negative_rate=0), r"negative_rate is 0; expected the share of negatives that is kept, in \(0, 1\]"),
    "rate above 1": (lambda: calibrated_logit(ONE, negative_rate=2.0), "negative_rate is 2.0"),
    "form": (lambda: regression(ONE, ONE, form="mae"), "form is 'mae'; expected one of mse, huber"),
    "delta": (lambda: regression(ONE, ONE, form="huber", delta=0), "delta is 0; expected a number > 0"),
    "sampled shapes": (lambda: sampled_bce(ONE, ONE), r"positive has shape \(1,\) and negatives \(1,\); expected \[B\] and \[B, K\]"),
    "sampled mask": (lambda: sampled_bce(ONE, ONE[None], mask=ONE), r"mask has shape \(1,\); expected \(1, 1\)"),
    "calibration": (lambda: gbce_weight(calibration=1.5, negatives=1, items=3), "calibration is 1.5; expected gBCE's t"),
    "too many negatives": (lambda: gbce_weight(calibration=1, negatives=3, items=3), "negatives is 3 with 3 items; .* the 2 others"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_named(case):
    call, message = BAD_OPTIONS[case]
    with pytest.raises(RecJaxError, match=message):
        call()


# -- the target against drawn items, and gBCE --


def test_sampled_bce_by_hand():
    # Logits log 3 and -log 3, 0: -log 3/4, -log 3/4, -log 1/2; the mean of three terms, then of the first two.
    positive, negatives = np.float32([np.log(3), np.log(3)]), np.float32([[-np.log(3), 0]] * 2)
    mask = np.array([[True, True], [True, False]])
    a, b = np.log(4 / 3), np.log(2)
    np.testing.assert_allclose(sampled_bce(positive, negatives, mask=mask), [(2 * a + b) / 3, a], rtol=1e-6)
    # A weight of 1/2 on the target alone.
    np.testing.assert_allclose(sampled_bce(positive, negatives, mask=mask, positive_weight=0.5), [(1.5 * a + b) / 3, 0.75 * a], rtol=1e-6)


def test_the_weight_of_gbce_by_hand():
    # 3 of 9 other items: alpha = 1/3. t = 1: alpha itself; t = 0: 1; t = 1/2: 1/3 (1/2 (1 - 3) + 3) = 2/3.
    for t, beta in ((1.0, 1 / 3), (0.0, 1.0), (0.5, 2 / 3)):
        assert gbce_weight(calibration=t, negatives=3, items=10) == pytest.approx(beta)
    assert gbce_weight(calibration=1.0, negatives=9, items=10) == 1.0  # all others are negatives: nothing to correct


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_equals_naive_float64(calibration):
    rng = np.random.default_rng(0)
    mask = rng.random((B, K)) < 0.7
    mask[0], mask[1] = False, True
    alpha, t = K / (N - 1), calibration
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)

    def naive(positive, negatives):
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        terms = -np.log(sigmoid(positive) ** beta)
        return (terms + np.where(mask, -np.log(1 - sigmoid(negatives)), 0).sum(1)) / (1 + mask.sum(1))

    weight = gbce_weight(calibration=calibration, negatives=K, items=N)
    floats = {"positive": 3 * rng.normal(size=B), "negatives": 3 * rng.normal(size=(B, K))}
    float64.assert_equal(lambda positive, negatives: sampled_bce(positive, negatives, mask=mask, positive_weight=weight), naive, floats)


def test_gbce_is_safe_for_huge_logits_and_masked_places():
    weight = gbce_weight(calibration=1.0, negatives=2, items=2001)
    positive, negatives = np.float32([500, -500, 0]), np.float32([[-500, 500], [500, 500], [np.nan, np.inf]])
    mask = np.array([[True, True], [True, True], [False, False]])
    loss = lambda p, n: sampled_bce(p, n, mask=mask, positive_weight=weight)
    np.testing.assert_allclose(loss(positive, negatives), [500 / 3, (0.5 + 1000) / 3, 1e-3 * np.log(2)], rtol=1e-5)
    gradients = jax.grad(lambda p, n: loss(p, n).sum(), (0, 1))(positive, negatives)
    np.testing.assert_allclose(gradients[0], [0, -1e-3 / 3, -0.5e-3], rtol=1e-5)
    np.testing.assert_allclose(gradients[1], [[0, 1 / 3], [1 / 3, 1 / 3], [0, 0]], rtol=1e-5)


def test_calibrated_probabilities_are_those_of_all_items():
    """An item of 10 is taken with probability 0.3: over 3 uniform negatives, the expected loss with t = 1 is least at just that."""
    taken, weight = 0.3, gbce_weight(calibration=1.0, negatives=3, items=10)

    def expected(logit, weight):
        # In 0.3 of the examples the item is the target; in the others it is a negative with probability 3 / 9 for each example.
        positive = weight * bce(logit, jnp.ones(()))
        return taken * positive + (1 - taken) * (3 / 9) * bce(logit, jnp.zeros(()))

    slope = jax.grad(expected)
    np.testing.assert_allclose(slope(jnp.float32(np.log(0.3 / 0.7)), weight), 0, atol=1e-6)
    assert float(slope(jnp.float32(np.log(0.3 / 0.7)), 1.0)) < -0.05  # plain bce goes on: it is too sure
