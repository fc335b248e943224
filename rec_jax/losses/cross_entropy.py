"""Softmax cross-entropy over many candidates, on the streaming folds of `blockwise`: per example, and as a weighted sum."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses.blockwise import RowLoss, Statistics, candidate_statistics, prepare, weighted_row_loss
from rec_jax.losses.checks import check_block, check_shape, check_vectors
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

    Raises:
      RecJaxError: shapes that do not fit, label_smoothing outside [0, 1), block < 1.

    Reference: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    check_block(block)
    row_loss = cross_entropy_of(label_smoothing)
    operands, positive, valid = prepare(query, item, target, scale, bias, target_bias, query_ids, item_ids, item_mask)
    statistics = candidate_statistics(operands, totals=label_smoothing > 0, block=block)
    return jnp.where(valid, row_loss(statistics, positive), 0)


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
) -> jax.Array:
    """query [B, D], item [N, D], target [B], weights [B] -> sum_i weights_i * softmax_cross_entropy_i, a scalar: the fast form.

    Under differentiation the gradients are made in the forward pass; without it only the loss is computed. A query of
    weight 0 adds exactly nothing to value and gradients, whatever its vector holds. Differentiable in nonzero weights too.

    Args:
      weights: [B] float; for a mean over the real places: mask / mask.sum().
      block: queries per block; None chooses.
      others: as in `softmax_cross_entropy`.

    Raises:
      RecJaxError: shapes that do not fit, label_smoothing outside [0, 1), block < 1.

    Reference: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (no logits in memory);
    Hsu et al. 2024, "Liger Kernel" (gradients in the forward pass).
    """
    check_block(block)
    row_loss = cross_entropy_of(label_smoothing)
    check_vectors(query, item)
    check_shape("weights", weights, np.shape(query)[:1], "one weight per query")
    check_shape("target", target, np.shape(query)[:1], "one row of item per query")
    target = jnp.where(jnp.asarray(weights) != 0, target, -1)
    operands, positive, valid = prepare(query, item, target, scale, bias, target_bias, query_ids, item_ids, item_mask)
    weights = jnp.where(valid, weights, 0)
    return weighted_row_loss(row_loss, operands, positive, weights, totals=label_smoothing > 0, block=block)


def cross_entropy_of(label_smoothing: float) -> RowLoss:
    """The row loss -log softmax at the positive, with its weight (1 - label_smoothing) + label_smoothing / candidates.

    Raises:
      RecJaxError: label_smoothing outside [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise RecJaxError(f"label_smoothing is {label_smoothing!r}; expected a number in [0, 1): set 0 to turn it off")
    return functools.partial(_cross_entropy, label_smoothing=label_smoothing)


def _cross_entropy(statistics: Statistics, positive: Any, *, label_smoothing: float) -> Any:
    loss = jax.nn.softplus(statistics.log_sum_exp - positive)
    if label_smoothing:
        mean = (statistics.total + positive) / (statistics.count + 1)
        loss = loss + label_smoothing * (positive - mean)
    return loss
