"""EASE: a linear item-to-item model in closed form."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from rec_jax.eval.baselines.histories import CHUNK, Scorer, matrix
from rec_jax.types import Ragged, RecJaxError


def ease(train: Ragged, *, n_items: int, regularisation: float = 100.0, max_items: int = 20000) -> Scorer:
    """train [U] -> scorer: the linear item-to-item model with zero diagonal, in closed form.

    B = I - P / diag(P) with P = (X^T X + regularisation I)^-1, by a float32 Cholesky factorisation in place. Cost: N^3 multiply-adds
    and N x N x 4 bytes (twice that while B is made).

    Args:
      regularisation: weight of the squared norm of B, in events; the default is the best on MovieLens latest-small's validation items.
      max_items: refuses larger catalogues.

    Raises:
      RecJaxError: more than `max_items` items.

    Reference: Steck 2019, Embarrassingly shallow autoencoders for sparse data, equation 8.
    """
    if n_items > max_items:
        raise RecJaxError(f"ease: {n_items} items are above max_items={max_items}; raise config.eval.ease_max_items or leave ease out")
    seen = matrix(train, n_items).astype(np.float32)
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
    return lambda histories: np.asarray(matrix(histories, n_items).astype(np.float32) @ inverse, np.float32)
