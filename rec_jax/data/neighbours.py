"""Which items stand near each other in histories: decayed co-occurrence, and each item's nearest neighbours by it."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from rec_jax.types import Ragged


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The M nearest neighbours of each item.

    Attributes:
      ids: [N, M] int32, nearest first; 0 where there are fewer.
      weights: [N, M] float32, shares that sum to 1 for an item that has neighbours; 0 where there are fewer.
    """

    ids: np.ndarray
    weights: np.ndarray


def co_occurrence(train: Ragged, n_items: int, *, window: int, decay: float, backward: float) -> scipy.sparse.csr_matrix:
    """train [U] -> C [N, N]: item i followed d places later by j, d <= window, adds decay^(d - 1) to C[i, j].

    `backward` times that is added to C[j, i]. Nothing stands on the diagonal. Memory: at most 2 x window numbers an event.
    """
    row = np.repeat(np.arange(len(train)), train.lengths())
    total = scipy.sparse.csr_matrix((n_items, n_items), dtype=np.float64)
    for distance in range(1, min(window, int(train.lengths().max(initial=0)) - 1) + 1):
        same = row[distance:] == row[:-distance]
        first, second = train.flat[:-distance][same], train.flat[distance:][same]
        weight = np.full(len(first), decay ** (distance - 1))
        total = total + scipy.sparse.coo_matrix((weight, (first, second)), shape=total.shape).tocsr()
    total = (total + backward * total.T).tocsr()
    total.setdiag(0)
    total.eliminate_zeros()
    return total


def nearest(
    train: Ragged,
    n_items: int,
    *,
    count: int,
    window: int = 10,
    decay: float = 0.8,
    backward: float = 0.25,
    target_power: float = 0.25,
) -> Neighbours:
    """train [U] -> the `count` neighbours of each item that most often follow it, or stand before it, within a few places.

    Args:
      train: histories in catalogue indices, oldest first.
      count: M.
      window, decay, backward: of `co_occurrence`.
      target_power: strength of the division by the neighbour's own number of events.
    """
    together = co_occurrence(train, n_items, window=window, decay=decay, backward=backward)
    popularity = np.maximum(np.bincount(train.flat, minlength=n_items), 1).astype(np.float64)
    together = (together @ scipy.sparse.diags(popularity**-target_power)).tocsr()
    item = np.repeat(np.arange(n_items), np.diff(together.indptr))
    order = np.lexsort((together.indices, -together.data, item))
    rank = np.arange(len(order)) - together.indptr[item]  # rows keep their places in the sorted order
    kept = rank < count
    ids, weights = np.zeros((n_items, count), np.int32), np.zeros((n_items, count))
    ids[item[kept], rank[kept]] = together.indices[order][kept]
    weights[item[kept], rank[kept]] = together.data[order][kept]
    return Neighbours(ids, (weights / np.maximum(weights.sum(1, keepdims=True), 1e-30)).astype(np.float32))
