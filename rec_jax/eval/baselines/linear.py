"""EASE: a linear item-to-item model in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.sparse

from rec_jax.eval.baselines.histories import CHUNK, Scorer, matrix
from rec_jax.types import Ragged, RecJaxError


def ease(train: Ragged, *, n_items: int, regularisation: float = 100.0, popularity_power: float = 0.0, max_items: int = 20000) -> Scorer:
    """train [U] -> scorer: the linear item-to-item model with zero diagonal, in closed form.

    B = I - P / diag(P) with P = (X^T X + regularisation I)^-1. Where there are more items than users, P goes by the U x U matrix of the
    users' common items instead: P = (I - X^T (X X^T + regularisation I)^-1 X) / regularisation. Cost: the cube of the smaller number in
    multiply-adds, and N x N (twice that while B is made) or U x N x 4 bytes.

    Args:
      regularisation: weight of the squared norm of B, in events; the default is the best on MovieLens latest-small's validation items.
      popularity_power: X has each item's events over count^popularity_power in place of 1, in histories and in scores, so that frequent
        items weigh less. 0 = as published.
      max_items: refuses larger data, by the smaller of both numbers.

    Raises:
      RecJaxError: more than `max_items` items and users, a power or regularisation out of range.

    Reference: Steck 2019, Embarrassingly shallow autoencoders for sparse data, equation 8; Steck 2019, Collaborative filtering via
    high-dimensional regression, section 3, for the items' scales.
    """
    if min(n_items, len(train)) > max_items:
        raise RecJaxError(
            f"ease: {n_items} items and {len(train)} users are above max_items={max_items}; raise config.eval.ease_max_items, or leave "
            "ease out"
        )
    if regularisation <= 0 or not 0 <= popularity_power <= 1:
        raise RecJaxError(
            f"ease: regularisation={regularisation}, popularity_power={popularity_power}; expected a number above 0, and one from 0 to 1"
        )
    seen = matrix(train, n_items).astype(np.float32)
    counts = np.maximum(np.asarray(seen.sum(0)).ravel(), 1)
    scale = scipy.sparse.diags((counts**-popularity_power).astype(np.float32))
    seen = (seen @ scale).tocsr()
    product = _by_items(seen, regularisation) if n_items <= len(train) else _by_users(seen, regularisation)
    return lambda histories: np.asarray(product((matrix(histories, n_items).astype(np.float32) @ scale).tocsr()), np.float32)


def _by_items(seen: scipy.sparse.csr_matrix, regularisation: float) -> Callable[[scipy.sparse.csr_matrix], np.ndarray]:
    """X [U, N] -> function of histories [q, N] to their products with B, by a float32 Cholesky factorisation of N x N in place."""
    n_items = seen.shape[1]
    gram = np.zeros((n_items, n_items), np.float32, order="F")
    columns = seen.T.tocsr()
    for start in range(0, n_items, CHUNK):
        gram[:, start : start + CHUNK] = (columns @ columns[start : start + CHUNK].T).toarray()
    gram[np.diag_indices(n_items)] += np.float32(regularisation)
    factor, failed = scipy.linalg.lapack.spotrf(gram, lower=1, overwrite_a=1, clean=0)
    if failed:
        raise RecJaxError(f"ease: X^T X + {regularisation} I is not positive definite in float32; raise regularisation")
    inverse, _ = scipy.linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
    for start in range(0, n_items, CHUNK):  # LAPACK fills the lower triangle only
        stop = min(start + CHUNK, n_items)
        inverse[start:stop, stop:] = inverse[stop:, start:stop].T
        square = inverse[start:stop, start:stop]
        inverse[start:stop, start:stop] = np.tril(square) + np.tril(square, -1).T
    inverse /= -np.diag(inverse)[None, :].copy()
    inverse[np.diag_indices(n_items)] = 0
    return lambda histories: histories @ inverse


def _by_users(seen: scipy.sparse.csr_matrix, regularisation: float) -> Callable[[scipy.sparse.csr_matrix], np.ndarray]:
    """The same by a Cholesky factorisation of U x U in float64: diag(P) is a difference of near numbers for frequent items."""
    gram = (seen @ seen.T).toarray().astype(np.float64)
    gram[np.diag_indices(len(gram))] += regularisation
    factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True)
    solved = np.empty(seen.shape, np.float32)
    diagonal = np.ones(seen.shape[1])
    for start in range(0, seen.shape[1], CHUNK):
        columns = seen[:, start : start + CHUNK].toarray().astype(np.float64)
        part = scipy.linalg.cho_solve(factor, columns)
        diagonal[start : start + CHUNK] -= (columns * part).sum(0)
        solved[:, start : start + CHUNK] = part
    users_of = seen.T.tocsr()

    def product(histories: scipy.sparse.csr_matrix) -> np.ndarray:
        own = histories.toarray()
        # h B = h - h P / diag(P), whose diagonal is exactly 0 in theory: an item says nothing of itself.
        return own - (own - np.asarray((histories @ users_of).todense()) @ solved) / diagonal.astype(np.float32)

    return product
