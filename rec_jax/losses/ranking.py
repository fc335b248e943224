"""Losses that compare scores of one query: a positive against its negatives, or a list against its labels or its order.

Leading axes are free: [B] may as well be [G, Q]. A masked place reaches neither value nor gradient, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses import softmax
from rec_jax.types import Array, RecJaxError

_NEVER = -1e30  # a score that adds nothing to a sum of exp; finite, so that no difference of two is NaN


def bpr_loss(positive: Array, negatives: Array, *, mask: Array | None = None) -> jax.Array:
    """positive [B], negatives [B, K] -> loss [B]: mean over the negatives of -log sigmoid(positive - negative).

    Args:
      positive: [B] score of the preferred item.
      negatives: [B, K] scores.
      mask: [B, K] bool, False for an empty place. A query without negatives has loss 0.

    Raises:
      RecJaxError: shapes that do not fit.

    Reference: Rendle et al. 2009, "BPR: Bayesian Personalized Ranking from Implicit Feedback", section 4.1.
    """
    difference, there = _against_positive(positive, negatives, mask)
    return _mean(jax.nn.softplus(difference), there)


def margin_loss(positive: Array, negatives: Array, *, margin: float = 1.0, mask: Array | None = None) -> jax.Array:
    """positive [B], negatives [B, K] -> loss [B]: mean over the negatives of max(0, margin + negative - positive).

    Args:
      positive: [B] score of the preferred item.
      negatives: [B, K] scores.
      margin: by how much the positive should be above, in units of the scores, > 0.
      mask: [B, K] bool, False for an empty place. A query without negatives has loss 0.

    Raises:
      RecJaxError: margin <= 0, shapes that do not fit.

    Reference: Herbrich et al. 2000, "Large Margin Rank Boundaries for Ordinal Regression".
    """
    difference, there = _against_positive(positive, negatives, mask)
    return _mean(_hinge(margin)(difference), there)


def softmax_loss(positive: Array, negatives: Array, *, temperature: Any = 1.0, mask: Array | None = None) -> jax.Array:
    """positive [B], negatives [B, K] -> loss [B]: -log softmax at the positive, among itself and its negatives.

    Args:
      positive: [B] score of the preferred item.
      negatives: [B, K] scores; subtract log Q from them beforehand where they were drawn by Q.
      temperature: divides the scores, > 0; may be traced and learned.
      mask: [B, K] bool, False for an empty place. A query without negatives has loss 0.

    Raises:
      RecJaxError: temperature <= 0, shapes that do not fit.

    Reference: Jean et al. 2015, "On Using Very Large Target Vocabulary for Neural Machine Translation", section 3.
    """
    check_positive("temperature", temperature)
    difference, there = _against_positive(positive, negatives, mask)
    return jax.nn.softplus(log_sum_exp(difference / temperature, there))


def list_bpr_loss(scores: Array, labels: Array, *, mask: Array | None = None) -> jax.Array:
    """scores [B, K], labels [B, K] -> loss [B]: mean of -log sigmoid(s_i - s_j) over the pairs of a list with label i > label j.

    Args:
      scores: [B, K].
      labels: [B, K] grades, higher is better; NaN is not observed, and left out. A list of equal labels has loss 0.
      mask: [B, K] bool, False for an empty place.

    Raises:
      RecJaxError: shapes that do not fit.

    Reference: Burges et al. 2005, "Learning to Rank using Gradient Descent", section 3 (RankNet).
    """
    return _over_pairs(scores, labels, mask, jax.nn.softplus)


def list_margin_loss(scores: Array, labels: Array, *, margin: float = 1.0, mask: Array | None = None) -> jax.Array:
    """scores [B, K], labels [B, K] -> loss [B]: mean of max(0, margin + s_j - s_i) over the pairs of a list with label i > label j.

    Args:
      margin: by how much the better one should be above, in units of the scores, > 0.
      others: as in `list_bpr_loss`.

    Raises:
      RecJaxError: margin <= 0, shapes that do not fit.

    Reference: Herbrich et al. 2000, "Large Margin Rank Boundaries for Ordinal Regression".
    """
    return _over_pairs(scores, labels, mask, _hinge(margin))


def list_softmax_loss(
    scores: Array, labels: Array, *, temperature: Any = 1.0, label_temperature: float = 1.0, mask: Array | None = None
) -> jax.Array:
    """scores [B, K], labels [B, K] -> loss [B]: cross-entropy from softmax(labels) to softmax(scores), ListNet's top-one form.

    Args:
      scores: [B, K].
      labels: [B, K] grades, higher is better; NaN is not observed, and left out. A list without any has loss 0.
      temperature: divides the scores, > 0; may be traced and learned.
      label_temperature: divides the labels, > 0; towards 0 all weight goes to the highest.
      mask: [B, K] bool, False for an empty place.

    Raises:
      RecJaxError: a temperature <= 0, shapes that do not fit.

    Reference: Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach", section 4.
    """
    check_positive("temperature", temperature)
    check_positive("label_temperature", label_temperature)
    scores, labels, there = _labelled(scores, labels, mask)
    goal = jnp.where(there, jnp.exp(log_softmax(labels / label_temperature, there)), 0)
    return -jnp.sum(goal * log_softmax(scores / temperature, there), -1)


def plackett_luce_loss(scores: Array, *, mask: Array | None = None, position_weights: Array | None = None) -> jax.Array:
    """scores [B, K] in the wanted order, best first -> loss [B]: -log probability of that order, place by place: ListMLE.

    The k-th place adds log sum_{j >= k} exp(s_j) - s_k: its item is chosen among those that are not placed yet.

    Args:
      scores: [B, K].
      mask: [B, K] bool, False for an empty place, wherever it stands.
      position_weights: [K] factor of each place's term, best place first, counted without the empty ones; None: 1.

    Raises:
      RecJaxError: shapes that do not fit.

    Reference: Xia et al. 2008, "Listwise Approach to Learning to Rank", section 4; Lan et al. 2014, "Position-Aware ListMLE".
    """
    scores, there = masked_scores("scores", scores, mask)
    k = scores.shape[-1]
    filled = jnp.where(there, scores, _NEVER)
    tail = jax.lax.cumlogsumexp(filled, axis=scores.ndim - 1, reverse=True)[..., 1:]  # of the places from the next on
    tail = jnp.concatenate([tail, jnp.full((*scores.shape[:-1], 1), _NEVER, scores.dtype)], -1)
    terms = jnp.where(there, jax.nn.softplus(tail - scores), 0)
    if position_weights is not None:
        if np.shape(position_weights) != (k,):
            raise RecJaxError(f"position_weights has shape {np.shape(position_weights)}; expected ({k},), one per place of the scores")
        terms = terms * jnp.asarray(position_weights, scores.dtype)[jnp.maximum(jnp.cumsum(there, -1) - 1, 0)]
    return terms.sum(-1)


def log_sum_exp(scores: Any, there: Any) -> jax.Array:
    """scores [..., K], there [..., K] bool -> [...]; -inf, with gradient 0, where nothing is there."""
    filled = jnp.where(there, scores, -jnp.inf)
    return softmax.log_sum_exp(filled.reshape(-1, filled.shape[-1])).reshape(filled.shape[:-1])


def log_softmax(scores: Any, there: Any) -> jax.Array:
    """scores [..., K], there [..., K] bool -> log-probabilities [..., K] among those that are there; 0 at the others."""
    total = log_sum_exp(scores, there)[..., None]
    return jnp.where(there, scores - jnp.where(there, total, 0), 0)


def masked_scores(name: str, scores: Array, mask: Array | None) -> tuple[jax.Array, jax.Array]:
    """scores [..., K], mask or None -> (scores in float32 or wider, 0 where masked; [..., K] bool).

    Raises:
      RecJaxError: no list axis, a mask of another shape.
    """
    shape = np.shape(scores)
    if not shape or shape[-1] == 0:
        raise RecJaxError(f"{name} has shape {shape}; expected [..., K] with K >= 1, the scores of a list")
    if mask is not None and np.shape(mask) != shape:
        raise RecJaxError(f"mask has shape {np.shape(mask)}; expected {shape}, one per place of {name}")
    scores = jnp.asarray(scores)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    there = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
    return jnp.where(there, scores, 0), there


def check_positive(name: str, value: Any) -> None:
    """Raises RecJaxError unless value, where it is known, is > 0."""
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise RecJaxError(f"{name} is {value!r}; expected a number > 0")


def check_same_shape(name: str, value: Array, other: str, shape: tuple[int, ...]) -> None:
    """Raises RecJaxError unless value has the shape of the other argument."""
    if np.shape(value) != shape:
        raise RecJaxError(f"{name} has shape {np.shape(value)}; expected {shape}, that of {other}")


def _against_positive(positive: Array, negatives: Array, mask: Array | None) -> tuple[jax.Array, jax.Array]:
    """-> negative - positive [..., K], and which are there."""
    negatives, there = masked_scores("negatives", negatives, mask)
    check_same_shape("positive", positive, "negatives without its last axis", negatives.shape[:-1])
    positive = jnp.where(there.any(-1), jnp.asarray(positive), 0)
    return jnp.where(there, negatives - positive[..., None], 0), there


def _labelled(scores: Array, labels: Array, mask: Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    scores, there = masked_scores("scores", scores, mask)
    check_same_shape("labels", labels, "scores", scores.shape)
    labels = jnp.asarray(labels, scores.dtype)
    there = there & ~jnp.isnan(labels)
    return jnp.where(there, scores, 0), jnp.where(there, labels, 0), there


def _over_pairs(scores: Array, labels: Array, mask: Array | None, term: Callable[[Any], Any]) -> jax.Array:
    scores, labels, there = _labelled(scores, labels, mask)
    pairs = (labels[..., :, None] > labels[..., None, :]) & there[..., :, None] & there[..., None, :]  # [..., better, worse]
    difference = jnp.where(pairs, scores[..., None, :] - scores[..., :, None], 0)
    flat = (*scores.shape[:-1], -1)
    return _mean(term(difference).reshape(flat), pairs.reshape(flat))


def _hinge(margin: float) -> Callable[[Any], Any]:
    if not margin > 0:
        raise RecJaxError(f"margin is {margin!r}; expected a number > 0, e.g. 1")
    return lambda difference: jax.nn.relu(margin + difference)


def _mean(values: Any, there: Any) -> jax.Array:
    """Mean over the last axis of those that are there; 0 where none is."""
    return jnp.where(there, values, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)
