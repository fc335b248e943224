"""Baselines without a network of their own: popularity, neighbours, linear models, matrix factorisation.

Each is `fit(train, n_items=N, ...) -> scorer` with `train` the users' histories in catalogue indices, oldest first; a scorer takes
histories (those known at scoring time, e.g. with the validation item) and gives scores [q, N] float32. NumPy and SciPy only, deterministic.
`text_knn` is fitted on no events, but on text vectors of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rec_jax.data.prepare import SPLITS, Prepared
from rec_jax.eval.baselines.histories import Scorer
from rec_jax.eval.baselines.implicit_als import ials
from rec_jax.eval.baselines.linear import ease
from rec_jax.eval.baselines.neighbours import item_knn, sequence_knn
from rec_jax.eval.baselines.pairwise import bpr
from rec_jax.eval.baselines.popular import popularity, recent_popularity
from rec_jax.eval.baselines.texts import text_knn
from rec_jax.types import Ragged, RecJaxError

__all__ = ["BASELINES", "TEXT_KNN", "Scorer", "fit", "of_config", "text_knn"]

TEXT_KNN = "text_knn"  # beside BASELINES, which know no texts

BASELINES: dict[str, Callable[..., Scorer]] = {
    "popularity": popularity,
    "recent_popularity": recent_popularity,
    "item_knn": item_knn,
    "sequence_knn": sequence_knn,
    "ease": ease,
    "ials": ials,
    "bpr": bpr,
}


def fit(name: str, train: Ragged, n_items: int, **options: Any) -> Scorer:
    """The scorer of one of BASELINES.

    Raises:
      RecJaxError: no such baseline, or train names an item outside the catalogue.
    """
    if name not in BASELINES:
        raise RecJaxError(f"baseline {name!r} does not exist; config.eval.baselines takes {', '.join(BASELINES)}")
    return BASELINES[name](train, n_items=n_items, **options)


def of_config(name: str, config: Any, prepared: Prepared, table: Callable[[], np.ndarray]) -> Scorer:
    """A baseline fitted on the train events of prepared data, with what the config and the data say of it.

    Args:
      name: of BASELINES, or TEXT_KNN.
      config: of a stage.
      prepared: the data.
      table: makes the text vectors of the catalogue [N, D_text]; called for TEXT_KNN alone.

    Raises:
      RecJaxError: as `fit`.
    """
    if name == TEXT_KNN:
        return text_knn(table())
    options: dict[str, Any] = {}
    if name == "ease":
        e = config.eval
        options = {"max_items": e.ease_max_items, "regularisation": e.ease_regularisation, "popularity_power": e.ease_popularity_power}
    if name == "recent_popularity" and prepared.meta["clock"]:
        source = prepared.source()
        records = (source[user] for user in range(prepared.n_users))
        options["times"] = np.concatenate([record["times"][record["splits"] == SPLITS["train"]] for record in records])
    if name in ("ials", "bpr"):
        options["seed"] = config.seed
    return fit(name, prepared.train_histories(), prepared.n_items, **options)
