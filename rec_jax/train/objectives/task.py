"""The recommendation task itself, L_T: labels of impressions, a history's next item against drawn ones, and logged feedback."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import (
    bce,
    bpr_loss,
    fixed_weights,
    margin_loss,
    observed,
    preference_loss,
    regression,
    softmax_cross_entropy,
    softmax_loss,
    task_means,
    top_k_reinforce,
    uncertainty_weights,
)
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs, RecJaxError

LOSSES = ("bce", "bpr", "margin", "softmax", "regression")


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """Keys of `config.objectives.task`, and L, the labels that the data has (0: none, histories)."""

    loss: str
    uniform: int
    label_smoothing: float
    positive_weight: float
    negative_rate: float
    margin: float
    weights: tuple[float, ...]
    uncertainty: bool
    labels: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise RecJaxError(f"config.objectives.task.loss={self.loss!r}: expected one of {', '.join(LOSSES)}")
        base.check_range("task.label_smoothing", self.label_smoothing, least=0, below=1)
        base.check_range("task.positive_weight", self.positive_weight, above=0)
        base.check_range("task.margin", self.margin, above=0)
        if not 0 < self.negative_rate <= 1:
            raise RecJaxError(f"config.objectives.task.negative_rate={self.negative_rate}: must be above 0 and at most 1")
        if self.labels:
            if self.loss not in ("bce", "regression"):
                raise RecJaxError(f"config.objectives.task.loss={self.loss!r}: labels of impressions take bce or regression")
            if self.weights and len(self.weights) != self.labels:
                raise RecJaxError(f"config.objectives.task.weights={self.weights}: the data has {self.labels} labels")
        else:
            base.check_range("task.uniform", self.uniform, least=1)
            if self.loss == "regression" or self.uncertainty or self.weights:
                raise RecJaxError(
                    "config.objectives.task: loss='regression', weights and uncertainty are for labels: set config.batch.kind='impressions'"
                )


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Keys of `config.objectives.policy`."""

    top_k: int
    cap: float
    baseline: float
    temperature: float

    def __post_init__(self) -> None:
        base.check_range("policy.top_k", self.top_k, least=1)
        base.check_range("policy.cap", self.cap, least=0)
        base.check_range("policy.temperature", self.temperature, above=0)


@dataclasses.dataclass(frozen=True)
class PreferenceSpec:
    """Keys of `config.objectives.preference`."""

    beta: float

    def __post_init__(self) -> None:
        base.check_range("preference.beta", self.beta, above=0)


