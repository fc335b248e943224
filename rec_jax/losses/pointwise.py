"""Losses of single (query, item) logits: binary cross-entropy, alone and with drawn negatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses.checks import check_shape, check_vectors
from rec_jax.types import Array, RecJaxError


def bce(logit: Array, label: Array, *, label_smoothing: float = 0.0, positive_weight: float = 1.0) -> jax.Array:
    """logit [...], label [...] in [0, 1] -> loss [...]: binary cross-entropy of sigmoid(logit), safe for logits of any size.

    Args:
      logit: [...] float.
      label: [...] probability of the positive class; broadcasts with logit.
      label_smoothing: moves each label this share of the way to 1/2; in [0, 1).
      positive_weight: factor of the positive class's term, > 0; odds of the classes where positives are rare.

    Raises:
      RecJaxError: label_smoothing outside [0, 1), positive_weight <= 0.
    """
    if not 0 <= label_smoothing < 1:
        raise RecJaxError(f"label_smoothing is {label_smoothing!r}; expected a number in [0, 1): set 0 to turn it off")
    if not isinstance(positive_weight, jax.core.Tracer) and not float(positive_weight) > 0:
        raise RecJaxError(f"positive_weight is {positive_weight!r}; expected a number > 0: 1 weighs both classes alike")
    logit = jnp.asarray(logit)
    logit = logit.astype(jnp.promote_types(logit.dtype, jnp.float32))
    label = jnp.asarray(label, logit.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return positive_weight * label * jax.nn.softplus(-logit) + (1 - label) * jax.nn.softplus(logit)


def bce_with_negatives(
    query: Array,
    item: Array,
    target: Array,
    *,
    negatives: Array,
    scale: Any,
    bias: Any = 0.0,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """query [B, D], item [N, D], target [B], negatives [B, K] -> loss [B]: bce of the target plus the mean bce of its negatives.

    Logit = scale * query . item + bias. Differentiable in query, item, scale and bias.

    Args:
      query: [B, D] float.
      item: [N, D] float.
      target: [B] int32, row of `item`. Negative = no target: loss and gradients are 0. Beyond N: the loss is NaN.
      negatives: [B, K] int32, rows of `item`; negative = an empty place. A negative that is the target, or has its id, is left
        out; a query whose negatives are all left out keeps the target's term.
      scale: scalar; may be traced and learned.
      bias: scalar, or [N] per item; may be traced and learned.
      query_ids: [B] int32, id of each query's target; None: item_ids[target].
      item_ids: [N] int32; None: only the target's own row is left out.
      label_smoothing: moves each label this share of the way to 1/2; in [0, 1).

    Raises:
      RecJaxError: shapes that do not fit, label_smoothing outside [0, 1).

    Reference: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", eq. 7 (there with one negative).
    """
    check_vectors(query, item)
    b, n = np.shape(query)[0], np.shape(item)[0]
    check_shape("target", target, (b,), "one row of item per query")
    if np.ndim(negatives) != 2 or np.shape(negatives)[0] != b or np.shape(negatives)[1] == 0:
        raise RecJaxError(f"negatives has shape {np.shape(negatives)}; expected ({b}, K) with K >= 1, rows of item for each query")
    check_shape("scale", scale, (), "a scalar")
    if np.ndim(bias):
        check_shape("bias", bias, (n,), "one per item, or a scalar")
    if query_ids is not None:
        check_shape("query_ids", query_ids, (b,), "the id of each query's target")
        if item_ids is None:
            raise RecJaxError("query_ids is given without item_ids: equal ids are masked by comparing both; pass item_ids too")
    if item_ids is not None:
        check_shape("item_ids", item_ids, (n,), "one id per item")

    query, item, target, negatives = map(jnp.asarray, (query, item, target, negatives))
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(query, item))
    valid, row = target >= 0, jnp.maximum(target, 0)
    query = jnp.where(valid[:, None], query, 0)
    kept = (negatives >= 0) & (negatives != row[:, None])
    if item_ids is not None:
        item_ids = jnp.asarray(item_ids)
        own = item_ids[row] if query_ids is None else jnp.asarray(query_ids)
        kept &= item_ids[jnp.maximum(negatives, 0)] != own[:, None]

    rows = jnp.concatenate([row[:, None], jnp.where(kept, negatives, row[:, None])], axis=1)  # [B, 1 + K]
    vectors = jnp.take(item, rows, axis=0, mode="fill", fill_value=jnp.nan)
    row_bias = jnp.take(jnp.asarray(bias), rows, mode="fill", fill_value=jnp.nan) if np.ndim(bias) else bias
    logits = scale * jnp.einsum("bd,bkd->bk", query, vectors, preferred_element_type=dtype) + row_bias
    positive = bce(logits[:, 0], jnp.ones(b), label_smoothing=label_smoothing)
    negative = jnp.where(kept, bce(logits[:, 1:], jnp.zeros(()), label_smoothing=label_smoothing), 0)
    return jnp.where(valid, positive + negative.sum(1) / jnp.maximum(kept.sum(1), 1), 0)
