"""The fold over blocks of items, compiled: scores of a block by one matmul, and what is kept of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rec_jax.mesh import Axis, devices_along

LANE = 128  # a block of items is a multiple of this
ROWS = 8  # and the queries of this
GROUP = 16  # neighbouring items that a top-k takes or leaves together before it sorts
BLOCK = 16384


class Ranked(NamedTuple):
    """What one pass over the catalogue gives; a part that was not asked for is None.

    Attributes:
      ranks: [Q, Tg] int32, 1-based rank of each target among the items that are not excluded; 0 where there is no target.
      ranks_all: [Q, Tg] int32, the same among all items.
      scores: [Q, k] float32, highest scores among the items that are not excluded; -inf where there are fewer than k.
      ids: [Q, k] int32, their items; -1 where there are fewer than k.
      own: [Q, Tg] float32, the targets' own scores; 0 where there is no target.
    """

    ranks: Any
    ranks_all: Any
    scores: Any
    ids: Any
    own: Any


@functools.partial(jax.jit, static_argnames=("k", "counts", "block", "mesh", "axis"))
def ranked(
    query: jax.Array,
    item: jax.Array,
    bias: jax.Array | None,
    target: jax.Array | None,
    exclude: jax.Array | None,
    *,
    k: int,
    counts: bool,
    block: int,
    mesh: Mesh | None,
    axis: Axis | None,
) -> tuple[Ranked, Any]:
    """-> (Ranked, nan [Q] bool: rows that have a NaN score); without `counts` no ranks, and `exclude` holds for targets too."""
    q, n = query.shape[0], item.shape[0]
    query = _pad(query, -q % ROWS, 0)
    target = None if target is None else _pad(target, -q % ROWS, -1)
    exclude = None if exclude is None else _pad(exclude, -q % ROWS, -1)
    fold = functools.partial(_fold_catalogue, k=k, counts=counts, block=block, total=n, axis=axis)
    if mesh is not None:
        shards = devices_along(mesh, axis)
        item = _pad(item, -n % shards, 0)
        bias = None if bias is None else _pad(bias, -n % shards, 0)
        rows, all_rows = PartitionSpec(axis), PartitionSpec()
        # the results are equal on every device (gathered, or summed), which shard_map cannot prove
        fold = jax.shard_map(fold, mesh=mesh, in_specs=(all_rows, rows, rows, all_rows, all_rows), out_specs=all_rows, check_vma=False)
    return jax.tree.map(lambda x: x[:q], fold(query, item, bias, target, exclude))


@functools.partial(jax.jit, static_argnames=("k",))
def ranked_dense(scores: jax.Array, target: jax.Array, exclude: jax.Array | None, *, k: int) -> tuple[Ranked, Any]:
    """What `ranked` gives, of scores [Q, N] that are there already."""
    n = scores.shape[1]
    only = _Block(_canonical(scores), jnp.int32(0), jnp.ones(n, bool))
    return _fold(lambda _: only, 1, target, exclude, k=k, counts=True, first=0, axis=None)


class _Block(NamedTuple):
    """Scores [Q, block] of the local items from `start` on; live [block] is False for those scored in an earlier block and for padding."""

    scores: jax.Array
    start: jax.Array
    live: jax.Array

    def places(self, ids: jax.Array) -> jax.Array:
        """Local ids [Q, E] -> their columns in this block, or its width (out of range) where they are not in it."""
        width = self.live.shape[0]
        column = ids - self.start
        inside = (column >= 0) & (column < width)
        inside &= self.live[jnp.clip(column, 0, width - 1)]
        return jnp.where(inside, column, width)


def _fold_catalogue(
    query: jax.Array,
    item: jax.Array,
    bias: jax.Array | None,
    target: jax.Array | None,
    exclude: jax.Array | None,
    *,
    k: int,
    counts: bool,
    block: int,
    total: int,
    axis: Axis | None,
) -> tuple[Ranked, jax.Array]:
    """One device's share: `item` holds the catalogue's rows from axis_index * len(item) on."""
    first = 0 if axis is None else lax.axis_index(axis) * item.shape[0]
    owned = jnp.minimum(item.shape[0], total - first)  # the rest is padding
    block = -(-block // LANE) * LANE
    if item.shape[0] <= block:
        padding = -item.shape[0] % LANE
        item, bias = _pad(item, padding, 0), None if bias is None else _pad(bias, padding, 0)
        block = item.shape[0]
    blocks = -(-item.shape[0] // block)
    precision = lax.Precision.HIGHEST if item.dtype == jnp.float32 else lax.Precision.DEFAULT

    def score(index: jax.Array) -> _Block:
        # the last block reaches back into the one before rather than have the whole catalogue copied to pad it
        start = jnp.minimum(index * block, item.shape[0] - block)
        rows = lax.dynamic_slice_in_dim(item, start, block)
        dot = lambda q: lax.dot_general(q, rows, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        # Of several vectors of a query each has the matmul that it would have alone: twins tie exactly in the maximum too.
        scores = dot(query) if query.ndim == 2 else functools.reduce(jnp.maximum, (dot(query[:, n]) for n in range(query.shape[1])))
        if bias is not None:
            scores += lax.dynamic_slice_in_dim(bias, start, block).astype(jnp.float32)
        ids = start + jnp.arange(block)
        return _Block(_canonical(scores), start, (ids >= index * block) & (ids < owned))

    return _fold(score, blocks, target, exclude, k=k, counts=counts, first=first, axis=axis)


def _fold(
    score: Callable[[jax.Array], _Block],
    blocks: int,
    target: jax.Array | None,
    exclude: jax.Array | None,
    *,
    k: int,
    counts: bool,
    first: jax.Array | int,
    axis: Axis | None,
) -> tuple[Ranked, jax.Array]:
    """Folds over the blocks: once for the top k and the targets' scores, once more for the counts; a single block is scored once."""
    only = score(jnp.int32(0)) if blocks == 1 else None

    def fold(step: Callable[[Any, _Block], Any], carry: Any) -> Any:
        if only is not None:
            return step(carry, only)
        return lax.scan(lambda c, i: (step(c, score(i)), None), carry, jnp.arange(blocks))[0]

    rows = jax.eval_shape(score, jnp.int32(0)).scores.shape[0]
    if exclude is not None and target is not None and counts:
        exclude = jnp.where((exclude[:, :, None] == target[:, None, :]).any(-1), -1, exclude)
    left_out = None if exclude is None else _local(exclude, first)
    targets = None if target is None else _local(target, first)

    def look(carry: tuple[Any, Any, Any], part: _Block) -> tuple[Any, Any, Any]:
        top, own, nan = carry
        if k:
            found, columns = _shortlist(_candidates(part, left_out), top[0][:, -1:], k)
            # the running top k goes in front: ties keep the lower id, and the CPU's heap starts full, so that few enter it
            best, places = lax.top_k(jnp.concatenate([top[0], found], axis=1), k)
            before = jnp.take_along_axis(top[1], jnp.minimum(places, k - 1), axis=1)
            column = jnp.take_along_axis(columns, jnp.maximum(places - k, 0), axis=1)
            top = best, jnp.where(places < k, before, first + part.start + column)
        if targets is not None:
            places = part.places(targets)
            here = jnp.take_along_axis(part.scores, jnp.minimum(places, part.scores.shape[1] - 1), axis=1)
            own = jnp.where(places < part.scores.shape[1], here, own)
            nan |= (jnp.isnan(part.scores) & part.live).any(-1)
        return top, own, nan

    empty = (jnp.full((rows, k), -jnp.inf), jnp.full((rows, k), -1)) if k else None
    own = None if target is None else jnp.zeros(target.shape, jnp.float32)
    top, own, nan = fold(look, (empty, own, jnp.zeros(rows, bool)))
    if axis is not None and k:
        top = _merged(top, k, axis)
    scores, ids = (None, None) if top is None else (top[0], jnp.where(top[0] == -jnp.inf, -1, top[1]))
    if target is None or targets is None:
        return Ranked(None, None, scores, ids, None), nan
    if axis is not None:
        own = lax.psum(own, axis)  # zero on every device but the target's
        nan = lax.pmax(nan.astype(jnp.int32), axis) > 0
    if not counts:
        return Ranked(None, None, scores, ids, own), nan

    def count(carry: tuple[Any, Any], part: _Block) -> tuple[Any, Any]:
        every, kept = carry
        # NaN is at least as high as nothing, so what must not count becomes NaN
        rivals = _put(jnp.where(part.live, part.scores, jnp.nan), part.places(targets), jnp.nan)
        every += _at_least(rivals, own)
        if left_out is not None:
            kept += _at_least(_put(rivals, part.places(left_out), jnp.nan), own)
        return every, kept

    zero = jnp.zeros(target.shape, jnp.int32)
    every, kept = fold(count, (zero, None if left_out is None else zero))
    if axis is not None:
        every, kept = lax.psum((every, kept), axis)
    real = target >= 0
    earlier = jnp.arange(target.shape[1])[None, :] < jnp.arange(target.shape[1])[:, None]
    ahead = (own[:, None, :] > own[:, :, None]) | ((own[:, None, :] == own[:, :, None]) & earlier)
    ahead = (ahead & real[:, None, :]).sum(-1, dtype=jnp.int32)
    ranks_all = jnp.where(real, 1 + every + ahead, 0)
    ranks = ranks_all if kept is None else jnp.where(real, 1 + kept + ahead, 0)
    return Ranked(ranks, ranks_all, scores, ids, own), nan


