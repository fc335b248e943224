"""The training state: one donated pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

RNG = "threefry2x32"  # the same bits under vmap, chunking and any device count


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: [] int32, updates done.
      params: {"item", "user", "text", "scalars"}; scalars are learned with the rest.
      opt_state: of the optimizer.
      rng: [2] uint32, data of the root key; every random stream is folded from it, so it never changes.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any


def create(params: Any, optimizer: optax.GradientTransformation, *, seed: int) -> TrainState:
    """Step 0. Traceable, so that `jit` with out_shardings makes it in place."""
    rng = jax.random.key_data(jax.random.key(seed, impl=RNG))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=rng)


def row_keys(key: jax.Array, shards: int, rows: int) -> jax.Array:
    """A stream's key -> typed keys [G, rows], by fold_in of shard and row."""
    per_shard = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shards))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(per_shard, jnp.arange(rows))
