"""Neighbours of items: by the users that they share, and by how near they stand in the histories."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from rec_jax.data.neighbours import co_occurrence
from rec_jax.eval.baselines.histories import CHUNK, Scorer, checked, dense, matrix
from rec_jax.types import Ragged


def item_knn(train: Ragged, *, n_items: int, neighbours: int = 100) -> Scorer:
    """train [U] -> scorer: the sum of cosines between an item and the history's items that are among its nearest neighbours.

    Cosine of the items' columns of the binary users x items matrix, without shrinkage. Memory: CHUNK x N x 4 bytes beside
    N x neighbours cosines.

    Args:
      neighbours: how many nearest items each item keeps.

    Reference: Sarwar et al. 2001, Item-based collaborative filtering recommendation algorithms, section 3.
    """
    seen = matrix(train, n_items)
    norm = np.sqrt(np.maximum(np.asarray(seen.sum(0)).ravel(), 1)).astype(np.float32)
    seen = (seen @ scipy.sparse.diags(1 / norm)).tocsc().astype(np.float32)
    columns = seen.T.tocsr()
    kept = []
    for start in range(0, n_items, CHUNK):
        cosine = np.asarray((columns[start : start + CHUNK] @ seen).todense())
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = 0  # an item is no neighbour of its own
        if neighbours < n_items:
            near = np.argpartition(-cosine, neighbours - 1, axis=1)[:, :neighbours]
            only = np.zeros_like(cosine)
            np.put_along_axis(only, near, np.take_along_axis(cosine, near, axis=1), axis=1)
            cosine = only
        kept.append(scipy.sparse.csr_matrix(cosine))
    similarity = scipy.sparse.vstack(kept).T.tocsr()  # [history item, scored item]
    return lambda histories: dense(matrix(histories, n_items) @ similarity)


def sequence_knn(
    train: Ragged,
    *,
    n_items: int,
    window: int = 50,
    decay: float = 0.9,
    backward: float = 0.25,
    recent: int = 5,
    recency: float = 0.7,
    source_power: float = 0.25,
    target_power: float = 0.25,
) -> Scorer:
    """train [U] -> scorer: decayed co-occurrence with the newest items of the history.

    Item i followed d places later by j, d <= window, adds decay^(d - 1) to C[i, j], and `backward` times that to C[j, i].
    C[i, j] is divided by count(i)^source_power * count(j)^target_power. The score of j is the sum over the newest `recent` items of the
    history of recency^age * C[i, j], with age 0 for the newest. The defaults are one setting for a dense and a sparse data set (MovieLens
    latest-small, Amazon Beauty), chosen on their validation items. Memory: at most 2 x window numbers an event.

    Args:
      window: places between two items that still count as together.
      decay: weight lost with each place between them.
      backward: weight of the pair against the order of time.
      recent: how many of the history's items count.
      recency: weight lost with each newer item in the history.
      source_power, target_power: strength of the division by the popularity of the history's item and of the scored one.

    Reference: Linden et al. 2003, Amazon.com recommendations; Ludewig and Jannach 2018, Evaluation of session-based recommendation
    algorithms, section 3.2 (decayed sequence neighbours).
    """
    together = co_occurrence(checked(train, n_items), n_items, window=window, decay=decay, backward=backward)
    counts = np.maximum(np.bincount(train.flat, minlength=n_items), 1).astype(np.float64)
    together = scipy.sparse.diags(counts**-source_power) @ together @ scipy.sparse.diags(counts**-target_power)
    together = together.tocsr().astype(np.float32)

    def score(histories: Ragged) -> np.ndarray:
        checked(histories, n_items)
        age = np.repeat(histories.offsets[1:], histories.lengths()) - 1 - np.arange(len(histories.flat))
        weight = np.where(age < recent, recency ** np.minimum(age, recent), 0).astype(np.float32)
        rows = scipy.sparse.csr_matrix((weight, histories.flat, histories.offsets), shape=(len(histories), n_items))
        return dense(rows @ together)

    return score
