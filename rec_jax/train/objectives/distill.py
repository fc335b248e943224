"""What a student learns from its teacher: the teacher's softmax, margins, order, vectors, relations, hidden states and attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import (
    angle_loss,
    attention_loss,
    distance_loss,
    hidden_states_loss,
    margin_mse,
    rank_order_loss,
    vector_loss,
    weighted_kl_over_candidates,
)
from rec_jax.losses.distill_vectors import VECTOR_FORMS
from rec_jax.towers.student import layer_map
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs, RecJaxError

OF = ("text", "item", "user")


@dataclasses.dataclass(frozen=True)
class KLSpec:
    """Keys of `config.objectives.distill_kl`; `catalogue`: the candidates are all items, else the batch's targets."""

    temperature: float
    scale: float
    catalogue: bool

    def __post_init__(self) -> None:
        base.check_range("distill_kl.temperature", self.temperature, above=0)
        base.check_range("distill_kl.scale", self.scale, least=0)


@dataclasses.dataclass(frozen=True)
class DrawnSpec:
    """Keys of `config.objectives.distill_margin` and `distill_rank`."""

    name: str
    uniform: int
    top: int = 0

    def __post_init__(self) -> None:
        base.check_range(f"{self.name}.uniform", self.uniform, least=1)
        base.check_range(f"{self.name}.top", self.top, least=0)


@dataclasses.dataclass(frozen=True)
class VectorsSpec:
    """Keys of `config.objectives.distill_vectors` and `distill_relations`."""

    name: str
    of: str
    form: str = "cosine"
    angles: float = 0.0
    neighbours: int = 16

    def __post_init__(self) -> None:
        if self.of not in OF:
            raise RecJaxError(f"config.objectives.{self.name}.of={self.of!r}: expected one of {', '.join(OF)}")
        if self.form not in VECTOR_FORMS:
            raise RecJaxError(f"config.objectives.{self.name}.form={self.form!r}: expected one of {', '.join(VECTOR_FORMS)}")
        base.check_range(f"{self.name}.angles", self.angles, least=0)
        base.check_range(f"{self.name}.neighbours", self.neighbours, least=2)


@dataclasses.dataclass(frozen=True)
class LayersSpec:
    """Keys of `config.objectives.distill_layers`."""

    hidden: float
    attention: float

    def __post_init__(self) -> None:
        base.check_range("distill_layers.hidden", self.hidden, least=0)
        base.check_range("distill_layers.attention", self.attention, least=0)


def logit_scale(scalars: Any, fixed: float, place: str) -> Any:
    """1 / temperature of info_nce, learned by whoever the scalars belong to, or the fixed scale.

    Raises:
      RecJaxError: neither is there.
    """
    if fixed:
        return fixed
    if base.TEMPERATURE not in scalars:
        raise RecJaxError(f"{place}.scale=0 takes the learned temperature of info_nce, which is not there: set {place}.scale, e.g. to 14")
    return base.learned_scale(scalars)


