"""Token vectors of packed rows -> one vector a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rec_jax.types import RecJaxError

POOLINGS = ("mean", "cls", "max")


def pool_segments(hidden: jax.Array, segment_ids: jax.Array, *, segments: int, kind: str) -> jax.Array:
    """hidden [R, T, D], segment_ids [R, T] -> vectors [R, K, D] float32; place k holds segment k + 1, zeros where the row has none.

    Args:
      hidden: token vectors; they must be finite in every place, padding included.
      segment_ids: 1..K within a row, 0 is padding; larger numbers belong to no place.
      segments: K.
      kind: "mean" over the segment's tokens, "cls" for its first token, "max" per dimension.

    Raises:
      RecJaxError: an unknown kind.
    """
    if kind not in POOLINGS:
        raise RecJaxError(f"pooling {kind!r}: expected one of {', '.join(POOLINGS)}")
    member = segment_ids[:, :, None] == jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
    if kind == "max":
        return _max(hidden, member)
    count = jnp.cumsum(member, axis=1, dtype=jnp.int32)
    share = jnp.where(count == 1, 1.0, 0.0) if kind == "cls" else 1.0 / jnp.maximum(count[:, -1:], 1)
    weight = jnp.where(member, share, 0.0)
    # A product with 0/1 masks instead of a gather: its gradient is a product too, not a scatter. Highest precision, because
    # an accelerator's default would round the vectors to bfloat16.
    return jnp.einsum("rtk,rtd->rkd", weight, hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@jax.checkpoint
def _max(hidden: jax.Array, member: jax.Array) -> jax.Array:
    """hidden [R, T, D], member [R, T, K] -> [R, K, D]; the backward pass makes the [R, T, K, D] comparison again instead of keeping it."""
    masked = jnp.where(member[..., None], hidden.astype(jnp.float32)[:, :, None, :], -jnp.inf)
    return jnp.where(member.any(1)[..., None], masked.max(1), 0.0)
