"""Differences between tested workdirs, with intervals over users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from rec_jax.eval import bootstrap
from rec_jax.eval.bootstrap import PerUser
from rec_jax.types import RecJaxError

Say = Callable[[str], None]


def run(
    whole: Sequence[epath.PathLike],
    variants: Mapping[str, Sequence[epath.PathLike]],
    *,
    name: str = "whole",
    metrics: Sequence[str] = ("ndcg@10", "hr@10"),
    split: str = "test",
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
    say: Say = print,
) -> dict[str, dict[str, bootstrap.Comparison]]:
    """Compares each variant with the whole by their files of per-user values, says a table a metric -> metric -> variant -> Comparison.

    Args:
      whole: workdirs, or stage folders, of the model that the others are compared with: one per seed.
      variants: the same of each other model, by the name of its row.
      name: of the whole's row.
      metrics: names in the files.
      split: which files.
      seed, draws, level: of `bootstrap.compare`.

    Raises:
      RecJaxError: a file that is not there, users that differ, a metric that a file lacks.
    """
    if name in variants:
        raise RecJaxError(f"two models are called {name!r}; name one of them: --b=NAME={','.join(map(str, variants[name]))}")
    models = {model: [(str(f), bootstrap.read_users(f, split)) for f in folders] for model, folders in {name: whole, **variants}.items()}
    first_folder, first = models[name][0]
    for folder, found in (pair for pairs in models.values() for pair in pairs):
        bootstrap.require_same_users(first, found, (first_folder, folder))
    out: dict[str, dict[str, bootstrap.Comparison]] = {}
    for metric in metrics:
        values = {model: np.stack([_of(found, metric, folder) for folder, found in pairs]) for model, pairs in models.items()}
        of_whole = values.pop(name)
        out[metric] = {model: bootstrap.compare(v, of_whole, seed=seed, draws=draws, level=level) for model, v in values.items()}
        say(f"{split} {metric}: {len(first.users):,} users, {level:.0%} intervals of the difference to {name}")
        say(bootstrap.table(out[metric], name=name))
    return out


def _of(found: PerUser, metric: str, folder: str) -> np.ndarray:
    if metric not in found.values:
        raise RecJaxError(f"{folder} has no per-user values of {metric!r}; it has {', '.join(found.values)}")
    return found.values[metric]
