"""Objectives: what each needs, and its pure function (outputs, batch, context, spec) -> (loss, metrics)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import bce_with_negatives, weighted_info_nce
from rec_jax.types import Batch, Context, Outputs, RecJaxError

MIN_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class InfoNCESpec:
    """Keys of `config.objectives.info_nce`."""

    candidates: str
    temperature: float
    learn_temperature: bool
    log_q: float
    mask_equal: bool
    symmetric: bool
    label_smoothing: float

    def __post_init__(self) -> None:
        place = "config.objectives.info_nce"
        if self.candidates == "catalogue" and self.symmetric:
            raise RecJaxError(f"{place}.symmetric=True needs batch candidates: the catalogue's items have no queries of their own")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise RecJaxError(f"{place}.label_smoothing={self.label_smoothing}: must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class BCESpec:
    """Keys of `config.objectives.bce`."""

    negatives: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted objective of a config: its spec, whether it ranks the whole catalogue, and its learned scalars' start values."""

    name: str
    weight: float
    spec: Any
    catalogue: bool
    scalars: tuple[tuple[str, float], ...]
    function: Callable[[Outputs, Batch, Context, Any], tuple[jax.Array, dict[str, jax.Array]]]


def target_ids(batch: Batch) -> jax.Array:
    """Catalogue index of each query's target [G, Q]; 0 where there is none (its weight is 0)."""
    ids = jax.vmap(lambda ids, i: jnp.take(ids, jnp.maximum(i, 0)))(batch.item_ids, batch.targets)
    return jnp.maximum(ids, 0)


def _targets(outputs: Outputs, batch: Batch) -> jax.Array:
    """Vectors of the targets, shard by shard, as [G * Q, D]."""
    vectors = jax.vmap(lambda v, i: jnp.take(v, jnp.maximum(i, 0), axis=0))(outputs.item, batch.targets)
    return vectors.reshape(-1, vectors.shape[-1])


def _mean_weights(batch: Batch) -> jax.Array:
    """Weights [G * Q] that sum to 1; all 0 for a batch without targets."""
    weights = batch.weights.reshape(-1)
    return weights / jnp.maximum(weights.sum(), 1e-6)


def temperature(scalars: Mapping[str, jax.Array], spec: InfoNCESpec) -> jax.Array | float:
    """The temperature in use, learned or fixed."""
    if not spec.learn_temperature:
        return spec.temperature
    return jnp.maximum(jnp.exp(scalars["info_nce_log_temperature"]), MIN_TEMPERATURE)


def info_nce(outputs: Outputs, batch: Batch, context: Context, spec: InfoNCESpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of every query against the targets of the global batch, or against the whole catalogue -> (loss, metrics).

    Reference: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), section 2.3; log Q after
    Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations" (2019), section 3.
    """
    query = outputs.user.reshape(-1, outputs.user.shape[-1])
    ids, tau = target_ids(batch).reshape(-1), temperature(context.scalars, spec)
    weights = _mean_weights(batch)
    if spec.candidates == "catalogue":
        loss = weighted_info_nce(
            query, outputs.catalogue, temperature=tau, target=ids, weights=weights, label_smoothing=spec.label_smoothing
        )
    else:
        loss = weighted_info_nce(
            query,
            _targets(outputs, batch),
            temperature=tau,
            log_q=spec.log_q * jnp.take(context.log_q, ids) if spec.log_q else None,
            query_ids=ids if spec.mask_equal else None,
            item_ids=ids if spec.mask_equal else None,
            item_mask=batch.weights.reshape(-1) > 0,
            weights=weights,
            symmetric=spec.symmetric,
        )
    return loss, {"info_nce": loss, "temperature": jnp.asarray(tau)}


def bce(outputs: Outputs, batch: Batch, context: Context, spec: BCESpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Binary cross-entropy of the target against targets drawn from the global batch -> (loss, metrics).

    Reference: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), section 3.5, with K negatives.
    """
    query = outputs.user.reshape(-1, outputs.user.shape[-1])
    ids, weights = target_ids(batch).reshape(-1), _mean_weights(batch)
    # Negatives are drawn by weight, so that padding is never one of them.
    logits = jnp.log(jnp.maximum(weights, 1e-30))
    negatives = jax.random.categorical(context.rng, logits, shape=(query.shape[0], spec.negatives))
    losses = bce_with_negatives(
        query,
        _targets(outputs, batch),
        jnp.arange(query.shape[0]),
        negatives=negatives,
        scale=context.scalars["bce_scale"],
        bias=context.scalars["bce_bias"],
        query_ids=ids,
        item_ids=ids,
    )
    loss = jnp.sum(losses * weights)
    return loss, {"bce": loss}


def _make_info_nce(weight: float, keys: dict[str, Any]) -> Objective:
    spec = InfoNCESpec(**keys)
    scalars = (("info_nce_log_temperature", math.log(spec.temperature)),) if spec.learn_temperature else ()
    return Objective("info_nce", weight, spec, spec.candidates == "catalogue", scalars, info_nce)


def _make_bce(weight: float, keys: dict[str, Any]) -> Objective:
    spec = BCESpec(**keys)
    return Objective("bce", weight, spec, False, (("bce_scale", spec.scale), ("bce_bias", 0.0)), bce)


OBJECTIVES: dict[str, Callable[[float, dict[str, Any]], Objective]] = {"info_nce": _make_info_nce, "bce": _make_bce}


def make_objectives(objectives: Mapping[str, Mapping[str, Any]]) -> tuple[Objective, ...]:
    """`config.objectives` -> those with a weight above 0.

    Raises:
      RecJaxError: an unknown name, or none with weight.
    """
    out = []
    for name, keys in objectives.items():
        if name not in OBJECTIVES:
            raise RecJaxError(f"config.objectives.{name}: no such objective; there are {', '.join(OBJECTIVES)}")
        if keys["weight"] > 0:
            out.append(OBJECTIVES[name](keys["weight"], {k: v for k, v in keys.items() if k != "weight"}))
    if not out:
        raise RecJaxError(f"config.objectives gives none of {', '.join(objectives)} a weight above 0")
    return tuple(out)
