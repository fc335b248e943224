"""Single predictions for people to read: right and wrong ones, with the names of the history, the target and what was ranked first."""

from __future__ import annotations

import numpy as np
from etils import epath

from rec_jax.eval.encoder import Say
from rec_jax.eval.model import load
from rec_jax.eval.rankings import Rankings
from rec_jax.types import RecJaxError

RIGHT = 1  # rank of a target, items of the history removed, that counts as right
WRONG = 11  # the best that counts as wrong: not among the first ten
NEWEST = 5  # items of a history that are named
FIRST = 3  # items of a ranking that are named


def chosen(ranked: Rankings, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks [U, Tg] -> rows of at most `count` users whose first target is ranked first, and of as many where it is not among ten.

    Drawn by seed, so that nobody picks them.
    """
    first = ranked.ranks[:, 0]
    random = np.random.default_rng(seed)
    draw = lambda rows: np.sort(random.choice(rows, min(count, len(rows)), replace=False))
    return draw(np.flatnonzero(first == RIGHT)), draw(np.flatnonzero(first >= WRONG))


def say_some(workdir: epath.PathLike, split: str, count: int, *, say: Say = print) -> None:
    """Says `count` right and `count` wrong predictions of the workdir's last model on a split.

    Raises:
      RecJaxError: a count below 1, a model that ranks no items for histories, nothing trained.
    """
    if count < 1:
        raise RecJaxError(f"--show={count}: expected how many predictions to show, e.g. 10")
    trained = load(workdir, say=say)
    config, prepared = trained.model.config, trained.model.prepared
    if config.batch.kind != "histories":
        raise RecJaxError(f"--show={count} reads rankings for histories; config.batch.kind is {config.batch.kind!r}")
    eval_set, names, counts = prepared.eval_set(split), prepared.names(), prepared.item_counts()
    ranked = trained.model.rank(trained.params, eval_set, name=split, items=trained.items, ks=(10,))
    named = lambda ids: ", ".join(names[int(i)] for i in ids if i >= 0)
    for title, rows in zip(("ranked first", "not among ten"), chosen(ranked, count, seed=config.seed), strict=True):
        say(f"\n{split}: targets that are {title}")
        for row in rows:
            history, target = eval_set.history[int(row)], int(eval_set.targets[int(row)][0])
            older = f" and {len(history) - NEWEST} before" if len(history) > NEWEST else ""
            say(f"  user {eval_set.users[row]}: after {named(history[-NEWEST:])}{older}")
            say(f"    came {names[target]} (rank {ranked.ranks[row, 0]}, trained on {counts[target]} times)")
            say(f"    first in the ranking: {named(ranked.ids[row, :FIRST])}")
