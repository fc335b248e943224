"""One train step, composed from specs: towers forward once, objectives summed, one update. Takes plain specs, no ConfigDict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rec_jax.mesh import batch_sharding, replicated
from rec_jax.towers import two_tower
from rec_jax.towers.dropout import fold
from rec_jax.train.objectives import Objective
from rec_jax.train.state import RNG, TrainState, row_keys
from rec_jax.types import Array, Batch, Context


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What a step is made of: the towers and the weighted objectives."""

    towers: two_tower.TwoTowerSpec
    objectives: tuple[Objective, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Constants:
    """Arrays that a run never changes: text vectors of the catalogue [N, D_text] or None, log sampling frequency [N]."""

    table: Any
    log_q: Any


def init_scalars(objectives: tuple[Objective, ...]) -> dict[str, jax.Array]:
    """Start values of all learned scalars."""
    return {name: jnp.asarray(value, jnp.float32) for o in objectives for name, value in o.scalars}


def log_frequencies(counts: Array) -> jax.Array:
    """Training targets of each item [N] -> log of its share [N]; an item that was never a target counts as seen once."""
    counts = jnp.maximum(jnp.asarray(counts, jnp.float32), 1.0)
    return jnp.log(counts) - jnp.log(counts.sum())


def loss_and_metrics(
    params: Any, spec: StepSpec, batch: Batch, constants: Constants, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a batch -> (loss [], metrics). `key` is the step's typed key; None = no dropout (objectives that draw still need one)."""
    shards = batch.item_ids.shape[0]
    keys = None
    if key is not None:
        rows = {
            "text": batch.item_tokens.shape[1] if batch.item_tokens is not None else 0,
            "user": (batch.history if batch.history is not None else batch.user_tokens).shape[1],
        }
        keys = {name: row_keys(fold(key, name), shards, n) for name, n in rows.items()}
    catalogue = any(o.catalogue for o in spec.objectives)
    outputs = two_tower.encode_batch(params, spec.towers, batch, table=constants.table, catalogue=catalogue, keys=keys)
    draw = jax.random.key(0, impl=RNG) if key is None else key
    total, metrics = jnp.zeros(()), dict[str, jax.Array]()
    for objective in spec.objectives:
        context = Context(scalars=params.get("scalars", {}), log_q=constants.log_q, rng=fold(draw, objective.name))
        loss, more = objective.function(outputs, batch, context, objective.spec)
        total, metrics = total + objective.weight * loss, metrics | more
    return total, metrics


def make_train_step(
    spec: StepSpec, optimizer: optax.GradientTransformation, mesh: Mesh, state_shardings: TrainState
) -> Callable[[TrainState, Batch, Constants], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, batch, constants) -> (state, metrics); the state is donated, nothing comes to the host.

    Metrics beside the losses: `grad_norm`, and the batch's `examples`, `targets` (queries with weight) and real `tokens`.
    """

    def step(state: TrainState, batch: Batch, constants: Constants) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=RNG), state.step)
        grad = jax.value_and_grad(loss_and_metrics, has_aux=True)
        (loss, metrics), grads = grad(state.params, spec, batch, constants, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        tokens = sum(jnp.sum(s > 0) for s in (batch.item_segments, batch.user_segments) if s is not None)
        metrics |= {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "examples": jnp.sum(batch.examples >= 0),
            "targets": jnp.sum(batch.weights > 0),
            "tokens": jnp.asarray(tokens),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng), metrics

    whole = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh), whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )
