"""Losses of single pairs and triples: binary cross-entropy, sigmoid, triplet."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import bce_with_negatives, gbce_weight, sampled_bce, sigmoid_loss, triplet_loss
from rec_jax.losses.triplet import MINING
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs, RecJaxError

DRAWS = ("batch", "catalogue")


@dataclasses.dataclass(frozen=True)
class BCESpec:
    """Keys of `config.objectives.bce`."""

    negatives: int
    scale: float
    draw: str = "batch"
    calibration: float = 0.0
    learn_scale: bool = True

    def __post_init__(self) -> None:
        base.check_range("bce.negatives", self.negatives, least=1)
        base.check_range("bce.scale", self.scale, above=0)
        place = "config.objectives.bce"
        if self.draw not in DRAWS:
            raise RecJaxError(f"{place}.draw={self.draw!r}: expected one of {', '.join(DRAWS)}")
        if not 0 <= self.calibration <= 1:
            raise RecJaxError(f"{place}.calibration={self.calibration!r}: must be between 0 (none) and 1")
        if self.calibration and self.draw != "catalogue":
            raise RecJaxError(
                f"{place}.calibration={self.calibration} is for negatives drawn uniformly from all items: set {place}.draw='catalogue'"
            )


@dataclasses.dataclass(frozen=True)
class SigmoidSpec:
    """Keys of `config.objectives.sigmoid`: start values of the learned scale and bias."""

    scale: float
    bias: float
    mask_equal: bool

    def __post_init__(self) -> None:
        base.check_range("sigmoid.scale", self.scale, above=0)


@dataclasses.dataclass(frozen=True)
class TripletSpec:
    """Keys of `config.objectives.triplet`."""

    margin: float
    mining: str

    def __post_init__(self) -> None:
        base.check_range("triplet.margin", self.margin, above=0)
        if self.mining not in MINING:
            raise RecJaxError(f"config.objectives.triplet.mining={self.mining!r}: expected one of {', '.join(MINING)}")


def bce(outputs: Outputs, batch: Batch, context: Context, spec: BCESpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Binary cross-entropy of the target against drawn items: targets of the global batch, or the catalogue's -> (loss, metrics).

    Reference: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), section 3.5, with K negatives; calibration after Petrov &
    Macdonald, "gSASRec" (2023), section 5.
    """
    scale, bias = (context.scalars["bce_scale"], context.scalars["bce_bias"]) if spec.learn_scale else (spec.scale, 0.0)
    against = _against_catalogue if spec.draw == "catalogue" else _against_batch
    loss = jnp.sum(against(outputs, batch, context, spec, scale, bias) * base.mean_weights(batch))
    return loss, {"bce": loss}


def _against_batch(outputs: Outputs, batch: Batch, context: Context, spec: BCESpec, scale: Any, bias: Any) -> jax.Array:
    """Losses [G * Q] against targets of the global batch."""
    query, ids = base.flat(outputs.user), base.flat(base.target_ids(batch))
    # Negatives are drawn where there is a target, whatever its event weighs, so that padding is never one of them.
    logits = jnp.log(jnp.maximum(base.shares(batch.weights), 1e-30))
    negatives = jax.random.categorical(context.rng, logits, shape=(query.shape[0], spec.negatives))
    return bce_with_negatives(
        query,
        base.targets(outputs, batch),
        jnp.arange(query.shape[0]),
        negatives=negatives,
        scale=scale,
        bias=bias,
        query_ids=ids,
        item_ids=ids,
    )


def _against_catalogue(outputs: Outputs, batch: Batch, context: Context, spec: BCESpec, scale: Any, bias: Any) -> jax.Array:
    """Losses [G * Q] against items drawn for each query."""
    query, k = outputs.user, spec.negatives
    positive = jnp.einsum("gqd,gqd->gq", query, base.lookup(outputs.item, batch.targets))
    negatives = jnp.einsum("gqd,gqkd->gqk", query, outputs.query_drawn[:, :, :k])
    weight = 1.0
    if spec.calibration:
        weight = gbce_weight(calibration=spec.calibration, negatives=k, items=len(context.log_q))
    losses = sampled_bce(
        scale * positive + bias, scale * negatives + bias, mask=outputs.query_drawn_ids[:, :, :k] >= 0, positive_weight=weight
    )
    return base.flat(losses)


def sigmoid(outputs: Outputs, batch: Batch, context: Context, spec: SigmoidSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Every pair of a query and a target of the global batch is a binary classification -> (loss, metrics).

    Reference: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), section 3.2.
    """
    ids = base.flat(base.target_ids(batch)) if spec.mask_equal else None
    losses = sigmoid_loss(
        base.flat(outputs.user),
        base.targets(outputs, batch),
        scale=jnp.exp(context.scalars["sigmoid_log_scale"]),
        bias=context.scalars["sigmoid_bias"],
        weights=base.mean_weights(batch),
        query_ids=ids,
        item_ids=ids,
        item_mask=base.flat(batch.weights) > 0,
        mesh=context.mesh,
        axis=context.axes,
    )
    loss = jnp.sum(losses)
    return loss, {"sigmoid": loss, "sigmoid_scale": jnp.exp(context.scalars["sigmoid_log_scale"])}


def triplet(outputs: Outputs, batch: Batch, context: Context, spec: TripletSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The target nearer than other targets of the global batch by a margin -> (loss, metrics).

    Reference: Schroff et al., "FaceNet" (2015), sections 3.1 and 3.2; Hermans et al., "In Defense of the Triplet Loss" (2017), eq. 5.
    """
    ids, weights = base.flat(base.target_ids(batch)), base.mean_weights(batch)
    losses = triplet_loss(
        base.flat(outputs.user),
        base.targets(outputs, batch),
        margin=spec.margin,
        mining=spec.mining,
        weights=weights,
        query_ids=ids,
        item_ids=ids,
        item_mask=base.flat(batch.weights) > 0,
        mesh=context.mesh,
        axis=context.axes,
    )
    loss = jnp.sum(losses)
    return loss, {"triplet": loss}


def make_bce(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.bce` -> Objective."""
    spec = BCESpec(**keys)
    scalars = (("bce_scale", spec.scale), ("bce_bias", 0.0)) if spec.learn_scale else ()
    return base.Objective("bce", weight, spec, bce, scalars, per_query=spec.negatives if spec.draw == "catalogue" else 0)


def make_sigmoid(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.sigmoid` -> Objective."""
    spec = SigmoidSpec(**keys)
    return base.Objective("sigmoid", weight, spec, sigmoid, (("sigmoid_log_scale", math.log(spec.scale)), ("sigmoid_bias", spec.bias)))


def make_triplet(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.triplet` -> Objective."""
    return base.Objective("triplet", weight, TripletSpec(**keys), triplet)
