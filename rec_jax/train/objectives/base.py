"""What an objective is, and what several of them use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.types import Batch, Context, Outputs, RecJaxError

TEMPERATURE = "info_nce_log_temperature"  # the learned scalar that scores of users and items are divided by


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted objective of a config, and what it needs.

    Attributes:
      name, weight, spec: of the config.
      function: (outputs, batch, context, spec) -> (loss, metrics).
      scalars: names and start values of what it learns.
      catalogue: vectors of all items.
      uniform: U, how many items of the catalogue are drawn uniformly in each step.
      per_query: K, how many are drawn uniformly for each query by itself.
      views: a second draw of dropout on the batch's item texts.
      plain: the batch's items without their own vectors.
      history_views: user vectors of two views of each history; the batches carry them.
      queue: item vectors kept of earlier batches.
      momentum: decay of the momentum encoder that makes its keys; 0 = none.
      ramp: steps over which its weight rises from 0; 0 = none.
      positives: next items of the history that are positives of a query.
      neighbours: M, neighbours of each catalogue item that are targets too; 0 = none.
      masks_history: items of a query's history are no candidates.
      matryoshka: prefix widths that are trained too.
      masked, denoised: what the heads of pre-training make of masked and of damaged texts; batches of texts have these.
      scores: the task head's logits of queries and targets, and of the drawn items.
      teacher: what the teacher makes of the batch, and of the catalogue where the objective needs that.
      layers: every layer's hidden states and attention, the student's and the teacher's.
    """

    name: str
    weight: float
    spec: Any
    function: Callable[[Outputs, Batch, Context, Any], tuple[jax.Array, dict[str, jax.Array]]]
    scalars: tuple[tuple[str, float], ...] = ()
    catalogue: bool = False
    uniform: int = 0
    per_query: int = 0
    views: bool = False
    plain: bool = False
    history_views: bool = False
    queue: int = 0
    momentum: float = 0.0
    ramp: int = 0
    positives: int = 1
    neighbours: int = 0
    masks_history: bool = False
    matryoshka: tuple[int, ...] = ()
    masked: bool = False
    denoised: bool = False
    scores: bool = False
    teacher: bool = False
    layers: bool = False

    @property
    def table(self) -> bool:
        """Whether it needs text vectors of the catalogue."""
        return self.catalogue or self.uniform > 0 or self.per_query > 0


def check_range(key: str, value: float, *, above: float | None = None, least: float | None = None, below: float | None = None) -> None:
    """Raises RecJaxError unless above < value, least <= value and value < below, as far as given; `key` goes on from config.objectives."""
    wrong = (above is not None and not value > above) or (least is not None and not value >= least)
    if wrong or (below is not None and not value < below):
        limits = [f"{word} {limit}" for word, limit in (("above", above), ("at least", least), ("below", below)) if limit is not None]
        raise RecJaxError(f"config.objectives.{key}={value!r}: must be {' and '.join(limits)}")


def taught(context: Context) -> Outputs:
    """What the teacher made of the batch; `check` has seen to it that there is one."""
    assert context.teacher is not None
    return context.teacher


def learned_scale(scalars: Any) -> Any:
    """What scores of users and items are multiplied by: 1 / the learned temperature of info_nce; 1 where none is learned."""
    return jnp.exp(-scalars[TEMPERATURE]) if TEMPERATURE in scalars else 1.0


def target_ids(batch: Batch) -> jax.Array:
    """Catalogue index of each query's target [G, Q]; 0 where there is none (its weight is 0)."""
    ids = jax.vmap(lambda ids, i: jnp.take(ids, jnp.maximum(i, 0)))(batch.item_ids, batch.targets)
    return jnp.maximum(ids, 0)


def lookup(vectors: Any, places: Any) -> jax.Array:
    """Per shard: vectors [G, M, ...], places [G, ...] -> [G, ..., ...]; vmapped over G, so that it stays on its device. -1 gives row 0."""
    return jax.vmap(lambda v, i: jnp.take(v, jnp.maximum(i, 0), axis=0))(jnp.asarray(vectors), jnp.asarray(places))


def flat(x: Any) -> jax.Array:
    """[G, Q, ...] -> [G * Q, ...]."""
    return x.reshape(-1, *x.shape[2:])


def targets(outputs: Outputs, batch: Batch) -> jax.Array:
    """Vectors of the targets, shard by shard, as [G * Q, D]."""
    return flat(lookup(outputs.item, batch.targets))


def shares(weights: Any) -> jax.Array:
    """weights [...] -> shares [product of ...] that sum to 1; all 0 where all weights are."""
    weights = weights.reshape(-1)
    return weights / jnp.maximum(weights.sum(), 1e-6)


def mean_weights(batch: Batch) -> jax.Array:
    """What each query weighs in a mean over the batch's targets [G * Q]: they sum to 1; all 0 for a batch without targets."""
    return shares(batch.weights if batch.event_weights is None else batch.weights * batch.event_weights)


@jax.custom_vjp
def bounded(x: jax.Array, low: float, high: float) -> jax.Array:
    """x [] -> x within [low, high]; beyond a bound, only a gradient that leads back inside passes, so that x never sticks there."""
    return jnp.clip(x, low, high)


def _bounded_forward(x: jax.Array, low: float, high: float) -> tuple[jax.Array, Any]:
    return bounded(x, low, high), (x, low, high)


def _bounded_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    x, low, high = saved
    outwards = ((x < low) & (gradient > 0)) | ((x > high) & (gradient < 0))
    return jnp.where(outwards, 0, gradient), None, None


bounded.defvjp(_bounded_forward, _bounded_backward)


def ramp_up(step: Any, steps: int) -> Any:
    """Updates done [] -> factor of a weight that rises from 0 to 1 over `steps`: exp(-5 (1 - step / steps)^2), 0 at step 0.

    Reference: Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning" (2017), section 2.3.
    """
    done = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
    return jnp.where(done > 0, jnp.exp(-5.0 * jnp.square(1.0 - done)), 0.0)
