"""Items without their own vectors beside the same items with them, so that texts and features alone place a new item well."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs

NORM_FLOOR = 1e-6  # a shorter vector has no direction to compare


@dataclasses.dataclass(frozen=True)
class ConsistencySpec:
    """Keys of `config.objectives.id_consistency`: none beside its weight."""


def id_consistency(outputs: Outputs, batch: Batch, context: Context, spec: ConsistencySpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of 1 - cos(item without its own vector, item with it) over the batch's items -> (loss, metrics).

    The gradient goes to what is left without the own vector alone: the item as it is known is what is learned, and is not held back.
    Beside the ranking loss this does for all items in each step what dropping own vectors does for some of them.

    Reference: Volkovs et al., "DropoutNet: Addressing Cold Start in Recommender Systems" (2017), section 4.1, whose objective asks the
    same of the users' and items' products.
    """
    plain, whole = base.flat(outputs.plain), jax.lax.stop_gradient(base.flat(outputs.item))
    there = base.flat(jnp.asarray(batch.item_ids)) >= 0
    length = lambda x: jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=1), NORM_FLOOR**2))
    apart = 1.0 - jnp.sum(plain * whole, axis=1) / (length(plain) * length(whole))
    loss = jnp.sum(jnp.where(there, apart, 0.0)) / jnp.maximum(there.sum(), 1)
    return loss, {"id_consistency": loss}


def make(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.id_consistency` -> Objective."""
    return base.Objective("id_consistency", weight, ConsistencySpec(**keys), id_consistency, plain=True)