def kl(outputs: Outputs, batch: Batch, context: Context, spec: KLSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """KL of the student's softmax over the candidates from the teacher's -> (loss, metrics).

    Reference: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """
    taught, place = base.taught(context), "config.objectives.distill_kl"
    options: dict[str, Any]
    if spec.catalogue:
        items, teacher_items, options = outputs.catalogue, taught.catalogue, {}
    else:
        items, teacher_items = base.targets(outputs, batch), base.targets(taught, batch)
        options = {"item_mask": base.flat(batch.weights) > 0, "mesh": context.mesh, "axis": context.axes}
    learned = base.TEMPERATURE in context.teacher_scalars
    loss = weighted_kl_over_candidates(
        base.flat(outputs.user),
        items,
        base.flat(taught.user),
        teacher_items,
        weights=base.mean_weights(batch),
        temperature=spec.temperature,
        student_scale=logit_scale(context.scalars, spec.scale, place),
        teacher_scale=logit_scale(context.teacher_scalars, 0.0 if learned else spec.scale, place),
        **options,
    )
    return loss, {"distill_kl": loss}


def _drawn(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Dot products of each query with its target [G * Q] and with the drawn items [G * Q, U]."""
    query = base.flat(outputs.user)
    return jnp.einsum("bd,bd->b", query, base.targets(outputs, batch)), query @ outputs.drawn.T


def margin(outputs: Outputs, batch: Batch, context: Context, spec: DrawnSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The student's margins between target and drawn items are the teacher's -> (loss, metrics).

    Reference: Hofstaetter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation" (2020).
    """
    (positive, negatives), (taught, taught_negatives) = _drawn(outputs, batch), _drawn(base.taught(context), batch)
    losses = margin_mse(positive, negatives, teacher_positive=taught, teacher_negatives=taught_negatives)
    loss = jnp.sum(losses * base.mean_weights(batch))
    return loss, {"distill_margin": loss}


def rank(outputs: Outputs, batch: Batch, context: Context, spec: DrawnSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The student orders target and drawn items as the teacher does, above all its best -> (loss, metrics).

    Reference: Reddi et al., "RankDistil" (2021); Tang & Wang, "Ranking Distillation" (2018).
    """
    scores = [jnp.concatenate([p[:, None], n], axis=1) for p, n in (_drawn(outputs, batch), _drawn(base.taught(context), batch))]
    losses = rank_order_loss(scores[0] * base.learned_scale(context.scalars), scores[1], top=spec.top or None)
    loss = jnp.sum(losses * base.mean_weights(batch))
    return loss, {"distill_rank": loss}


def _vectors(outputs: Outputs, batch: Batch, of: str) -> tuple[jax.Array, jax.Array]:
    """-> vectors [B, D], and which of them are real [B]."""
    if of == "user":
        return base.flat(outputs.user), base.flat(batch.weights) > 0
    return base.flat(outputs.text if of == "text" else outputs.item), base.flat(jnp.asarray(batch.item_ids)) >= 0


def vectors(outputs: Outputs, batch: Batch, context: Context, spec: VectorsSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Each vector of the student's near the teacher's -> (loss, metrics).

    Reference: Reimers & Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation" (2020).
    """
    (mine, real), (taught, _) = _vectors(outputs, batch, spec.of), _vectors(base.taught(context), batch, spec.of)
    loss = jnp.sum(vector_loss(mine, taught, form=spec.form) * real) / jnp.maximum(real.sum(), 1)
    return loss, {"distill_vectors": loss}


def relations(outputs: Outputs, batch: Batch, context: Context, spec: VectorsSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Distances and angles between the student's vectors are the teacher's -> (loss, metrics).

    Reference: Park et al., "Relational Knowledge Distillation" (2019), section 3.2.
    """
    (mine, real), (taught, _) = _vectors(outputs, batch, spec.of), _vectors(base.taught(context), batch, spec.of)
    losses = distance_loss(mine, taught, mask=real, neighbours=spec.neighbours)
    if spec.angles:
        losses = losses + spec.angles * angle_loss(mine, taught, mask=real, neighbours=spec.neighbours)
    loss = jnp.sum(losses * real) / jnp.maximum(real.sum(), 1)
    return loss, {"distill_relations": loss}


def layers(outputs: Outputs, batch: Batch, context: Context, spec: LayersSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Hidden states and attention of each of the student's layers are those of the teacher's that it began as -> (loss, metrics).

    Reference: Jiao et al., "TinyBERT" (2020), section 3.1; the embeddings count as a layer of hidden states.
    """
    segments = jnp.asarray(batch.item_segments)
    segments = segments.reshape(-1, segments.shape[-1])
    real = segments > 0
    share = real / jnp.maximum(real.sum(), 1)
    taught = base.taught(context)
    mapped = layer_map(taught.hidden.shape[0] - 1, outputs.hidden.shape[0] - 1)
    split = lambda stack: [x.reshape(-1, *x.shape[2:]) for x in stack]
    pairs = [(0, 0), *((n + 1, m + 1) for n, m in enumerate(mapped))]
    loss = jnp.zeros(())
    if spec.hidden:
        losses = hidden_states_loss(split(outputs.hidden), split(taught.hidden), layer_map=pairs, mask=real)
        loss = loss + spec.hidden * jnp.sum(losses * share)
    if spec.attention and mapped:
        logs = [[jnp.log(jnp.maximum(x, 1e-30)) for x in split(made.attention)] for made in (outputs, taught)]
        seen = (segments[:, :, None] == segments[:, None, :]) & real[:, :, None]
        losses = attention_loss(*logs, layer_map=list(enumerate(mapped)), mask=seen)
        loss = loss + spec.attention * jnp.sum(losses * share)
    return loss, {"distill_layers": loss}


def make_kl(weight: float, keys: dict[str, Any], catalogue: bool) -> base.Objective:
    """`config.objectives.distill_kl` -> Objective; candidates are those of `config.objectives.info_nce`."""
    spec = KLSpec(**keys, catalogue=catalogue)
    return base.Objective("distill_kl", weight, spec, kl, teacher=True, catalogue=catalogue)


def make_margin(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.distill_margin` -> Objective."""
    spec = DrawnSpec("distill_margin", **keys)
    return base.Objective("distill_margin", weight, spec, margin, teacher=True, uniform=spec.uniform)


def make_rank(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.distill_rank` -> Objective."""
    spec = DrawnSpec("distill_rank", **keys)
    return base.Objective("distill_rank", weight, spec, rank, teacher=True, uniform=spec.uniform)


def make_vectors(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.distill_vectors` -> Objective."""
    return base.Objective("distill_vectors", weight, VectorsSpec("distill_vectors", **keys), vectors, teacher=True)


def make_relations(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.distill_relations` -> Objective."""
    return base.Objective("distill_relations", weight, VectorsSpec("distill_relations", **keys), relations, teacher=True)


def make_layers(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.distill_layers` -> Objective."""
    return base.Objective("distill_layers", weight, LayersSpec(**keys), layers, teacher=True, layers=True)
