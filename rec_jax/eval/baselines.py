"""Baselines without training by gradient: popularity, item neighbours, sequence neighbours, EASE.

Each is `fit(train, n_items=N, ...) -> scorer` with `train` the users' histories in catalogue indices, oldest first; a scorer takes
histories (those known at scoring time, e.g. with the validation item) and gives scores [q, N] float32. NumPy and SciPy only, deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse

from rec_jax.types import Ragged, RecJaxError

Scorer = Callable[[Ragged], np.ndarray]
CHUNK = 1024  # rows of an items x items product held at a time


def popularity(train: Ragged, *, n_items: int) -> Scorer:
    """train [U] -> scorer: an item's score is its number of events."""
    counts = np.bincount(_checked(train, n_items).flat, minlength=n_items).astype(np.float32)
    return lambda histories: np.tile(counts, (len(histories), 1))


def item_knn(train: Ragged, *, n_items: int, neighbours: int = 100) -> Scorer:
    """train [U] -> scorer: the sum of cosines between an item and the history's items that are among its nearest neighbours.

    Cosine of the items' columns of the binary users x items matrix, without shrinkage. Memory: CHUNK x N x 4 bytes beside
    N x neighbours cosines.

    Args:
      neighbours: how many nearest items each item keeps.

    Reference: Sarwar et al. 2001, Item-based collaborative filtering recommendation algorithms, section 3.
    """
    seen = _matrix(train, n_items)
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
    return lambda histories: _dense(_matrix(histories, n_items) @ similarity)


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
    together = _co_occurrence(_checked(train, n_items), n_items, window, decay)
    together = (together + backward * together.T).tocsr()
    together.setdiag(0)
    together.eliminate_zeros()
    counts = np.maximum(np.bincount(train.flat, minlength=n_items), 1).astype(np.float64)
    together = scipy.sparse.diags(counts**-source_power) @ together @ scipy.sparse.diags(counts**-target_power)
    together = together.tocsr().astype(np.float32)

    def score(histories: Ragged) -> np.ndarray:
        _checked(histories, n_items)
        age = np.repeat(histories.offsets[1:], histories.lengths()) - 1 - np.arange(len(histories.flat))
        weight = np.where(age < recent, recency ** np.minimum(age, recent), 0).astype(np.float32)
        rows = scipy.sparse.csr_matrix((weight, histories.flat, histories.offsets), shape=(len(histories), n_items))
        return _dense(rows @ together)

    return score


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
    seen = _matrix(train, n_items).astype(np.float32)
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
    return lambda histories: np.asarray(_matrix(histories, n_items).astype(np.float32) @ inverse, np.float32)


BASELINES: dict[str, Callable[..., Scorer]] = {
    "popularity": popularity,
    "item_knn": item_knn,
    "sequence_knn": sequence_knn,
    "ease": ease,
}


def fit(name: str, train: Ragged, n_items: int, **options: Any) -> Scorer:
    """The scorer of one of BASELINES.

    Raises:
      RecJaxError: no such baseline, or train names an item outside the catalogue.
    """
    if name not in BASELINES:
        raise RecJaxError(f"baseline {name!r} does not exist; config.eval.baselines takes {', '.join(BASELINES)}")
    return BASELINES[name](train, n_items=n_items, **options)


def _co_occurrence(train: Ragged, n_items: int, window: int, decay: float) -> scipy.sparse.csr_matrix:
    row = np.repeat(np.arange(len(train)), train.lengths())
    total = scipy.sparse.csr_matrix((n_items, n_items), dtype=np.float64)
    for distance in range(1, min(window, int(train.lengths().max(initial=0)) - 1) + 1):
        same = row[distance:] == row[:-distance]
        first, second = train.flat[:-distance][same], train.flat[distance:][same]
        weight = np.full(len(first), decay ** (distance - 1))
        total = total + scipy.sparse.coo_matrix((weight, (first, second)), shape=total.shape).tocsr()
    return total


def _checked(histories: Ragged, n_items: int) -> Ragged:
    if histories.flat.size and (histories.flat.min() < 0 or histories.flat.max() >= n_items):
        raise RecJaxError(f"histories name items {histories.flat.min()} to {histories.flat.max()}; the catalogue has 0 to {n_items - 1}")
    return histories


def _matrix(histories: Ragged, n_items: int) -> scipy.sparse.csr_matrix:
    """Histories -> binary [rows, N]."""
    _checked(histories, n_items)
    ones = np.ones(len(histories.flat), np.float32)
    seen = scipy.sparse.csr_matrix((ones, histories.flat, histories.offsets), shape=(len(histories), n_items))
    seen = seen.copy()
    seen.sum_duplicates()
    seen.data[:] = 1
    return seen


def _dense(scores: Any) -> np.ndarray:
    return np.asarray(scores.todense(), np.float32)
