"""The product of linear layers: value and gradients are those of jax's own, whatever axes are contracted and whichever side is wider."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.towers.products import dot_general


@pytest.mark.parametrize(
    ("x", "kernel", "axes"),
    [
        ((6, 3), (3, 7), 1),  # the inputs are narrower
        ((2, 5, 7), (7, 3), 1),  # the outputs are
        ((2, 5, 4), (4, 2, 3), 1),  # heads behind
        ((2, 5, 2, 3), (2, 3, 4), 2),  # heads before
        ((7,), (7, 3), 1),  # no rows but one
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_are_those_of_jax(x, kernel, axes, dtype):
    draw = np.random.default_rng(0)
    # Whole numbers, whose sums are exact in every order and both dtypes.
    whole = lambda shape: jnp.asarray(draw.integers(-3, 4, shape), dtype)
    arrays, places = (whole(x), whole(kernel)), ((tuple(range(len(x) - axes, len(x))), tuple(range(axes))), ((), ()))
    want, pull = jax.vjp(lambda a, b: jax.lax.dot_general(a, b, places), *arrays)
    got, mine = jax.vjp(jax.jit(lambda a, b: dot_general(a, b, places)), *arrays)
    np.testing.assert_array_equal(got, want)
    for left, right in zip(mine(jnp.ones_like(want) * 2), pull(jnp.ones_like(want) * 2), strict=True):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        np.testing.assert_array_equal(left, right)


def test_the_backward_pass_keeps_what_a_policy_names():
    # A layer whose activations are made again, but for its products: one product forward, two backward, none a second time.
    x, kernel = jnp.ones((8, 4)), jnp.ones((4, 16))
    places = (((1,), (0,)), ((), ()))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def layer(x, kernel):
        return jnp.sin(dot_general(jnp.sin(x), kernel, places)).sum()

    text = str(jax.make_jaxpr(jax.grad(layer, argnums=(0, 1)))(x, kernel))
    assert text.count("dot_general[") == 3


def test_layers_take_it_and_others_keep_jax_s():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 6)), jnp.float32)
    for layer in (nn.Dense(5), nn.DenseGeneral((2, 5)), nn.DenseGeneral(5, axis=(-2, -1)), nn.DenseGeneral(5, axis=1)):
        params = layer.init(jax.random.key(0), x)
        ours = layer.clone(dot_general=dot_general)
        loss = lambda params, layer: jnp.sum(layer.apply(params, x) ** 3)
        want, got = jax.grad(loss)(params, layer), jax.grad(loss)(params, ours)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)


def test_a_batch_of_products_is_jax_s():
    a, b = (jnp.asarray(np.random.default_rng(n).normal(size=(2, 3, 3)), jnp.float32) for n in (0, 1))
    places = (((2,), (1,)), ((0,), (0,)))
    np.testing.assert_array_equal(dot_general(a, b, places), jax.lax.dot_general(a, b, places))
