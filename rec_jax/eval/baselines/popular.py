"""The same ranking for everybody: what many have, or what many have had of late."""

from __future__ import annotations

import numpy as np

from rec_jax.eval.baselines.histories import Scorer, checked
from rec_jax.types import Ragged, RecJaxError


def popularity(train: Ragged, *, n_items: int) -> Scorer:
    """train [U] -> scorer: an item's score is its number of events."""
    counts = np.bincount(checked(train, n_items).flat, minlength=n_items).astype(np.float32)
    return lambda histories: np.tile(counts, (len(histories), 1))


def recent_popularity(train: Ragged, *, n_items: int, times: np.ndarray | None = None, share: float = 0.1, places: int = 5) -> Scorer:
    """train [U] -> scorer: an item's score is its number of newest events.

    Args:
      times: [E] of the events in `train.flat`; the newest `share` of all events count, with all those of the time at which they begin.
        None: there is only an order, and the last `places` of each history count.
      share: above 0, at most 1.
      places: at least 1.

    Raises:
      RecJaxError: no share or places, times that are not one an event.
    """
    flat = checked(train, n_items).flat
    if not 0 < share <= 1 or places < 1:
        raise RecJaxError(f"recent_popularity: share={share}, places={places}; expected a share in (0, 1] and at least one place")
    if times is None:
        newest = np.repeat(train.offsets[1:], train.lengths()) - np.arange(len(flat)) <= places
    else:
        if times.shape != flat.shape:
            raise RecJaxError(f"recent_popularity: {len(times)} times for {len(flat)} events")
        newest = times >= np.sort(times)[min(int(np.ceil((1 - share) * len(times))), len(times) - 1)] if len(times) else times
    counts = np.bincount(flat[newest], minlength=n_items).astype(np.float32)
    return lambda histories: np.tile(counts, (len(histories), 1))