def task(outputs: Outputs, batch: Batch, context: Context, spec: TaskSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The task head's loss -> (loss, metrics): on the labels of impressions, else on each target against the drawn items.

    Drawn items that are the target itself count for nothing.
    """
    return _labelled(outputs, batch, context, spec) if spec.labels else _ranked(outputs, batch, spec)


def _labelled(outputs: Outputs, batch: Batch, context: Context, spec: TaskSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits, labels = base.flat(outputs.scores), base.flat(jnp.asarray(batch.labels))
    if spec.loss == "bce":
        losses = bce(
            logits,
            labels,
            label_smoothing=spec.label_smoothing,
            positive_weight=spec.positive_weight,
            negative_rate=spec.negative_rate,
        )
    else:
        losses = regression(logits, labels)
    means, there = task_means(losses, observed(labels) * jnp.asarray(batch.weights).reshape(-1, 1))
    if spec.uncertainty:
        variances = jnp.stack([context.scalars[f"task_log_variance_{n}"] for n in range(spec.labels)])
        loss = uncertainty_weights(means, log_variances=variances, squared=(spec.loss == "regression",) * spec.labels, observed=there)
    else:
        loss = fixed_weights(means, weights=spec.weights or (1.0,) * spec.labels, observed=there)
    return loss, {"task": loss} | {f"task_{n}": means[n] for n in range(spec.labels) if spec.labels > 1}


def _ranked(outputs: Outputs, batch: Batch, spec: TaskSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    weights, ids = base.mean_weights(batch), base.flat(base.target_ids(batch))
    positive, negatives = base.flat(outputs.scores)[:, 0], base.flat(outputs.drawn_scores)
    mask = ids[:, None] != outputs.drawn_ids[None]
    if spec.loss == "bce":
        smooth = {"label_smoothing": spec.label_smoothing, "negative_rate": spec.negative_rate}
        against = jnp.where(mask, bce(negatives, jnp.zeros_like(negatives), **smooth), 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
        losses = bce(positive, jnp.ones_like(positive), positive_weight=spec.positive_weight, **smooth) + against
    elif spec.loss == "bpr":
        losses = bpr_loss(positive, negatives, mask=mask)
    elif spec.loss == "margin":
        losses = margin_loss(positive, negatives, margin=spec.margin, mask=mask)
    else:
        losses = softmax_loss(positive, negatives, mask=mask)
    loss = jnp.sum(losses * weights)
    return loss, {"task": loss}


def policy(outputs: Outputs, batch: Batch, context: Context, spec: PolicySpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Off-policy top-K REINFORCE of a softmax policy over the catalogue; the first label is the reward -> (loss, metrics).

    Reference: Chen et al., "Top-K Off-Policy Correction for a REINFORCE Recommender System" (2019), sections 4.1 to 4.3.
    """
    weights, ids = base.mean_weights(batch), base.flat(base.target_ids(batch))
    reward = base.flat(jnp.asarray(batch.labels))[:, 0]
    there = (weights > 0) & ~jnp.isnan(reward)
    log_prob = -softmax_cross_entropy(base.flat(outputs.user), outputs.catalogue, ids, scale=1 / spec.temperature)
    losses = top_k_reinforce(
        log_prob,
        jnp.where(there, base.flat(jnp.asarray(batch.propensities)), 1.0),
        jnp.where(there, reward, 0.0),
        top_k=spec.top_k,
        cap=spec.cap or None,
        baseline=spec.baseline,
    )
    loss = jnp.sum(jnp.where(there, losses * weights, 0.0))
    return loss, {"policy": loss}


def preference(outputs: Outputs, batch: Batch, context: Context, spec: PreferenceSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """DPO: the target is preferred to the mined negatives, as far as the teacher's own preference leaves it -> (loss, metrics).

    Scores are dot products over info_nce's temperature, where that is learned; the teacher's over its own.

    Reference: Rafailov et al., "Direct Preference Optimization" (2023), eq. 7; Chen et al., "On Softmax Direct Preference Optimization for
    Recommendation" (2024).
    """
    if batch.negatives is None:
        raise RecJaxError("config.objectives.preference.weight is above 0, but batches have no mined negatives: set config.data.negatives")
    places = jnp.asarray(batch.negatives)

    def scores(made: Outputs, scalars: Any) -> tuple[jax.Array, jax.Array]:
        scale = base.learned_scale(scalars)
        target = jnp.einsum("gqd,gqd->gq", made.user, base.lookup(made.item, batch.targets))
        others = jnp.einsum("gqd,gqkd->gqk", made.user, base.lookup(made.item, places))
        return base.flat(target) * scale, base.flat(others) * scale

    chosen, rejected = scores(outputs, context.scalars)
    reference_chosen, reference_rejected = scores(base.taught(context), context.teacher_scalars)
    losses = preference_loss(
        chosen,
        rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        beta=spec.beta,
        mask=base.flat(places) >= 0,
    )
    loss = jnp.sum(losses * base.mean_weights(batch))
    return loss, {"preference": loss}


def make_task(weight: float, keys: dict[str, Any], labels: int = 0) -> base.Objective:
    """`config.objectives.task` -> Objective; `labels` is how many the data has."""
    spec = TaskSpec(**{**keys, "weights": tuple(keys["weights"])}, labels=labels)
    scalars = tuple((f"task_log_variance_{n}", 0.0) for n in range(labels)) if spec.uncertainty else ()
    return base.Objective("task", weight, spec, task, scalars, scores=True, uniform=0 if labels else spec.uniform)


def make_policy(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.policy` -> Objective."""
    return base.Objective("policy", weight, PolicySpec(**keys), policy, catalogue=True)


def make_preference(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.preference` -> Objective."""
    return base.Objective("preference", weight, PreferenceSpec(**keys), preference, teacher=True)
