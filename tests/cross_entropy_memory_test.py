"""No form of the softmax cross-entropy ever holds a matrix of queries and candidates."""

import jax
import jax.extend
import jax.numpy as jnp
from cross_entropy_test import FORMS, D

from rec_jax.losses import blockwise, forward_gradients


def temp_bytes(function, b, n, d=16, **kwargs):
    floats, ints = jax.ShapeDtypeStruct((b, d), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
    items = jax.ShapeDtypeStruct((n, d), jnp.float32)

    def run(query, item, target):
        return function(query, item, target, scale=10.0, weights=jnp.ones(b), **kwargs)

    return jax.jit(jax.grad(run, (0, 1))).lower(floats, items, ints).compile().memory_analysis().temp_size_in_bytes


def test_memory_stays_below_the_matrix_and_follows_the_block():
    b, n = 8192, 8192
    matrix = 4 * b * n
    vectors = 4 * (b + n) * 16
    assert temp_bytes(naive_matrix, b, n) > matrix / 2  # the measure sees a matrix where there is one
    for form in FORMS.values():
        assert temp_bytes(form, b, n) < matrix / 2
        assert temp_bytes(form, b, n, block=128) < 3 * 4 * 128 * n + 8 * vectors
        # Twice the examples, the same candidates: no more than a linear share more.
        assert temp_bytes(form, 2 * b, n, block=128) < 2.1 * temp_bytes(form, b, n, block=128)


def naive_matrix(query, item, target, *, scale, weights):
    logits = scale * query @ item.T
    return weights @ (jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, target[:, None], 1)[:, 0])


def test_no_matrix_in_the_program():
    b, n = 4096, 40_000

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from shapes(inner)

    a = {"query": jax.ShapeDtypeStruct((b, D), jnp.float32), "item": jax.ShapeDtypeStruct((n, D), jnp.float32)}
    target = jax.ShapeDtypeStruct((b,), jnp.int32)
    for form, block in (("weighted", forward_gradients.block_elements()), ("per_example", b * blockwise._SHORTEST)):
        run = lambda a, t, form=form: FORMS[form](**a, target=t, scale=1.0, weights=jnp.ones(b))
        largest = max(shapes(jax.make_jaxpr(jax.grad(run))(a, target).jaxpr))
        # The blocks are seen, and nothing larger.
        assert block // 2 < largest < 2 * block < b * n // 8
