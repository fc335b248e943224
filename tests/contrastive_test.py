"""InfoNCE against a naive float64 form, and log Q against sampling theory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.losses import info_nce, weighted_info_nce
from rec_jax.types import RecJaxError

B, N, D = 12, 31, 8


def naive(
    query, item, temperature, weights, *, target, log_q=None, query_ids=None, item_ids=None, item_mask=None, symmetric=False, smoothing=0.0
):
    """By definition, on whole matrices -> sum_i weights_i loss_i."""

    def cross_entropy(logits, own, kept):
        log_p = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf), axis=1)
        goal = (1 - smoothing) * own + smoothing * kept / kept.sum(1, keepdims=True)
        return -jnp.sum(goal * jnp.where(kept, log_p, 0), 1)

    own = np.arange(len(item)) == target[:, None]
    kept = np.ones(own.shape, bool) if item_mask is None else np.broadcast_to(item_mask, own.shape)
    logits = query @ item.T / temperature
    if log_q is not None:
        if item_ids is None:
            logits = logits - log_q
        else:
            others = (len(item) if item_mask is None else item_mask.sum()) - 1
            logits = jnp.where(own, logits, logits - log_q - np.log(others))
    if item_ids is not None:
        kept = kept & (own | (query_ids[:, None] != item_ids))
    loss = cross_entropy(logits, own, kept)
    if symmetric:
        own = np.eye(len(query), dtype=bool)
        kept = jnp.broadcast_to(weights != 0, own.shape) | own
        if item_ids is not None:
            kept = kept & (own | (query_ids[:, None] != query_ids))
        loss = (loss + cross_entropy(item[target] @ query.T / temperature, own, kept)) / 2
    return weights @ loss


def data(seed=0):
    rng = np.random.default_rng(seed)
    query, item = rng.normal(size=(B, D)), rng.normal(size=(N, D))
    query, item = (np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (query, item))
    target = rng.permutation(N)[:B].astype(np.int32)
    item_ids = rng.integers(0, 9, N).astype(np.int32)
    item_mask = rng.random(N) < 0.8
    item_mask[target] = True
    weights = rng.random(B).astype(np.float32)
    weights[3] = 0
    log_q = np.log(rng.dirichlet(np.ones(N))).astype(np.float32)
    options = {"target": target, "log_q": log_q, "query_ids": item_ids[target], "item_ids": item_ids, "item_mask": item_mask}
    return (query, item), weights, options


def per_example(query, item, temperature, weights, **options):
    return info_nce(query, item, temperature=temperature, weights=weights, **options).sum()


def fast(query, item, temperature, weights, **options):
    return weighted_info_nce(query, item, temperature=temperature, weights=weights, **options)


FORMS = {"per_example": per_example, "weighted": fast}
VARIANTS = {
    "log_q": ({"target", "log_q"}, {}),
    "ids, log_q, mask": ({"target", "log_q", "query_ids", "item_ids", "item_mask"}, {}),
    "symmetric": ({"target"}, {"symmetric": True}),
    "everything": ({"target", "log_q", "query_ids", "item_ids", "item_mask"}, {"symmetric": True, "label_smoothing": 0.1}),
}


def assert_close(got, want, tolerance):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(np.float64(x) - y)) <= tolerance * np.max(np.abs(y))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_naive_float64(form, variant):
    names, static = VARIANTS[variant]
    vectors, weights, options = data()
    options = {k: v for k, v in options.items() if k in names}
    run = jax.jit(jax.value_and_grad(functools.partial(FORMS[form], **options, **static), (0, 1, 2)))
    smoothing = static.get("label_smoothing", 0.0)
    for temperature in (1.0, 0.1, 0.01):
        with jax.enable_x64(True):
            wide = [jnp.float64(x) for x in (*vectors, np.float32(temperature))]
            reference = functools.partial(naive, **options, smoothing=smoothing, symmetric=static.get("symmetric", False))
            want = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(reference, (0, 1, 2)))(*wide, jnp.float64(weights)))
        got = run(*vectors, np.float32(temperature), weights)
        assert_close(got, want, 1e-5 if temperature >= 0.1 else 5e-5)


def test_by_hand():
    eye = np.eye(2, dtype=np.float32)
    temperature = 1 / np.log(3)  # logits log 3 and 0: probabilities 3/4 and 1/4
    np.testing.assert_allclose(info_nce(eye, eye, temperature=temperature), [np.log(4 / 3)] * 2, rtol=1e-6)
    np.testing.assert_allclose(weighted_info_nce(eye, eye, temperature=temperature, weights=np.ones(2) / 2), np.log(4 / 3), rtol=1e-6)
    d_query = jax.grad(lambda q: info_nce(q, eye, temperature=temperature)[0])(eye)
    np.testing.assert_allclose(d_query, np.log(3) * np.float32([[-1 / 4, 1 / 4], [0, 0]]), rtol=1e-6)


def test_defaults_are_the_options_written_out():
    (query, item), _, options = data()
    named = info_nce(query, item, temperature=0.1, target=np.arange(B), query_ids=options["item_ids"][:B], item_ids=options["item_ids"])
    np.testing.assert_array_equal(info_nce(query, item, temperature=0.1, item_ids=options["item_ids"]), named)
    corrected = info_nce(query, item, temperature=0.1, log_q=options["log_q"], log_q_strength=0.0)
    np.testing.assert_allclose(corrected, info_nce(query, item, temperature=0.1), rtol=1e-6)


def test_a_uniform_log_q_changes_nothing_with_all_and_weighs_others_with_negatives():
    (query, item), _, _ = data()
    plain = info_nce(query, item, temperature=0.1)
    uniform = np.full(N, -np.log(N), np.float32)
    np.testing.assert_allclose(info_nce(query, item, temperature=0.1, log_q=uniform), plain, rtol=1e-5)
    # N - 1 other candidates, each drawn with probability 1 / N: every one stands for N / (N - 1) items.
    others = info_nce(query, item, temperature=0.1, log_q=uniform, item_ids=np.arange(N))
    np.testing.assert_allclose(others, np.log1p((np.exp(plain) - 1) * N / (N - 1)), rtol=1e-4)


def test_weight_zero_is_padding_in_both_directions():
    (query, item), weights, options = data()
    target = options["target"]
    weights = np.where(np.arange(B) < 8, weights + 0.1, 0).astype(np.float32)
    query[8:] = np.nan
    for form in FORMS.values():
        run = jax.jit(jax.value_and_grad(functools.partial(form, symmetric=True), (0, 1)))
        value, (d_query, d_item) = run(query, item, 0.1, weights, target=np.where(np.arange(B) < 8, target, -1))
        want, (want_query, want_item) = run(query[:8], item, 0.1, weights[:8], target=target[:8])
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_array_equal(d_query[8:], 0)
        np.testing.assert_allclose(d_query[:8], want_query, atol=1e-6)
        np.testing.assert_allclose(d_item, want_item, atol=1e-6)


LOG_Q_CASES = {  # name: (options of info_nce, whether the mean gradient tends to the full softmax's)
    "negatives": ({"log_q_form": "negatives", "ids": True}, True),
    "all, copies kept": ({"log_q_form": "all", "ids": False}, True),
    "all, copies masked": ({"log_q_form": "all", "ids": True}, False),
    "wrong sign, negatives": ({"log_q_form": "negatives", "ids": True, "log_q_strength": -1.0}, False),
    "wrong sign, all": ({"log_q_form": "all", "ids": False, "log_q_strength": -1.0}, False),
    "none": ({"log_q_strength": 0.0, "log_q_form": "all", "ids": True}, False),
}


def simulated_bias(draws, positive=0, ids=False, repeats=2000, **options):
    """Candidates of one query drawn by popularity from 12 items -> |mean gradient - the full softmax's| / |the full softmax's|.

    The positive is given, as it is for a query in a batch; the other candidates are the targets of other queries.
    """
    items, rng = 12, np.random.default_rng(0)
    probability = 1 / np.arange(1, items + 1)
    probability /= probability.sum()
    log_q = jnp.log(jnp.float32(probability))
    scores = np.float32(rng.normal(size=items))
    scores[positive] = 1.5
    # One query (1) against vectors (score) of width 1: the gradient of the vectors is that of the scores.
    drawn = rng.choice(items, (repeats, draws), p=probability)
    drawn[:, 0] = positive

    def sampled(scores, row):
        kwargs = {"item_ids": row} if ids else {}
        loss = info_nce(
            jnp.ones((1, 1)), scores[row][:, None], temperature=1.0, target=jnp.zeros(1, jnp.int32), log_q=log_q[row], **kwargs, **options
        )
        return loss[0]

    gradient = jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(scores, jnp.int32(drawn)).mean(0)
    full = jax.nn.softmax(scores) - np.eye(items)[positive]
    return float(jnp.linalg.norm(gradient - full) / jnp.linalg.norm(full))


@pytest.mark.parametrize("case", LOG_Q_CASES)
def test_log_q_makes_the_mean_gradient_tend_to_the_full_softmax(case):
    options, right = LOG_Q_CASES[case]
    many = simulated_bias(512, **options)
    if right:
        assert many < 0.02
        assert simulated_bias(32, **options) > 2 * many  # more draws, less bias
    else:
        assert many > 0.2


def test_with_few_draws_of_a_rare_positive_form_negatives_is_far_less_biased():
    bias = [simulated_bias(32, positive=11, ids=form == "negatives", log_q_form=form) for form in ("negatives", "all")]
    assert bias[0] < bias[1] / 2


def test_log_q_gets_no_gradient():
    (query, item), _, options = data()
    gradient = jax.grad(lambda q: info_nce(query, item, temperature=0.1, log_q=q).sum())(options["log_q"])
    np.testing.assert_array_equal(gradient, 0)


BAD = {
    "zero": ({"temperature": 0}, "temperature is 0; expected a finite number > 0"),
    "negative": ({"temperature": -0.1}, "temperature is -0.1"),
    "nan": ({"temperature": float("nan")}, "temperature is nan"),
    "array": ({"temperature": np.float32(-2)}, "temperature is"),
    "vector": ({"temperature": np.ones(B)}, "temperature has shape"),
    "widths": ({"item": np.zeros((N, D + 1), np.float32)}, "item \\(31, 9\\)"),
    "too few": ({"item": np.zeros((B - 1, D), np.float32)}, "item has 11 rows for 12 queries"),
    "target": ({"target": np.zeros(B + 1, np.int32)}, "target has shape"),
    "weights": ({"weights": np.ones(B + 1)}, "weights has shape"),
    "log_q": ({"log_q": np.zeros(B, np.float32)}, "log_q has shape"),
    "form": ({"log_q": np.zeros(N, np.float32), "log_q_form": "some"}, "one of negatives, all"),
    "form without ids": ({"log_q": np.zeros(N, np.float32), "log_q_form": "negatives"}, "needs item_ids"),
    "ids": ({"item_ids": np.zeros(B, np.int32)}, "item_ids has shape"),
    "query ids alone": ({"query_ids": np.zeros(B, np.int32)}, "without item_ids"),
    "smoothing": ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_tracing(case):
    change, message = BAD[case]
    (query, item), weights, _ = data()
    arguments = {"query": query, "item": item, "temperature": 0.1, "weights": weights} | change
    for function in (info_nce, weighted_info_nce):
        with pytest.raises(RecJaxError, match=message):
            function(**arguments)
