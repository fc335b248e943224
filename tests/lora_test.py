"""LoRA: the merged parameters are at first the given ones, then W + alpha / rank * a b, and only adapters learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax.mesh import path_name
from rec_jax.towers import bert, history, lora
from rec_jax.towers.bert import init as init_text
from rec_jax.types import RecJaxError

PATTERN = r"text/.*/(query|value)/kernel"


@pytest.fixture(scope="module")
def params():
    return {"text": init_text(jax.random.key(0), tiny.bert_spec()), "item": {"project": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}}


def names(tree) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_adapters_of_the_matching_kernels_alone(params):
    adapters = lora.init(jax.random.key(1), params, rank=4, pattern=PATTERN)
    kernels = [f"text/layer_{n}/attention/{role}/kernel" for n in (0, 1) for role in ("query", "value")]
    assert names(adapters) == [f"{kernel}/{part}" for kernel in kernels for part in ("a", "b")]
    query = adapters["text"]["layer_0"]["attention"]["query"]["kernel"]
    assert (query["a"].shape, query["b"].shape) == ((16, 4), (4, 16))
    assert not query["b"].any()
    assert 0.1 < float(query["a"].std()) < 0.5
    assert (query["a"] != adapters["text"]["layer_1"]["attention"]["query"]["kernel"]["a"]).all()
    from_shapes = lora.init(jax.random.key(1), jax.eval_shape(lambda: params), rank=4, pattern=PATTERN)
    jax.tree.map(np.testing.assert_array_equal, from_shapes, adapters)
    fewer = lora.init(jax.random.key(1), params, rank=4, pattern=r".*layer_0/.*/query/kernel")
    np.testing.assert_array_equal(fewer["text"]["layer_0"]["attention"]["query"]["kernel"]["a"], query["a"])


def test_merge_is_the_identity_at_first(params):
    adapters = lora.init(jax.random.key(1), params, rank=4, pattern=PATTERN)
    merged = lora.merge(params, adapters, alpha=8.0)
    assert names(merged) == names(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    assert merged["item"]["project"]["kernel"] is params["item"]["project"]["kernel"]


def test_merge_adds_the_scaled_product_and_changes_no_argument(params):
    adapters = lora.init(jax.random.key(1), params, rank=4, pattern=PATTERN)
    adapters = jax.tree.map(lambda x: x + 0.5, adapters)
    before = jax.tree.map(np.asarray, params)
    merged = lora.merge(params, adapters, alpha=8.0)
    for name, kernel, was in zip(names(params), jax.tree.leaves(merged), jax.tree.leaves(before), strict=True):
        node = adapters
        for part in name.split("/"):
            node = node.get(part, {})
        added = 2.0 * np.asarray(node["a"], np.float64) @ np.asarray(node["b"], np.float64) if node else 0.0
        np.testing.assert_allclose(kernel, was + added, rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_gradient_of_adapters_is_that_of_the_product_and_the_rest_stays(params):
    spec = tiny.bert_spec()
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 6))
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init(jax.random.key(1), params, rank=2, pattern=PATTERN))

    def loss(adapters, params):
        return jnp.sum(jnp.sin(bert(lora.merge(params, adapters, alpha=4.0)["text"], spec, tokens, np.ones_like(tokens))))

    of_adapters = jax.jit(jax.grad(loss))(adapters, params)
    whole = jax.jit(jax.grad(lambda params: loss({}, params)))(lora.merge(params, adapters, alpha=4.0))
    assert names(of_adapters) == names(adapters)
    of_kernel = whole["text"]["layer_0"]["attention"]["query"]["kernel"]
    query, got = (tree["text"]["layer_0"]["attention"]["query"]["kernel"] for tree in (adapters, of_adapters))
    np.testing.assert_allclose(got["a"], 2.0 * of_kernel @ query["b"].T, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(got["b"], 2.0 * query["a"].T @ of_kernel, atol=1e-4, rtol=1e-3)


def test_any_towers_kernels():
    user = history.init(jax.random.key(0), history.HistorySpec(dim=8, layers=1, heads=2, mlp=16, dropout=0.0, max_positions=8))
    adapters = lora.init(jax.random.key(1), {"user": user}, rank=2, pattern=r"user/.*mlp_(in|out)/kernel")
    assert len(jax.tree.leaves(adapters)) == 4
    merged = lora.merge({"user": user}, adapters, alpha=1.0)
    jax.tree.map(np.testing.assert_array_equal, merged, {"user": user})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "text/.*/kernels"}, r"'text/\.\*/kernels' matches no kernel.*text/layer_0/attention"),
        ({"pattern": "text/.*/bias"}, "matches no kernel"),
        ({"pattern": "text/("}, "is no regular expression"),
        ({"rank": 0}, "rank 0: text/layer_0/attention/query/kernel is"),
        ({"rank": 16}, "between 1 and 15"),
    ],
)
def test_init_refuses(params, changes, message):
    with pytest.raises(RecJaxError, match=message):
        lora.init(jax.random.key(0), params, **{"rank": 2, "pattern": PATTERN, **changes})


def test_merge_refuses_an_adapter_without_a_kernel(params):
    adapters = lora.init(jax.random.key(1), params, rank=2, pattern=PATTERN)
    with pytest.raises(RecJaxError, match="adapter is for text/layer_1, which is not among the parameters: embeddings, layer_0"):
        lora.merge({"text": {name: params["text"][name] for name in ("embeddings", "layer_0")}}, adapters, alpha=1.0)
