"""Neighbours of items by their texts."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from rec_jax.eval.baselines.histories import Scorer, checked
from rec_jax.types import Ragged


def text_knn(table: np.ndarray, *, recent: int = 5, recency: float = 0.8, sharpness: float = 5.0) -> Scorer:
    """Text vectors [N, D_text] -> scorer: how similar an item's text is to those of the newest items of the history.

    With centred vectors of unit length t, the score of j is the sum over the newest `recent` items i of the history, age 0 for the newest,
    of recency^age * exp(sharpness * (t_i . t_j - 1)): near copies count, and what is merely of the same kind hardly does. An item without
    text is as any other with an empty one. Memory: for a block of users, its different newest items x N x 4 bytes.

    Args:
      table: rows of any length.
      recent: how many of the history's items count.
      recency: weight lost with each newer item in the history.
      sharpness: how much nearer texts count more.
    """
    items = np.asarray(table - table.mean(0), np.float32)
    items /= np.maximum(np.linalg.norm(items, axis=1, keepdims=True), 1e-12)

    def score(histories: Ragged) -> np.ndarray:
        checked(histories, len(items))
        age = np.repeat(histories.offsets[1:], histories.lengths()) - 1 - np.arange(len(histories.flat))
        row = np.repeat(np.arange(len(histories)), histories.lengths())
        newest = age < recent
        known, place = np.unique(histories.flat[newest], return_inverse=True)
        similar = np.exp(sharpness * (items[known] @ items.T - 1))
        weight = (recency ** age[newest]).astype(np.float32)
        return scipy.sparse.csr_matrix((weight, (row[newest], place)), shape=(len(histories), len(known))) @ similar

    return score
