"""Weights of events in the loss, by their ratings: hours played, listens, stars (`config.batch.event_weight`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rec_jax.types import RecJaxError

KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"rating": lambda rating: rating, "log_rating": np.log1p}


@dataclasses.dataclass(frozen=True)
class EventWeight:
    """What ratings weigh.

    Attributes:
      kind: of KINDS.
      mean: of what it makes of the ratings of all train events, which weigh 1 on average.
    """

    kind: str
    mean: float

    def __call__(self, ratings: np.ndarray) -> np.ndarray:
        """Ratings [n] float32, none below 0 -> weights [n] float32."""
        return (KINDS[self.kind](ratings.astype(np.float64)) / self.mean).astype(np.float32)


def of_run(config: Any, prepared: Any) -> EventWeight | None:
    """What ratings weigh by `config.batch.event_weight` of one stage; None where all events weigh the same.

    Raises:
      RecJaxError: a train event with a rating that is below 0 or no finite number; all ratings are the same.
    """
    kind = config.batch.event_weight
    if not kind:
        return None
    histories = prepared.train_histories()
    ratings = histories.columns["ratings"]
    key, path = f"config.batch.event_weight={kind!r}", f"config.data.path={config.data.path!r}"
    wrong = ~((ratings >= 0) & np.isfinite(ratings))
    if wrong.any():
        place = int(np.argmax(wrong))
        user = prepared.users()["user"][int(np.searchsorted(histories.offsets, place, side="right")) - 1]
        item = prepared.item_ids()[int(histories.flat[place])]
        raise RecJaxError(
            f"{key}: user {user!r} has item {item!r} of {path} with the rating {ratings[place]:g}, and no event weighs less than nothing: "
            "leave such events out by config.data.filter.min_rating, the lowest rating that counts, like 1.0, or set it to ''"
        )
    if ratings.min() == ratings.max():
        raise RecJaxError(
            f"{key}: all ratings of {path} (config.data.reader={config.data.reader!r}) are {ratings[0]:g}, so all events weigh the same: "
            "set it to ''"
        )
    return EventWeight(kind, float(KINDS[kind](ratings.astype(np.float64)).mean()))
