"""What the softmax losses share: queries, their positives, and one or several sets of candidates -> a loss per query, or a weighted sum.

A query's positives are left out of the fold, which gives the log-sum-exp of the others; their own logits are computed apart. So a
cross-entropy is softplus(log-sum-exp of the others - positive's logit): never negative, and exact where the loss is tiny. Further sets of
candidates and negatives of a single query join by the same sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.losses.blockwise import check_axis, fold
from rec_jax.losses.checks import check_shape, check_vectors
from rec_jax.losses.forward_gradients import RowLoss, Statistics, weighted_row_loss
from rec_jax.losses.tiles import NO_CANDIDATE, NO_POSITIVE, Accumulator, Count, LogSumExp, Side, Total, finite
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError


class Candidates(NamedTuple):
    """Candidates beside those that hold the positives: a queue, uniform draws, shared hard negatives.

    Attributes:
      vectors: [N, D] float.
      ids: [N] int32 or None; those with the id of a query's positive are left out.
      mask: [N] bool or None, False for empty places.
      log_q: [N] float32 or None, log of the probability that one draw is this item, among all that are drawn, of all sets together.
    """

    vectors: Any
    ids: Any = None
    mask: Any = None
    log_q: Any = None


class Positives(NamedTuple):
    """What belongs to single queries.

    Attributes:
      logits: [B, K] of their positives.
      there: [B, K] float, 1 for a positive that is there.
      hard: [B, H] logits of hard negatives of their own, -inf for none; or None.
      floor: [B] the lowest logit that there can be, or None.
      weights: [B, K] of the positives in their query's mean, or None: they weigh the same.
    """

    logits: Any
    there: Any
    hard: Any
    floor: Any = None
    weights: Any = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A softmax over sets of candidates.

    Attributes:
      query: B queries; numbers [B, K] are those of its positives in the first set; a bias of -inf marks a query without any.
      sets: the candidates; positives are looked for in the first alone.
      scale: scalar that multiplies the products.
      positives: logits of the positives; None: the fold finds them in the first set by their numbers.
      mesh, axis: of the ring; None: one device.
      travelling: the side that goes round.
    """

    query: Side
    sets: tuple[Side, ...]
    scale: Any
    positives: Positives | None
    mesh: Mesh | None
    axis: Axis | None
    travelling: str = "item"

    @property
    def valid(self) -> Any:
        """[B] bool, queries that have a positive."""
        return self.query.bias > -jnp.inf


