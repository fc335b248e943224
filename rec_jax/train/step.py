"""One train step, composed from specs: towers forward once, objectives summed, one update. Takes plain specs, no ConfigDict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rec_jax.mesh import BATCH_AXES, batch_sharding, replicated
from rec_jax.towers import two_tower
from rec_jax.towers.dropout import fold
from rec_jax.train import forwards
from rec_jax.train import rows as rows_lib
from rec_jax.train.forwards import Constants, StepSpec
from rec_jax.train.objectives import Objective, check, ramp_up, target_ids, targets
from rec_jax.train.state import RNG, QueueSpec, TrainState, cooled, follow, mean_of, push
from rec_jax.types import Array, Batch, Context, Outputs, RecJaxError


def make_spec(
    towers: two_tower.TwoTowerSpec,
    objectives: tuple[Objective, ...],
    *,
    shards: int,
    queries: int,
    chunk_rows: int = 0,
    kind: str = "histories",
    teacher: two_tower.TwoTowerSpec | None = None,
    rows: str = "dense",
) -> StepSpec:
    """The spec of a step on batches of G shards with Q queries each; `kind` is what they are made of (`config.batch.kind`).

    `rows` is `config.optimizer.rows`: how the tables of own vectors move.

    Raises:
      RecJaxError: an objective that towers, teacher or batches do not fit, a negative chunk.
    """
    if chunk_rows < 0:
        raise RecJaxError(f"config.batch.chunk_rows={chunk_rows}: must be at least 0, which encodes all rows at once")
    check(objectives, towers, shards=shards, queries=queries, kind=kind, teacher=teacher)
    longest = max(o.queue for o in objectives)
    queue = QueueSpec(shards, longest // (shards * queries), queries, towers.dim) if longest else None
    taught = teacher if any(o.teacher for o in objectives) else None
    tables = rows_lib.tables_of(rows, objectives, towers, kind=kind)
    return StepSpec(towers, objectives, queue, chunk_rows, kind if kind in ("texts", "pairs") else "users", taught, tables)


def init_scalars(objectives: tuple[Objective, ...]) -> dict[str, jax.Array]:
    """Start values of all learned scalars."""
    return {name: jnp.asarray(value, jnp.float32) for o in objectives for name, value in o.scalars}


def log_frequencies(counts: Array) -> jax.Array:
    """Training targets of each item [N] -> log of its share [N]; an item that was never a target counts as seen once."""
    counts = jnp.maximum(jnp.asarray(counts, jnp.float32), 1.0)
    return jnp.log(counts) - jnp.log(counts.sum())


def loss_and_metrics(
    params: Any,
    spec: StepSpec,
    batch: Batch,
    constants: Constants,
    key: jax.Array | None,
    *,
    step: Any = 0,
    momentum: Any = None,
    queue: Any = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a batch -> (loss [], metrics); what is not given of a state's parts is as at its start.

    Args:
      params, spec, batch, constants: see `make_train_step`.
      key: the step's typed key; None = no dropout, and always the same draws.
      step: updates done, for weights that rise.
      momentum: parameters of the momentum encoder.
      queue: see `TrainState`.
      mesh: with more than one device along its batch axes, the losses go round them.
    """
    keys = forwards.momentum_outputs(momentum, spec, batch, constants, _several(mesh)) if momentum is not None else None
    loss, (metrics, _) = _loss(params, spec, batch, constants, key, step, keys, queue, _several(mesh))
    return loss, metrics


def _several(mesh: Mesh | None) -> Mesh | None:
    """The mesh, or None where the batch lies on one device of it."""
    return mesh if mesh is not None and math.prod(mesh.shape[a] for a in BATCH_AXES) > 1 else None


def _loss(
    params: Any,
    spec: StepSpec,
    batch: Batch,
    constants: Constants,
    key: jax.Array | None,
    step: Any,
    momentum: Outputs | None,
    queue: Any,
    mesh: Mesh | None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Outputs]]:
    """-> (loss, (metrics, outputs)): each forward once, whatever number of objectives asks for it."""
    draw = jax.random.key(0, impl=RNG) if key is None else key
    outputs = forwards.outputs(params, spec, batch, constants, key, draw, mesh)
    taught = forwards.teacher_outputs(spec, batch, constants, outputs.drawn_ids, mesh) if spec.teacher is not None else None
    total, metrics = jnp.zeros(()), dict[str, jax.Array]()
    for objective in spec.objectives:
        context = Context(
            scalars=params.get("scalars", {}),
            log_q=constants.log_q,
            rng=fold(draw, objective.name),
            neighbours=constants.neighbours,
            queue=queue,
            momentum=momentum,
            teacher=taught,
            teacher_scalars=None if taught is None else constants.teacher["params"].get("scalars", {}),
            normalize=spec.towers.normalize,
            mesh=mesh,
            axes=None if mesh is None else BATCH_AXES,
        )
        loss, more = objective.function(outputs, batch, context, objective.spec)
        weight = objective.weight * ramp_up(step, objective.ramp) if objective.ramp else objective.weight
        total, metrics = total + weight * loss, metrics | more
    return total, (metrics, outputs)


def make_train_step(
    spec: StepSpec, optimizer: optax.GradientTransformation, mesh: Mesh, state_shardings: TrainState, *, horizon: int = 0
) -> Callable[[TrainState, Batch, Constants], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, batch, constants) -> (state, metrics); the state is donated, nothing comes to the host.

    With a `horizon`, of so many steps, the state has a running mean of its parameters. Metrics beside the losses: `grad_norm`, and the
    batch's `examples`, `targets` (queries with weight) and real `tokens`.
    """

    def step(state: TrainState, batch: Batch, constants: Constants) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=RNG), state.step)
        keys = forwards.momentum_outputs(state.momentum, spec, batch, constants, several) if spec.momentum else None
        placed = state_shardings.params
        touched = rows_lib.touched(state.params, spec, batch, n_items=len(constants.log_q), draw=key, placed=placed, mesh=mesh)
        params, opt_state = rows_lib.whole_rows(state.params, touched), rows_lib.taken(state.opt_state, touched)

        def loss_of(params: Any) -> Any:
            return _loss(rows_lib.looked_up_in(params, touched), spec, batch, constants, key, state.step, keys, state.queue, several)

        (loss, (metrics, outputs)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        if state.cooldown is not None:
            updates = optax.tree.scale(cooled(state.step, state.cooldown), updates)
        params = rows_lib.put_back(state.params, optax.apply_updates(params, updates), touched)
        opt_state = rows_lib.put_back(state.opt_state, opt_state, touched)
        tokens = sum(jnp.sum(s > 0) for s in (batch.item_segments, batch.user_segments) if s is not None)
        metrics |= {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "examples": jnp.sum(batch.examples >= 0),
            "targets": jnp.sum(batch.weights > 0),
            "tokens": jnp.asarray(tokens),
        }
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng, cooldown=state.cooldown)
        if horizon:
            new.average = mean_of(state.average, params, state.step, horizon)
        if spec.momentum:
            new.momentum = follow(state.momentum, params, spec.momentum)
        if spec.queue is not None:
            ids = jnp.where(batch.weights > 0, target_ids(batch), -1)
            vectors = targets(outputs if keys is None else keys, batch).reshape(*ids.shape, -1)
            new.queue = push(state.queue, state.step, vectors, ids)
        return new, metrics

    several = _several(mesh)
    whole = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh), whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )
