"""InfoNCE with in-batch, sampled or full-catalogue candidates, on the streaming folds of `blockwise`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import checks, cross_entropy
from rec_jax.types import Array, RecJaxError

LOG_Q_FORMS = ("negatives", "all")


def info_nce(
    query: Array,
    item: Array,
    *,
    temperature: Any,
    target: Array | None = None,
    weights: Array | None = None,
    log_q: Array | None = None,
    log_q_strength: float = 1.0,
    log_q_form: str | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    block: int | None = None,
) -> jax.Array:
    """query [B, D], item [N, D] -> loss [B]: -log softmax(query @ item.T / temperature) at each query's target.

    Vectors are taken as they are: unit vectors give cosines, others dot products. Candidates keep their multiplicity. Under
    differentiation of a weighted sum, `weighted_info_nce` computes the same faster.

    **Log Q.** Popular items stand among sampled candidates more often than rare ones; taking log q_j from a logit undoes it,
    so that the mean gradient tends to that of the softmax over the whole catalogue. What happens to the positive, which is
    there with certainty and not by chance, decides whether it does:

    - "negatives" (default with item_ids): the logit of candidate j becomes s_j - log((n - 1) q_j) for the n - 1 candidates
      beside the positive, and the positive's stays. With equal ids masked, exp(s_positive) plus the sum over the others is an
      unbiased estimate of the partition function.
    - "all" (default without item_ids): s_j - log q_j for the positive too. It converges as n grows if the positive's
      duplicates are *not* masked; a rare positive weighs 1 / (n q) times too much. Masking its duplicates makes it wrong in
      the limit, and so is asked for explicitly.

    Args:
      query: [B, D] float.
      item: [N, D] float, the candidates.
      temperature: scalar > 0 that divides the logits; may be traced and learned.
      target: [B] int32, row of the positive in `item`; None: row i for query i (N >= B). Negative = none: the loss is 0.
      weights: [B] float that multiply the losses; a query of weight 0 is padding and no candidate of the symmetric form.
      log_q: [N] log of the probability that one drawn candidate is this item; None where candidates are not sampled. Gets no gradient.
      log_q_strength: factor of the correction; 1 is the theory's, 0 turns it off.
      log_q_form: "negatives" or "all", see above; None = by item_ids.
      query_ids: [B] int32, id of each query's positive; None: item_ids[target].
      item_ids: [N] int32; candidates with the id of a query's positive are no negatives of it. None: nothing is masked.
      item_mask: [N] bool, False for padding.
      symmetric: the mean with the opposite direction, where the positives seek their queries among all queries. Candidates
        there are whole batch rows; neither log Q nor item_mask applies to them.
      label_smoothing: share of the weight that is spread evenly over a query's candidates; in [0, 1).
      block: candidates per block; None chooses.

    Raises:
      RecJaxError: a temperature <= 0 (where its value is known), shapes that do not fit, an unknown log_q_form.

    Reference: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4;
    Bengio and Senecal 2008, "Adaptive Importance Sampling", sections II and III; Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling",
    section 3 (form "all"); Khrylchenko et al. 2025, "Correcting the LogQ Correction" (the positive is no sample).
    """
    row_weights, directions = _directions(
        query, item, temperature, target, weights, log_q, log_q_strength, log_q_form, query_ids, item_ids, item_mask, symmetric
    )
    losses = [cross_entropy.softmax_cross_entropy(**d, label_smoothing=label_smoothing, block=block) for d in directions]
    loss = sum(losses[1:], losses[0]) / len(losses)
    return loss if row_weights is None else jnp.where(row_weights != 0, row_weights * loss, 0)


def weighted_info_nce(
    query: Array,
    item: Array,
    *,
    temperature: Any,
    weights: Array,
    target: Array | None = None,
    log_q: Array | None = None,
    log_q_strength: float = 1.0,
    log_q_form: str | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    block: int | None = None,
) -> jax.Array:
    """query [B, D], item [N, D], weights [B] -> sum_i weights_i * info_nce_i, a scalar whose gradients are made in the forward pass.

    Equal to `info_nce(..., weights=weights).sum()`, and faster to train with.

    Args:
      weights: [B] float; for a mean over the real places: mask / mask.sum().
      block: queries per block; None chooses.
      others: as in `info_nce`.

    Raises:
      RecJaxError: a temperature <= 0 (where its value is known), shapes that do not fit, an unknown log_q_form.
    """
    _, directions = _directions(
        query, item, temperature, target, weights, log_q, log_q_strength, log_q_form, query_ids, item_ids, item_mask, symmetric
    )
    losses = [
        cross_entropy.weighted_softmax_cross_entropy(**d, weights=weights, label_smoothing=label_smoothing, block=block) for d in directions
    ]
    return sum(losses[1:], losses[0]) / len(losses)


def _directions(
    query: Array,
    item: Array,
    temperature: Any,
    target: Array | None,
    weights: Array | None,
    log_q: Array | None,
    log_q_strength: float,
    log_q_form: str | None,
    query_ids: Array | None,
    item_ids: Array | None,
    item_mask: Array | None,
    symmetric: bool,
) -> tuple[jax.Array | None, list[dict[str, Any]]]:
    """Checks -> (weights, arguments of a cross-entropy for query -> item and, if symmetric, for item -> query)."""
    checks.check_vectors(query, item)
    b, n = query.shape[0], item.shape[0]
    if target is None:
        if n < b:
            raise RecJaxError(
                f"item has {n} rows for {b} queries; expected at least {b}, row i being the positive of query i: else pass target"
            )
        target = jnp.arange(b, dtype=jnp.int32)
    checks.check_shape("target", target, (b,), "one row of item per query")
    target = jnp.asarray(target)
    if weights is not None:
        checks.check_shape("weights", weights, (b,), "one weight per query")
        weights = jnp.asarray(weights)
        target = jnp.where(weights != 0, target, -1)
    if item_ids is not None:
        checks.check_shape("item_ids", item_ids, (n,), "one id per candidate")
        if query_ids is None:
            query_ids = jnp.take(jnp.asarray(item_ids), jnp.maximum(target, 0), mode="clip")

    scale = _scale(temperature)
    bias, target_bias = _log_q_bias(b, n, log_q, log_q_strength, log_q_form, item_ids, item_mask)
    forward = {
        "query": query,
        "item": item,
        "target": target,
        "scale": scale,
        "bias": bias,
        "target_bias": target_bias,
        "query_ids": query_ids,
        "item_ids": item_ids,
        "item_mask": item_mask,
    }
    if not symmetric:
        return weights, [forward]
    anchors = jnp.take(jnp.asarray(item), jnp.maximum(target, 0), axis=0, mode="fill", fill_value=jnp.nan)
    own = jnp.where(target >= 0, jnp.arange(b, dtype=target.dtype), -1)
    backward = {
        "query": anchors,
        "item": query,
        "target": own,
        "scale": scale,
        "query_ids": query_ids,
        "item_ids": query_ids,
        "item_mask": target >= 0,
    }
    return weights, [forward, backward]


def _scale(temperature: Any) -> Any:
    """1 / temperature; a value that is known before tracing is checked."""
    checks.check_shape("temperature", temperature, (), "a scalar")
    if not isinstance(temperature, jax.core.Tracer) and not (0 < float(temperature) < float("inf")):
        raise RecJaxError(f"temperature is {temperature!r}; expected a finite number > 0, e.g. 0.07: logits are divided by it")
    return 1 / temperature


def _log_q_bias(
    b: int, n: int, log_q: Array | None, strength: float, form: str | None, item_ids: Array | None, item_mask: Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """The correction as (bias [N], the targets' own bias [B] or None where it is bias[target])."""
    if form is not None and form not in LOG_Q_FORMS:
        raise RecJaxError(f"log_q_form is {form!r}; expected one of {', '.join(LOG_Q_FORMS)}, or None to choose by item_ids")
    if log_q is None:
        return None, None
    checks.check_shape("log_q", log_q, (n,), "the log sampling probability of each candidate")
    log_q = jax.lax.stop_gradient(jnp.asarray(log_q, jnp.float32))
    if (form or ("negatives" if item_ids is not None else "all")) == "all":
        return -strength * log_q, None
    if item_ids is None:
        raise RecJaxError('log_q_form "negatives" needs item_ids, or copies of the positive count it twice: pass them, or use "all"')
    candidates = n if item_mask is None else jnp.sum(jnp.asarray(item_mask, jnp.float32))
    draws = jnp.log(jnp.maximum(candidates - 1, 1))
    return -strength * (log_q + draws), jnp.zeros(b, jnp.float32)
