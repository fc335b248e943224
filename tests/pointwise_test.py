"""Binary cross-entropy, alone and with negatives, against naive float64 forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.losses import bce, bce_with_negatives
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


def test_bad_positive_weight_is_named():
    with pytest.raises(RecJaxError, match="positive_weight is 0"):
        bce(np.zeros(1, np.float32), np.zeros(1, np.float32), positive_weight=0)
