"""Vectors whose first d numbers are vectors themselves: any loss, summed over several widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.types import RecJaxError


def check_widths(widths: Sequence[int], dim: int, place: str = "widths") -> None:
    """Raises RecJaxError unless widths are distinct numbers from 1 to dim."""
    if not widths or len(set(widths)) != len(widths) or not all(1 <= w <= dim for w in widths):
        raise RecJaxError(f"{place} is {tuple(widths)}; expected distinct widths from 1 to {dim}, the width of the vectors")


def matryoshka(
    loss: Callable[..., jax.Array], *vectors: Any, widths: Sequence[int], weights: Sequence[float] | None = None, normalize: bool = True
) -> jax.Array:
    """Vectors [..., D] (None passes) -> the weighted mean over widths d of loss(*the first d numbers of each).

    Args:
      loss: takes the vectors, cut, and gives a scalar or a loss per example.
      vectors: arrays [..., D] of one width D.
      widths: the numbers of leading dimensions.
      weights: of each width; None = equal.
      normalize: cut vectors get unit length again.

    Raises:
      RecJaxError: a width that is not in 1..D, weights that are not one per width.

    Reference: Kusupati et al. 2022, "Matryoshka Representation Learning", eq. 1.
    """
    check_widths(widths, min(v.shape[-1] for v in vectors if v is not None))
    if weights is not None and len(weights) != len(widths):
        raise RecJaxError(f"weights is {tuple(weights)}; expected one per width of {tuple(widths)}")
    shares = [1.0] * len(widths) if weights is None else list(weights)
    losses = [share * loss(*(cut(v, width, normalize=normalize) for v in vectors)) for width, share in zip(widths, shares, strict=True)]
    return sum(losses[1:], losses[0]) / sum(shares)


def cut(vectors: Any, width: int, *, normalize: bool = True) -> Any:
    """vectors [..., D] -> their first `width` numbers, of unit length; zeros stay zeros. None passes."""
    if vectors is None or width == vectors.shape[-1]:
        return vectors
    short = jnp.asarray(vectors)[..., :width]
    if not normalize:
        return short
    wide = short.astype(jnp.promote_types(short.dtype, jnp.float32))
    square = jnp.sum(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(short.dtype)
