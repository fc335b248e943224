"""BPR: matrix factorisation that ranks what a user has above what the user has not."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from rec_jax.eval.baselines.histories import Scorer, matrix
from rec_jax.types import Ragged, RecJaxError

BATCH = 4096  # triples of a step
EPSILON = 1e-6
Factors = dict[str, np.ndarray]


def bpr(
    train: Ragged,
    *,
    n_items: int,
    dim: int = 64,
    regularisation: float = 0.03,
    learning_rate: float = 0.1,
    epochs: int = 60,
    negatives: int = 128,
    steps: int = 30,
    seed: int = 0,
) -> Scorer:
    """train [U] -> scorer: dot products of the items' vectors with the history's, and the items' biases.

    Maximises the sum over triples (user, item of the user, other item) of log sigmoid(x(user, item) - x(user, other)) with
    x = w.h + b, less half of `regularisation` x the squares of what the triple touches, by AdaGrad on triples drawn uniformly. A user is
    scored by history: the vector that maximises the same sum with the items held, against `negatives` drawn items a step. The defaults
    are one setting for a dense and a sparse data set (MovieLens 100K, Amazon Beauty), chosen on their validation items.

    Args:
      dim: D.
      regularisation: of vectors and biases, a triple.
      learning_rate: of AdaGrad.
      epochs: as many triples as events each.
      negatives: items that a history is held against in each step of its scoring.
      steps: of that.
      seed: of the start and of what is drawn.

    Raises:
      RecJaxError: sizes or rates out of range, nothing to train on, a user who has every item.

    Reference: Rendle et al. 2009, BPR: Bayesian personalized ranking from implicit feedback, section 4; Duchi et al. 2011, Adaptive
    subgradient methods.
    """
    if min(dim, epochs, negatives, steps) < 1 or regularisation < 0 or learning_rate <= 0:
        raise RecJaxError(
            f"bpr: dim={dim}, epochs={epochs}, negatives={negatives}, steps={steps}, regularisation={regularisation}, "
            f"learning_rate={learning_rate}; expected numbers above 0"
        )
    seen = matrix(train, n_items)
    if not seen.nnz or int(np.diff(seen.indptr).max()) == n_items:
        raise RecJaxError(f"bpr: {seen.nnz} events of {n_items} items; it needs events, and for each user an item that is not the user's")
    random = np.random.default_rng(seed)
    user_of, item_of = np.repeat(np.arange(len(train)), np.diff(seen.indptr)), seen.indices
    factors = {
        "users": random.normal(scale=0.1 / np.sqrt(dim), size=(len(train), dim)).astype(np.float32),
        "items": random.normal(scale=0.1 / np.sqrt(dim), size=(n_items, dim)).astype(np.float32),
        "bias": np.zeros((n_items, 1), np.float32),
    }
    squares = {name: np.full_like(x, EPSILON) for name, x in factors.items()}
    keys = np.sort(user_of * np.int64(n_items) + item_of)
    for _ in range(epochs):
        order = random.permutation(len(item_of))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            users, items = user_of[chosen], item_of[chosen]
            _step(factors, squares, users, items, _others(random, keys, users, n_items), regularisation, learning_rate)
    drawn = random.integers(0, n_items, (steps, negatives))

    def score(histories: Ragged) -> np.ndarray:
        of = matrix(histories, n_items)
        users = _folded(of, factors, drawn, regularisation, learning_rate)
        return users @ factors["items"].T + factors["bias"].T

    return score


def _others(random: np.random.Generator, keys: np.ndarray, users: np.ndarray, n_items: int) -> np.ndarray:
    """users [B], sorted keys user * N + item of what is seen -> [B] items drawn uniformly among those that the user has not."""
    out, wanted = np.zeros(len(users), np.int64), np.arange(len(users))
    while len(wanted):
        out[wanted] = random.integers(0, n_items, len(wanted))
        key = users[wanted] * np.int64(n_items) + out[wanted]
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        wanted = wanted[keys[place] == key]
    return out


def _step(
    factors: Factors, squares: Factors, users: np.ndarray, items: np.ndarray, others: np.ndarray, regularisation: float, rate: float
) -> None:
    """One step of AdaGrad up the objective of the triples (users, items, others), in place."""
    w, h, g, b, c = factors["users"][users], *(factors[name][of] for name in ("items", "bias") for of in (items, others))
    slope = _slope((w * (h - g)).sum(1, keepdims=True) + b - c)
    _ascend(factors["users"], squares["users"], [(users, slope * (h - g) - regularisation * w)], rate)
    _ascend(factors["items"], squares["items"], [(items, slope * w - regularisation * h), (others, -slope * w - regularisation * g)], rate)
    _ascend(factors["bias"], squares["bias"], [(items, slope - regularisation * b), (others, -slope - regularisation * c)], rate)


def _ascend(table: np.ndarray, squares: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray]], rate: float) -> None:
    """Adds the gradients of rows, summed by row, to a table [rows, D], each divided by the root of its squares so far."""
    rows = np.concatenate([row for row, _ in parts])
    touched, inverse = np.unique(rows, return_inverse=True)
    sums = scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), (inverse, np.arange(len(rows)))), shape=(len(touched), len(rows)))
    gradient = sums @ np.concatenate([values for _, values in parts])
    squares[touched] += gradient**2
    table[touched] += np.float32(rate) * gradient / np.sqrt(squares[touched])


def _folded(seen: scipy.sparse.csr_matrix, factors: Factors, drawn: np.ndarray, regularisation: float, rate: float) -> np.ndarray:
    """seen [q, N], drawn [steps, negatives] -> vectors [q, D]: AdaGrad up the mean objective of each history against the drawn items.

    Each step has items of its own: those of one draw would be held against every user, and stand below all others for everybody.
    """
    h, b = factors["items"][seen.indices], factors["bias"][seen.indices]
    row = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
    mean = scipy.sparse.diags(1 / np.maximum(np.diff(seen.indptr), 1)).astype(np.float32) @ scipy.sparse.csr_matrix(
        (np.ones(len(row), np.float32), np.arange(len(row)), seen.indptr), shape=(seen.shape[0], len(row))
    )
    users = np.zeros((seen.shape[0], h.shape[1]), np.float32)
    squares = np.full_like(users, EPSILON)
    for others in drawn:
        w, g, c = users[row], factors["items"][others], factors["bias"][others]
        slope = _slope((w * h).sum(1, keepdims=True) + b - (w @ g.T + c.T)) / np.float32(len(others))  # [events, negatives]
        gradient = mean @ (slope.sum(1, keepdims=True) * h - slope @ g) - np.float32(regularisation) * users
        squares += gradient**2
        users += np.float32(rate) * gradient / np.sqrt(squares)
    return users


def _slope(difference: np.ndarray) -> np.ndarray:
    """Derivative of log sigmoid: sigmoid(-difference)."""
    return (1 / (1 + np.exp(np.clip(difference, -30, 30)))).astype(np.float32)
