"""What the history tower knows of places beside their items: how far they are from each other, when and how rated their events were.

Everything is made of a place's own event and of earlier ones of its segment. Tables begin at zero: at the start, and for what is unknown
in data that always knows it, a tower is the one without them.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

DISTANCE_BITS = 3  # distances below 16 have ranges of their own, then each octave has 8
TIME_BITS = 1  # times have two ranges an octave
BASE = 10_000.0  # of rotary positions
NEAREST, FARTHEST = 1.0, 4.0  # a head's bias begins as -distance / 2^this: from the first head's to the last one's


def log_buckets(values: jax.Array, *, bits: int) -> jax.Array:
    """values [...] int32 of at least 0 -> numbers [...] int32 of their ranges: one each below 2^(bits + 1), then 2^bits an octave.

    Integers throughout, so that no rounding moves a value from one range to another.
    """
    octave = 31 - jax.lax.clz(jnp.maximum(values, 1))
    shift = jnp.maximum(octave - bits, 0)
    return (shift << bits) + (values >> shift)


def bucket_count(largest: int, *, bits: int) -> int:
    """How many ranges `log_buckets` has for values up to `largest`."""
    shift = max(largest.bit_length() - 1 - bits, 0)
    return (shift << bits) + (largest >> shift) + 1


TIME_ROWS = 1 + bucket_count(2**31 - 1, bits=TIME_BITS)  # of a table by time; row 0 is that of unknown times


def time_rows(seconds: jax.Array) -> jax.Array:
    """Seconds [...] int32, below 0 where unknown -> rows [...] of a table of TIME_ROWS."""
    return jnp.where(seconds < 0, 0, 1 + log_buckets(jnp.maximum(seconds, 0), bits=TIME_BITS))


def rating_rows(ratings: jax.Array, edges: tuple[float, ...]) -> jax.Array:
    """ratings [...], NaN where unknown -> rows [...] of a table of 1 + len(edges); row 0: unknown, or below all edges."""
    return (ratings[..., None] >= jnp.asarray(edges, ratings.dtype)).sum(-1)


def gaps(times: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """times [R, S] (seconds, -1 = unknown), segment_ids [R, S] -> seconds since the place before [R, S], -1 without one or if unknown."""
    before = jnp.roll(times, 1, axis=1)
    known = (times >= 0) & (before >= 0) & (segment_ids == jnp.roll(segment_ids, 1, axis=1))
    return jnp.where(known, times - before, -1).at[:, 0].set(-1)


def same_session(times: jax.Array, segment_ids: jax.Array, gap: int) -> jax.Array:
    """times [R, S], segment_ids [R, S] -> [R, S, S] bool, whether no pause of `gap` seconds or more lies between two places of a row.

    An unknown time is no pause. Segments are told apart by their own mask.
    """
    session = jnp.cumsum(gaps(times, segment_ids) >= gap, axis=1)
    return session[:, :, None] == session[:, None, :]


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [R, S, heads, d], positions [R, S] -> [R, S, heads, d], pair n (of numbers n and n + d/2) turned by position * BASE^(-2n/d).

    Products of two places so turned depend on their distance alone.

    Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * BASE ** (-jnp.arange(half) / half)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Places:
    """What layers see of the places of packed histories; what the tower does not read is None.

    Attributes:
      positions: [R, S] from 0 in each segment, for rotary positions.
      distances: [S, S], row of the table by distance of each pair of places.
      times: [R, S, S], row of the table by time of each pair.
    """

    positions: jax.Array | None = None
    distances: jax.Array | None = None
    times: jax.Array | None = None


def distance_rows(length: int, longest: int) -> jax.Array:
    """Row [S, S] of a table of `bucket_count(longest - 1)` by the distance of two places; larger distances are as `longest` - 1."""
    place = jnp.arange(length, dtype=jnp.int32)
    return log_buckets(jnp.minimum(jnp.abs(place[:, None] - place[None, :]), longest - 1), bits=DISTANCE_BITS)


def recency(longest: int, heads: int) -> jax.Array:
    """Table [rows, heads] of biases by distance that a tower may begin with: -distance / 2^s of the least distance of each row.

    s goes from NEAREST at the first head to FARTHEST at the last: heads see more or less of the past.

    Reference: Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2022), section 3;
    here the slopes are steeper, and learned from there on.
    """
    distances = jnp.arange(longest, dtype=jnp.int32)
    rows, count = log_buckets(distances, bits=DISTANCE_BITS), bucket_count(longest - 1, bits=DISTANCE_BITS)
    least = jnp.full(count, jnp.inf).at[rows].min(distances.astype(jnp.float32))
    return -least[:, None] * 2.0 ** -jnp.linspace(NEAREST, FARTHEST, heads)


def time_difference_rows(times: jax.Array) -> jax.Array:
    """times [R, S], -1 = unknown -> row [R, S, S] of a table by the time between two places."""
    later, earlier = times[:, :, None], times[:, None, :]
    return time_rows(jnp.where((later >= 0) & (earlier >= 0), jnp.abs(later - earlier), -1))


class Bias(nn.Module):
    """Rows [..., S, S] of a learned table -> bias of each head's scores [..., heads, S, S].

    Reference: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section 2.1, for
    distances; Zhai et al. 2024 (see `history_layers`), section 3.2, for times.
    """

    rows: int
    heads: int

    @nn.compact
    def __call__(self, rows: jax.Array) -> jax.Array:
        table = self.param("bias", nn.initializers.zeros, (self.rows, self.heads))
        return jnp.moveaxis(jnp.take(table, rows, axis=0), -1, -3)
