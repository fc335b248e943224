"""Losses of single predictions: binary cross-entropy, alone and with drawn negatives, and regression on ratings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses.checks import check_shape, check_vectors
from rec_jax.types import Array, RecJaxError

REGRESSIONS = ("mse", "huber")


def observed(label: Array) -> jax.Array:
    """label [...] -> weight [...] float32: 1 where there is a label, 0 where it is NaN, which is: not observed."""
    return jnp.where(jnp.isnan(jnp.asarray(label, jnp.float32)), 0.0, 1.0)


def bce(
    logit: Array,
    label: Array,
    *,
    label_smoothing: float = 0.0,
    positive_weight: Any = 1.0,
    negative_weight: Any = 1.0,
    negative_rate: Any = 1.0,
) -> jax.Array:
    """logit [...], label [...] in [0, 1] -> loss [...]: binary cross-entropy of sigmoid(logit), safe for logits of any size.

    Where the label is NaN nothing was observed: the loss and its gradient are 0.

    Args:
      logit: [...] float.
      label: [...] probability of the positive class; broadcasts with logit.
      label_smoothing: moves each label this share of the way to 1/2; in [0, 1).
      positive_weight: factor of the positive class's term, > 0; odds of the classes where positives are rare.
      negative_weight: factor of the negative class's term, > 0.
      negative_rate: share of the negatives that the data keeps, in (0, 1]; a scalar, or one per logit. The odds of the kept examples are
        1 / rate times too high, which the loss adds to the logit: so sigmoid(logit) is the probability among all examples, calibrated.
        A model that was fitted without it is corrected afterwards by `calibrated_logit` instead.

    Raises:
      RecJaxError: label_smoothing outside [0, 1), a weight <= 0, negative_rate outside (0, 1].

    Reference: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7 (smoothing); King and Zeng 2001, "Logistic Regression
    in Rare Events Data", section 4.1 (prior correction).
    """
    if not 0 <= label_smoothing < 1:
        raise RecJaxError(f"label_smoothing is {label_smoothing!r}; expected a number in [0, 1): set 0 to turn it off")
    for name, value in (("positive_weight", positive_weight), ("negative_weight", negative_weight)):
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
            raise RecJaxError(f"{name} is {value!r}; expected a number > 0: 1 weighs both classes alike")
    logit = jnp.asarray(logit)
    logit = logit.astype(jnp.promote_types(logit.dtype, jnp.float32))
    label = jnp.asarray(label, logit.dtype)
    seen = ~jnp.isnan(label)
    logit = jnp.where(seen, logit, 0) - _log_rate(negative_rate)
    label = jnp.where(seen, label, 0) * (1 - label_smoothing) + label_smoothing / 2
    loss = positive_weight * label * jax.nn.softplus(-logit) + negative_weight * (1 - label) * jax.nn.softplus(logit)
    return jnp.where(seen, loss, 0)


def calibrated_logit(logit: Array, *, negative_rate: Any) -> jax.Array:
    """logit [...] of a model fitted where a share of the negatives was kept -> logit [...] among all examples: logit + log rate.

    Not for a model that was fitted with `bce(..., negative_rate=...)`: its logits are calibrated already.

    Args:
      negative_rate: share of the negatives that was kept, in (0, 1].

    Raises:
      RecJaxError: negative_rate outside (0, 1].

    Reference: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", section 6.3.
    """
    logit = jnp.asarray(logit)
    return logit.astype(jnp.promote_types(logit.dtype, jnp.float32)) + _log_rate(negative_rate)


def regression(prediction: Array, rating: Array, *, form: str = "mse", delta: float = 1.0) -> jax.Array:
    """prediction [...], rating [...] -> loss [...]: the squared error, or Huber's. Where the rating is NaN nothing was observed: 0.

    Args:
      prediction: [...] float.
      rating: [...], in the same units; broadcasts with prediction.
      form: "mse": e^2 of the error e. "huber": e^2 / 2 up to |e| = delta, and delta (|e| - delta / 2) beyond: outliers pull no harder.
      delta: where Huber's loss turns linear, in units of the rating, > 0.

    Raises:
      RecJaxError: an unknown form, delta <= 0.

    Reference: Huber 1964, "Robust Estimation of a Location Parameter".
    """
    if form not in REGRESSIONS:
        raise RecJaxError(f"form is {form!r}; expected one of {', '.join(REGRESSIONS)}")
    if not delta > 0:
        raise RecJaxError(f"delta is {delta!r}; expected a number > 0, e.g. 1")
    prediction = jnp.asarray(prediction)
    prediction = prediction.astype(jnp.promote_types(prediction.dtype, jnp.float32))
    rating = jnp.asarray(rating, prediction.dtype)
    error = jnp.where(jnp.isnan(rating), 0, prediction - rating)
    return jnp.square(error) if form == "mse" else huber(error, delta)


def huber(error: Any, delta: float = 1.0) -> jax.Array:
    """error [...] -> [...]: e^2 / 2 up to |e| = delta, and delta (|e| - delta / 2) beyond."""
    inner = jnp.clip(error, -delta, delta)
    return inner * (error - inner / 2)


def _log_rate(negative_rate: Any) -> jax.Array:
    if not isinstance(negative_rate, jax.core.Tracer):
        rates = np.asarray(negative_rate)
        if not np.all((rates > 0) & (rates <= 1)):
            raise RecJaxError(f"negative_rate is {negative_rate!r}; expected the share of negatives that is kept, in (0, 1]: 1 keeps all")
    return jnp.log(jnp.asarray(negative_rate, jnp.float32))


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


def sampled_bce(positive: Array, negatives: Array, *, mask: Array | None = None, positive_weight: Any = 1.0) -> jax.Array:
    """positive [B], negatives [B, K] logits -> loss [B]: mean bce of the positive and its negatives.

    Args:
      positive: [B] float, or any leading axes.
      negatives: [B, K] float.
      mask: [B, K] bool, False for an empty place, which reaches neither value nor gradient.
      positive_weight: factor of the positive's term, > 0; that of `gbce_weight` makes it gBCE: the log of a sigmoid to the power of beta
        is beta times the log, so that nothing is ever raised to a power.

    Raises:
      RecJaxError: shapes that do not fit, a weight <= 0.

    Reference: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", section 3.5 (there a sum with one negative); Petrov and
    Macdonald 2023, "gSASRec", eq. 10.
    """
    shape = np.shape(negatives)
    if not shape or not shape[-1] or np.shape(positive) != shape[:-1]:
        raise RecJaxError(f"positive has shape {np.shape(positive)} and negatives {shape}; expected [B] and [B, K] with K >= 1")
    there = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
    if there.shape != shape:
        raise RecJaxError(f"mask has shape {there.shape}; expected {shape}, one per place of negatives")
    own = bce(positive, jnp.ones(()), positive_weight=positive_weight)
    others = jnp.where(there, bce(jnp.where(there, negatives, 0), jnp.zeros(())), 0)
    return (own + others.sum(-1)) / (1 + there.sum(-1))


def gbce_weight(*, calibration: float, negatives: int, items: int) -> float:
    """-> beta = alpha (t (1 - 1 / alpha) + 1 / alpha) = 1 - t (1 - alpha), the positive's weight in gBCE, with alpha = K / (N - 1).

    Where K of the N - 1 other items are drawn as negatives, a model fitted by plain bce takes each item's odds for 1 / alpha times what
    they are among all items. With t = 1 its probabilities are those of all items as negatives; with t = 0 they are plain bce's.

    Args:
      calibration: t in [0, 1].
      negatives: K, drawn uniformly for each positive.
      items: N of the catalogue.

    Raises:
      RecJaxError: t outside [0, 1], more negatives than there are other items.

    Reference: Petrov and Macdonald 2023, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative Sampling",
    section 5.
    """
    if not 0 <= calibration <= 1:
        raise RecJaxError(f"calibration is {calibration!r}; expected gBCE's t in [0, 1]: 0 is plain binary cross-entropy")
    if not 0 < negatives < items:
        raise RecJaxError(f"negatives is {negatives!r} with {items} items; gBCE expects at least 1 and at most the {items - 1} others")
    return 1 - calibration * (1 - negatives / (items - 1))
