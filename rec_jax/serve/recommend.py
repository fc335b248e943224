"""Recommendations for a history given by titles."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from rec_jax import topk
from rec_jax.eval.model import Trained
from rec_jax.types import Ragged, RecJaxError


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One line of an answer: the item's id and display name, and the model's score (a cosine where vectors are normalised)."""

    item: str
    name: str
    score: float


class Recommender:
    """Answers histories with the best items of the catalogue that are not in them.

    Args:
      trained: the model, its parameters and the vectors of its catalogue.
    """

    def __init__(self, trained: Trained):
        self._trained, prepared = trained, trained.model.prepared
        self._names, self._ids = prepared.names(), [str(i) for i in prepared.item_ids()]
        self._by_name: dict[str, int] = {}
        for table in (self._ids, self._names):  # a name wins over an equal id
            for index, name in enumerate(table):
                self._by_name[name.casefold()] = index

    def find(self, name: str) -> int:
        """Catalogue index of an item by its display name or id, in any case.

        Raises:
          RecJaxError: no such item; names the nearest titles.
        """
        index = self._by_name.get(name.strip().casefold())
        if index is not None:
            return index
        wanted = name.strip().casefold()
        near = difflib.get_close_matches(wanted, self._by_name, n=5, cutoff=0.5)
        near += [n for n in self._by_name if wanted in n and n not in near][: 5 - len(near)]
        shown = "; ".join(self._names[self._by_name[n]] for n in near) or "none is like it"
        raise RecJaxError(f"no item is called {name!r}. Nearest: {shown}")

    def recommend(self, history: Sequence[str], *, k: int = 10) -> list[Recommendation]:
        """The k best items for a history of names or ids, oldest first; of their events, times, ratings and features are unknown.

        Raises:
          RecJaxError: an empty history, an unknown name, k < 1.
        """
        if not history:
            raise RecJaxError("the history is empty; give at least one item: --history='Toy Story (1995)'")
        if k < 1:
            raise RecJaxError(f"k={k}: must be at least 1")
        seen = np.asarray([self.find(name) for name in history], np.int32)
        user = self._trained.model.user_vectors(self._trained.params, self._trained.items, Ragged.from_rows([seen]))
        k = min(k, len(self._ids) - len(set(seen.tolist())))
        scores, ids = topk.top_k(user, self._trained.items, k=k, exclude=seen[None])
        found = [(int(i), float(s)) for i, s in zip(np.asarray(ids)[0], np.asarray(scores)[0], strict=True) if i >= 0]
        return [Recommendation(self._ids[i], self._names[i], score) for i, score in found]


def as_text(history: Sequence[str], answer: Sequence[Recommendation]) -> str:
    """The answer as a person reads it."""
    width = max((len(r.name) for r in answer), default=0)
    lines = [f"after {', '.join(history)}:"]
    lines += [f"  {n:>2}. {r.name:<{width}}  {r.score:.3f}" for n, r in enumerate(answer, 1)]
    return "\n".join(lines)
