"""Losses of several tasks -> one loss. A task of which the batch observed nothing adds exactly nothing."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.types import Array, RecJaxError


def task_means(losses: Array, weights: Array) -> tuple[jax.Array, jax.Array]:
    """losses [..., L], weights [..., L] -> (mean loss of each task [L], whether anything of it was observed [L] bool).

    Args:
      losses: [..., L], a column per task.
      weights: [..., L] float >= 0; 0 is padding or not observed (see `pointwise.observed`); beside it any loss may stand, even NaN.

    Raises:
      RecJaxError: shapes that do not fit.
    """
    if not np.ndim(losses) or np.shape(losses) != np.shape(weights):
        raise RecJaxError(f"losses has shape {np.shape(losses)} and weights {np.shape(weights)}; expected [..., L] for both")
    losses = jnp.asarray(losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    weights = jnp.asarray(weights, losses.dtype)
    rows = tuple(range(losses.ndim - 1))
    total = weights.sum(rows)
    summed = jnp.where(weights > 0, weights * jnp.where(weights > 0, losses, 0), 0).sum(rows)
    return summed / jnp.where(total > 0, total, 1), total > 0


def fixed_weights(losses: Array, *, weights: Array | Sequence[float], observed: Array | None = None) -> jax.Array:
    """losses [L] -> scalar: sum_l weights_l * losses_l over the observed tasks.

    Args:
      losses: [L], one per task.
      weights: [L] >= 0.
      observed: [L] bool, whether the batch holds anything of the task; None: all do.

    Raises:
      RecJaxError: shapes that do not fit, a negative weight.
    """
    losses, there = _checked(losses, observed, "weights", weights)
    if not isinstance(weights, jax.core.Tracer) and not np.all(np.asarray(weights) >= 0):
        raise RecJaxError(f"weights is {weights!r}; expected numbers >= 0, one per task: 0 turns a task off")
    return jnp.where(there, jnp.asarray(weights, losses.dtype) * losses, 0).sum()


def uncertainty_weights(
    losses: Array, *, log_variances: Array, squared: Sequence[bool] | None = None, observed: Array | None = None
) -> jax.Array:
    """losses [L], learned log_variances [L] -> scalar: sum_l exp(-s_l) losses_l + s_l / 2 over the observed tasks.

    A squared error is the negative log likelihood of a Gaussian up to the factor 2, and is halved. The sum may be negative: it is a log
    density. For a constant loss c the best s is log 2c (log c for a squared error), so that every task weighs the same.

    Args:
      losses: [L], the mean loss of each task.
      log_variances: [L] log of the task's noise variance; learned, start at 0.
      squared: of each task, whether its loss is a squared error; None: none is.
      observed: [L] bool, whether the batch holds anything of the task; None: all do. Else its log variance adds nothing either.

    Raises:
      RecJaxError: shapes that do not fit.

    Reference: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", eq. 7 and 10 (s = log of their
    sigma squared).
    """
    losses, there = _checked(losses, observed, "log_variances", log_variances)
    halves = np.ones(losses.shape) if squared is None else np.where(np.asarray(squared, bool), 0.5, 1.0)
    if halves.shape != losses.shape:
        raise RecJaxError(f"squared has shape {halves.shape}; expected {losses.shape}, one per task")
    s = jnp.where(there, jnp.asarray(log_variances, losses.dtype), 0)
    return jnp.where(there, jnp.asarray(halves, losses.dtype) * jnp.exp(-s) * losses + s / 2, 0).sum()


def _checked(losses: Array, observed: Array | None, name: str, values: Array | Sequence[float]) -> tuple[jax.Array, jax.Array]:
    """-> (losses [L], 0 where not observed; observed [L] bool)."""
    shape = np.shape(losses)
    if len(shape) != 1:
        raise RecJaxError(f"losses has shape {shape}; expected [L], the mean loss of each task: see task_means")
    for what, value in ((name, values), ("observed", observed)):
        if value is not None and np.shape(value) != shape:
            raise RecJaxError(f"{what} has shape {np.shape(value)}; expected {shape}, one per task")
    losses = jnp.asarray(losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    there = jnp.ones(shape, bool) if observed is None else jnp.asarray(observed, bool)
    return jnp.where(there, losses, 0), there
