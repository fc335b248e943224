"""Gates of what an item is joined of: its text, its own vector and each of its features count by the item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.types import Params


def init(parts: int, dim: int) -> dict[str, Any]:
    """Parameters of gates for so many parts of width D, all open: the sum begins as the plain one."""
    return {"kernel": jnp.zeros((parts * dim, parts)), "bias": jnp.zeros((parts,))}


def weighed(params: Params, parts: Sequence[jax.Array]) -> jax.Array:
    """Parts of the same items, each [..., D] -> their sum [..., D], part p times 2 sigmoid(all parts . w_p + b_p).

    A part that is not known is zero, and so is what it says to the gates.

    Reference: Arevalo et al., "Gated Multimodal Units for Information Fusion" (2017), section 3; here a gate is one number, and lets a
    part through up to twice.
    """
    open_ = 2.0 * jax.nn.sigmoid(jnp.concatenate(parts, axis=-1) @ params["kernel"] + params["bias"])
    return sum((open_[..., n, None] * part for n, part in enumerate(parts[1:], 1)), start=open_[..., 0, None] * parts[0])