def make_problem(
    query: Array,
    item: Array,
    *,
    scale: Any,
    target: Array | None,
    positive: Array | None = None,
    positive_mask: Array | None = None,
    positive_weights: Array | None = None,
    bias: Array | None = None,
    target_bias: Array | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    weights: Array | None = None,
    negatives: Sequence[tuple[Candidates, Any]] = (),
    hard_negatives: Array | None = None,
    hard_ids: Array | None = None,
    left_out: Array | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> Problem:
    """Checks -> Problem. Queries without a positive and candidates that are padding become zeros, so that garbage in them reaches nothing.

    `target` None: row i of item is query i's. `negatives` are pairs of candidates and their bias [N] or None.

    Raises:
      RecJaxError: shapes that do not fit, an axis that is not in the mesh, rows that its devices do not divide.
    """
    check_vectors(query, item)
    b, n = np.shape(query)[0], np.shape(item)[0]
    aligned = target is None
    if target is None:
        if n < b:
            raise RecJaxError(f"item has {n} rows for {b} queries; expected at least {b}, row i being query i's positive: else pass target")
        target = jnp.arange(b, dtype=jnp.int32)
    targets = _columns("target", target, b, "rows of item per query")
    width = targets.shape[1]
    for name, value, shape, what in (
        ("bias", bias, (n,), "one per candidate"),
        ("target_bias", target_bias, (b,), "one per query"),
        ("item_ids", item_ids, (n,), "one id per candidate"),
        ("item_mask", item_mask, (n,), "one per candidate"),
        ("weights", weights, (b,), "one weight per query"),
        ("positive", positive, (b, width, np.shape(query)[1]), "vectors of each query's positives, as many as it has targets"),
        ("positive_mask", positive_mask, (b, width), "one per positive"),
        ("positive_weights", positive_weights, (b, width), "one weight per positive"),
    ):
        if value is not None:
            check_shape(name, value, shape, what)
    _check_ids(query_ids, item_ids, negatives, hard_ids, b)
    check_axis(mesh, axis, queries=b, candidates=n)

    query, item = jnp.asarray(query), jnp.asarray(item)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(query, item))
    there = targets >= 0 if positive_mask is None else (targets >= 0) & jnp.asarray(positive_mask)
    if weights is not None:
        there = there & (jnp.asarray(weights) != 0)[:, None]
    valid = there.any(1)
    if not aligned or weights is not None or positive_mask is not None:  # else every query has its positive, and a copy is saved
        query = jnp.where(valid[:, None], query, 0)
    bias = jnp.zeros(n, dtype) if bias is None else jnp.asarray(bias, dtype)
    if item_mask is not None:
        item = jnp.where(jnp.asarray(item_mask)[:, None], item, 0)
        bias = jnp.where(item_mask, bias, -jnp.inf)
    scale = jnp.asarray(scale, dtype)
    ids = None if query_ids is None else _columns("query_ids", query_ids, b, "ids of each query's positives")
    without = None if left_out is None else _columns("left_out", left_out, b, "rows of item that each query leaves out")
    side = Side(query, jnp.where(there, targets, NO_POSITIVE), ids, jnp.where(valid, 0, -jnp.inf).astype(dtype), left_out=without)
    first = Side(item, jnp.arange(n, dtype=jnp.int32)[:, None], _column(item_ids), bias)

    hard = None
    if hard_negatives is not None:
        hard = _hard_logits(side, scale, hard_negatives, hard_ids)
    positives: Positives | None = None
    if positive is None and not aligned and mesh is not None:
        # Looking the targets up would gather vectors across devices: the fold meets them anyway.
        if width > 1 or target_bias is not None or positive_weights is not None:
            raise RecJaxError("several targets, or a bias of their own, on a mesh need the vectors of the positives: pass `positive`")
        if hard is not None:
            positives = Positives(None, there, hard)
    else:
        rows = jnp.where(there, targets, 0)
        own = item[:b, None] if aligned else None
        if positive is not None:
            own = jnp.where(there[:, :, None], jnp.asarray(positive), 0)
        elif own is None:
            own = jnp.take(item, rows, axis=0, mode="fill", fill_value=jnp.nan)
        own_bias = bias[:b, None] if aligned else jnp.take(bias, rows, mode="fill", fill_value=jnp.nan)
        if target_bias is not None:
            own_bias = jnp.where(own_bias == -jnp.inf, -jnp.inf, jnp.asarray(target_bias, dtype)[:, None])
        logits = scale * jnp.einsum("bd,bkd->bk", query, own, preferred_element_type=dtype) + own_bias
        shares = None if positive_weights is None else jnp.where(there, jnp.asarray(positive_weights, dtype), 0)
        positives = Positives(jnp.where(there, logits, 0), there.astype(dtype), hard, weights=shares)
    return Problem(side, (first, *(_further(c, b_, dtype) for c, b_ in negatives)), scale, positives, mesh, axis)


def ids_of_positives(query_ids: Any, item_ids: Any, target: Any, queries: int) -> Any:
    """The ids that mask copies of the positives: as given, or the targets' where only the candidates' are given; None without any."""
    if query_ids is not None or item_ids is None:
        return query_ids
    if np.ndim(item_ids) != 1:
        raise RecJaxError(f"item_ids has shape {np.shape(item_ids)}; expected [N], one id per candidate")
    return item_ids[:queries] if target is None else jnp.take(jnp.asarray(item_ids), jnp.maximum(jnp.asarray(target), 0), mode="clip")


