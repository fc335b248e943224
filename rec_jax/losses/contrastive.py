"""InfoNCE with in-batch, cross-device, sampled, queued, hard or full-catalogue candidates, on the streaming folds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.losses import checks, softmax
from rec_jax.losses.cross_entropy import cross_entropy_of, mean_of_positives
from rec_jax.losses.forward_gradients import RowLoss, Statistics
from rec_jax.losses.softmax import Candidates
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError

LOG_Q_FORMS = ("negatives", "all")
FORMS = ("standard", "decoupled", "debiased")


def info_nce(
    query: Array,
    item: Array,
    *,
    temperature: Any,
    target: Array | None = None,
    positive: Array | None = None,
    positive_mask: Array | None = None,
    positive_weights: Array | None = None,
    weights: Array | None = None,
    log_q: Array | None = None,
    log_q_strength: float = 1.0,
    log_q_form: str | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    negatives: Sequence[Candidates] = (),
    hard_negatives: Array | None = None,
    hard_ids: Array | None = None,
    left_out: Array | None = None,
    symmetric: bool = False,
    form: str = "standard",
    positive_prior: float = 0.0,
    label_smoothing: float = 0.0,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """query [B, D], item [N, D] -> loss [B]: -log softmax(query @ item.T / temperature) at each query's target.

    Vectors are taken as they are: unit vectors give cosines, others dot products. Candidates keep their multiplicity. Under
    differentiation of a weighted sum, `weighted_info_nce` computes the same faster.

    **Log Q.** Popular items stand among sampled candidates more often than rare ones; taking log q_j from a logit undoes it,
    so that the mean gradient tends to that of the softmax over the whole catalogue. What happens to the positive, which is
    there with certainty and not by chance, decides whether it does:

    - "negatives" (default with item_ids): the logit of candidate j becomes s_j - log((n - 1) q_j) for the n - 1 candidates
      beside the positive, and the positive's stays. With equal ids masked, exp(s_positive) plus the sum over the others is an
      unbiased estimate of the partition function. n counts the candidates of all sets that have a log_q.
    - "all" (default without item_ids): s_j - log q_j for the positive too. It converges as n grows if the positive's
      duplicates are *not* masked; a rare positive weighs 1 / (n q) times too much. Masking its duplicates makes it wrong in
      the limit, and so is asked for explicitly.

    **Several positives** of a query: the mean of their losses, each against the candidates that are no positives of the query.

    **Devices.** With `mesh` and `axis` all arrays are global and sharded by rows; candidates go round a ring, and no device ever holds more
    than two shares of them. Values and gradients are those of one device.

    Args:
      query: [B, D] float.
      item: [N, D] float, the candidates.
      temperature: scalar > 0 that divides the logits; may be traced and learned.
      target: [B] or [B, K] int32, rows of the positives in `item`; None: row i for query i (N >= B). Negative = none: without any, the loss
        is 0.
      positive: [B, K, D] vectors of the positives in the targets' stead; `target` then only says which candidates are their copies. Needed
        on a mesh for several positives.
      positive_mask: [B, K] bool, False for a positive that is not there.
      positive_weights: [B, K] float >= 0, of several positives in the mean of their losses; None: they weigh the same.
      weights: [B] float that multiply the losses; a query of weight 0 is padding and no candidate of the symmetric form.
      log_q: [N] log of the probability that one drawn candidate is this item; None where candidates are not sampled. Gets no gradient.
      log_q_strength: factor of the correction; 1 is the theory's, 0 turns it off.
      log_q_form: "negatives" or "all", see above; None = by item_ids.
      query_ids: [B] or [B, K] int32, ids of each query's positives; None: item_ids[target].
      item_ids: [N] int32; candidates with the id of a query's positive are no negatives of it. None: nothing is masked.
      item_mask: [N] bool, False for padding.
      negatives: further sets of candidates that all queries share (a queue, uniform draws, mined items).
      hard_negatives: [B, H, D] candidates of one query each; no log Q applies to them.
      hard_ids: [B, H] int32, -1 for an empty place; those with the id of the query's positive are left out.
      left_out: [B, L] int32, rows of `item` that are no candidates of a query, such as what it has already; -1 for an empty place. A target
        is a candidate all the same.
      symmetric: the mean with the opposite direction, where the positives seek their queries among all queries. Candidates
        there are whole batch rows; neither log Q nor item_mask nor further negatives apply to them. With target None and N = B both
        directions come from one pass.
      form: "standard"; "decoupled", where the positive is not in the denominator; "debiased", where the share of false negatives that
        `positive_prior` expects is taken from the denominator (for vectors of unit length).
      positive_prior: probability that a candidate is a positive of the query, in [0, 1); for "debiased".
      label_smoothing: share of the weight that is spread evenly over a query's candidates; in [0, 1). For one positive, standard form.
      block: candidates per block; None chooses.
      mesh: with `axis`, the ring.
      axis: a name or several.

    Raises:
      RecJaxError: a temperature <= 0 (where its value is known), shapes that do not fit, an unknown form or log_q_form, an axis that is not
        in the mesh, rows that its devices do not divide.

    Reference: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4;
    Bengio and Senecal 2008, "Adaptive Importance Sampling", sections II and III; Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling",
    section 3 (form "all"); Khrylchenko et al. 2025, "Correcting the LogQ Correction" (the positive is no sample); Yeh et al. 2022,
    "Decoupled Contrastive Learning", eq. 6; Chuang et al. 2020, "Debiased Contrastive Learning", eq. 7 and 8; Yang et al. 2020, "Mixed
    Negative Sampling", section 3.
    """
    problems = _problems(
        query,
        item,
        temperature,
        weights,
        block,
        target=target,
        positive=positive,
        positive_mask=positive_mask,
        positive_weights=positive_weights,
        log_q=log_q,
        log_q_strength=log_q_strength,
        log_q_form=log_q_form,
        query_ids=query_ids,
        item_ids=item_ids,
        item_mask=item_mask,
        negatives=negatives,
        hard_negatives=hard_negatives,
        hard_ids=hard_ids,
        left_out=left_out,
        symmetric=symmetric,
        form=form,
        positive_prior=positive_prior,
        label_smoothing=label_smoothing,
        mesh=mesh,
        axis=axis,
    )
    loss = problems.losses(block)
    return loss if weights is None else jnp.where(jnp.asarray(weights) != 0, weights * loss, 0)


class Options(TypedDict, total=False):
    """Arguments of `info_nce` beside vectors, temperature, weights and block."""

    target: Array | None
    positive: Array | None
    positive_mask: Array | None
    positive_weights: Array | None
    log_q: Array | None
    log_q_strength: float
    log_q_form: str | None
    query_ids: Array | None
    item_ids: Array | None
    item_mask: Array | None
    negatives: Sequence[Candidates]
    hard_negatives: Array | None
    hard_ids: Array | None
    left_out: Array | None
    symmetric: bool
    form: str
    positive_prior: float
    label_smoothing: float
    mesh: Mesh | None
    axis: Axis | None


def weighted_info_nce(
    query: Array, item: Array, *, temperature: Any, weights: Array, block: int | None = None, **options: Unpack[Options]
) -> jax.Array:
    """query [B, D], item [N, D], weights [B] -> sum_i weights_i * info_nce_i, a scalar: the fast form.

    Equal to `info_nce(..., weights=weights).sum()`. On one device its gradients are made in the forward pass.

    Args:
      query, item, temperature: as in `info_nce`.
      weights: [B] float; for a mean over the real places: mask / mask.sum().
      block: queries per block; None chooses.
      options: the other arguments of `info_nce`.

    Raises:
      RecJaxError: as in `info_nce`.
    """
    return _problems(query, item, temperature, weights, block, **options).weighted_loss(weights, block)


@dataclasses.dataclass(frozen=True)
class _Problems:
    """Query -> item and, if symmetric, item -> query: as a problem of its own, or from the columns of the same pass."""

    forward: softmax.Problem
    backward: softmax.Problem | None
    columns: bool
    row_loss: RowLoss
    totals: bool

    def losses(self, block: int | None) -> jax.Array:
        """-> loss [B]."""
        if self.columns:
            return self._both(block)
        parts = [softmax.losses(p, self.row_loss, totals=self.totals, block=block) for p in (self.forward, self.backward) if p is not None]
        return sum(parts[1:], parts[0]) / len(parts)

    def weighted_loss(self, weights: Array, block: int | None) -> jax.Array:
        """-> sum_i weights_i * loss_i."""
        if self.columns:
            return jnp.sum(jnp.where(self.forward.valid, weights, 0) * self._both(block))
        parts = [
            softmax.weighted_loss(p, self.row_loss, weights, totals=self.totals, block=block)
            for p in (self.forward, self.backward)
            if p is not None
        ]
        return sum(parts[1:], parts[0]) / len(parts)

    def _both(self, block: int | None) -> jax.Array:
        """Both directions from one pass: query i and row i of item are each other's positive."""
        p = self.forward
        kept, positives, of_item = softmax.statistics(p, totals=self.totals, block=block, columns=True)
        assert of_item is not None
        own = p.scale * jnp.einsum("bd,bd->b", p.query.vectors, p.sets[0].vectors, preferred_element_type=p.query.bias.dtype)
        column = softmax.Positives(jnp.where(p.valid, own, 0)[:, None], positives.there, None, positives.floor)
        return jnp.where(p.valid, (self.row_loss(kept, positives) + self.row_loss(of_item, column)) / 2, 0)


