"""Hard negatives: of each user the items that the model ranks high and that are none of the user's own, filtered against false ones.

`mine` is a pure function of vectors; `python -m rec_jax.eval.mine` runs it on a trained workdir and writes a file that training reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rec_jax import mesh as mesh_lib
from rec_jax import topk
from rec_jax.data.prepare import SPLITS, Prepared
from rec_jax.mesh import Axis
from rec_jax.types import Array, Ragged, RecJaxError

USERS_PER_BLOCK = 256


class Mined(NamedTuple):
    """What was found, and what each rule left out.

    Attributes:
      ids: [Q, K] int32 catalogue indices, highest score first; -1 where there are fewer than K.
      scores: [Q, K] float32; -inf where there is no item.
      positive: [Q] float32, the positives' own scores.
      known: [Q] int32, known items, the positive apart, that would stand among the ranks looked at.
      skipped: [Q] int32, items of the first `skip` ranks.
      too_close: [Q] int32, items of the other ranks looked at whose score `margin` or `max_share` forbids.
    """

    ids: np.ndarray
    scores: np.ndarray
    positive: np.ndarray
    known: np.ndarray
    skipped: np.ndarray
    too_close: np.ndarray


def mine(
    query: Array,
    item: Array,
    positive: np.ndarray,
    known: Ragged,
    *,
    k: int,
    skip: int = 0,
    window: int = 200,
    margin: float | None = 0.0,
    max_share: float | None = None,
    seed: int | None = None,
    block: int = topk.BLOCK,
    queries_per_block: int = USERS_PER_BLOCK,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> Mined:
    """query [Q, D], item [N, D], positive [Q], known [Q rows] -> Mined: K items a query that score high and are no likely positives.

    All items but the positive and the known ones are ranked by dot product, exactly, of equal scores the lower id first. Of ranks
    skip + 1 .. window stay those whose score is at most

        positive's score - margin   and   positive's score - (1 - max_share) x |positive's score|

    (the second is max_share x the positive's score, where that is above 0), and of these the K best, or K drawn by `seed`.
    The filters are compared in float32 on scores out of one matmul, so that a twin of the positive has exactly its score.
    The same on any number of devices and for any block size, where the matmul gives the same bits (see `topk`).

    Args:
      positive: int32 catalogue index of the item that each query should find.
      known: catalogue indices of each query that are never negatives; repeats, and the positive itself, do no harm.
      k: K.
      skip: the first ranks are left out: there false negatives are most likely.
      window: the last rank that is looked at.
      margin: in units of the score, at least 0; None = off.
      max_share: above 0, at most 1; None = off.
      seed: None = the K best of what is left; a number = a uniform draw out of it, the same for the same seed.
      block: items scored at a time.
      queries_per_block: queries taken at a time; memory on a device is its share of the items and queries_per_block x block x 4 bytes.
      mesh, axis: items are sharded by rows over that axis, as in `topk.top_k`.

    Raises:
      RecJaxError: settings that leave no rank, a negative margin, sizes that do not fit, an unknown item, a NaN score.

    Reference: Moreira et al. 2024, "NV-Retriever", TopK-MarginPos and TopK-PercPos; Xiong et al. 2020, "ANCE" (the model's own top).
    """
    _check_rules(k=k, skip=skip, window=window, margin=margin, max_share=max_share)
    n = item.shape[0]
    if not len(query) == len(positive) == len(known):
        raise RecJaxError(f"{len(query)} queries, {len(positive)} positives, {len(known)} rows of known items: expected as many of each")
    if len(positive) and not (np.min(positive) >= 0 and np.max(positive) < n):
        raise RecJaxError(f"positives {np.min(positive)} to {np.max(positive)}: expected catalogue indices from 0 to {n - 1}")
    shared, bias = _shared(item, mesh, axis)
    random = None if seed is None else np.random.default_rng(seed)
    parts = [_empty(k)]
    for first in range(0, len(query), queries_per_block):
        rows = range(first, min(first + queries_per_block, len(query)))
        named = _named(positive, known, rows, queries_per_block)
        vectors = np.zeros((queries_per_block, *query.shape[1:]), query.dtype)  # filled up, so that a short block compiles to nothing new
        vectors[: len(rows)] = query[rows.start : rows.stop]
        found = topk.top_k_with_scores_of(vectors, shared, named, k=window, exclude=named, block=block, bias=bias, mesh=mesh, axis=axis)
        scores, ids, own = (x[: len(rows)] for x in found)
        draw = None if random is None else random.random(scores.shape)
        limit = _limit(own[:, 0], margin, max_share)
        parts.append(_choose(scores, ids, own, named[: len(rows)], limit, draw, k=k, skip=skip))
    return Mined(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def known_items(prepared: Prepared, splits: Sequence[str]) -> Ragged:
    """Catalogue indices of each user's events in the named parts ("train", "valid", "test") -> [U rows] int32.

    Raises:
      RecJaxError: an unknown part.
    """
    users, items = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for split in splits:
        if split not in SPLITS:
            raise RecJaxError(f"known events {split!r}: expected some of {', '.join(SPLITS)}, e.g. train,valid")
        if split == "train":
            rows, events = np.arange(prepared.n_users), prepared.train_histories()
        else:
            part = prepared.eval_set(split)
            rows, events = part.users, part.targets
        users.append(np.repeat(rows, events.lengths()))
        items.append(events.flat)
    user = np.concatenate(users)
    offsets = np.zeros(prepared.n_users + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=prepared.n_users), out=offsets[1:])
    return Ragged(np.concatenate(items)[np.argsort(user, kind="stable")], offsets)


def _check_rules(*, k: int, skip: int, window: int, margin: float | None, max_share: float | None) -> None:
    if k < 1 or skip < 0:
        raise RecJaxError(f"k={k}, skip={skip}: expected k of at least 1 and skip of at least 0")
    if k > window - skip:
        raise RecJaxError(f"k={k} negatives out of ranks {skip + 1} to window={window} cannot be: raise window to {k + skip}, or lower k")
    if margin is not None and not 0 <= margin < math.inf:
        raise RecJaxError(f"margin={margin}: expected at least 0 (a negative lies that far below the positive), or None for no such rule")
    if max_share is not None and not 0 < max_share <= 1:
        raise RecJaxError(f"max_share={max_share}: expected above 0 and at most 1 (of the positive's score), or None for no such rule")


def _shared(item: Array, mesh: Mesh | None, axis: Axis | None) -> tuple[Array, np.ndarray | None]:
    """The items on their devices, padded once so that these divide them -> (items, bias that takes the padding out, or None)."""
    if mesh is None or axis is None:
        return jnp.asarray(item), None
    n, devices = item.shape[0], math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis))
    padding = -n % devices
    rows = np.pad(np.asarray(item), ((0, padding), (0, 0)))
    bias = np.where(np.arange(n + padding) < n, 0, -np.inf).astype(np.float32)
    return mesh_lib.put(rows, NamedSharding(mesh, PartitionSpec(axis))), bias if padding else None


def _named(positive: np.ndarray, known: Ragged, rows: range, size: int) -> np.ndarray:
    """-> [size, 1 + E] int32: the positive, then the other known items once each in rising order; -1 is padding. E is 15, 63, 255, ..."""
    others = [np.setdiff1d(known[row], positive[row]) for row in rows]
    width = 16
    while width < 1 + max(map(len, others)):
        width *= 4
    out = np.full((size, width), -1, np.int32)
    for place, (row, items) in enumerate(zip(rows, others, strict=True)):
        out[place, 0], out[place, 1 : 1 + len(items)] = positive[row], items
    return out


def _limit(positive: np.ndarray, margin: float | None, max_share: float | None) -> np.ndarray:
    """The positives' scores [q] -> the highest score [q] that a negative may have, float32."""
    limit = np.full(positive.shape, np.inf, np.float32)
    if margin is not None:
        limit = positive - np.float32(margin)
    if max_share is not None:
        limit = np.minimum(limit, positive * np.where(positive >= 0, np.float32(max_share), np.float32(2 - max_share)))
    return limit


def _choose(
    scores: np.ndarray,
    ids: np.ndarray,
    own: np.ndarray,
    named: np.ndarray,
    limit: np.ndarray,
    draw: np.ndarray | None,
    *,
    k: int,
    skip: int,
) -> Mined:
    """scores, ids [q, window] without the known items, own, named [q, 1 + E], limit [q], draw [q, window] in [0, 1) -> Mined."""
    there = ids >= 0
    early = np.arange(ids.shape[1]) < skip
    close = there & ~early & (scores > limit[:, None])
    kept = there & ~early & ~close
    first = np.argsort(np.where(kept, 0.0 if draw is None else draw, 1.0), axis=1, kind="stable")[:, :k]
    chosen = np.sort(np.where(np.take_along_axis(kept, first, axis=1), first, ids.shape[1]), axis=1)  # by rank again, the empty ones last
    full = chosen < ids.shape[1]
    take = lambda x, empty: np.where(full, np.take_along_axis(x, np.minimum(chosen, ids.shape[1] - 1), axis=1), empty)
    last_score, last_id = scores[:, -1:], np.where(ids[:, -1:] < 0, np.iinfo(np.int32).max, ids[:, -1:])
    known = (named >= 0) & ((own > last_score) | ((own == last_score) & (named < last_id)))
    count = lambda mask: mask.sum(1, dtype=np.int32)
    return Mined(
        ids=take(ids, -1).astype(np.int32),
        scores=take(scores, -np.inf).astype(np.float32),
        positive=own[:, 0],
        known=count(known[:, 1:]),
        skipped=count(there & early),
        too_close=count(close),
    )


def _empty(k: int) -> Mined:
    none = np.zeros(0, np.int32)
    return Mined(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), np.zeros(0, np.float32), none, none, none)
