"""KL between a teacher's and a student's softmax over all candidates, on the streaming fold: the whole catalogue fits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.losses.blockwise import check_axis, even_block, fold, join, split
from rec_jax.losses.checks import check_block, check_shape, check_vectors
from rec_jax.losses.distill import kl_of_logits
from rec_jax.losses.forward_gradients import MIN_BLOCK, block_elements
from rec_jax.losses.ranking import check_positive
from rec_jax.losses.tiles import NO_POSITIVE, QUERIES, LogSumExp, Side, TeacherMean, tiles
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError


def kl_over_candidates(
    query: Array,
    item: Array,
    teacher_query: Array,
    teacher_item: Array,
    *,
    temperature: Any = 1.0,
    student_scale: Any = 1.0,
    teacher_scale: Any = 1.0,
    student_bias: Array | None = None,
    teacher_bias: Array | None = None,
    query_mask: Array | None = None,
    item_mask: Array | None = None,
    excluded_ids: Array | None = None,
    item_ids: Array | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """query [B, D], item [N, D], teacher_query [B, E], teacher_item [N, E] -> loss [B]: temperature^2 KL(teacher || student).

    Both are a softmax over the N candidates: of (student_scale * query . item + student_bias) / temperature, and the teacher's alike. No
    [B, N] array exists: N may be the whole catalogue. Differentiable in query, item, student_scale and student_bias. The factor
    temperature^2 keeps the gradient's size when the temperature changes, for it shrinks by 1 / temperature^2.

    A sum of weighted losses is faster with `weighted_kl_over_candidates`.

    Args:
      query, item: vectors of the student, float.
      teacher_query, teacher_item: those of the teacher, of any width of their own.
      temperature: divides both's logits, > 0; above 1 it shows more of what the teacher thinks of unlikely candidates.
      student_scale, teacher_scale: scalars, e.g. 1 / the temperature that each was trained at; the student's may be traced and learned.
      student_bias, teacher_bias: [N] added to the logits of a candidate, finite.
      query_mask: [B] bool, False for padding: loss and gradients are 0.
      item_mask: [N] bool, False for padding or a duplicate: out of both softmaxes.
      excluded_ids: [B, K] int32, candidates of these ids are out of both softmaxes of the query, such as its history; -1 for none.
      item_ids: [N] int32 >= 0, with excluded_ids.
      block: candidates per block; None chooses.
      mesh: with `axis`, queries and candidates are sharded by rows over that mesh axis (or axes); the smaller side goes round.
      axis: a name or several.

    A query without candidates has loss 0.

    Raises:
      RecJaxError: shapes that do not fit, temperature <= 0, block < 1, an axis that is not in the mesh, rows that its devices do not
        divide.

    Reference: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (the factor) and 2.1.
    """
    check_block(block)
    sides = _sides(
        query,
        item,
        teacher_query,
        teacher_item,
        student_bias,
        teacher_bias,
        query_mask,
        item_mask,
        excluded_ids,
        item_ids,
        temperature,
        student_scale,
        teacher_scale,
    )
    queries, items, scale, taught_scale = sides
    check_axis(mesh, axis, queries=queries.vectors.shape[0], candidates=items.vectors.shape[0])
    travelling = "query" if queries.vectors.shape[0] < items.vectors.shape[0] else "item"
    (total, teacher), _ = fold(
        queries,
        items,
        scale,
        of_query=(LogSumExp("all"), TeacherMean("all")),
        teacher_scale=taught_scale,
        travelling=travelling,
        block=block,
        mesh=mesh,
        axis=axis,
    )
    there = (queries.bias > -jnp.inf) & (total > -jnp.inf)
    total = jnp.where(there, total, 0)
    teacher_part = jnp.where(there, teacher.teacher_mean - teacher.teacher_log_sum_exp, 0)
    kl = teacher_part + (total - teacher.student_mean)
    return jnp.where(there, jnp.square(jnp.asarray(temperature, kl.dtype)) * kl, 0)


def weighted_kl_over_candidates(
    query: Array,
    item: Array,
    teacher_query: Array,
    teacher_item: Array,
    *,
    weights: Array,
    temperature: Any = 1.0,
    student_scale: Any = 1.0,
    teacher_scale: Any = 1.0,
    student_bias: Array | None = None,
    teacher_bias: Array | None = None,
    item_mask: Array | None = None,
    excluded_ids: Array | None = None,
    item_ids: Array | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """As `kl_over_candidates`, with weights [B] -> sum_i weights_i * loss_i, a scalar: the fast form.

    On one device the gradients are made in the forward pass, block of queries by block against all candidates: 6 B N D + 2 B N E FLOP and
    O(block * N) memory, against 8 B N D + 4 B N E of the other form. On a mesh it is the other form's sum.

    Args:
      weights: [B] float; for a mean over the real places: mask / mask.sum(). 0 adds exactly nothing, whatever the vectors hold.
      block: queries per block on one device, candidates per block on a mesh; None chooses.
      others: as in `kl_over_candidates`.

    Raises:
      RecJaxError: as in `kl_over_candidates`.
    """
    check_block(block)
    check_vectors(query, item)
    check_shape("weights", weights, np.shape(query)[:1], "one weight per query")
    weights = jnp.asarray(weights)
    if mesh is not None or axis is not None:
        losses = kl_over_candidates(
            query,
            item,
            teacher_query,
            teacher_item,
            temperature=temperature,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            query_mask=weights != 0,
            item_mask=item_mask,
            excluded_ids=excluded_ids,
            item_ids=item_ids,
            block=block,
            mesh=mesh,
            axis=axis,
        )
        return jnp.sum(weights * losses)
    queries, items, scale, taught_scale = _sides(
        query,
        item,
        teacher_query,
        teacher_item,
        student_bias,
        teacher_bias,
        weights != 0,
        item_mask,
        excluded_ids,
        item_ids,
        temperature,
        student_scale,
        teacher_scale,
    )
    b, n = queries.vectors.shape[0], items.vectors.shape[0]
    # With the teacher's logits a block holds as many as one of `forward_gradients`.
    rows = even_block(b, block or max(MIN_BLOCK, block_elements() // 2 // n))
    weights = jnp.square(jnp.asarray(temperature, scale.dtype)) * weights.astype(scale.dtype)
    items = items._replace(row=jnp.arange(n, dtype=jnp.int32))
    return _weighted(rows, student_bias is not None, queries, items, scale, taught_scale, weights)


def _sides(
    query: Array,
    item: Array,
    teacher_query: Array,
    teacher_item: Array,
    student_bias: Array | None,
    teacher_bias: Array | None,
    query_mask: Array | None,
    item_mask: Array | None,
    excluded_ids: Array | None,
    item_ids: Array | None,
    temperature: Any,
    student_scale: Any,
    teacher_scale: Any,
) -> tuple[Side, Side, jax.Array, jax.Array]:
    """Checks -> queries, candidates, the scales of student and teacher. Padding becomes zeros; the teacher's bias goes into its vectors."""
    check_positive("temperature", temperature)
    check_vectors(query, item)
    check_vectors(teacher_query, teacher_item)
    b, n = np.shape(query)[0], np.shape(item)[0]
    if (np.shape(teacher_query)[0], np.shape(teacher_item)[0]) != (b, n):
        raise RecJaxError(
            f"teacher_query has {np.shape(teacher_query)[0]} rows and teacher_item {np.shape(teacher_item)[0]}; expected {b} and {n}, "
            "those of the student's query and item"
        )
    for name, value, shape, what in (
        ("student_scale", student_scale, (), "a scalar"),
        ("teacher_scale", teacher_scale, (), "a scalar"),
        ("student_bias", student_bias, (n,), "one per candidate"),
        ("teacher_bias", teacher_bias, (n,), "one per candidate"),
        ("query_mask", query_mask, (b,), "one per query"),
        ("item_mask", item_mask, (n,), "one per candidate"),
        ("item_ids", item_ids, (n,), "one id per candidate"),
    ):
        if value is not None:
            check_shape(name, value, shape, what)
    if (excluded_ids is None) != (item_ids is None):
        raise RecJaxError("one of excluded_ids and item_ids is given: candidates are excluded by comparing both; pass both or neither")
    if excluded_ids is not None and (np.ndim(excluded_ids) != 2 or np.shape(excluded_ids)[0] != b or not np.shape(excluded_ids)[1]):
        raise RecJaxError(f"excluded_ids has shape {np.shape(excluded_ids)}; expected ({b}, K) with K >= 1, ids per query")

    query, item = jnp.asarray(query), jnp.asarray(item)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(query, item))
    teacher_query, teacher_item = (jax.lax.stop_gradient(jnp.asarray(x)) for x in (teacher_query, teacher_item))
    scale = jnp.asarray(student_scale, dtype) / temperature
    taught_scale = jax.lax.stop_gradient(jnp.asarray(teacher_scale, dtype)) / temperature
    query_bias, item_bias = jnp.zeros(b, dtype), jnp.zeros(n, dtype)
    if student_bias is not None:
        item_bias = jnp.asarray(student_bias, dtype) / temperature
    if query_mask is not None:
        query, teacher_query = (jnp.where(jnp.asarray(query_mask)[:, None], x, 0) for x in (query, teacher_query))
        query_bias = jnp.where(query_mask, query_bias, -jnp.inf)
    if item_mask is not None:
        item, teacher_item = (jnp.where(jnp.asarray(item_mask)[:, None], x, 0) for x in (item, teacher_item))
        item_bias = jnp.where(item_mask, item_bias, -jnp.inf)
    if teacher_bias is not None:
        # One more column: of a query 1, of an item its bias.
        bias = jax.lax.stop_gradient(jnp.asarray(teacher_bias, dtype)) / temperature
        bias = bias if item_mask is None else jnp.where(item_mask, bias, 0)
        teacher_query = jnp.concatenate([taught_scale * teacher_query.astype(dtype), jnp.ones((b, 1), dtype)], 1)
        taught_scale = jnp.ones((), dtype)
        teacher_item = jnp.concatenate([teacher_item.astype(dtype), bias[:, None]], 1)
    numbers = jnp.full((b, 1), NO_POSITIVE, jnp.int32), jnp.arange(n, dtype=jnp.int32)[:, None]
    ids = (None, None) if excluded_ids is None else (jnp.asarray(excluded_ids), jnp.asarray(item_ids)[:, None])
    return (
        Side(query, numbers[0], ids[0], query_bias, teacher=teacher_query),
        Side(item, numbers[1], ids[1], item_bias, teacher=teacher_item),
        scale,
        taught_scale,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(rows: int, with_bias: bool, query: Side, item: Side, scale: Any, taught_scale: Any, weights: Any) -> Any:
    def step(total: Any, part: Any) -> Any:
        query, weights = part
        kl, _ = _block_kl(query, item, scale, taught_scale)
        return total + jnp.sum(weights * kl), None

    return jax.lax.scan(step, jnp.zeros((), weights.dtype), split((query, weights), rows))[0]


def _weighted_forward(rows: int, with_bias: bool, query: Side, item: Side, scale: Any, taught_scale: Any, weights: Any) -> tuple[Any, Any]:
    def step(carry: Any, part: Any) -> Any:
        total, d_item, d_bias = carry
        query, weights = part
        kl, d_logits = _block_kl(query, item, scale, taught_scale)
        low = d_logits.astype(item.vectors.dtype)
        # Factors go to the narrow side of a matmul, not to [b, N].
        d_query = weights[:, None] * jnp.einsum("bn,nd->bd", low, item.vectors, preferred_element_type=scale.dtype)
        weighted = ((scale * weights)[:, None] * query.vectors).astype(query.vectors.dtype)
        d_item = d_item + jnp.einsum("bn,bd->nd", low, weighted, preferred_element_type=scale.dtype)
        if with_bias:
            d_bias = d_bias + jnp.einsum("bn,b->n", d_logits, weights)
        return (total + jnp.sum(weights * kl), d_item, d_bias), (d_query, kl)

    start = jnp.zeros((), weights.dtype), jnp.zeros(item.vectors.shape, scale.dtype), jnp.zeros_like(item.bias) if with_bias else None
    (total, d_item, d_bias), by_part = jax.lax.scan(step, start, split((query, weights), rows))
    d_query, losses = join(by_part, query.vectors.shape[0])
    d_scale = jnp.sum(d_query * query.vectors)
    # Empty arrays carry the dtypes of both sides to the backward pass.
    dtypes = jnp.zeros(0, query.vectors.dtype), jnp.zeros(0, item.vectors.dtype)
    return total, (scale * d_query, d_item, d_bias, d_scale, losses, *dtypes)


def _weighted_backward(rows: int, with_bias: bool, residuals: Any, cotangent: Any) -> Any:
    d_query, d_item, d_bias, d_scale, losses, of_query, of_item = residuals
    none = Side(None, None, None, None)
    return (
        none._replace(vectors=(cotangent * d_query).astype(of_query.dtype)),
        none._replace(vectors=(cotangent * d_item).astype(of_item.dtype), bias=None if d_bias is None else cotangent * d_bias),
        cotangent * d_scale,
        None,
        cotangent * losses,
    )


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _block_kl(query: Side, item: Side, scale: Any, taught_scale: Any) -> tuple[jax.Array, jax.Array]:
    (tile,) = tiles(query, item, scale, taught_scale, axes=(QUERIES,))
    return kl_of_logits(tile.logits, tile.teacher, tile.pairs("all"))
