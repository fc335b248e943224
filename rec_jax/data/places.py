"""Times and ratings of events as a batch holds them for the places of its histories, and the ranges that ratings are told apart by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rec_jax.config_places import EVENT, INPUTS, columns_of
from rec_jax.data import event_features
from rec_jax.types import RecJaxError

RATING_RANGES = 16  # ratings of more values than that are told apart by so many quantiles
LONGEST = 2**31 - 1  # seconds, 68 years; longer is as long
# Of a place without an event, or one of which it is not known
EMPTY = {"times": np.int32(-1), "ratings": np.float32(np.nan), "users": np.int32(-1)}
NO_FEATURE = np.int32(0)  # likewise, in a column of a feature of events


def empty(column: str) -> Any:
    """What a column has at a place without an event, or at one of which it is not known; in the column's type."""
    return NO_FEATURE if column.startswith(EVENT) else EMPTY[column]


def of_places(columns: Mapping[str, np.ndarray], first: np.ndarray | int = 0) -> dict[str, np.ndarray]:
    """Columns of windows' events, oldest first -> the same as places have them: times in seconds since the window's first, [n] int32.

    `first` [n] says where each event's window begins; by default all are of one.
    """
    out = {name: np.asarray(values, empty(name).dtype) for name, values in columns.items() if name != "times"}
    if "times" in columns:
        times = np.asarray(columns["times"], np.int64)
        gone = times - times[first] if len(times) else times
        # `tables.code` sorts each user's events by time, drop_events keeps their order, and shuffle_events goes with no times.
        assert not (gone < 0).any(), "events of a window are not in time order"
        out["times"] = np.minimum(gone, LONGEST).astype(np.int32)
    return out


def check(config: Any, meta: Mapping[str, Any]) -> None:
    """Finds out whether prepared data has what the history tower reads; `meta` is what its meta.json says.

    Raises:
      RecJaxError: times are asked for where there is only an order.
    """
    if "times" in columns_of(config) and not meta["clock"]:
        user = config.towers.user
        raise RecJaxError(
            f"config.towers.user.inputs={user.inputs!r}, time_bias={user.time_bias}, session_gap={user.session_gap}, or those of a stage, "
            f"read times of events, and config.data.path={config.data.path!r} (config.data.reader={config.data.reader!r}) has only their "
            "order: give an input with times, or leave out 'gap' and set time_bias=False and session_gap=0"
        )


def event_rows(config: Any, prepared: Any) -> dict[str, int]:
    """Rows of the table of each feature of events that the history tower reads, by name: one for none, and one a category."""
    user = config.towers.user
    read = [name for name in user.inputs if name not in INPUTS] if user.kind == "history" else []
    categories = event_features.categories_of(prepared.meta) if read else {}
    return {name: 1 + len(categories[name]) for name in read}


def rating_edges(config: Any, prepared: Any) -> tuple[float, ...]:
    """Lower ends of the ranges that ratings are told apart by, by `config.towers.user.rating_edges`; () where the tower reads none.

    Raises:
      RecJaxError: all ratings are the same.
    """
    user = config.towers.user
    if user.kind != "history" or "rating" not in user.inputs:
        return ()
    if user.rating_edges:
        return tuple(float(edge) for edge in user.rating_edges)
    ratings = prepared.train_histories().columns["ratings"]
    edges = np.unique(ratings)
    if len(edges) > RATING_RANGES:
        edges = np.unique(np.quantile(ratings, np.arange(RATING_RANGES) / RATING_RANGES).astype(np.float32))
    if len(edges) < 2:
        raise RecJaxError(
            f"config.towers.user.inputs={user.inputs!r} names 'rating', and all ratings of {config.data.path!r} are {edges[0]:g}: "
            "leave it out"
        )
    return tuple(edges.tolist())
