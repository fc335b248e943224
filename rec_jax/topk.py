"""Exact top-k and exact ranks over a catalogue that is read in blocks of items, on one device or sharded over a mesh axis.

One fold serves both: a block of items is scored by one matmul, and what is kept of it is a running top-k, the targets' own scores, or
counts. Ties are decided once, here: in a top-k the lower id comes first; in a rank a tie never favours the target.

Exactness. A target's score is read out of the same matmul that scores its rivals, so identical items tie exactly. Blocks are
multiples of 128 items and queries are padded to a multiple of 8: for such shapes the CPU's matmul gives the same bits whatever the
block size, the number of queries or the number of devices (tests/topk_test.py). On GPU and TPU the order of summation may depend on
the shape, so there results are reproducible for one block size and device count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rec_jax.types import Array, RecJaxError

LANE = 128  # a block of items is a multiple of this
ROWS = 8  # and the queries of this
GROUP = 16  # neighbouring items that a top-k takes or leaves together before it sorts
BLOCK = 16384

Axis = str | tuple[str, ...]


class Ranked(NamedTuple):
    """What one pass over the catalogue gives; a part that was not asked for is None.

    Attributes:
      ranks: [Q, Tg] int32, 1-based rank of each target among the items that are not excluded; 0 where there is no target.
      ranks_all: [Q, Tg] int32, the same among all items.
      scores: [Q, k] float32, highest scores among the items that are not excluded; -inf where there are fewer than k.
      ids: [Q, k] int32, their items; -1 where there are fewer than k.
    """

    ranks: Any
    ranks_all: Any
    scores: Any
    ids: Any


def top_k(
    query: Array,
    item: Array,
    *,
    k: int,
    block: int = BLOCK,
    exclude: Array | None = None,
    bias: Array | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> tuple[jax.Array, jax.Array]:
    """query [Q, D], item [N, D] -> scores [Q, k] float32, ids [Q, k] int32: the k items of highest dot product, best first, exactly.

    Ties go to the lower id. Memory beyond the inputs is one block of scores, Q x block x 4 bytes a device. May be called inside `jit`.

    Args:
      k: how many items; where fewer are left, ids are -1 and scores -inf.
      block: items scored at a time; rounded up to a multiple of 128.
      exclude: [Q, E] int32, items left out of each row; -1 is padding.
      bias: [N], added to every query's score; -inf takes an item out of the catalogue.
      mesh: with `axis`, items are sharded by rows over that mesh axis (or axes); each device keeps its own top k, which are then merged.
        N that the devices do not divide is padded, which copies the items: pad once, with bias -inf, where it matters.

    Raises:
      RecJaxError: shapes that do not fit; a NaN score (inside `jit` it cannot be raised and shows as a leading NaN).
    """
    _check(query, item, bias, block, mesh, axis)
    _check_ids("exclude", exclude, query.shape[0], None)
    if k < 1:
        raise RecJaxError(f"top_k: k={k}; it must be at least 1")
    out, _ = _ranked(query, item, bias, None, exclude, k=k, block=block, mesh=mesh, axis=axis)
    if not isinstance(out.scores, jax.core.Tracer):
        _refuse_nan(np.asarray(jnp.isnan(out.scores[:, 0])))
    return out.scores, out.ids


def target_ranks(
    query: Array,
    item: Array,
    target: np.ndarray,
    *,
    exclude: Array | None = None,
    block: int = BLOCK,
    bias: Array | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> np.ndarray:
    """query [Q, D], item [N, D], target [Q, Tg] -> [Q, Tg] int32: 1-based rank of each target among all items that are not excluded.

    rank = 1 + the other items, neither targets nor excluded, that score at least as high + the row's other targets that score higher, or
    equal and stand earlier in the row. So ties never count for the target, and the targets of a row have different ranks.
    A target is ranked even where `exclude` names it. Where N is above `block`, items are scored twice (targets first, then rivals).

    Args:
      target: [Q, Tg] int32, each item at most once in a row; -1 is padding and gets rank 0.
      exclude, block, bias, mesh, axis: as in `top_k`.

    Raises:
      RecJaxError: shapes that do not fit, an unknown or repeated target, a NaN score.
    """
    return rank_and_top_k(query, item, target, k=0, exclude=exclude, block=block, bias=bias, mesh=mesh, axis=axis).ranks


def rank_and_top_k(
    query: Array,
    item: Array,
    target: np.ndarray,
    *,
    k: int,
    exclude: Array | None = None,
    block: int = BLOCK,
    bias: Array | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> Ranked:
    """query [Q, D], item [N, D], target [Q, Tg] -> Ranked: ranks with and without `exclude`, and the top k (none for k = 0), in one go.

    The row's targets stay in its top k even where `exclude` names them. Args and Raises as in `target_ranks`.
    """
    _check(query, item, bias, block, mesh, axis)
    _check_targets(target, query.shape[0], item.shape[0])
    _check_ids("exclude", exclude, query.shape[0], None)
    out, nan = _ranked(query, item, bias, target, exclude, k=k, block=block, mesh=mesh, axis=axis)
    _refuse_nan(np.asarray(nan))
    return Ranked(*(x if x is None else np.asarray(x) for x in out))


def rank_and_top_k_of_scores(scores: np.ndarray, target: np.ndarray, *, k: int, exclude: Array | None = None) -> Ranked:
    """scores [Q, N] float32, target [Q, Tg] -> Ranked: as `rank_and_top_k`, of scores that are there already.

    Raises:
      RecJaxError: scores of another type (rounding them here could make ties), an unknown or repeated target, a NaN score.
    """
    if scores.ndim != 2 or scores.dtype != np.float32:
        raise RecJaxError(f"scores: expected [Q, N] float32, got {scores.shape} {scores.dtype}; use scores.astype(np.float32)")
    _check_targets(target, *scores.shape)
    _check_ids("exclude", exclude, scores.shape[0], None)
    out, nan = _ranked_dense(scores, target, exclude, k=k)
    _refuse_nan(np.asarray(nan))
    return Ranked(*(x if x is None else np.asarray(x) for x in out))


def ranks_from_scores(scores: np.ndarray, target: np.ndarray, exclude: Array | None = None) -> np.ndarray:
    """scores [Q, N] float32, target [Q, Tg] -> [Q, Tg] int32: `target_ranks` of scores that are there already."""
    return rank_and_top_k_of_scores(scores, target, k=0, exclude=exclude).ranks


@functools.partial(jax.jit, static_argnames=("k", "block", "mesh", "axis"))
def _ranked(
    query: jax.Array,
    item: jax.Array,
    bias: jax.Array | None,
    target: jax.Array | None,
    exclude: jax.Array | None,
    *,
    k: int,
    block: int,
    mesh: Mesh | None,
    axis: Axis | None,
) -> tuple[Ranked, Any]:
    """-> (Ranked, nan [Q] bool: rows that have a NaN score)."""
    q, n = query.shape[0], item.shape[0]
    query = _pad(query, -q % ROWS, 0)
    target = None if target is None else _pad(target, -q % ROWS, -1)
    exclude = None if exclude is None else _pad(exclude, -q % ROWS, -1)
    fold = functools.partial(_fold_catalogue, k=k, block=block, total=n, axis=axis)
    if mesh is not None:
        shards = int(np.prod([mesh.shape[a] for a in _names(axis)]))
        item = _pad(item, -n % shards, 0)
        bias = None if bias is None else _pad(bias, -n % shards, 0)
        rows, all_rows = PartitionSpec(axis), PartitionSpec()
        # the results are equal on every device (merged by all_gather and psum), which shard_map cannot prove
        fold = jax.shard_map(fold, mesh=mesh, in_specs=(all_rows, rows, rows, all_rows, all_rows), out_specs=all_rows, check_vma=False)
    return jax.tree.map(lambda x: x[:q], fold(query, item, bias, target, exclude))


@functools.partial(jax.jit, static_argnames=("k",))
def _ranked_dense(scores: jax.Array, target: jax.Array, exclude: jax.Array | None, *, k: int) -> tuple[Ranked, Any]:
    n = scores.shape[1]
    return _fold(lambda _: _Block(_canonical(scores), jnp.int32(0), jnp.ones(n, bool)), 1, target, exclude, k=k, first=0, axis=None)


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
        scores = lax.dot_general(query, rows, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        if bias is not None:
            scores += lax.dynamic_slice_in_dim(bias, start, block).astype(jnp.float32)
        ids = start + jnp.arange(block)
        return _Block(_canonical(scores), start, (ids >= index * block) & (ids < owned))

    return _fold(score, blocks, target, exclude, k=k, first=first, axis=axis)


def _fold(
    score: Callable[[jax.Array], _Block],
    blocks: int,
    target: jax.Array | None,
    exclude: jax.Array | None,
    *,
    k: int,
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
    if exclude is not None and target is not None:
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
        every_top, every_id = (lax.all_gather(x, axis, axis=1, tiled=True) for x in top)  # by device, hence by id
        best, places = lax.top_k(every_top, k)
        top = best, jnp.take_along_axis(every_id, places, axis=1)
    scores, ids = (None, None) if top is None else (top[0], jnp.where(top[0] == -jnp.inf, -1, top[1]))
    if target is None or targets is None:
        return Ranked(None, None, scores, ids), nan
    if axis is not None:
        own = lax.psum(own, axis)  # zero on every device but the target's
        nan = lax.pmax(nan.astype(jnp.int32), axis) > 0

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
    return Ranked(ranks_all if kept is None else jnp.where(real, 1 + kept + ahead, 0), ranks_all, scores, ids), nan


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


def _names(axis: Axis | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def _check(query: Array, item: Array, bias: Array | None, block: int, mesh: Mesh | None, axis: Axis | None) -> None:
    if query.ndim != 2 or item.ndim != 2 or query.shape[1] != item.shape[1] or item.shape[0] == 0:
        raise RecJaxError(f"query {query.shape}, item {item.shape}: expected [Q, D] and [N, D] of one width, with N > 0")
    if query.dtype != item.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise RecJaxError(f"query is {query.dtype}, item is {item.dtype}: expected one floating type; cast one of them")
    if bias is not None and bias.shape != (item.shape[0],):
        raise RecJaxError(f"bias {bias.shape}: expected [N] = {(item.shape[0],)}")
    if block < 1:
        raise RecJaxError(f"block={block}: it must be at least 1")
    if (mesh is None) != (axis is None):
        raise RecJaxError(f"mesh={mesh}, axis={axis!r}: give both or neither")
    for name in _names(axis):
        if mesh is not None and name not in mesh.shape:
            raise RecJaxError(f"axis {name!r} is not in the mesh; it has: {', '.join(mesh.shape)}")


def _check_ids(name: str, ids: Array | None, rows: int, items: int | None) -> None:
    if ids is None:
        return
    if ids.ndim != 2 or ids.shape[0] != rows or not np.issubdtype(ids.dtype, np.integer):
        raise RecJaxError(f"{name}: expected integers [{rows}, any], got {ids.shape} {ids.dtype}")
    if items is not None and ids.size and int(np.max(ids)) >= items:
        row = int(np.argmax(np.max(ids, axis=1)))
        raise RecJaxError(f"{name}[{row}] names item {int(np.max(ids))}, but there are {items} items")


def _check_targets(target: np.ndarray, rows: int, items: int) -> None:
    _check_ids("target", target, rows, items)
    in_order = np.sort(np.asarray(target), axis=1)
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(1)
    if twice.any():
        raise RecJaxError(
            f"target[{int(np.argmax(twice))}] = {target[int(np.argmax(twice))].tolist()} names an item twice; keep one of each"
        )


def _refuse_nan(nan: np.ndarray) -> None:
    if nan.any():
        raise RecJaxError(
            f"row {int(np.argmax(nan))} of {len(nan)} has a NaN score ({int(nan.sum())} rows have); look for NaN in the vectors"
        )
