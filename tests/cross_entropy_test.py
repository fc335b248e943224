"""Softmax cross-entropy on the streaming folds against a naive float64 softmax: values, gradients, masks, blocks, sharding."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rec_jax.losses import softmax_cross_entropy, weighted_softmax_cross_entropy
from rec_jax.types import RecJaxError

B, N, D = 21, 75, 8
FLOATS = ("query", "item", "scale", "bias", "target_bias", "weights")


def naive(
    query,
    item,
    target,
    *,
    scale,
    weights,
    bias=None,
    target_bias=None,
    query_ids=None,
    item_ids=None,
    item_mask=None,
    label_smoothing=0.0,
):
    """The whole [B, N] matrix, by definition, in the precision of its input -> sum_i weights_i loss_i."""
    b, n = len(query), len(item)
    own = np.arange(n) == target[:, None]
    kept = np.ones((b, n), bool)
    if item_mask is not None:
        kept &= item_mask
    if item_ids is not None:
        kept &= own | (query_ids[:, None] != item_ids)
    logits = scale * jnp.sum(query[:, None] * item[None], -1)
    if bias is not None:
        logits = logits + bias
    if target_bias is not None:
        logits = logits + own * (target_bias[:, None] - (0 if bias is None else bias))
    log_p = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf), axis=1)
    log_p = jnp.where(kept, log_p, 0)
    goal = (1 - label_smoothing) * own + label_smoothing * kept / kept.sum(1, keepdims=True)
    return -jnp.sum(weights[:, None] * goal * log_p)


def data(seed=0, b=B, n=N, d=D):
    rng = np.random.default_rng(seed)

    def unit(rows):
        x = rng.normal(size=(rows, d))
        return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))

    target = rng.integers(0, n, b).astype(np.int32)
    item_ids = rng.integers(0, n // 4, n).astype(np.int32)
    item_mask = rng.random(n) < 0.8
    item_mask[target] = True
    return {
        "query": unit(b),
        "item": unit(n),
        "target": target,
        "scale": np.float32(1),
        "weights": rng.random(b).astype(np.float32),
        "bias": rng.normal(size=n).astype(np.float32),
        "target_bias": rng.normal(size=b).astype(np.float32),
        "query_ids": item_ids[target],
        "item_ids": item_ids,
        "item_mask": item_mask,
    }


def per_example(query, item, target, *, weights, **kwargs):
    return weights @ softmax_cross_entropy(query, item, target, **kwargs)


def fast(query, item, target, **kwargs):
    return weighted_softmax_cross_entropy(query, item, target, **kwargs)


FORMS = {"per_example": per_example, "weighted": fast}


@functools.cache
def compiled(function, jit=True, **static):
    """Value and gradients as a function of ({float arguments}, {the others}), compiled once per shape."""

    def run(floats, rest):
        return function(**floats, **rest, **static)

    return jax.jit(jax.value_and_grad(run)) if jit else jax.value_and_grad(run)


def value_and_gradients(function, arguments, jit=True, **static):
    """-> {"value": ..., name of each float argument: its gradient}."""
    floats = {k: v for k, v in arguments.items() if k in FLOATS}
    rest = {k: v for k, v in arguments.items() if k not in FLOATS}
    value, gradients = compiled(function, jit, **static)(floats, rest)
    return {"value": value, **gradients}


def reference(arguments, **static):
    with jax.enable_x64(True):
        wide = {k: np.float64(v) if k in FLOATS else v for k, v in arguments.items()}
        return jax.tree.map(np.asarray, value_and_gradients(naive, wide, **static))


def assert_close(got, want, tolerance=1e-5):
    """Largest difference, as a share of the largest magnitude of each array."""
    assert got.keys() == want.keys()
    for name in want:
        error = np.max(np.abs(np.float64(got[name]) - np.float64(want[name])))
        assert error <= tolerance * max(np.max(np.abs(np.float64(want[name]))), 1e-6), f"{name}: off by {error}"


PLAIN = {"query", "item", "target", "scale", "weights"}
VARIANTS = {
    "plain": (PLAIN, 0.0),
    "masks": (PLAIN | {"bias", "query_ids", "item_ids", "item_mask"}, 0.0),
    "smoothing": (PLAIN, 0.1),
    "all": (set(data()), 0.1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_naive_float64(form, variant):
    names, smoothing = VARIANTS[variant]
    for scale in (1.0, 10.0, 100.0):
        arguments = {k: v for k, v in data().items() if k in names} | {"scale": np.float32(scale)}
        want = reference(arguments, label_smoothing=smoothing)
        got = value_and_gradients(FORMS[form], arguments, label_smoothing=smoothing, block=32)
        assert_close(got, want, 1e-5 if scale <= 10 else 5e-5)


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form):
    query, item = np.float32([[1, 0]]), np.float32([[np.log(2), 0], [0, 5], [np.log(5), 1]])
    # Logits log 2, 0, log 5: probabilities 2/8, 1/8, 5/8.
    arguments = {"query": query, "item": item, "target": np.int32([0]), "scale": np.float32(1), "weights": np.float32([1])}
    got = value_and_gradients(FORMS[form], arguments)
    np.testing.assert_allclose(got["value"], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(got["item"], [[2 / 8 - 1, 0], [1 / 8, 0], [5 / 8, 0]], rtol=1e-6)
    np.testing.assert_allclose(got["query"], [[-0.75 * np.log(2) + 0.625 * np.log(5), 5 / 8 + 5 / 8]], rtol=1e-6)
    np.testing.assert_allclose(got["scale"], -0.75 * np.log(2) + 0.625 * np.log(5), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_jit_equals_eager_and_block_size_changes_nothing(form):
    arguments = data() | {"scale": np.float32(20)}
    want = value_and_gradients(FORMS[form], arguments, label_smoothing=0.1)
    assert_close(value_and_gradients(FORMS[form], arguments, jit=False, label_smoothing=0.1), want, 2e-6)
    for block in (7, 32):
        assert_close(value_and_gradients(FORMS[form], arguments, label_smoothing=0.1, block=block), want, 5e-6)


@pytest.mark.parametrize("form", FORMS)
def test_value_without_differentiation_is_the_value_with_it(form):
    arguments = data()
    np.testing.assert_allclose(FORMS[form](**arguments), value_and_gradients(FORMS[form], arguments)["value"], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_huge_logits_stay_finite(form, size):
    arguments = {
        "query": np.float32([[1], [1]]),
        "item": np.float32([[1], [-1], [0]]),
        "target": np.int32([0, 1]),
        "scale": np.float32(size),
        "weights": np.float32([1, 1]),
    }
    got = value_and_gradients(FORMS[form], arguments)
    np.testing.assert_allclose(got["value"], 2 * size, rtol=1e-6)  # query 0 is right: exactly 0
    np.testing.assert_allclose(got["item"][:, 0], [size, -size, 0], rtol=1e-6)
    assert all(np.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("form", FORMS)
def test_tiny_losses_keep_their_digits(form):
    arguments = {
        "query": np.float32([[1]]),
        "item": np.float32([[1], [0]]),
        "target": np.int32([0]),
        "scale": np.float32(30),
        "weights": np.float32([1]),
    }
    got = value_and_gradients(FORMS[form], arguments)
    np.testing.assert_allclose(got["value"], np.exp(-30), rtol=1e-5)  # a difference of two float32 near 30 would be 0
    np.testing.assert_allclose(got["scale"], -np.exp(-30), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_exact(form):
    real = data(b=12, n=40)
    rng = np.random.default_rng(1)
    want = value_and_gradients(FORMS[form], real, label_smoothing=0.1)

    def padded(garbage):
        def longer(name, rows, value):
            x = real[name]
            return np.concatenate([x, np.full((rows, *x.shape[1:]), value, x.dtype)])

        arguments = dict(real)
        for name in ("query", "target_bias", "query_ids"):
            arguments[name] = longer(name, 4, garbage if name != "query_ids" else 3)
        arguments |= {"weights": longer("weights", 4, 0), "target": np.concatenate([real["target"], np.int32([-1, -1, 5, 5])])}
        for name in ("item", "bias", "item_ids"):
            arguments[name] = longer(name, 9, garbage if name != "item_ids" else 2)
        arguments["item_mask"] = longer("item_mask", 9, False)
        if form == "per_example":  # there, only the target says that a query is padding
            arguments["target"][-4:] = -1
        return arguments

    for garbage in (rng.normal() * 1e3, 1e38, np.inf, np.nan):
        got = value_and_gradients(FORMS[form], padded(garbage), label_smoothing=0.1)
        for name, gradient in got.items():
            if np.ndim(gradient):
                np.testing.assert_array_equal(gradient[len(want[name]) :], 0, err_msg=name)
        assert_close({k: v[: len(want[k])] if np.ndim(v) else v for k, v in got.items()}, want, 2e-6)


def test_no_target_means_no_loss_and_a_target_beyond_the_items_is_nan():
    a = data()
    a["target"][:2] = -1, N
    a = {k: a[k] for k in ("query", "item", "target", "scale")}
    loss = softmax_cross_entropy(**a)
    assert loss[0] == 0
    assert np.isnan(loss[1])
    assert np.isfinite(loss[2:]).all()


def test_a_query_without_other_candidates_has_loss_zero_and_a_masked_target_an_infinite_one():
    query, item = np.float32([[1], [2]]), np.float32([[3], [4]])
    kwargs = {"target": np.int32([0, 1]), "scale": np.float32(1), "item_mask": np.array([True, False])}
    loss = softmax_cross_entropy(query, item, **kwargs)
    np.testing.assert_array_equal(loss, [0, np.inf])
    got = value_and_gradients(fast, {"query": query, "item": item, "weights": np.float32([1, 0]), **kwargs})
    assert got["value"] == 0
    np.testing.assert_array_equal(got["query"], 0)
    np.testing.assert_array_equal(got["item"], 0)


def test_equal_ids_are_no_negatives_and_copies_without_ids_are():
    query, item = np.float32([[1, 0]]), np.float32([[1, 0], [1, 0], [0, 1]])
    kwargs = {"target": np.int32([0]), "scale": 1.0}
    e = np.exp(1)
    np.testing.assert_allclose(softmax_cross_entropy(query, item, **kwargs), [np.log((2 * e + 1) / e)], rtol=1e-6)
    masked = softmax_cross_entropy(query, item, query_ids=np.int32([7]), item_ids=np.int32([7, 7, 8]), **kwargs)
    np.testing.assert_allclose(masked, [np.log((e + 1) / e)], rtol=1e-6)


def test_the_same_item_as_target_of_many_queries_collects_all_gradients():
    a = {k: v for k, v in data().items() if k in PLAIN | {"bias"}}
    a["target"][:] = 3
    for form in FORMS.values():
        assert_close(value_and_gradients(form, a), reference(a))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_have_float32_sums(form):
    a = {k: v for k, v in data(n=400).items() if k in PLAIN | {"bias"}} | {"scale": np.float32(20)}
    low = {k: jnp.bfloat16(v) if k in ("query", "item") else v for k, v in a.items()}
    got = value_and_gradients(FORMS[form], low)
    rounded = {k: np.float32(v) for k, v in low.items() if k in ("query", "item")}
    want = reference(a | rounded)
    assert got["value"].dtype == jnp.float32
    assert got["query"].dtype == got["item"].dtype == jnp.bfloat16
    np.testing.assert_allclose(got["value"], want["value"], rtol=1e-6)  # a bfloat16 sum would be off by 1e-2
    assert_close(got, want, 1e-2)
    assert_close({"bias": got["bias"]}, {"bias": want["bias"]}, 1e-5)


def test_float64_inputs_are_summed_in_float64():
    with jax.enable_x64(True):
        a = {k: jnp.float64(v) if k in FLOATS else v for k, v in data().items()} | {"scale": jnp.float64(100)}
        for form in FORMS.values():
            assert_close(value_and_gradients(form, a), reference(a), 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_only_wanted_gradients_are_computed(form):
    a = data(b=64, n=128)

    def dots(names):
        def run(floats):
            return FORMS[form](**(a | floats), block=32)

        jaxpr = jax.make_jaxpr(jax.grad(run))({k: a[k] for k in names})
        return str(jaxpr).count("preferred_element_type=float32")

    assert dots(["query"]) == dots(["item"]) == dots(["query", "item"]) - 2  # one in the fold, one of the target


@pytest.mark.parametrize("form", FORMS)
def test_vmap_and_scan_and_remat_of_the_gradient(form):
    a = {k: v for k, v in data().items() if k in PLAIN}
    one = value_and_gradients(FORMS[form], a)
    run = functools.partial(FORMS[form], target=a["target"], scale=a["scale"], weights=a["weights"])

    def gradient(function):
        return jax.grad(lambda q: function(query=q, item=a["item"]))

    stacked = jnp.stack([a["query"]] * 2)
    for got in (
        jax.vmap(gradient(run))(stacked)[1],
        jax.lax.map(gradient(run), stacked)[1],
        gradient(jax.checkpoint(run))(a["query"]),
    ):
        np.testing.assert_allclose(got, one["query"], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("items_sharded", [False, True])
def test_sharded_over_eight_devices_gives_the_same(form, items_sharded):
    assert jax.device_count() >= 8, "tests/conftest.py simulates 8 devices"
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    a = data(b=64, n=128) | {"scale": np.float32(10)}
    static = {"label_smoothing": 0.1, "block": 16}
    want = value_and_gradients(FORMS[form], a, **static)
    place = dict.fromkeys(("query", "target", "weights", "target_bias", "query_ids"), rows) | {"scale": whole}
    place |= dict.fromkeys(("item", "bias", "item_ids", "item_mask"), rows if items_sharded else whole)
    sharded = {k: jax.device_put(v, place[k]) for k, v in a.items()}
    with jax.set_mesh(mesh):
        got = value_and_gradients(FORMS[form], sharded, **static)
    assert_close(got, want, 3e-6)


BAD = {
    "widths": ({"item": np.zeros((N, D + 1), np.float32)}, r"query has shape \(21, 8\) and item \(75, 9\)"),
    "rank": ({"query": np.zeros(D, np.float32)}, r"expected \[B, D\]"),
    "dtype": ({"query": np.zeros((B, D), np.int32)}, "int32"),
    "target": ({"target": np.zeros(B + 1, np.int32)}, "target has shape"),
    "scale": ({"scale": np.ones(2, np.float32)}, "scale has shape"),
    "bias": ({"bias": np.zeros(B, np.float32)}, "bias has shape"),
    "mask": ({"item_mask": np.ones(B, bool)}, "item_mask has shape"),
    "ids": ({"query_ids": None}, "item_ids is given without query_ids"),
    "no items": ({"item": np.zeros((0, D), np.float32)}, "at least one candidate"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    "block": ({"block": 0}, "block is 0"),
    "weights": ({"weights": np.ones(B + 1, np.float32)}, "weights has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        weighted_softmax_cross_entropy(**(data() | change))
    if case != "weights":
        arguments = data() | change
        del arguments["weights"]
        with pytest.raises(RecJaxError, match=message):
            softmax_cross_entropy(**arguments)
