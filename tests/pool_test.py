"""pool_segments against naive numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rec_jax.towers.pool import POOLINGS, pool_segments
from rec_jax.types import RecJaxError

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [0, 2, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
REDUCE = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.max(0)}


def _hidden() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(*SEGMENTS.shape, 5)).astype(np.float32)


def _naive(hidden: np.ndarray, kind: str) -> np.ndarray:
    out = np.zeros((len(hidden), 3, hidden.shape[-1]))
    for r, row in enumerate(SEGMENTS):
        for k in range(3):
            if (row == k + 1).any():
                out[r, k] = REDUCE[kind](hidden[r, row == k + 1].astype(np.float64))
    return out


@pytest.mark.parametrize("kind", POOLINGS)
def test_equals_naive(kind):
    hidden = _hidden()
    got = pool_segments(jnp.asarray(hidden), jnp.asarray(SEGMENTS), segments=3, kind=kind)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, _naive(hidden, kind), atol=1e-6)
    jitted = jax.jit(pool_segments, static_argnames=("segments", "kind"))(hidden, SEGMENTS, segments=3, kind=kind)
    np.testing.assert_allclose(jitted, got, atol=1e-7)


@pytest.mark.parametrize("kind", POOLINGS)
def test_empty_places_are_exact_zeros_and_have_no_gradient(kind):
    hidden = jnp.asarray(_hidden())

    def total(hidden):
        return jnp.sum(pool_segments(hidden, jnp.asarray(SEGMENTS), segments=3, kind=kind) ** 2)

    pooled = np.asarray(pool_segments(hidden, jnp.asarray(SEGMENTS), segments=3, kind=kind))
    assert (pooled[1] == 0).all()
    assert (pooled[2, 0] == 0).all()
    assert (pooled[3, 1:] == 0).all()
    gradient = np.asarray(jax.grad(total)(hidden))
    assert np.isfinite(gradient).all()
    assert (gradient[SEGMENTS == 0] == 0).all()
    assert (np.abs(gradient[3]) > 0).any()


@pytest.mark.parametrize("kind", POOLINGS)
def test_gradient_by_finite_differences(kind):
    check_grads(
        lambda hidden: pool_segments(hidden, jnp.asarray(SEGMENTS), segments=3, kind=kind),
        (_hidden(),),
        order=1,
        modes=["rev"],
        eps=1e-3,
        atol=2e-2,
        rtol=2e-2,
    )


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_segment_depends_on_its_own_tokens_alone(kind):
    hidden = _hidden()
    changed = hidden.copy()
    changed[0, SEGMENTS[0] != 2] += 100.0
    before, after = (np.asarray(pool_segments(jnp.asarray(x), jnp.asarray(SEGMENTS), segments=3, kind=kind)) for x in (hidden, changed))
    np.testing.assert_array_equal(before[0, 1], after[0, 1])
    assert (before[0, 0] != after[0, 0]).all()


def test_bfloat16_is_pooled_in_float32():
    hidden = jnp.asarray(_hidden(), jnp.bfloat16)
    got = pool_segments(hidden, jnp.asarray(SEGMENTS), segments=3, kind="mean")
    np.testing.assert_allclose(got, _naive(np.asarray(hidden, np.float32), "mean"), atol=1e-6)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(RecJaxError, match=r"'median'.*mean, cls, max"):
        pool_segments(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), segments=1, kind="median")
