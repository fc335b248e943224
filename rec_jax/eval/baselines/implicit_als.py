"""iALS: matrix factorisation of implicit feedback by alternating least squares."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse

from rec_jax.eval.baselines.histories import Scorer, matrix
from rec_jax.types import Ragged, RecJaxError

PLACES = 1 << 16  # of padded rows that are gathered at a time


def ials(
    train: Ragged,
    *,
    n_items: int,
    dim: int = 64,
    unobserved: float = 0.1,
    regularisation: float = 0.003,
    frequency: float = 1.0,
    epochs: int = 16,
    scale: float = 0.1,
    seed: int = 0,
) -> Scorer:
    """train [U] -> scorer: dot products of the items' vectors with the vector that fits the history best.

    Minimises sum over a user's items of (1 - w.h)^2, plus `unobserved` x the sum over all pairs of (w.h)^2, plus `regularisation` x the
    sum over users of (items of the user + unobserved x N)^frequency |w|^2, and the same of items. Users and items are solved in turn; the
    scorer solves for the history with the items held. The defaults are one setting for a dense and a sparse data set (MovieLens 100K,
    Amazon Beauty), chosen on their validation items; a large sparse catalogue wants a smaller `unobserved`.
    Cost of an epoch: E D^2 + (U + N) D^3 multiply-adds.

    Args:
      dim: D.
      unobserved: weight of all pairs beside the observed ones.
      regularisation: of vectors.
      frequency: 0 = the same for all rows, 1 = as much as there are terms in a row's loss.
      epochs: of users and items in turn.
      scale: standard deviation of an item vector's start, over sqrt(D).
      seed: of that start.

    Raises:
      RecJaxError: sizes or weights out of range.

    Reference: Hu et al. 2008, Collaborative filtering for implicit feedback datasets; Rendle et al. 2022, Revisiting the performance of
    iALS on item recommendation benchmarks, section 3.
    """
    if dim < 1 or epochs < 1 or unobserved <= 0 or regularisation <= 0:
        raise RecJaxError(
            f"ials: dim={dim}, epochs={epochs}, unobserved={unobserved}, regularisation={regularisation}; all must be above 0"
        )
    users_of = matrix(train, n_items)
    items_of = users_of.T.tocsr()
    items = (np.random.default_rng(seed).normal(size=(n_items, dim)) * scale / np.sqrt(dim)).astype(np.float32)
    weights = {"unobserved": unobserved, "regularisation": regularisation, "frequency": frequency}
    for _ in range(epochs):
        users = solve(users_of, items, **weights)
        items = solve(items_of, users, **weights)
    return lambda histories: solve(matrix(histories, n_items), items, **weights) @ items.T


def solve(seen: scipy.sparse.csr_matrix, fixed: np.ndarray, *, unobserved: float, regularisation: float, frequency: float) -> np.ndarray:
    """seen [rows, N] binary, fixed [N, D] -> [rows, D] float32: each row's minimum of the loss of `ials` with the other side held.

    A row without anything seen is 0.
    """
    dim, lengths = fixed.shape[1], np.diff(seen.indptr)
    penalty = regularisation * (lengths + unobserved * len(fixed)) ** frequency
    every = unobserved * (fixed.T.astype(np.float64) @ fixed)
    out = np.zeros((seen.shape[0], dim), np.float32)
    filled = np.concatenate([fixed, np.zeros((1, dim), np.float32)])  # the last row stands for padding
    for rows, ids in _padded(seen, lengths, len(fixed)):
        vectors = filled[ids]
        gram = (vectors.transpose(0, 2, 1) @ vectors) + every
        gram[:, np.arange(dim), np.arange(dim)] += penalty[rows, None]
        out[rows] = np.linalg.solve(gram, vectors.sum(1, dtype=np.float64)[:, :, None])[:, :, 0]
    return out


def _padded(seen: scipy.sparse.csr_matrix, lengths: np.ndarray, empty: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of like length together -> (rows [q], their columns [q, longest], `empty` behind); rows without columns are left out."""
    order = np.argsort(lengths, kind="stable")
    start = int((lengths == 0).sum())
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= PLACES and stop - start < 1024:
            stop += 1
        rows = order[start:stop]
        ids = np.full((len(rows), int(lengths[rows[-1]])), empty)
        ids[np.arange(ids.shape[1]) < lengths[rows, None]] = np.concatenate(
            [seen.indices[seen.indptr[r] : seen.indptr[r + 1]] for r in rows]
        )
        yield rows, ids
        start = stop
