"""Checks that the losses share, made before anything is traced."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from rec_jax.types import RecJaxError


def check_block(block: int | None) -> None:
    """Raises RecJaxError unless block is None or at least 1."""
    if block is not None and block < 1:
        raise RecJaxError(f"block is {block!r}; expected at least 1, or None for a block chosen by size")


def check_vectors(query: Any, item: Any) -> None:
    """Raises RecJaxError unless query is [B, D], item [N, D], of one width and float."""
    shapes = np.shape(query), np.shape(item)
    if any(len(s) != 2 for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise RecJaxError(f"query has shape {shapes[0]} and item {shapes[1]}; expected [B, D] and [N, D]: one width D for both")
    if 0 in shapes[1]:
        raise RecJaxError(f"item has shape {shapes[1]}; expected at least one candidate of width 1 or more")
    for name, value in (("query", query), ("item", item)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise RecJaxError(f"{name} has dtype {value.dtype}; expected a float type: cast it")


def check_shape(name: str, value: Any, shape: tuple[int, ...], what: str) -> None:
    """Raises RecJaxError unless value has the shape."""
    if np.shape(value) != shape:
        raise RecJaxError(f"{name} has shape {np.shape(value)}; expected {shape} ({what}): pass it in that shape")