def _problems(
    query: Array,
    item: Array,
    temperature: Any,
    weights: Array | None,
    block: int | None,
    *,
    target: Array | None = None,
    positive: Array | None = None,
    positive_mask: Array | None = None,
    positive_weights: Array | None = None,
    log_q: Array | None = None,
    log_q_strength: float = 1.0,
    log_q_form: str | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    negatives: Sequence[Candidates] = (),
    hard_negatives: Array | None = None,
    hard_ids: Array | None = None,
    left_out: Array | None = None,
    symmetric: bool = False,
    form: str = "standard",
    positive_prior: float = 0.0,
    label_smoothing: float = 0.0,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> _Problems:
    """Checks the arguments of `info_nce` -> what is to be solved."""
    checks.check_vectors(query, item)
    checks.check_block(block)
    b, n = query.shape[0], item.shape[0]
    several = positive is not None or (target is not None and np.ndim(target) == 2)
    row_loss = _row_loss(form, positive_prior, label_smoothing, several)
    scale = scale_of(temperature)
    query_ids = softmax.ids_of_positives(query_ids, item_ids, target, b)
    masks = item_ids is not None or (bool(negatives) and query_ids is not None)
    bias, target_bias, further = _log_q_bias(b, n, log_q, log_q_strength, log_q_form, masks, item_mask, negatives)
    forward = softmax.make_problem(
        query,
        item,
        scale=scale,
        target=target,
        positive=positive,
        positive_mask=positive_mask,
        positive_weights=positive_weights,
        bias=bias,
        target_bias=target_bias,
        query_ids=query_ids,
        item_ids=item_ids,
        item_mask=item_mask,
        weights=weights,
        negatives=further,
        hard_negatives=hard_negatives,
        hard_ids=hard_ids,
        left_out=left_out,
        mesh=mesh,
        axis=axis,
    )
    if form == "debiased" and forward.positives is not None and forward.positives.logits is not None:
        floor = jnp.broadcast_to(jax.lax.stop_gradient(-forward.scale), (b,))
        forward = dataclasses.replace(forward, positives=forward.positives._replace(floor=floor))
    elif form == "debiased":
        raise RecJaxError('form="debiased" on a mesh needs the vectors of the positives: pass `positive`, or item with row i for query i')
    totals = label_smoothing > 0 or form == "debiased"
    forward = softmax.smaller_side_travels(forward)
    if not symmetric:
        return _Problems(forward, None, False, row_loss, totals)
    if left_out is not None:
        raise RecJaxError("symmetric=True with left_out, which are no candidates in one direction alone: pass one of both")
    if several:
        raise RecJaxError("symmetric=True with several positives per query: expected one, row i of item for query i, or one target each")
    if target is None and n == b:
        return _Problems(forward, None, True, row_loss, totals)
    if mesh is not None:
        raise RecJaxError("symmetric=True on a mesh needs row i of item for query i: pass no target and as many items as queries")
    return _Problems(forward, _opposite(query, item, scale, target, weights, query_ids), False, row_loss, totals)


def _opposite(
    query: Array, item: Array, scale: Any, target: Array | None, weights: Array | None, query_ids: Array | None
) -> softmax.Problem:
    """The targets' vectors seek their queries among all queries."""
    b = query.shape[0]
    rows = jnp.arange(b, dtype=jnp.int32) if target is None else jnp.asarray(target)
    valid = rows >= 0 if weights is None else (rows >= 0) & (jnp.asarray(weights) != 0)
    return softmax.make_problem(
        jnp.take(jnp.asarray(item), jnp.maximum(rows, 0), axis=0, mode="fill", fill_value=jnp.nan),
        query,
        scale=scale,
        target=jnp.where(valid, jnp.arange(b, dtype=jnp.int32), -1),
        query_ids=query_ids,
        item_ids=query_ids,
        item_mask=valid,
    )


def _row_loss(form: str, positive_prior: float, label_smoothing: float, several: bool) -> RowLoss:
    if form not in FORMS:
        raise RecJaxError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    if label_smoothing and (several or form != "standard"):
        raise RecJaxError(f"label_smoothing={label_smoothing} goes with one positive per query and form 'standard'; set it to 0")
    if not 0 <= positive_prior < 1:
        raise RecJaxError(f"positive_prior is {positive_prior!r}; expected a probability in [0, 1), e.g. 0.01")
    if form == "standard":
        return cross_entropy_of(label_smoothing)
    return _decoupled if form == "decoupled" else functools.partial(_debiased, positive_prior=positive_prior)


def _decoupled(kept: Statistics, positives: softmax.Positives) -> Any:
    kept = softmax.with_hard(kept, positives)
    return mean_of_positives(kept.log_sum_exp[:, None] - positives.logits, positives)


def _debiased(kept: Statistics, positives: softmax.Positives, *, positive_prior: float) -> Any:
    """The mean of exp over negatives, less the positives' expected share of it, but not below the least that a logit can give."""
    kept = softmax.with_hard(kept, positives)
    there = positives.there > 0
    count = jnp.maximum(kept.count, 1)
    mean = kept.log_sum_exp - jnp.log(count)
    if positive_prior:
        own = softmax.log_sum_exp(jnp.where(there, positives.logits, -jnp.inf)) - jnp.log(jnp.maximum(there.sum(1), 1))
        share = jnp.minimum(own + jnp.log(positive_prior) - mean, 0)
        more = share < 0  # else the positives take all of it, and the floor is what is left
        rest = mean + jnp.where(more, jnp.log1p(-jnp.exp(jnp.where(more, share, -1.0))), -jnp.inf) - jnp.log1p(-positive_prior)
        mean = jnp.where(kept.count > 0, jnp.maximum(rest, positives.floor), mean)
    log_sum_exp = mean + jnp.log(count)
    return mean_of_positives(jax.nn.softplus(log_sum_exp[:, None] - positives.logits), positives)


def scale_of(temperature: Any) -> Any:
    """1 / temperature; a value that is known before tracing is checked."""
    checks.check_shape("temperature", temperature, (), "a scalar")
    if not isinstance(temperature, jax.core.Tracer) and not (0 < float(temperature) < float("inf")):
        raise RecJaxError(f"temperature is {temperature!r}; expected a finite number > 0, e.g. 0.07: logits are divided by it")
    return 1 / temperature


def _log_q_bias(
    b: int,
    n: int,
    log_q: Array | None,
    strength: float,
    form: str | None,
    masks: bool,
    item_mask: Array | None,
    negatives: Sequence[Candidates],
) -> tuple[jax.Array | None, jax.Array | None, list[tuple[Candidates, Any]]]:
    """The correction as (bias [N], the targets' own bias [B] or None where it is bias[target], the further sets with theirs)."""
    if form is not None and form not in LOG_Q_FORMS:
        raise RecJaxError(f"log_q_form is {form!r}; expected one of {', '.join(LOG_Q_FORMS)}, or None to choose by item_ids")
    if log_q is None and all(c.log_q is None for c in negatives):
        return None, None, [(c, None) for c in negatives]
    if log_q is not None:
        checks.check_shape("log_q", log_q, (n,), "the log sampling probability of each candidate")
    spared = (form or ("negatives" if masks else "all")) == "negatives"
    if spared and not masks:
        raise RecJaxError('log_q_form "negatives" needs item_ids, or copies of the positive count it twice: pass them, or use "all"')
    draws: Any = 0.0
    if spared:
        sampled = [(n, item_mask)] if log_q is not None else []
        sampled += [(c.vectors.shape[0], c.mask) for c in negatives if c.log_q is not None]
        number = sum(rows if mask is None else jnp.sum(jnp.asarray(mask, jnp.float32)) for rows, mask in sampled)
        draws = jnp.log(jnp.maximum(number - (log_q is not None), 1))  # the positive is no draw

    def correction(values: Any) -> Any:
        return None if values is None else -strength * (jax.lax.stop_gradient(jnp.asarray(values, jnp.float32)) + draws)

    own = jnp.zeros(b, jnp.float32) if spared and log_q is not None else None
    return correction(log_q), own, [(c, correction(c.log_q)) for c in negatives]
