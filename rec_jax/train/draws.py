"""Items of the catalogue that are drawn for each query by itself: uniformly, and none that the query's own window holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rec_jax.train.objectives.base import lookup, target_ids
from rec_jax.types import Batch


def unseen_items(key: jax.Array, batch: Batch, *, n_items: int, draws: int) -> jax.Array:
    """Batch of G shards with Q queries -> catalogue indices [G, Q, K] int32, drawn uniformly, with replacement, from what is not its own.

    A query of packed histories never gets an item of its own window: its target, what comes before it, or what comes later, hidden or
    not. Where a history is longer than `config.batch.history_length`, the user's items outside of that window may be drawn; SASRec as
    published leaves them out too. Other queries (impressions, written-out histories) do not get their target. Nothing is drawn again: the
    r-th item of those that are left is found by counting the own items before it, so that the draws are exact. A query whose window holds
    the whole catalogue gets -1.

    Args:
      key: typed key; the draws are the same on any number of devices.
      batch: see `types.Batch`.
      n_items: N of the catalogue.
      draws: K.

    Reference: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), section 3.4 (an item that is not in the user's sequence).
    """
    targets = target_ids(batch)
    shards, queries = targets.shape
    if batch.history is None:
        rank = jax.random.randint(key, (shards, queries, draws), 0, max(n_items - 1, 1))
        drawn = rank + (rank >= targets[..., None])
        return jnp.where(n_items > 1, drawn, -1).astype(jnp.int32)

    segments = jnp.asarray(batch.history_segments)
    rows, length = segments.shape[1:]
    # The items of each row's windows, by window and index: every item but a window's last is in its history, all but its first are targets.
    # A hidden item is a target alone, and what is not hidden beside it no target: then the one stands for the other.
    history, sought = jnp.asarray(batch.history), jnp.asarray(batch.targets).reshape(segments.shape)
    both = (jnp.where(one >= 0, one, other) for one, other in ((history, sought), (sought, history)))
    own = jnp.concatenate([jnp.maximum(lookup(batch.item_ids, places), 0) for places in both], axis=-1)
    window, own = jax.lax.sort((jnp.concatenate([segments, segments], axis=-1), own), dimension=-1, num_keys=2)
    changed = lambda x: jnp.concatenate([jnp.ones_like(x[..., :1], bool), x[..., 1:] != x[..., :-1]], axis=-1)
    begins = changed(window)
    once = begins | changed(own)  # an item that comes again in a window counts once
    number = jnp.cumsum(once, axis=-1, dtype=jnp.int32)
    before = own - (number - jax.lax.cummax(jnp.where(begins, number, 0), axis=own.ndim - 1))  # items that are left, before this one

    same = (window[:, :, None] == segments[..., None]) & once[:, :, None]  # [G, H, S, 2 S]
    left = n_items - same.sum(-1, dtype=jnp.int32)
    rank = jax.random.randint(key, (shards, rows, length, draws), 0, jnp.maximum(left, 1)[..., None])
    skipped = same[..., None, :] & (before[:, :, None, None] <= rank[..., None])
    drawn = jnp.where((left > 0)[..., None], rank + skipped.sum(-1, dtype=jnp.int32), -1)
    return drawn.reshape(shards, queries, draws)
