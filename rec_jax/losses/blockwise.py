"""The streaming fold that the softmax family stands on: logits = scale * query @ item.T + bias, a block at a time.

No [B, N] array exists. Two folds share one block of logits:

- `candidate_statistics` streams over blocks of candidates and keeps, per query, a running log-sum-exp. A custom VJP computes
  the blocks again: 8 B N D FLOP, O(B * block) memory. Any per-example loss can be built on it by ordinary autodiff.
- `weighted_row_loss` streams over blocks of queries, each against all candidates, and makes the gradients of
  sum_i weight_i * loss_i on the way forward, while a block's logits are at hand: 6 B N D FLOP, O(block * N) memory.

The target's logit is computed apart from the fold, which leaves the target out. A cross-entropy is then
softplus(log-sum-exp of the others - target's logit): never negative, and exact where the loss is tiny. Terms that come
from elsewhere (another set of candidates, hard negatives of a row, a ring of devices) join by `logaddexp`.

Sums, maxima and gradients are float32 (float64 for float64 inputs), whatever the inputs are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from rec_jax.losses.checks import check_shape, check_vectors
from rec_jax.types import Array, RecJaxError

# Elements of a block of logits: 16 MB of float32, about the best of tests/bench/info_nce.py --blocks on 2 cores. Smaller blocks
# read the gradient of the candidates more often. At least _MIN_BLOCK rows, or matmuls turn memory-bound.
_BLOCK_ELEMENTS = 1 << 22
_MIN_BLOCK = 128
# Rows of a block of candidates come in this multiple: vector width of the matmul kernels.
_ALIGN = 16


class Statistics(NamedTuple):
    """What a fold keeps per query [B]: log-sum-exp of the logits, their sum and their number; the last two None if not asked for."""

    log_sum_exp: Any
    total: Any
    count: Any


class Operands(NamedTuple):
    """Input of a fold. Floats: query [B, D], item [N, D], scale [], bias [N]; integers: target [B], query_ids [B], item_ids [N] or None.

    Candidate j counts for query i unless bias[j] is -inf, j is target[i], or item_ids[j] equals query_ids[i].
    """

    query: Any
    item: Any
    scale: Any
    bias: Any
    target: Any
    query_ids: Any
    item_ids: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients somebody asks for; the others cost nothing."""

    query: bool
    item: bool
    scale: bool
    bias: bool


RowLoss = Callable[[Statistics, Any], Any]  # (statistics of a block of queries, their positives' logits) -> loss per query


def prepare(
    query: Array,
    item: Array,
    target: Array,
    scale: Any,
    bias: Array | None,
    target_bias: Array | None,
    query_ids: Array | None,
    item_ids: Array | None,
    item_mask: Array | None,
) -> tuple[Operands, jax.Array, jax.Array]:
    """Checks shapes -> (operands of a fold, the targets' logits [B], which queries have a target [B] bool).

    Queries without a target and candidates that are padding are set to zero here, so that garbage in them reaches nothing.

    Raises:
      RecJaxError: shapes that do not fit.
    """
    check_vectors(query, item)
    b, n = np.shape(query)[0], np.shape(item)[0]
    check_shape("target", target, (b,), "one row of item per query")
    check_shape("scale", scale, (), "a scalar")
    for name, value, shape, what in (
        ("bias", bias, (n,), "one per candidate"),
        ("target_bias", target_bias, (b,), "one per query"),
        ("query_ids", query_ids, (b,), "the id of each query's target"),
        ("item_ids", item_ids, (n,), "one id per candidate"),
        ("item_mask", item_mask, (n,), "one per candidate"),
    ):
        if value is not None:
            check_shape(name, value, shape, what)
    if (query_ids is None) != (item_ids is None):
        given, missing = ("item_ids", "query_ids") if query_ids is None else ("query_ids", "item_ids")
        raise RecJaxError(f"{given} is given without {missing}: equal ids are masked by comparing both; pass both or neither")

    query, item, target = jnp.asarray(query), jnp.asarray(item), jnp.asarray(target)
    dtype = _sum_dtype(query, item)
    valid = target >= 0
    query = jnp.where(valid[:, None], query, 0)
    bias = jnp.zeros(n, dtype) if bias is None else jnp.asarray(bias, dtype)
    row = jnp.where(valid, target, 0)
    if item_mask is not None:
        item = jnp.where(jnp.asarray(item_mask)[:, None], item, 0)
        bias = jnp.where(item_mask, bias, -jnp.inf)
    target_item = jnp.take(item, row, axis=0, mode="fill", fill_value=jnp.nan)
    own_bias = jnp.take(bias, row, mode="fill", fill_value=jnp.nan)
    if target_bias is not None:
        own_bias = jnp.where(own_bias == -jnp.inf, -jnp.inf, jnp.asarray(target_bias, dtype))
    scale = jnp.asarray(scale, dtype)
    positive = scale * jnp.einsum("bd,bd->b", query, target_item, preferred_element_type=dtype) + own_bias
    positive = jnp.where(valid, positive, 0)
    ids = [None if x is None else jnp.asarray(x) for x in (query_ids, item_ids)]
    return Operands(query, item, scale, bias, row, *ids), positive, valid


