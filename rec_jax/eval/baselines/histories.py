"""What the baselines share: histories as a checked list or a sparse matrix, and what a scorer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

from rec_jax.types import Ragged, RecJaxError

Scorer = Callable[[Ragged], np.ndarray]
CHUNK = 1024  # rows of an items x items product held at a time


def checked(histories: Ragged, n_items: int) -> Ragged:
    """The histories, if they name items of the catalogue only.

    Raises:
      RecJaxError: another item.
    """
    if histories.flat.size and (histories.flat.min() < 0 or histories.flat.max() >= n_items):
        raise RecJaxError(f"histories name items {histories.flat.min()} to {histories.flat.max()}; the catalogue has 0 to {n_items - 1}")
    return histories


def matrix(histories: Ragged, n_items: int) -> scipy.sparse.csr_matrix:
    """Histories -> binary [rows, N]."""
    checked(histories, n_items)
    ones = np.ones(len(histories.flat), np.float32)
    seen = scipy.sparse.csr_matrix((ones, histories.flat, histories.offsets), shape=(len(histories), n_items))
    seen = seen.copy()
    seen.sum_duplicates()
    seen.data[:] = 1
    return seen


def dense(scores: Any) -> np.ndarray:
    """A sparse matrix -> float32 array."""
    return np.asarray(scores.todense(), np.float32)
