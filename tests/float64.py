"""A loss in float32 against its definition written out in numpy, in float64: values, and gradients by central differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_STEP = 1e-5


def assert_equal(loss, naive, floats, tolerance=1e-5):
    """loss(**floats) -> array in float32, naive(**floats) -> the same in float64; every value counts with a weight of its own."""
    wide = {k: np.array(v, np.float64) for k, v in floats.items()}
    want = np.asarray(naive(**wide))
    weights = np.cos(np.arange(want.size)).reshape(want.shape)

    def total(floats):
        out = loss(**floats)
        return jnp.sum(weights * out), out

    (_, got), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))({k: jnp.asarray(v, jnp.float32) for k, v in floats.items()})
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(np.max(np.abs(want)), 1e-6))
    for name, x in wide.items():
        gradient = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            here, up_and_down = x[i], []
            for step in (_STEP, -_STEP):
                x[i] = here + step
                up_and_down.append(np.sum(weights * naive(**wide)))
            x[i] = here
            gradient[i] = (up_and_down[0] - up_and_down[1]) / (2 * _STEP)
        error = np.max(np.abs(gradients[name] - gradient))
        assert error <= max(tolerance * np.max(np.abs(gradient)), 1e-8), f"gradient of {name}: off by {error}"
