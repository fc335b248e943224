"""A weighted sum of softmax losses whose gradients are made in the forward pass: 6 B N D FLOP, all candidates on one device.

The fold goes over blocks of queries, each against all candidates, and makes the gradients of sum_i weight_i * loss_i on the way forward,
while a block's logits are at hand: O(block * N) memory. Beyond one device the candidates' gradients would need the queries' finished
log-sum-exp before it is known, so a ring computes logits twice (`blockwise`).

Reference: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (no logits in memory); Hsu et al. 2024, "Liger Kernel"
(gradients in the forward pass).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from rec_jax.losses.tiles import Side, any_equal, finite, left_out_pairs, similarities
from rec_jax.mesh import on_cpu

# Elements of a block of logits, by platform. CPU: 16 MB of float32, about the best of tests/bench/info_nce.py --blocks on 2 cores. The
# others as a tile of the fold: smaller blocks read and write the gradient of the candidates more often, and with the CPU's a GPU took
# twice as long as the fold does (tests/bench/accelerator.py). At least MIN_BLOCK rows, or matmuls turn memory-bound.
_BLOCK_ELEMENTS = {"cpu": 1 << 22, "gpu": 1 << 26, "tpu": 1 << 24}
MIN_BLOCK = 128
_ALIGN = 16  # candidates come in this multiple: vector width of the matmul kernels


def block_elements() -> int:
    """Elements of a block of logits on this platform; other names than these are GPUs."""
    return _BLOCK_ELEMENTS.get(jax.default_backend(), _BLOCK_ELEMENTS["gpu"])


class Statistics(NamedTuple):
    """Of each query's candidates but its positives [B]: log-sum-exp, sum and number of the logits; the last two None if not asked for."""

    log_sum_exp: Any
    total: Any
    count: Any


