"""Features of events beside their item, time and rating (their kind, the device, ...): columns of the events table as numbers.

Records carry them as `event_NAME`, int32. Categories are numbered from 1 in alphabetical order, by the train events alone; 0 is none, or
one that no train event has. meta.json of a prepared folder says, as `event_features`, what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl

from rec_jax.config_places import EVENT
from rec_jax.data.tables import Report, bad_input
from rec_jax.types import RecJaxError

META = "event_features"  # of meta.json: name -> {"categories", "missing": events without, "unseen": events with none of these}


def code(
    events: pl.DataFrame, rows: np.ndarray, train: np.ndarray, data: Any, report: Report, place: Callable[[int], str]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Rows [E] of the events table -> numbers [E] int32 of each of `config.data.event_features`, by column of the records; and their meta.

    Args:
      events: with a column of text `event_NAME` for each.
      rows: of the events that are kept, in the records' order.
      train: [E] bool, which of them are of the train part.
      data: `config.data`.
      report: counts events without a value.
      place: row of the events table -> "file:line".

    Raises:
      RecJaxError: an event without a value where the policy is "error"; a column without any value in a train event.
    """
    out, meta = dict[str, np.ndarray](), dict[str, dict[str, Any]]()
    for name in data.event_features:
        values = events[EVENT + name].gather(rows).fill_null("").str.strip_chars()
        missing = (values == "").to_numpy()
        for n, row in enumerate(np.flatnonzero(missing)[:3].tolist()):
            count = int(missing.sum()) - 2 if n == 2 else 1  # the third example stands for all the others
            bad_input(report, data.on_bad, "missing_feature", place(int(rows[row])), f"column {name} of an event is empty", count)
        categories = sorted(values.filter(pl.Series(train & ~missing)).unique().to_list())
        if not categories:
            raise RecJaxError(f"config.data.event_features names {name!r}, which has no value in any train event; leave it out")
        numbers = np.arange(1, len(categories) + 1, dtype=np.int32)
        coded = values.replace_strict(categories, numbers, default=0, return_dtype=pl.Int32).to_numpy()
        out[EVENT + name] = coded
        unseen = int(((coded == 0) & ~missing).sum())
        meta[name] = {"categories": categories, "missing": int(missing.sum()), "unseen": unseen}
    return out, meta


def categories_of(meta: Mapping[str, Any]) -> dict[str, list[str]]:
    """What meta.json says -> name -> categories; the first one has the number 1."""
    return {name: found["categories"] for name, found in meta.get(META, {}).items()}


def rows_in(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Two data sets, by their meta.json -> column of the records -> row [V + 1] in the old one's table of each row of the new one's.

    -1 = new there. Row 0, for none, is row 0. Features that one of them lacks are left out.
    """
    before, out = categories_of(old), dict[str, np.ndarray]()
    for name, categories in categories_of(new).items():
        if name in before:
            row = {category: n for n, category in enumerate(before[name], start=1)}
            out[EVENT + name] = np.asarray([0, *(row.get(category, -1) for category in categories)])
    return out
