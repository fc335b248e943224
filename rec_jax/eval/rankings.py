"""Full-catalogue rankings of an evaluation set: every target against every item, by two protocols in one pass.

`NAME/...` removes the items of the user's history from the ranking (a target is never removed), `NAME_all/...` removes nothing.
Ties never count for the target. Users are taken in blocks; of a block stay its ranks and top ids, never its scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax import topk
from rec_jax.eval import metrics
from rec_jax.mesh import Axis
from rec_jax.types import Array, EvalSet, Ragged, RecJaxError


@dataclasses.dataclass(frozen=True)
class Block:
    """Users of an evaluation set, at its places rows [q]: histories [q], target [q, Tg] and exclude [q, any], both with -1 behind."""

    rows: np.ndarray
    histories: Ragged
    target: np.ndarray
    exclude: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rankings:
    """What came out, in the order of the evaluation set.

    Attributes:
      metrics: means over the users by name, e.g. "test/ndcg@10", "test_all/hr@10"; and "test/coverage@10".
      per_user: [U] float64 by the same names (coverage has none), for paired tests.
      ids: [U, max k] int32, each user's best items with the history's removed, best first; -1 where there are fewer.
      ranks: [U, Tg] int32 of the targets with the history removed, in the order of the set's targets; 0 = none.
      ranks_all: [U, Tg] int32, with nothing removed.
    """

    metrics: dict[str, float]
    per_user: dict[str, np.ndarray]
    ids: np.ndarray
    ranks: np.ndarray
    ranks_all: np.ndarray


def evaluate_vectors(
    users: Array,
    items: Array,
    eval_set: EvalSet,
    *,
    ks: Sequence[int],
    name: str = "test",
    users_per_block: int = 256,
    items_per_block: int = topk.BLOCK,
    exclude: Ragged | None = None,
    bias: Array | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> Rankings:
    """users [U, D], items [N, D] -> Rankings of the users of `eval_set` by dot product, on the device; of users [U, K, D] by their highest.

    Memory on the device: the items, and users_per_block x items_per_block x 4 bytes.

    Args:
      users: one vector for each row of `eval_set`, or K.
      ks: list lengths of the metrics.
      name: of the split; metrics are called `name/...` and `name_all/...`.
      exclude: items that the ranking `name/...` leaves out for each user; None: those of the history.
      bias, mesh, axis: as in `topk.top_k`.

    Raises:
      RecJaxError: sizes that do not fit, a user without target, a NaN score.
    """
    if len(users) != len(eval_set.users) or len(items) != eval_set.n_items:
        raise RecJaxError(f"{len(users)} users, {len(items)} items; the evaluation set has {len(eval_set.users)} and {eval_set.n_items}")
    items = jnp.asarray(items)

    def rank(block: Block) -> topk.Ranked:
        rows = block.rows
        few = users_per_block - len(rows)  # the last block is filled up, so that it compiles to nothing new

        def grow(x: Array, value: int) -> np.ndarray:
            return np.pad(np.asarray(x), ((0, few), *((0, 0),) * (x.ndim - 1)), constant_values=value)

        out = topk.rank_and_top_k(
            grow(users[rows], 0),
            items,
            grow(block.target, -1),
            k=max(ks),
            exclude=grow(block.exclude, -1),
            block=items_per_block,
            bias=bias,
            mesh=mesh,
            axis=axis,
        )
        return topk.Ranked(*(x[: len(rows)] for x in out))

    return _evaluate(rank, eval_set, ks, name, users_per_block, exclude)


def evaluate_scores(
    scorer: Callable[[Ragged], np.ndarray],
    eval_set: EvalSet,
    *,
    ks: Sequence[int],
    name: str = "test",
    users_per_block: int = 256,
    exclude: Ragged | None = None,
) -> Rankings:
    """scorer(histories [q]) -> scores [q, N] float32 -> Rankings of the users of `eval_set`; the scorer gets their histories, in blocks.

    Memory: a few times users_per_block x N x 4 bytes. Args and Raises as in `evaluate_vectors`.
    """

    def rank(block: Block) -> topk.Ranked:
        scores = scorer(block.histories)
        if scores.shape != (len(block.rows), eval_set.n_items):
            raise RecJaxError(f"the scorer gave scores of shape {scores.shape}, expected {(len(block.rows), eval_set.n_items)}")
        return topk.rank_and_top_k_of_scores(scores, block.target, k=max(ks), exclude=block.exclude)

    return _evaluate(rank, eval_set, ks, name, users_per_block, exclude)


def blocks(eval_set: EvalSet, users_per_block: int, exclude: Ragged | None = None) -> Iterator[Block]:
    """The users of `eval_set`, users_per_block at a time; those of like history length together: little padding, few compilations."""
    history, targets = eval_set.history, eval_set.targets
    removed = _removed(eval_set, exclude)
    lengths, width = removed.lengths(), int(targets.lengths().max(initial=0))
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), users_per_block):
        rows = order[start : start + users_per_block]
        left_out = padded(removed, rows, bucket(int(lengths[rows].max())))
        yield Block(rows, history.take(rows), _once(padded(targets, rows, width)), left_out)


def some_users(eval_set: EvalSet, most: int, *, seed: int) -> EvalSet:
    """The set with at most that many of its users, drawn by seed; 0 = all of them."""
    if not most or len(eval_set.users) <= most:
        return eval_set
    chosen = np.sort(np.random.default_rng(seed).choice(len(eval_set.users), most, replace=False))
    removed = None if eval_set.removed is None else eval_set.removed.take(chosen)
    return EvalSet(eval_set.users[chosen], eval_set.history.take(chosen), eval_set.targets.take(chosen), eval_set.n_items, removed)


def _evaluate(
    rank: Callable[[Block], topk.Ranked],
    eval_set: EvalSet,
    ks: Sequence[int],
    name: str,
    users_per_block: int,
    exclude: Ragged | None,
) -> Rankings:
    history, targets = _removed(eval_set, exclude), eval_set.targets
    n = len(eval_set.users)
    if not n or len(history) != n or len(targets) != n:
        raise RecJaxError(
            f"evaluation set {name!r}: {n} users, {len(history)} histories, {len(targets)} rows of targets; expected as many, not 0"
        )
    if not ks or min(ks) < 1 or users_per_block < 1:
        raise RecJaxError(f"config.eval.k={tuple(ks)}, config.eval.users_per_block={users_per_block}: expected whole numbers above 0")
    width = int(targets.lengths().max())
    ids = np.full((n, max(ks)), -1, np.int32)
    ranks, ranks_all = np.zeros((2, n, width), np.int32)
    for block in blocks(eval_set, users_per_block, exclude):
        out = rank(block)
        ids[block.rows], ranks[block.rows], ranks_all[block.rows] = out.ids, out.ranks, out.ranks_all
    return of_ranks(ids, ranks, ranks_all, ks=ks, name=name, n_items=eval_set.n_items)


def _removed(eval_set: EvalSet, exclude: Ragged | None) -> Ragged:
    """The items that the ranking leaves out: as given, else as the set says, else those of the history."""
    if exclude is not None:
        return exclude
    return eval_set.history if eval_set.removed is None else eval_set.removed


def of_ranks(ids: np.ndarray, ranks: np.ndarray, ranks_all: np.ndarray, *, ks: Sequence[int], name: str, n_items: int) -> Rankings:
    """Best ids [U, at least max k] and ranks [U, Tg], as `Rankings` has them -> the Rankings with their metrics."""
    values = {f"{name}/{key}": v for key, v in metrics.per_user(ranks, ks=tuple(ks)).items()}
    values |= {f"{name}_all/{key}": v for key, v in metrics.per_user(ranks_all, ks=tuple(ks)).items()}
    means = {key: float(v.mean()) for key, v in values.items()}
    means |= {f"{name}/coverage@{k}": metrics.coverage(ids, k=k, n_items=n_items) for k in ks}
    return Rankings(means, values, ids, ranks, ranks_all)


def padded(rows: Ragged, which: np.ndarray, width: int) -> np.ndarray:
    """Those rows [q] -> [q, width] int32 with -1 behind."""
    out = np.full((len(which), width), -1, np.int32)
    for place, n in enumerate(which):
        row = rows[int(n)]
        out[place, : len(row)] = row
    return out


def _once(targets: np.ndarray) -> np.ndarray:
    """An item that is a user's target twice is ranked once, at its first place."""
    again = (targets[:, :, None] == targets[:, None, :]) & np.tri(targets.shape[1], k=-1, dtype=bool)
    return np.where(again.any(2), -1, targets).astype(np.int32)


def bucket(width: int) -> int:
    """Widths that the compiled code comes in: 16, 64, 256, ..."""
    size = 16
    while size < width:
        size *= 4
    return size