RowLoss = Callable[[Statistics, Any], Any]  # (statistics of a block of queries, the caller's arrays [b, ...]) -> loss per query


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients somebody asks for; the others cost nothing."""

    query: bool
    item: bool
    scale: bool
    bias: bool


def weighted_row_loss(
    row_loss: RowLoss, query: Side, item: Side, scale: Any, rows: Any, weights: Any, *, totals: bool = False, block: int | None = None
) -> jax.Array:
    """Queries [B, D], candidates [N, D], weights [B] -> sum_i weights_i * row_loss(statistics, rows)_i, a scalar.

    Differentiable in vectors, scale, the candidates' bias, rows and weights, with gradients made in the forward pass.

    Args:
      row_loss: maps Statistics [b] and a block of `rows` to losses [b]; plain jax.
      query, item: both sides, without shift.
      scale: scalar that multiplies the products.
      rows: a pytree of float arrays [B, ...] that row_loss wants, such as the logits of the positives.
      weights: [B] float.
      totals: whether row_loss wants total and count.
      block: queries per block; None chooses.
    """
    b, n = query.vectors.shape[0], item.vectors.shape[0]
    block = block or max(MIN_BLOCK, block_elements() // max(n, 1))
    # Padding the candidates to whole vectors is worth 20% on the CPU, and costs a copy of [N, D].
    extra = -n % _ALIGN

    def padded(x: Any, value: float) -> Any:
        return x if x is None or not extra else jnp.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1)), constant_values=value)

    item = Side(padded(item.vectors, 0), padded(item.numbers, 0), padded(item.ids, 0), padded(item.bias, -jnp.inf))
    dtype = item.bias.dtype
    return _weighted(row_loss, totals, _query_blocks(b, block), query, item, jnp.asarray(scale, dtype), rows, jnp.asarray(weights, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted(row_loss: RowLoss, totals: bool, blocks: int, query: Side, item: Side, scale: Any, rows: Any, weights: Any) -> Any:
    def step(total: Any, part: Any) -> Any:
        query_part, rows_part, weights_part = part
        statistics, _ = _block_statistics(_logits(query_part, item, scale), totals)
        return total + jnp.sum(weights_part * row_loss(statistics, rows_part)), None

    parts = _split_queries((_without_bias(query), rows, weights), blocks)
    return jax.lax.scan(step, jnp.zeros((), weights.dtype), parts)[0]


def _weighted_forward(
    row_loss: RowLoss, totals: bool, blocks: int, query: Any, item: Any, scale: Any, rows: Any, weights: Any
) -> tuple[Any, Any]:
    wanted = _Wanted(query.vectors.perturbed, item.vectors.perturbed, scale.perturbed, item.bias.perturbed)
    query, item, scale, rows, weights = jax.tree.map(
        lambda x: x.value, (query, item, scale, rows, weights), is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    vectors = item.vectors
    # A CPU adds up the candidates' gradient as [D, N]: then the narrow side is what it has to transpose for the product.
    turned = on_cpu()

    def step(carry: Any, part: Any) -> Any:
        total, d_item, d_bias = carry
        query_part, rows_part, weights_part = part
        logits = _logits(query_part, item, scale)
        statistics, exps = _block_statistics(logits, totals)
        losses, pull = jax.vjp(row_loss, statistics, rows_part)
        d_statistics, d_rows = pull(weights_part)
        # d loss / d logit = factor * exps (+ total's share). Factors go to the narrow side of a matmul, not to [b, N].
        total_exp = exps.sum(1)
        factor = jnp.where(total_exp > 0, d_statistics.log_sum_exp / jnp.where(total_exp > 0, total_exp, 1), 0)[:, None]
        d_logits, left = exps, factor
        if totals:
            d_logits = factor * exps + jnp.where(logits > -jnp.inf, d_statistics.total[:, None], 0)
            left = jnp.ones_like(factor)
        d_query = left * _matmul("bn,nd->bd", d_logits, vectors) if wanted.query or wanted.scale else None
        if wanted.item:
            d_item = d_item + _matmul(
                "bn,bd->dn" if turned else "bn,bd->nd", d_logits, (left * scale * query_part.vectors).astype(query.vectors.dtype)
            )
        if wanted.bias:
            d_bias = d_bias + jnp.einsum("bn,b->n", d_logits, left[:, 0])
        return (total + jnp.sum(weights_part * losses), d_item, d_bias), (d_query, d_rows, losses)

    start = (
        jnp.zeros((), weights.dtype),
        jnp.zeros(vectors.shape[::-1] if turned else vectors.shape, item.bias.dtype) if wanted.item else None,
        jnp.zeros_like(item.bias) if wanted.bias else None,
    )
    parts = _split_queries((_without_bias(query), rows, weights), blocks)
    (total, d_item, d_bias), by_part = jax.lax.scan(step, start, parts)
    d_query, d_rows, losses = _join_queries(by_part, query.vectors.shape[0])
    if wanted.item and turned:
        d_item = jax.lax.optimization_barrier(d_item).T  # or the compiler would turn the product round again
    d_scale = jnp.sum(d_query * query.vectors) if wanted.scale else None
    d_query = scale * d_query if wanted.query else None
    # Empty arrays carry the dtypes of both sides to the backward pass.
    of_query, of_item = (jnp.zeros(0, side.vectors.dtype) for side in (query, item))
    return total, (d_query, d_item, d_scale, d_bias, d_rows, losses, of_query, of_item)


def _weighted_backward(row_loss: RowLoss, totals: bool, blocks: int, residuals: Any, cotangent: Any) -> Any:
    d_query, d_item, d_scale, d_bias, d_rows, losses, of_query, of_item = residuals
    none = Side(None, None, None, None)
    if isinstance(cotangent, SymbolicZero):
        return none, none, None, None, None

    def times(gradient: Any, dtype: Any) -> Any:
        return None if gradient is None else (cotangent * gradient).astype(dtype)

    dtype = losses.dtype
    return (
        none._replace(vectors=times(d_query, of_query.dtype)),
        none._replace(vectors=times(d_item, of_item.dtype), bias=times(d_bias, dtype)),
        times(d_scale, dtype),
        jax.tree.map(lambda x: times(x, x.dtype), d_rows),
        times(losses, dtype),
    )


_weighted.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _without_bias(query: Side) -> Side:
    return query._replace(bias=None)


def _logits(query: Side, item: Side, scale: Any) -> Any:
    """One block [b, N] of logits, -inf where a candidate does not count for a query."""
    left_out = any_equal(query.numbers, item.numbers)
    if query.ids is not None and item.ids is not None:
        left_out |= any_equal(query.ids, item.ids)
    if query.left_out is not None:
        left_out |= left_out_pairs(query, item)
    return jnp.where(left_out, -jnp.inf, similarities(query, item, scale) + item.bias)


def _block_statistics(logits: Any, totals: bool) -> tuple[Statistics, Any]:
    """Logits [b, N] of all candidates -> (Statistics [b], exp(logits - maximum) [b, N])."""
    shift = finite(logits.max(1))
    exps = jnp.exp(logits - shift[:, None])
    return Statistics(shift + jnp.log(exps.sum(1)), *(_totals(logits) if totals else (None, None))), exps


def _totals(logits: Any) -> tuple[Any, Any]:
    counts = logits > -jnp.inf
    zero = jnp.zeros((), logits.dtype)
    both = lambda a, b: (a[0] + b[0], a[1] + b[1])
    # One pass for the two; a sum of booleans alone takes as long as two passes.
    return jax.lax.reduce((jnp.where(counts, logits, zero), counts.astype(logits.dtype)), (zero, zero), both, (1,))


def _matmul(equation: str, d_logits: Any, vectors: Any) -> Any:
    """Product with float32 sums; low-precision vectors meet d_logits in their own precision, as matmul units want it."""
    return jnp.einsum(equation, d_logits.astype(vectors.dtype), vectors, preferred_element_type=d_logits.dtype)


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