def statistics(
    problem: Problem, *, totals: bool, block: int | None, columns: bool = False
) -> tuple[Statistics, Positives, Statistics | None]:
    """Folds every set -> (Statistics [B] of the candidates that are no positives, Positives, the same of each candidate of the first set).

    The last is None unless `columns`: statistics over the queries that are no positives of it [N], from the same pass.
    """
    seek = problem.positives is None or problem.positives.logits is None
    found, joined, of_item = None, None, None
    for number, candidates in enumerate(problem.sets):
        wanted: tuple[Accumulator, ...] = (LogSumExp(),) + ((Total(), Count()) if totals else ())
        if seek and number == 0:
            wanted += (Total("positives"),)
        values, by_item = fold(
            problem.query if number == 0 else problem.query._replace(left_out=None),
            candidates,
            problem.scale,
            of_query=wanted,
            of_item=wanted if columns and number == 0 else (),
            travelling=problem.travelling if number == 0 else "item",
            block=block,
            mesh=problem.mesh,
            axis=problem.axis,
        )
        if seek and number == 0:
            found = values[-1]
        if by_item:
            of_item = Statistics(by_item[0], *(by_item[1:3] if totals else (None, None)))
        part = Statistics(values[0], *(values[1:3] if totals else (None, None)))
        joined = part if joined is None else _join(joined, part)
    assert joined is not None
    if not seek:
        assert problem.positives is not None
        return joined, problem.positives, of_item
    assert found is not None
    hard = None if problem.positives is None else problem.positives.hard
    return joined, Positives(found[:, None], problem.valid[:, None].astype(found.dtype), hard), of_item


def losses(problem: Problem, row_loss: RowLoss, *, totals: bool, block: int | None) -> jax.Array:
    """-> loss [B]; 0 where a query has no positive."""
    kept, positives, _ = statistics(problem, totals=totals, block=block)
    return jnp.where(problem.valid, row_loss(kept, positives), 0)


def weighted_loss(problem: Problem, row_loss: RowLoss, weights: Any, *, totals: bool, block: int | None) -> jax.Array:
    """-> sum_i weights_i * loss_i, a scalar; on one device its gradients are made in the forward pass."""
    weights = jnp.where(problem.valid, jnp.asarray(weights, problem.query.bias.dtype), 0)
    if problem.mesh is not None or problem.positives is None:
        return jnp.sum(weights * losses(problem, row_loss, totals=totals, block=block))
    item = problem.sets[0]
    if len(problem.sets) > 1:
        with_ids = problem.query.ids is not None
        parts = [s if s.ids is not None or not with_ids else s._replace(ids=jnp.full_like(s.numbers, NO_CANDIDATE)) for s in problem.sets]
        parts = [s if with_ids else s._replace(ids=None) for s in parts]
        item = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return weighted_row_loss(row_loss, problem.query, item, problem.scale, problem.positives, weights, totals=totals, block=block)


