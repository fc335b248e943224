"""Trained vectors of items and users by their numbers: a table with a row for each, or the sum of a few rows of a smaller one, by hashing.

A group of parameters holds the table, {"embedding" [N, D]}. Within a step of a row-wise optimizer (`rec_jax.train.rows`) it holds the rows
that the step looks up alone, and which ones these are, ascending: {"embedding" [R, D], "rows" [R] int32}.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.types import Array, Params, RecJaxError

ID_SCALE = 0.02  # standard deviation, at the start, of the numbers of items' own vectors where there is no text beside them
ID_ROWS = 256  # a table of ID vectors has a multiple of this many rows, so that up to 256 devices hold equal parts of it, whatever N is
FIT_STEPS, FIT_END = 64, 1e-11  # of conjugate gradients in `fitted`: the most, and the share of the squared residual that ends them


def table_rows(n: int) -> int:
    """Rows of a table for n numbers: filled up to a multiple of ID_ROWS."""
    return -(-n // ID_ROWS) * ID_ROWS


def places(ids: Array, *, buckets: int, hashes: int) -> jax.Array:
    """Catalogue indices [...] -> the rows of the table whose sum is an item's own vector [..., K] int32; -1 stays -1.

    Without buckets K is 1, the index itself. Else hash k of index i is mix(i + 0x9E3779B9 (k + 1)) modulo the buckets, all in 32 bits
    without sign; mix is the finalizer of MurmurHash3. It depends on nothing but these numbers, so that a checkpoint needs no table of them.

    Args:
      ids: of the catalogue.
      buckets: B, rows of a hashed table; 0 = a row for each item.
      hashes: K of a hashed table.

    Reference: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009); the sum of several hashes' rows after
    Svenstrup et al., "Hash Embeddings for Efficient Word Representations" (2017), without their importance weights.
    """
    ids = jnp.asarray(ids)[..., None]
    if not buckets:
        return ids
    x = ids.astype(jnp.uint32) + jnp.uint32(0x9E3779B9) * jnp.arange(1, hashes + 1, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jnp.where(ids < 0, -1, ((x ^ (x >> 16)) % jnp.uint32(buckets)).astype(jnp.int32))


def look_up(group: Params, rows: Array) -> jax.Array:
    """Rows [...] of a group's table -> [..., D]; -1 gives any row. Of a group that holds some rows, these must be among them."""
    table, rows = group["embedding"], jnp.asarray(rows)
    if "rows" in group:
        rows = jnp.minimum(jnp.searchsorted(group["rows"], rows), len(table) - 1)
    return jnp.take(table, jnp.maximum(rows, 0), axis=0)


def vectors(group: Params, ids: Array, *, buckets: int, hashes: int) -> jax.Array:
    """Own vectors [..., D] of catalogue items [...]; -1 gives any."""
    if not buckets:
        return look_up(group, ids)
    own = look_up(group, places(ids, buckets=buckets, hashes=hashes)).sum(-2)
    if "dropped" not in group:
        return own
    key, rate = group["dropped"]
    return jnp.where(kept(key, rate, ids)[..., None], own, 0.0)


def all_vectors(group: Params, n: int, *, buckets: int, hashes: int) -> jax.Array:
    """Own vectors of the whole catalogue [N, D].

    Raises:
      RecJaxError: within a step that holds some rows of the table alone.
    """
    if "rows" in group:
        raise RecJaxError("vectors of the whole catalogue look up every row: set config.optimizer.rows='dense', or batch candidates")
    return vectors(group, jnp.arange(n, dtype=jnp.int32), buckets=buckets, hashes=hashes) if buckets else group["embedding"][:n]


def without_some(group: Params, key: jax.Array, *, rate: float, buckets: int) -> Params:
    """A group in which each item's own vector is zero with probability `rate`: the same items on both sides of the loss.

    Items of a hashed table share rows, so that each draws for itself when it is looked up.

    Reference: Volkovs et al., "DropoutNet: Addressing Cold Start in Recommender Systems" (2017), section 4.2.
    """
    if buckets:
        return {**group, "dropped": (key, rate)}
    table = group["embedding"]
    keep = jax.random.bernoulli(key, 1.0 - rate, (table.shape[0], 1))
    return {**group, "embedding": jnp.where(keep, table, 0.0)}


def shrunk(group: Params, counts: Array, by: float) -> Params:
    """A group whose own vectors count as far as they were seen: times n / (n + by) for an item with n train events; 0 where there are none.

    A seldom seen item is a negative in nearly every step and a target in few, so that its own vector learns to be far from all users,
    and with an optimizer that scales gradients up it is the longest of all. What its text says is then outweighed.

    Args:
      group: with a row for each item; no hashed table.
      counts: [N] train events of each item.
      by: of n / (n + by).

    Reference: Koren, "Factorization Meets the Neighborhood" (2008), section 2.2, which shrinks similarities so.
    """
    counts = jnp.asarray(counts, jnp.float32)
    table = jnp.asarray(group["embedding"])
    return {**group, "embedding": table.at[: len(counts)].multiply((counts / (counts + by))[:, None])}


def kept(key: jax.Array, rate: float, ids: Array) -> jax.Array:
    """Whether each item [...] keeps what is dropped with probability `rate`; an item draws the same wherever it stands."""
    ids = jnp.asarray(ids)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.maximum(ids, 0).reshape(-1))
    return jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate))(keys).reshape(ids.shape)


def fitted(table: Array, wanted: Array, *, buckets: int, hashes: int) -> jax.Array:
    """A table [rows, D] whose items' own vectors are nearest to those wanted [N, D].

    A row for each item takes them as they are, and the rows behind stay. Of a hashed table it is the least squares solution that
    conjugate gradients come to from zero, so that rows that no item has are zero.

    Reference: Hestenes & Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952), on the normal equations.
    """
    wanted = jnp.asarray(wanted, jnp.float32)
    if not buckets:
        return jnp.asarray(table).at[: len(wanted)].set(wanted)
    rows = places(np.arange(len(wanted), dtype=np.int32), buckets=buckets, hashes=hashes)
    shape = np.shape(table)

    def spread(x: jax.Array) -> jax.Array:
        return jnp.zeros(shape).at[rows].add(x[:, None])

    rest = spread(wanted)
    first = jnp.sum(rest * rest, axis=0)

    def step(_: int, carried: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, rest, along, size = carried
        going = size > FIT_END * first  # a column that has come to its end stays: what is left of it is rounding
        over = lambda a, b: jnp.where(going, a / jnp.where(going, b, 1.0), 0.0)
        image = spread(jnp.take(along, rows, axis=0).sum(1))
        by = over(size, jnp.sum(along * image, axis=0))
        found, rest = found + by * along, rest - by * image
        new = jnp.sum(rest * rest, axis=0)
        return found, rest, rest + over(new, size) * along, new

    return jax.lax.fori_loop(0, FIT_STEPS, step, (jnp.zeros(shape), rest, rest, first))[0]
