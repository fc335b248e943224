"""Pairwise and listwise losses: golden values by hand, naive float64 forms, masks, ties, bad input."""

import itertools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax import losses
from rec_jax.types import RecJaxError

B, K = 5, 7


def data(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, K)) < 0.7
    mask[:, 0], mask[3], mask[4] = True, False, np.arange(K) == 2  # nothing there, one there
    labels = rng.integers(0, 3, (B, K)).astype(np.float32)
    return {
        "positive": np.float32(rng.normal(size=B)),
        "negatives": np.float32(rng.normal(size=(B, K))),
        "scores": np.float32(rng.normal(size=(B, K))),
        "labels": labels,
        "mask": mask,
    }


def rows(function):
    """A definition for one query, over the places that are there -> for B queries."""

    def over(mask, *arrays):
        return np.stack([function(np.flatnonzero(m), *(a[i] for a in arrays)) for i, m in enumerate(mask)])

    return over


def mean(terms):
    return sum(terms) / max(len(terms), 1)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def log_p(scores, there):
    return {i: scores[i] - np.log(sum(np.exp(scores[j]) for j in there)) for i in there}


def better(there, labels):
    return [(i, j) for i, j in itertools.permutations(there, 2) if labels[i] > labels[j]]


def naive_softmax(there, positive, negatives):
    return -np.log(np.exp(positive) / (np.exp(positive) + sum(np.exp(negatives[j]) for j in there)))


def naive_list_softmax(there, scores, labels):
    goal = {i: np.exp(labels[i]) / sum(np.exp(labels[j]) for j in there) for i in there}
    return -sum(goal[i] * log_p(scores, there)[i] for i in there)


def naive_order(there, scores, weights):
    return -sum(weights[k] * log_p(scores, there[k:])[i] for k, i in enumerate(there))