def _merged(top: tuple[jax.Array, jax.Array], k: int, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Each device's best scores and ids [Q, k] of all rows -> the best k of all devices, on every device.

    A device merges its share of the rows and hands them round: it receives 2 Q k pairs, where gathering before merging brings P Q k.
    """
    rows, devices = top[0].shape[0], lax.axis_size(axis)
    shares = (_pad(x, -rows % devices, 0) for x in top)
    # [Q, k] -> [Q / P, P k], by device, hence by id: ties keep the lower one
    scores, ids = (lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True) for x in shares)
    best, places = lax.top_k(scores, k)
    merged = best, jnp.take_along_axis(ids, places, axis=1)
    best, ids = (lax.all_gather(x, axis, axis=0, tiled=True)[:rows] for x in merged)
    return best, ids


def _canonical(scores: jax.Array) -> jax.Array:
    """One zero and one NaN: `lax.top_k` sorts -0 below 0 and a negative NaN below everything."""
    return jnp.where(jnp.isnan(scores), jnp.nan, jnp.where(scores == 0, 0.0, scores))


def _local(ids: jax.Array, first: jax.Array | int) -> jax.Array:
    """Catalogue ids -> ids in this device's rows; negative where they are padding or of an earlier device."""
    return jnp.where(ids < 0, -1, ids - first)


def _put(scores: jax.Array, places: jax.Array, value: float) -> jax.Array:
    return scores.at[jnp.arange(scores.shape[0])[:, None], places].set(value, mode="drop")


def _candidates(part: _Block, left_out: jax.Array | None) -> jax.Array:
    """Scores [Q, block] with -inf for what is no candidate."""
    scores = jnp.where(part.live, part.scores, -jnp.inf)
    return scores if left_out is None else _put(scores, part.places(left_out), -jnp.inf)


def _shortlist(scores: jax.Array, threshold: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """scores [Q, block], threshold [Q, 1] -> scores and columns [Q, *], columns rising, that hold the row's best k above the threshold.

    Sorting is what a top-k costs beside its matmul, so whole groups of columns are sorted out first, by their maxima: the best k of a row
    lie in the k groups of highest maximum, of equal ones the first.
    """
    rows, block = scores.shape
    if block % GROUP or 2 * k * GROUP > block:
        return scores, jnp.broadcast_to(jnp.arange(block), scores.shape)
    groups = scores.reshape(rows, -1, GROUP)
    highest = jnp.where(jnp.isnan(groups), jnp.inf, groups).max(-1)  # a NaN must stay to be seen, and a compiled max may drop it
    _, chosen = lax.top_k(jnp.where(highest <= threshold, -jnp.inf, highest), k)
    chosen = jnp.sort(chosen, axis=1)
    columns = chosen[:, :, None] * GROUP + jnp.arange(GROUP)
    return jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(rows, -1), columns.reshape(rows, -1)


def _at_least(scores: jax.Array, own: jax.Array) -> jax.Array:
    """scores [Q, block], own [Q, Tg] -> [Q, Tg] int32: how many scores of the row are at least own, a target at a time."""
    return lax.map(lambda t: (scores >= t[:, None]).sum(-1, dtype=jnp.int32), own.T).T


def _pad(x: jax.Array, rows: int, value: float) -> jax.Array:
    return x if rows == 0 else jnp.pad(x, ((0, rows),) + ((0, 0),) * (x.ndim - 1), constant_values=value)
