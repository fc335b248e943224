"""The training state: one donated pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

RNG = "threefry2x32"  # the same bits under vmap, chunking and any device count


@dataclasses.dataclass(frozen=True)
class QueueSpec:
    """Sizes of the queue of item vectors: G shards, each with the targets of the last `slots` batches of `places` (Q) vectors of `dim`."""

    shards: int
    slots: int
    places: int
    dim: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a step reads and writes; `average`, `momentum` and `queue` are None where config or objectives do not want them.

    Attributes:
      step: [] int32, updates done.
      params: {"item", "user", "text", "scalars"}; scalars are learned with the rest.
      opt_state: of the optimizer.
      rng: [2] uint32, data of the root key; every random stream is folded from it, so it never changes.
      cooldown: [2] int32, steps between which the learning rate goes down to 0, -1 before that is known; with schedule "plateau".
      average: running mean of params (`mean_of`), which is validated and kept in their place; with `config.optimizer.average`.
      momentum: the momentum encoder, moved by each step towards the towers' params (no scalars).
      queue: {"vectors" [G, slots, Q, D], "ids" [G, slots, Q]}: target items of the last batches, id -1 = empty. G comes first, so that it
        lies on the devices as the batch does, and [G * slots * Q, D] is the same memory.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any
    cooldown: Any = None
    average: Any = None
    momentum: Any = None
    queue: Any = None


def create(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    plateau: bool = False,
    average: bool = False,
    momentum: bool = False,
    queue: QueueSpec | None = None,
) -> TrainState:
    """Step 0. Traceable, so that `jit` with out_shardings makes it in place."""
    rng = jax.random.key_data(jax.random.key(seed, impl=RNG))
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=rng)
    if plateau:
        state.cooldown = jnp.full(2, -1, jnp.int32)
    if average:
        state.average = jax.tree.map(jnp.copy, params)
    if momentum:
        state.momentum = jax.tree.map(jnp.copy, tower_params(params))
    if queue is not None:
        shape = (queue.shards, queue.slots, queue.places)
        state.queue = {"vectors": jnp.zeros((*shape, queue.dim)), "ids": jnp.full(shape, -1, jnp.int32)}
    return state


def tower_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without the learned scalars: what the momentum encoder is made of."""
    return {name: value for name, value in params.items() if name != "scalars"}


def cooled(step: Any, cooldown: Any) -> Any:
    """Updates done [], cooldown [2] -> factor of the learning rate []: 1, then linearly down to 0 between both steps.

    Reference: Zhai et al., "Scaling Vision Transformers" (2022), section 3.5.
    """
    begin, end = cooldown[0], cooldown[1]
    left = (end - step) / jnp.maximum(end - begin, 1)
    return jnp.where(begin < 0, 1.0, jnp.clip(left, 0.0, 1.0))


def mean_of(average: Any, params: Any, step: Any, horizon: int) -> Any:
    """The running mean of weights after step `step` + 1 [], which made `params`: of all up to `horizon` steps, then a decaying one.

    Its share of the newest weights is 1 / min(step + 1, horizon), so that the start counts for nothing after the first.

    Reference: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); Izmailov et al., "Averaging Weights Leads
    to Wider Optima and Better Generalization" (2018), section 3.
    """
    share = 1.0 / jnp.minimum(step + 1, horizon)
    return jax.tree.map(lambda old, new: old + (share * (new - old)).astype(old.dtype), average, params)


def follow(momentum: Any, params: Any, decay: float) -> Any:
    """The momentum encoder after an update: decay * old + (1 - decay) * new.

    Reference: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (2020), eq. 2.
    """
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, momentum, tower_params(params))


def push(queue: dict[str, jax.Array], step: jax.Array, vectors: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
    """The queue with a batch's vectors [G, Q, D] and ids [G, Q] (-1 = none) in place of its oldest; no device needs another's.

    Each step writes one slot, so slot step mod slots is the oldest.
    """
    slot = step % queue["ids"].shape[1]
    new = {"vectors": jax.lax.stop_gradient(vectors), "ids": ids}
    return {
        name: jax.lax.dynamic_update_slice_in_dim(old, new[name].astype(old.dtype)[:, None], slot, axis=1) for name, old in queue.items()
    }


def row_keys(key: jax.Array, shards: int, rows: int) -> jax.Array:
    """A stream's key -> typed keys [G, rows], by fold_in of shard and row."""
    per_shard = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shards))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(per_shard, jnp.arange(rows))
