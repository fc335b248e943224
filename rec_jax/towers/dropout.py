"""Dropout with one key a row, so that chunking the rows or using another number of devices changes no bit."""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp

from rec_jax.types import RecJaxError


def fold(keys: jax.Array, name: str | int) -> jax.Array:
    """Typed keys [R] (or a single key []) -> keys of the sub-stream `name`, same shape.

    Args:
      keys: typed keys (`jax.random.key`), one per row.
      name: a name, hashed with CRC-32 so that it means the same in every process, or an integer below 2**32, such as a layer's number.
    """
    data = jnp.uint32(zlib.crc32(name.encode()) if isinstance(name, str) else name)
    fold_in = jax.random.fold_in
    for _ in range(keys.ndim):
        fold_in = jax.vmap(fold_in, in_axes=(0, None))
    return fold_in(keys, data)


def dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """x [R, ...], keys [R] -> x with each element zero with probability `rate`, the others scaled up to keep the mean.

    A mask element costs 8 random bits (16 for rates below 0.05 and above 0.95), not 32; the rate is therefore rounded to a multiple of
    1/256 (1/65536), and the scale is that of the rounded rate, so that the mean stays exact.

    Args:
      x: values; the leading axis is the rows'.
      keys: typed keys, one per row; row i of the result depends on x[i] and keys[i] alone.
      rate: probability of zero, in [0, 1); 0 returns x itself.

    Raises:
      RecJaxError: a rate outside [0, 1), or keys that are not one per row.
    """
    if not 0.0 <= rate < 1.0:
        raise RecJaxError(f"dropout rate {rate!r}: must be at least 0 and below 1")
    if keys.shape != x.shape[:1]:
        raise RecJaxError(f"dropout takes one key per row: x has shape {x.shape}, so keys must have shape {x.shape[:1]}, not {keys.shape}")
    if rate == 0.0:
        return x
    bits = 8 if 0.05 <= rate <= 0.95 else 16
    threshold = min(max(round(rate * 2**bits), 1), 2**bits - 1)
    keep_scale = 2**bits / (2**bits - threshold)
    size = math.prod(x.shape[1:])
    per_word = 32 // bits
    words = jax.vmap(lambda key: jax.random.bits(key, (-(-size // per_word),), jnp.uint32))(keys)
    small = jax.lax.bitcast_convert_type(words, jnp.uint8 if bits == 8 else jnp.uint16)
    keep = small.reshape(x.shape[0], -1)[:, :size].reshape(x.shape) >= threshold
    return jnp.where(keep, x * jnp.asarray(keep_scale, x.dtype), jnp.zeros((), x.dtype))