def candidate_statistics(operands: Operands, *, totals: bool = False, block: int | None = None) -> Statistics:
    """Fold over blocks of candidates -> Statistics [B] of the logits of each query's candidates, the target left out.

    Differentiable in query, item, scale and bias. A query without candidates has a log-sum-exp of -inf.

    Args:
      operands: query [B, D], item [N, D] and the rest.
      totals: also sum and count the logits.
      block: candidates per block; None chooses.
    """
    b, n = operands.query.shape[0], operands.item.shape[0]
    block = block or max(_MIN_BLOCK, _BLOCK_ELEMENTS // max(b, 1))
    return _statistics(totals, _even_block(n, block, _ALIGN), operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(totals: bool, block: int, operands: Operands) -> Statistics:
    b, dtype = operands.query.shape[0], operands.bias.dtype

    def step(carry: Any, part: Any) -> Any:
        peak, total_exp, total, count = carry
        logits = _logits(operands.query, operands.scale, operands.target, operands.query_ids, *part)
        new_peak = jnp.maximum(peak, logits.max(1))
        shift = _finite(new_peak)
        total_exp = total_exp * jnp.exp(peak - shift) + jnp.exp(logits - shift[:, None]).sum(1)
        if totals:
            more_total, more_count = _totals(logits)
            total, count = total + more_total, count + more_count
        return (new_peak, total_exp, total, count), None

    zeros = jnp.zeros(b, dtype)
    start = (jnp.full(b, -jnp.inf, dtype), zeros, zeros if totals else None, zeros if totals else None)
    (peak, total_exp, total, count), _ = jax.lax.scan(step, start, _candidate_blocks(operands, block))
    return Statistics(_finite(peak) + jnp.log(total_exp), total, count)


def _statistics_forward(totals: bool, block: int, operands: Operands) -> Any:
    operands, wanted = _split_perturbed(operands)
    statistics = _statistics(totals, block, operands)
    return statistics, (operands, statistics.log_sum_exp, wanted)


def _statistics_backward(totals: bool, block: int, residuals: Any, cotangent: Statistics) -> tuple[Operands]:
    operands, log_sum_exp, wanted = residuals
    query, item, scale, bias, *_ = operands
    of_total = totals and not isinstance(cotangent.total, SymbolicZero)
    of_sum = jnp.zeros_like(log_sum_exp) if isinstance(cotangent.log_sum_exp, SymbolicZero) else cotangent.log_sum_exp

    def step(d_query: Any, part: Any) -> Any:
        logits = _logits(query, scale, operands.target, operands.query_ids, *part)
        # exp(-inf - shift) is 0 also where a query has no candidate at all, so that nothing has to be masked again.
        d_logits = of_sum[:, None] * jnp.exp(logits - _finite(log_sum_exp)[:, None])
        if of_total:
            d_logits = d_logits + jnp.where(logits > -jnp.inf, cotangent.total[:, None], 0)
        if wanted.query or wanted.scale:
            d_query = d_query + _matmul("bn,nd->bd", d_logits, part[0])
        d_item = _matmul("bn,bd->nd", d_logits, query) * scale if wanted.item else None
        return d_query, (d_item, d_logits.sum(0) if wanted.bias else None)

    d_query, (d_item, d_bias) = jax.lax.scan(step, jnp.zeros(query.shape, bias.dtype), _candidate_blocks(operands, block))
    d_scale = jnp.sum(d_query * query) if wanted.scale else None
    if wanted.item:
        d_item = d_item.reshape(-1, item.shape[1])[: len(item)].astype(item.dtype)
    if wanted.bias:
        d_bias = d_bias.reshape(-1)[: len(item)]
    d_query = (d_query * scale).astype(query.dtype)
    return (Operands(d_query if wanted.query else None, d_item, d_scale, d_bias, None, None, None),)


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)


def weighted_row_loss(
    row_loss: RowLoss, operands: Operands, positive: Any, weights: Any, *, totals: bool = False, block: int | None = None
) -> jax.Array:
    """Fold over blocks of queries: operands, positive [B], weights [B] -> sum_i weights_i * row_loss(statistics, positive)_i.

    Differentiable in query, item, scale, bias, positive and weights, with gradients made in the forward pass.

    Args:
      row_loss: maps Statistics [b] and logits of the positives [b] to losses [b]; plain jax.
      operands: query [B, D], item [N, D] and the rest.
      positive: [B] logit of each query's positive.
      weights: [B] float.
      totals: whether row_loss wants total and count.
      block: queries per block; None chooses.
    """
    b, n = operands.query.shape[0], operands.item.shape[0]
    block = block or max(_MIN_BLOCK, _BLOCK_ELEMENTS // max(n, 1))
    # Padding the candidates to whole vectors is worth 20% on the CPU, and costs a copy of [N, D].
    extra = -n % _ALIGN
    ids = None if operands.item_ids is None else jnp.pad(operands.item_ids, (0, extra))
    item = jnp.pad(operands.item, ((0, extra), (0, 0)))
    bias = jnp.pad(operands.bias, (0, extra), constant_values=-jnp.inf)
    operands = operands._replace(item=item, bias=bias, item_ids=ids)
    return _weighted(row_loss, totals, _query_blocks(b, block), operands, positive, weights.astype(positive.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted(row_loss: RowLoss, totals: bool, blocks: int, operands: Operands, positive: Any, weights: Any) -> Any:
    def step(total: Any, part: Any) -> Any:
        query, target, query_ids, positive_part, weights_part = part
        logits = _logits(query, operands.scale, target, query_ids, *_all_candidates(operands))
        statistics, _ = _block_statistics(logits, totals)
        return total + jnp.sum(weights_part * row_loss(statistics, positive_part)), None

    parts = _split_queries((operands.query, operands.target, operands.query_ids, positive, weights), blocks)
    return jax.lax.scan(step, jnp.zeros((), positive.dtype), parts)[0]


def _weighted_forward(row_loss: RowLoss, totals: bool, blocks: int, operands: Operands, positive: Any, weights: Any) -> Any:
    operands, wanted = _split_perturbed(operands)
    positive, weights = positive.value, weights.value
    query, item, scale, bias, *_ = operands

    def step(carry: Any, part: Any) -> Any:
        total, d_item, d_bias = carry
        query_part, target, query_ids, positive_part, weights_part = part
        logits = _logits(query_part, scale, target, query_ids, *_all_candidates(operands))
        statistics, exps = _block_statistics(logits, totals)
        losses, pull = jax.vjp(row_loss, statistics, positive_part)
        d_statistics, d_positive = pull(weights_part)
        # d loss / d logit = factor * exps (+ total's share). Factors go to the narrow side of a matmul, not to [b, N].
        total_exp = exps.sum(1)
        factor = jnp.where(total_exp > 0, d_statistics.log_sum_exp / jnp.where(total_exp > 0, total_exp, 1), 0)[:, None]
        d_logits, left = exps, factor
        if totals:
            d_logits = factor * exps + jnp.where(logits > -jnp.inf, d_statistics.total[:, None], 0)
            left = jnp.ones_like(factor)
        d_query = left * _matmul("bn,nd->bd", d_logits, item) if wanted.query or wanted.scale else None
        if wanted.item:
            d_item = d_item + _matmul("bn,bd->nd", d_logits, (left * scale * query_part).astype(query.dtype))
        if wanted.bias:
            d_bias = d_bias + jnp.einsum("bn,b->n", d_logits, left[:, 0])
        return (total + jnp.sum(weights_part * losses), d_item, d_bias), (d_query, d_positive, losses)

    start = (
        jnp.zeros((), positive.dtype),
        jnp.zeros(item.shape, bias.dtype) if wanted.item else None,
        jnp.zeros_like(bias) if wanted.bias else None,
    )
    parts = _split_queries((query, operands.target, operands.query_ids, positive, weights), blocks)
    (total, d_item, d_bias), by_part = jax.lax.scan(step, start, parts)
    d_query, d_positive, losses = _join_queries(by_part, len(query))
    d_scale = jnp.sum(d_query * query) if wanted.scale else None
    if wanted.query or wanted.scale:
        d_query = scale * d_query
    # Empty arrays carry the dtypes of query and item to the backward pass.
    return total, (d_query, d_item, d_scale, d_bias, d_positive, losses, jnp.zeros(0, query.dtype), jnp.zeros(0, item.dtype))


def _weighted_backward(row_loss: RowLoss, totals: bool, blocks: int, residuals: Any, cotangent: Any) -> Any:
    d_query, d_item, d_scale, d_bias, d_positive, losses, of_query, of_item = residuals
    if isinstance(cotangent, SymbolicZero):
        return Operands(*[None] * 7), None, None

    def times(gradient: Any, dtype: Any) -> Any:
        return None if gradient is None else (cotangent * gradient).astype(dtype)

    dtype = losses.dtype
    floats = times(d_query, of_query.dtype), times(d_item, of_item.dtype), times(d_scale, dtype), times(d_bias, dtype)
    return Operands(*floats, None, None, None), times(d_positive, dtype), times(losses, dtype)


_weighted.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _logits(query: Any, scale: Any, target: Any, query_ids: Any, item: Any, bias: Any, item_ids: Any, first: Any) -> Any:
    """One block [b, n] of logits, -inf where a candidate does not count for a query; `first` is the block's first candidate."""
    logits = scale * jnp.einsum("bd,nd->bn", query, item, preferred_element_type=bias.dtype) + bias
    left_out = (target - first)[:, None] == jnp.arange(len(item), dtype=target.dtype)
    if item_ids is not None:
        left_out |= query_ids[:, None] == item_ids
    return jnp.where(left_out, -jnp.inf, logits)


def _block_statistics(logits: Any, totals: bool) -> tuple[Statistics, Any]:
    """Logits [b, N] of all candidates -> (Statistics [b], exp(logits - maximum) [b, N])."""
    shift = _finite(logits.max(1))
    exps = jnp.exp(logits - shift[:, None])
    return Statistics(shift + jnp.log(exps.sum(1)), *(_totals(logits) if totals else (None, None))), exps


def _totals(logits: Any) -> tuple[Any, Any]:
    counts = logits > -jnp.inf
    return jnp.where(counts, logits, 0).sum(1), counts.sum(1).astype(logits.dtype)


def _finite(peak: Any) -> Any:
    """The shift that keeps exp in range; 0 for a query without candidates, where -inf - -inf would be NaN."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def _matmul(equation: str, d_logits: Any, vectors: Any) -> Any:
    """Product with float32 sums; low-precision vectors meet d_logits in their own precision, as matmul units want it."""
    return jnp.einsum(equation, d_logits.astype(vectors.dtype), vectors, preferred_element_type=d_logits.dtype)


def _sum_dtype(*arrays: Any) -> Any:
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _split_perturbed(operands: Any) -> tuple[Operands, _Wanted]:
    def is_primal(x: Any) -> bool:
        return isinstance(x, CustomVJPPrimal)

    values = jax.tree.map(lambda x: x.value, operands, is_leaf=is_primal)
    return values, _Wanted(operands.query.perturbed, operands.item.perturbed, operands.scale.perturbed, operands.bias.perturbed)


def _all_candidates(operands: Operands) -> Any:
    return operands.item, operands.bias, operands.item_ids, 0


def _candidate_blocks(operands: Operands, block: int) -> Any:
    """Candidates in blocks, stacked for a scan: item [n, block, D], bias, ids or None, first candidate [n]."""
    n = len(operands.item)
    blocks = -(-n // block)
    extra = blocks * block - n
    item = jnp.pad(operands.item, ((0, extra), (0, 0))).reshape(blocks, block, -1)
    bias = jnp.pad(operands.bias, (0, extra), constant_values=-jnp.inf).reshape(blocks, block)
    ids = None if operands.item_ids is None else jnp.pad(operands.item_ids, (0, extra)).reshape(blocks, block)
    return item, bias, ids, jnp.arange(blocks, dtype=operands.target.dtype) * block


def _split_queries(tree: Any, blocks: int) -> Any:
    """[B, ...] -> [blocks, b, ...]. Block k takes every blocks-th row: where B is sharded, each device owns a part of every block."""

    def split(x: Any) -> Any:
        x = jnp.pad(x, ((0, -len(x) % blocks), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(len(x) // blocks, blocks, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join_queries(tree: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:rows], tree)


def _query_blocks(rows: int, block: int) -> int:
    """Number of blocks of at most `block` rows; up to twice as many where that divides the rows, so that nothing is padded."""
    least = max(1, -(-rows // block))
    return next((n for n in range(least, 2 * least + 1) if rows % n == 0), least)


def _even_block(rows: int, block: int, align: int) -> int:
    """Block size, a multiple of `align`, that covers the rows with as many blocks as `block` needs, evenly."""
    blocks = max(1, -(-rows // block))
    return max(align, -(-rows // (blocks * align)) * align)
