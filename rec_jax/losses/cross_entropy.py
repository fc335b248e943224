"""Softmax cross-entropy over many candidates, on the streaming folds: per example, and as a weighted sum."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.losses import softmax
from rec_jax.losses.checks import check_block, check_shape, check_vectors
from rec_jax.losses.forward_gradients import RowLoss, Statistics
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError


def softmax_cross_entropy(
    query: Array,
    item: Array,
    target: Array,
    *,
    scale: Any,
    bias: Array | None = None,
    target_bias: Array | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    label_smoothing: float = 0.0,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """query [B, D], item [N, D], target [B] -> loss [B]: cross-entropy of softmax(scale * query @ item.T + bias) at the target.

    Differentiable in query, item, scale, bias and target_bias. The gradients are computed in a second pass; a sum of
    weighted losses is faster with `weighted_softmax_cross_entropy`.

    Args:
      query: [B, D] float.
      item: [N, D] float, the candidates; the same item may stand there several times.
      target: [B] int32, row of `item`. Negative = no target: loss and gradients are 0. Beyond N: the loss is NaN.
      scale: scalar, e.g. 1 / temperature; may be traced and learned.
      bias: [N] added to the logits of a candidate; -inf leaves it out.
      target_bias: [B] stands in for bias[target] in the target's own logit.
      query_ids: [B] int32, id of each query's target; candidates of that id, other than the target itself, are left out.
      item_ids: [N] int32.
      item_mask: [N] bool, False for padding. A query whose target is padding has an infinite loss.
      label_smoothing: share of the target's weight that is spread evenly over the query's candidates, target included; in [0, 1).
      block: candidates per block; None chooses.
      mesh: with `axis`, queries and candidates are sharded by rows over that mesh axis (or axes); the smaller side goes round.
      axis: a name or several. There a target beyond N counts as none found: logit 0.

    Raises:
      RecJaxError: shapes that do not fit, label_smoothing outside [0, 1), block < 1, an axis that is not in the mesh, rows that its devices
        do not divide.

    Reference: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    row_loss, problem = _problem(
        query, item, target, None, scale, bias, target_bias, query_ids, item_ids, item_mask, label_smoothing, block, mesh, axis
    )
    return softmax.losses(problem, row_loss, totals=label_smoothing > 0, block=block)


def weighted_softmax_cross_entropy(
    query: Array,
    item: Array,
    target: Array,
    *,
    weights: Array,
    scale: Any,
    bias: Array | None = None,
    target_bias: Array | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    label_smoothing: float = 0.0,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """query [B, D], item [N, D], target [B], weights [B] -> sum_i weights_i * softmax_cross_entropy_i, a scalar: the fast form.

    Under differentiation the gradients are made in the forward pass (on one device); without it only the loss is computed. A query of
    weight 0 adds exactly nothing to value and gradients, whatever its vector holds. Differentiable in nonzero weights too.

    Args:
      weights: [B] float; for a mean over the real places: mask / mask.sum().
      block: queries per block; None chooses.
      others: as in `softmax_cross_entropy`.

    Raises:
      RecJaxError: as in `softmax_cross_entropy`.
    """
    check_vectors(query, item)
    check_shape("weights", weights, np.shape(query)[:1], "one weight per query")
    row_loss, problem = _problem(
        query, item, target, weights, scale, bias, target_bias, query_ids, item_ids, item_mask, label_smoothing, block, mesh, axis
    )
    return softmax.weighted_loss(problem, row_loss, weights, totals=label_smoothing > 0, block=block)


def _problem(
    query: Array,
    item: Array,
    target: Array,
    weights: Array | None,
    scale: Any,
    bias: Array | None,
    target_bias: Array | None,
    query_ids: Array | None,
    item_ids: Array | None,
    item_mask: Array | None,
    label_smoothing: float,
    block: int | None,
    mesh: Mesh | None,
    axis: Axis | None,
) -> tuple[RowLoss, softmax.Problem]:
    check_block(block)
    row_loss = cross_entropy_of(label_smoothing)
    check_vectors(query, item)
    check_shape("scale", scale, (), "a scalar")
    check_shape("target", target, np.shape(query)[:1], "one row of item per query")
    problem = softmax.make_problem(
        query,
        item,
        scale=scale,
        target=target,
        bias=bias,
        target_bias=target_bias,
        query_ids=query_ids,
        item_ids=item_ids,
        item_mask=item_mask,
        weights=weights,
        mesh=mesh,
        axis=axis,
    )
    return row_loss, softmax.smaller_side_travels(problem)


def cross_entropy_of(label_smoothing: float = 0.0) -> RowLoss:
    """The row loss -log softmax at the positive, with its weight (1 - label_smoothing) + label_smoothing / candidates.

    Several positives: the mean of their losses, each against the candidates that are no positives.

    Raises:
      RecJaxError: label_smoothing outside [0, 1).

    Reference: Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2 (the sum over positives outside the logarithm), here with the
    other positives left out of each denominator.
    """
    if not 0 <= label_smoothing < 1:
        raise RecJaxError(f"label_smoothing is {label_smoothing!r}; expected a number in [0, 1): set 0 to turn it off")
    return functools.partial(_cross_entropy, label_smoothing=label_smoothing)


def _cross_entropy(kept: Statistics, positives: softmax.Positives, *, label_smoothing: float) -> Any:
    kept = softmax.with_hard(kept, positives)
    loss = mean_of_positives(jax.nn.softplus(kept.log_sum_exp[:, None] - positives.logits), positives)
    if label_smoothing:
        mean = (kept.total + (positives.logits * positives.there).sum(1)) / (kept.count + positives.there.sum(1))
        loss = loss + label_smoothing * (mean_of_positives(positives.logits, positives) - mean)
    return loss


def mean_of_positives(values: Any, positives: softmax.Positives) -> Any:
    """values [B, K] -> mean over each query's positives [B], by their weights where they have some; 0 where all of these are."""
    if values.shape[1] == 1:
        return values[:, 0]
    there = positives.there > 0
    if positives.weights is not None:
        total = positives.weights.sum(1)
        return jnp.where(there, positives.weights * values, 0).sum(1) / jnp.where(total > 0, total, 1)
    return jnp.where(there, values, 0).sum(1) / jnp.maximum(positives.there.sum(1), 1)
