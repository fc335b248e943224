"""The calls: exact top-k and exact ranks of vectors or of scores, with what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.mesh import Axis, devices_along
from rec_jax.topk.fold import BLOCK, Ranked, ranked, ranked_dense
from rec_jax.types import Array, RecJaxError


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

    A query of several vectors [Q, K, D], here and below, scores an item by the highest of its dot products.

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
    out, _ = ranked(query, item, bias, None, exclude, k=k, counts=False, block=block, mesh=mesh, axis=axis)
    if not isinstance(out.scores, jax.core.Tracer):
        _refuse_nan(np.asarray(jnp.isnan(out.scores[:, 0])))
    return out.scores, out.ids


def top_k_with_scores_of(
    query: Array,
    item: Array,
    named: np.ndarray,
    *,
    k: int,
    exclude: Array | None = None,
    block: int = BLOCK,
    bias: Array | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query [Q, D], item [N, D], named [Q, E] -> scores [Q, k], ids [Q, k] as `top_k` gives them, and the named items' scores [Q, E].

    In one pass, out of one matmul, so that a named item and its twin in the top k have the very same score.

    Args:
      named: int32 catalogue indices; -1 is padding and scores 0.
      k, exclude, block, bias, mesh, axis: as in `top_k`; a named item that `exclude` names too is left out of the top k.

    Raises:
      RecJaxError: shapes that do not fit, an unknown item, a NaN score.
    """
    _check(query, item, bias, block, mesh, axis)
    _check_ids("named", named, query.shape[0], item.shape[0])
    _check_ids("exclude", exclude, query.shape[0], None)
    if k < 1:
        raise RecJaxError(f"top_k_with_scores_of: k={k}; it must be at least 1")
    out, nan = ranked(query, item, bias, named, exclude, k=k, counts=False, block=block, mesh=mesh, axis=axis)
    _refuse_nan(np.asarray(nan))
    return np.asarray(out.scores), np.asarray(out.ids), np.asarray(out.own)


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
    out, nan = ranked(query, item, bias, target, exclude, k=k, counts=True, block=block, mesh=mesh, axis=axis)
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
    out, nan = ranked_dense(scores, target, exclude, k=k)
    _refuse_nan(np.asarray(nan))
    return Ranked(*(x if x is None else np.asarray(x) for x in out))


def ranks_from_scores(scores: np.ndarray, target: np.ndarray, exclude: Array | None = None) -> np.ndarray:
    """scores [Q, N] float32, target [Q, Tg] -> [Q, Tg] int32: `target_ranks` of scores that are there already."""
    return rank_and_top_k_of_scores(scores, target, k=0, exclude=exclude).ranks


def _check(query: Array, item: Array, bias: Array | None, block: int, mesh: Mesh | None, axis: Axis | None) -> None:
    several = query.ndim == 3 and query.shape[1] > 0
    if not (query.ndim == 2 or several) or item.ndim != 2 or query.shape[-1] != item.shape[1] or item.shape[0] == 0:
        raise RecJaxError(f"query {query.shape}, item {item.shape}: expected [Q, D] or [Q, K, D] and [N, D] of one width, with N > 0")
    if query.dtype != item.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise RecJaxError(f"query is {query.dtype}, item is {item.dtype}: expected one floating type; cast one of them")
    if bias is not None and bias.shape != (item.shape[0],):
        raise RecJaxError(f"bias {bias.shape}: expected [N] = {(item.shape[0],)}")
    if block < 1:
        raise RecJaxError(f"block={block}: it must be at least 1")
    devices_along(mesh, axis)


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
