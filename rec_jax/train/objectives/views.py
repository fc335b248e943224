"""Two dropout views of each item text of the batch; needs no interactions, so the pairs are unlabelled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import weighted_info_nce
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs


@dataclasses.dataclass(frozen=True)
class ViewsSpec:
    """Keys of `config.objectives.simcse` and `config.objectives.simclr`."""

    name: str
    temperature: float
    ramp: int

    def __post_init__(self) -> None:
        base.check_range(f"{self.name}.temperature", self.temperature, above=0)
        base.check_range(f"{self.name}.ramp", self.ramp, least=0)


def simcse(outputs: Outputs, batch: Batch, context: Context, spec: ViewsSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The first view of each text seeks its second among the second views of all texts of the global batch -> (loss, metrics).

    Reference: Gao et al., "SimCSE: Simple Contrastive Learning of Sentence Embeddings" (2021), eq. 4.
    """
    first, second = (base.flat(view) for view in outputs.views)
    ids = base.flat(jnp.asarray(batch.item_ids))
    loss = _loss(first, second, ids, context, spec, target=None)
    return loss, {"simcse": loss}


def simclr(outputs: Outputs, batch: Batch, context: Context, spec: ViewsSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Each view of each text seeks the other view among all other views of both kinds (NT-Xent) -> (loss, metrics).

    Reference: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), eq. 1.
    """
    shards, items = batch.item_ids.shape
    both = jnp.moveaxis(outputs.views, 0, 1).reshape(shards * 2 * items, -1)  # per shard the first views, then the second
    ids = jnp.tile(jnp.asarray(batch.item_ids), (1, 2)).reshape(-1)
    place = jnp.arange(shards * 2 * items, dtype=jnp.int32).reshape(shards, 2, items)
    loss = _loss(both, both, ids, context, spec, target=place[:, ::-1].reshape(-1))
    return loss, {"simclr": loss}


def _loss(query: jax.Array, item: jax.Array, ids: jax.Array, context: Context, spec: ViewsSpec, *, target: Any) -> jax.Array:
    there = ids >= 0
    return weighted_info_nce(
        query,
        item,
        temperature=spec.temperature,
        weights=there / jnp.maximum(there.sum(), 1),
        target=target,
        query_ids=ids,
        item_ids=ids,
        item_mask=there,
        mesh=context.mesh,
        axis=context.axes,
    )


def make_simcse(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.simcse` -> Objective."""
    spec = ViewsSpec("simcse", **keys)
    return base.Objective("simcse", weight, spec, simcse, views=True, ramp=spec.ramp)


def make_simclr(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.simclr` -> Objective."""
    spec = ViewsSpec("simclr", **keys)
    return base.Objective("simclr", weight, spec, simclr, views=True, ramp=spec.ramp)