def log_sum_exp(logits: Any) -> Any:
    """logits [B, H] -> [B]; -inf, with gradient 0, where all are -inf."""
    shift = finite(jax.lax.stop_gradient(logits).max(1))
    total = jnp.exp(logits - shift[:, None]).sum(1)
    return jnp.where(total > 0, shift + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def with_hard(kept: Statistics, positives: Positives) -> Statistics:
    """The statistics with the queries' own hard negatives among the candidates."""
    if positives.hard is None:
        return kept
    counts = positives.hard > -jnp.inf
    total = None if kept.total is None else jnp.where(counts, positives.hard, 0).sum(1)
    count = None if kept.count is None else counts.sum(1).astype(positives.hard.dtype)
    return _join(kept, Statistics(log_sum_exp(positives.hard), total, count))


def _join(left: Statistics, right: Statistics) -> Statistics:
    total, count = (None if a is None else a + b for a, b in ((left.total, right.total), (left.count, right.count)))
    # Not jnp.logaddexp: its gradient is NaN where neither has a candidate.
    return Statistics(log_sum_exp(jnp.stack([left.log_sum_exp, right.log_sum_exp], axis=1)), total, count)


def _further(candidates: Candidates, bias: Any, dtype: Any) -> Side:
    vectors = jnp.asarray(candidates.vectors)
    n = vectors.shape[0]
    bias = jnp.zeros(n, dtype) if bias is None else jnp.asarray(bias, dtype)
    if candidates.mask is not None:
        vectors = jnp.where(jnp.asarray(candidates.mask)[:, None], vectors, 0)
        bias = jnp.where(candidates.mask, bias, -jnp.inf)
    return Side(vectors, jnp.full((n, 1), NO_CANDIDATE, jnp.int32), _column(candidates.ids), bias)


def _hard_logits(query: Side, scale: Any, vectors: Array, ids: Array | None) -> Any:
    """Hard negatives [B, H, D] -> logits [B, H], -inf for empty places and for those with an id of the query's positives."""
    if np.ndim(vectors) != 3 or np.shape(vectors)[0] != query.vectors.shape[0] or np.shape(vectors)[2] != query.vectors.shape[1]:
        raise RecJaxError(f"hard_negatives has shape {np.shape(vectors)}; expected (B, H, D) = ({query.vectors.shape[0]}, H, D)")
    vectors = jnp.asarray(vectors)
    there = (query.bias > -jnp.inf)[:, None] & jnp.ones(vectors.shape[:2], bool)
    if ids is not None:
        check_shape("hard_ids", ids, vectors.shape[:2], "one id per hard negative, -1 for an empty place")
        ids = jnp.asarray(ids)
        there &= ids >= 0
        if query.ids is not None:
            there &= ~(ids[:, :, None] == query.ids[:, None, :]).any(-1)
    vectors = jnp.where(there[:, :, None], vectors, 0)
    logits = scale * jnp.einsum("bd,bhd->bh", query.vectors, vectors, preferred_element_type=query.bias.dtype)
    return jnp.where(there, logits, -jnp.inf)


def _check_ids(query_ids: Any, item_ids: Any, negatives: Any, hard_ids: Any, b: int) -> None:
    others = item_ids is not None or hard_ids is not None or any(c.ids is not None for c, _ in negatives)
    if query_ids is not None and not others:
        raise RecJaxError("query_ids is given without item_ids: equal ids are masked by comparing both; pass both or neither")
    if query_ids is None and item_ids is not None:
        raise RecJaxError("item_ids is given without query_ids: equal ids are masked by comparing both; pass both or neither")
    for candidates, _ in negatives:
        check_vectors(candidates.vectors, candidates.vectors)
        for name in ("ids", "mask", "log_q"):
            value = getattr(candidates, name)
            if value is not None:
                check_shape(f"negatives' {name}", value, np.shape(candidates.vectors)[:1], "one per candidate")


def _columns(name: str, value: Array, b: int, what: str) -> Any:
    """[B] or [B, K] -> [B, K]."""
    if np.ndim(value) == 2:
        check_shape(name, value, (b, np.shape(value)[1]), what)
        return jnp.asarray(value)
    check_shape(name, value, (b,), what)
    return jnp.asarray(value)[:, None]


def _column(ids: Array | None) -> Any:
    return None if ids is None else jnp.asarray(ids)[:, None]


def smaller_side_travels(problem: Problem) -> Problem:
    """The problem with the side of fewer rows going round the ring."""
    fewer_queries = problem.query.vectors.shape[0] < problem.sets[0].vectors.shape[0]
    return dataclasses.replace(problem, travelling="query" if fewer_queries else "item")
