"""What a student learns from a teacher's scores of the same candidates: their distribution, their margins, their order.

The teacher gets no gradient. For a whole catalogue see `distill_candidates`, for vectors, hidden states and attention `distill_vectors`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses.ranking import check_positive, check_same_shape, masked_scores, plackett_luce_loss
from rec_jax.losses.tiles import finite
from rec_jax.types import Array, RecJaxError


def kl_over_scores(student: Array, teacher: Array, *, temperature: Any = 1.0, mask: Array | None = None) -> jax.Array:
    """student [B, K], teacher [B, K] scores of the same candidates -> loss [B]: temperature^2 KL(teacher || student).

    Args:
      student, teacher: [B, K] logits or log-probabilities.
      temperature: divides both, > 0.
      mask: [B, K] bool, False for an empty place. A list without any has loss 0.

    Raises:
      RecJaxError: temperature <= 0, shapes that do not fit.

    Reference: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    check_positive("temperature", temperature)
    student, teacher, there = _lists(student, teacher, mask)
    kl, _ = kl_of_logits(student / temperature, teacher / temperature, there)
    return jnp.square(jnp.asarray(temperature, kl.dtype)) * kl


def margin_mse(
    positive: Array, negatives: Array, *, teacher_positive: Array, teacher_negatives: Array, mask: Array | None = None
) -> jax.Array:
    """positive [B], negatives [B, K], and the teacher's -> loss [B]: mean squared difference of the margins positive - negative.

    Args:
      positive, teacher_positive: [B] scores, of any offset of their own, but of one unit.
      negatives, teacher_negatives: [B, K] scores.
      mask: [B, K] bool, False for an empty place. A query without negatives has loss 0.

    Raises:
      RecJaxError: shapes that do not fit.

    Reference: Hofstaetter et al. 2020, "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
    section 3.
    """
    negatives, taught, there = _lists(negatives, teacher_negatives, mask, names=("negatives", "teacher_negatives"))
    for name, value in (("positive", positive), ("teacher_positive", teacher_positive)):
        check_same_shape(name, value, "negatives without its last axis", negatives.shape[:-1])
    some = there.any(-1)
    positive = jnp.where(some, jnp.asarray(positive), 0)
    taught_positive = jax.lax.stop_gradient(jnp.where(some, jnp.asarray(teacher_positive), 0))
    error = (positive[..., None] - negatives) - (taught_positive[..., None] - taught)
    return jnp.where(there, jnp.square(error), 0).sum(-1) / jnp.maximum(there.sum(-1), 1)


def rank_order_loss(
    student: Array, teacher: Array, *, top: int | None = None, position_weights: Array | None = None, mask: Array | None = None
) -> jax.Array:
    """student [B, K], teacher [B, K] scores of the same candidates -> loss [B]: -log probability of the teacher's order, places weighted.

    Each of the teacher's first `top` places adds its weight times -log softmax of its candidate among those that the teacher puts no
    higher; the weights sum to 1. Only the teacher's order counts, not its scores; of equal ones the first place goes first.

    Args:
      student, teacher: [B, K] scores.
      top: places whose order counts, the rest must only be lower; None: all.
      position_weights: [K] >= 0, best place first, counted without the empty ones; None: 1 / log2(1 + place), the discount of DCG.
      mask: [B, K] bool, False for an empty place. A list without any has loss 0.

    Raises:
      RecJaxError: top < 1, shapes that do not fit.

    Reference: Reddi et al. 2021, "RankDistil: Knowledge Distillation for Ranking" (the teacher's top k in order, the rest below); Xia et
    al. 2008, "Listwise Approach to Learning to Rank", section 4 (ListMLE); Tang and Wang 2018, "Ranking Distillation" (weights of places).
    """
    if top is not None and top < 1:
        raise RecJaxError(f"top is {top!r}; expected an integer >= 1, or None for all places")
    student, teacher, there = _lists(student, teacher, mask)
    places = np.arange(1, student.shape[-1] + 1)
    if position_weights is None:
        position_weights = 1 / np.log2(1 + places)
    elif np.shape(position_weights) != places.shape:
        raise RecJaxError(f"position_weights has shape {np.shape(position_weights)}; expected {places.shape}, one per place")
    weights = jnp.asarray(position_weights, student.dtype) * (places <= (top or len(places)))
    order = jnp.argsort(jnp.where(there, -teacher, jnp.inf), axis=-1, stable=True)
    ordered, ordered_there = (jnp.take_along_axis(x, order, axis=-1) for x in (student, there))
    total = jnp.where(there.any(-1), jnp.cumsum(weights)[jnp.maximum(there.sum(-1), 1) - 1], 1)
    return plackett_luce_loss(ordered, mask=ordered_there, position_weights=weights) / jnp.where(total > 0, total, 1)


def _lists(
    student: Array, teacher: Array, mask: Array | None, *, names: tuple[str, str] = ("student", "teacher")
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (student's, teacher's without gradient [..., K], 0 where masked; [..., K] bool)."""
    student, there = masked_scores(names[0], student, mask)
    check_same_shape(names[1], teacher, names[0], student.shape)
    teacher = jnp.where(there, jax.lax.stop_gradient(jnp.asarray(teacher)).astype(student.dtype), 0)
    return student, teacher, there


def kl_of_logits(student: Any, teacher: Any, there: Any) -> tuple[jax.Array, jax.Array]:
    """Logits [..., K] -> (KL(teacher || student) [...], its gradient with respect to the student's logits [..., K])."""

    def shifted(logits: Any) -> tuple[Any, Any, Any]:
        """-> logits below their maximum, their exp, 0 where not there, and its sum [..., 1], 1 where nothing is there."""
        peak = finite(jax.lax.stop_gradient(jnp.where(there, logits, -jnp.inf)).max(-1, keepdims=True))
        logits = jnp.where(there, logits - peak, 0)
        exps = jnp.where(there, jnp.exp(logits), 0)
        total = exps.sum(-1, keepdims=True)
        return logits, exps, jnp.where(total > 0, total, 1)

    student, student_exps, student_total = shifted(student)
    teacher, teacher_exps, teacher_total = shifted(teacher)
    share = teacher_exps / teacher_total
    kl = (share * (teacher - student)).sum(-1) + (jnp.log(student_total) - jnp.log(teacher_total))[..., 0]
    return kl, student_exps / student_total - share