PAIRWISE = {
    "bpr": (losses.bpr_loss, rows(lambda there, p, n: mean([-log_sigmoid(p - n[j]) for j in there]))),
    "margin": (losses.margin_loss, rows(lambda there, p, n: mean([max(0, 1 + n[j] - p) for j in there]))),
    "softmax": (losses.softmax_loss, rows(naive_softmax)),
}
LISTWISE = {
    "list_bpr": (losses.list_bpr_loss, rows(lambda there, s, y: mean([-log_sigmoid(s[i] - s[j]) for i, j in better(there, y)]))),
    "list_margin": (losses.list_margin_loss, rows(lambda there, s, y: mean([max(0, 1 + s[j] - s[i]) for i, j in better(there, y)]))),
    "list_softmax": (losses.list_softmax_loss, rows(naive_list_softmax)),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_positive_against_negatives_equals_naive_float64(name):
    loss, naive = PAIRWISE[name]
    d = data()
    float64.assert_equal(
        lambda positive, negatives: loss(positive, negatives, mask=d["mask"]),
        lambda positive, negatives: naive(d["mask"], positive, negatives),
        {k: d[k] for k in ("positive", "negatives")},
    )


@pytest.mark.parametrize("name", LISTWISE)
def test_lists_equal_naive_float64(name):
    loss, naive = LISTWISE[name]
    d = data()
    float64.assert_equal(
        lambda scores: loss(scores, d["labels"], mask=d["mask"]),
        lambda scores: naive(d["mask"], scores, d["labels"]),
        {"scores": d["scores"]},
    )


@pytest.mark.parametrize("weights", [None, np.linspace(1, 0.1, K)])
def test_order_equals_naive_float64(weights):
    d = data()
    float64.assert_equal(
        lambda scores: losses.plackett_luce_loss(scores, mask=d["mask"], position_weights=weights),
        lambda scores: rows(naive_order)(d["mask"], scores, np.broadcast_to(1 if weights is None else weights, (B, K))),
        {"scores": d["scores"]},
    )


def test_by_hand():
    positive, negatives = np.float32([np.log(3)]), np.float32([[0, np.log(2)]])
    # sigmoid(log 3) = 3/4, sigmoid(log 3/2) = 3/5: (log 4/3 + log 5/3) / 2
    np.testing.assert_allclose(losses.bpr_loss(positive, negatives), [(np.log(4 / 3) + np.log(5 / 3)) / 2], rtol=1e-6)
    # 3 / (3 + 1 + 2) = 1/2; at temperature 1/2 the exps are squared: 9 / (9 + 1 + 4)
    np.testing.assert_allclose(losses.softmax_loss(positive, negatives), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(losses.softmax_loss(positive, negatives, temperature=0.5), [np.log(14 / 9)], rtol=1e-6)
    # margins 2 - 1.5 = 0.5 violate 1 by 0.5; 2 - 0 does not
    np.testing.assert_allclose(losses.margin_loss(np.float32([2]), np.float32([[1.5, 0]])), [0.25], rtol=1e-6)
    np.testing.assert_allclose(losses.margin_loss(np.float32([2]), np.float32([[1.5, 0]]), margin=3.0), [(2.5 + 1) / 2], rtol=1e-6)

    scores, labels = np.float32([[np.log(3), 0]]), np.float32([[0, 1]])
    # one pair, the second above the first: sigmoid(0 - log 3) = 1/4
    np.testing.assert_allclose(losses.list_bpr_loss(scores, labels), [np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(losses.list_margin_loss(np.float32([[2, 1.5]]), labels), [1.5], rtol=1e-6)
    # softmax of the labels 0, log 3 is 1/4, 3/4; of the scores 3/4, 1/4: log(4/3) / 4 + 3 log(4) / 4
    loss = losses.list_softmax_loss(scores, np.log(3) * labels)
    np.testing.assert_allclose(loss, [np.log(4 / 3) / 4 + 3 * np.log(4) / 4], rtol=1e-6)
    # a sharp label: all weight on the second, -log 1/4
    np.testing.assert_allclose(losses.list_softmax_loss(scores, labels, label_temperature=0.01), [np.log(4)], rtol=1e-6)
    # order 3, 1, 2: first of all 3/6, then 1/3, then certain; weighted 2, 1
    order = np.log(np.float32([[3, 1, 2]]))
    np.testing.assert_allclose(losses.plackett_luce_loss(order), [np.log(2) + np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce_loss(order, position_weights=[2, 1, 1]), [2 * np.log(2) + np.log(3)], rtol=1e-6)


def test_the_probabilities_of_all_orders_sum_to_one():
    scores = np.float32([0.3, -1, 2, 0.7])
    orders = np.array(list(itertools.permutations(range(4))))
    np.testing.assert_allclose(np.exp(-losses.plackett_luce_loss(scores[orders])).sum(), 1, rtol=1e-6)


def test_single_positive_of_a_list_is_the_softmax_over_negatives():
    d = data()
    scores = np.concatenate([d["positive"][:, None], d["negatives"]], 1)
    got = losses.list_softmax_loss(scores, np.float32(np.arange(K + 1) == 0) * np.ones((B, 1)), label_temperature=1e-3)
    np.testing.assert_allclose(got, losses.softmax_loss(d["positive"], d["negatives"]), rtol=1e-5)


def calls(labels):
    """Every loss as a function of [..., 1 + K] scores, the positive's first, and a mask."""
    return {
        **{n: (lambda x, mask, f=f: f(x[..., 0], x[..., 1:], mask=mask)) for n, (f, _) in PAIRWISE.items()},
        **{n: (lambda x, mask, f=f: f(x[..., 1:], labels, mask=mask)) for n, (f, _) in LISTWISE.items()},
        "order": lambda x, mask: losses.plackett_luce_loss(x[..., 1:], mask=mask),
    }


@pytest.mark.parametrize("name", [*PAIRWISE, *LISTWISE, "order"])
def test_masks_ties_extremes_and_leading_axes(name):
    d = data()
    x = np.concatenate([d["positive"][:, None], d["scores"]], 1)

    def total(x, mask):
        loss = calls(d["labels"])[name](x, mask)
        return loss.sum(), loss

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, want), gradient = run(x, d["mask"])
    assert want[3] == 0
    garbage = x.copy()
    garbage[:, 1:] = np.where(d["mask"], x[:, 1:], np.nan)
    garbage[3, 0] = np.nan  # nothing there: not even the positive counts
    (_, loss), d_garbage = run(garbage, d["mask"])
    np.testing.assert_array_equal(loss, want)
    np.testing.assert_array_equal(d_garbage, gradient)
    for extreme in (np.zeros_like(x), 1e4 * np.sign(x), 1e-30 * x):
        (_, loss), d_extreme = run(extreme, d["mask"])
        assert np.isfinite(loss).all()
        assert np.isfinite(d_extreme).all()

    everywhere = np.ones((B, K), bool)
    np.testing.assert_allclose(calls(d["labels"])[name](x, None), run(x, everywhere)[0][1], rtol=1e-5, atol=1e-6)
    shards = jax.jit(calls(np.stack([d["labels"]] * 2))[name])(np.stack([x, x]), np.stack([d["mask"], everywhere]))
    np.testing.assert_allclose(shards, np.stack([want, run(x, everywhere)[0][1]]), rtol=1e-5, atol=1e-6)
    assert jax.eval_shape(calls(d["labels"])[name], jnp.bfloat16(x), d["mask"]).dtype == jnp.float32


def test_what_is_not_observed_is_as_good_as_masked():
    d = data()
    for loss, _ in LISTWISE.values():
        unobserved = jax.jit(loss)(d["scores"], np.where(d["mask"], d["labels"], np.nan))
        np.testing.assert_array_equal(unobserved, jax.jit(loss)(d["scores"], d["labels"], mask=d["mask"]))


ONES = np.ones((2, 3), np.float32)
BAD = {
    "positive": (lambda: losses.bpr_loss(ONES, ONES), r"positive has shape \(2, 3\); expected \(2,\)"),
    "no list": (lambda: losses.softmax_loss(ONES[0], np.zeros((2, 0))), r"negatives has shape \(2, 0\); expected \[..., K\] with K >= 1"),
    "mask": (lambda: losses.bpr_loss(ONES[:, 0], ONES, mask=ONES[0]), r"mask has shape \(3,\); expected \(2, 3\)"),
    "margin": (lambda: losses.margin_loss(ONES[:, 0], ONES, margin=0), "margin is 0; expected a number > 0"),
    "list margin": (lambda: losses.list_margin_loss(ONES, ONES, margin=-1), "margin is -1"),
    "labels": (lambda: losses.list_bpr_loss(ONES, ONES[0]), r"labels has shape \(3,\); expected \(2, 3\), that of scores"),
    "temperature": (lambda: losses.list_softmax_loss(ONES, ONES, temperature=0), "temperature is 0; expected a number > 0"),
    "label_temperature": (lambda: losses.list_softmax_loss(ONES, ONES, label_temperature=-1), "label_temperature is -1"),
    "softmax temperature": (lambda: losses.softmax_loss(ONES[:, 0], ONES, temperature=0.0), "temperature is 0.0"),
    "position_weights": (lambda: losses.plackett_luce_loss(ONES, position_weights=np.ones(2)), r"position_weights has shape \(2,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        call()
