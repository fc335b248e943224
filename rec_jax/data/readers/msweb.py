"""Anonymous Microsoft web data (UCI): which areas of a site each user visited, with the areas' titles; comma-separated lines of six kinds.

Reference: Breese et al., Empirical Analysis of Predictive Algorithms for Collaborative Filtering, UAI 1998.
"""

from __future__ import annotations

import csv
from typing import Any

import polars as pl

from rec_jax.data.readers import files
from rec_jax.data.tables import Report, Tables, bad_input, users_of
from rec_jax.types import RecJaxError

FIELDS = {"A": 5, "C": 3, "V": 3, "I": 4, "T": 6, "N": 3}  # of a line of each kind; I, T and N describe the log itself


def read(data: Any, report: Report) -> Tables:
    """Reads the lines A (an area: number, title, path), C (a user) and V (an area that the user of the last C visited), in their order.

    An area's path is its `description`. There is no time: the order is that of the file.

    Raises:
      RecJaxError: a file without areas; bad lines whose policy is "error".
    """
    file = files.single(data.path)
    areas: list[tuple[int, str, str]] = []
    visits: list[tuple[int, int]] = []
    area_lines, visit_lines, user = [], [], None
    for number, raw in file.lines():
        place = f"{file}:{number}"
        try:
            row = next(csv.reader([raw.decode()], strict=True))
        except (UnicodeDecodeError, csv.Error) as e:
            bad_input(report, data.on_bad, "bad_row", place, f"the line cannot be read ({e})")
            continue
        kind = row[0]
        fault = _fault(row)
        if not fault and kind == "V" and user is None:
            fault = "a visit before any user: expected a line C,NAME,NUMBER first"
        if fault:
            bad_input(report, data.on_bad, "bad_row", place, fault)
            user = None if kind == "C" else user  # else the visits that follow would be another user's
        elif kind == "A":
            areas.append((int(row[1]), row[3], row[4]))
            area_lines.append(number)
        elif kind == "C":
            user = int(row[2])
        elif kind == "V":
            assert user is not None
            visits.append((user, int(row[1])))
            visit_lines.append(number)
    if not areas or not visits:
        raise RecJaxError(
            f"{file}: {len(areas)} areas (lines A) and {len(visits)} visits (lines V); expected a file like anonymous-msweb.data"
        )
    items = pl.DataFrame(areas, schema={"item": pl.Int32, "title": pl.String, "description": pl.String}, orient="row")
    events = pl.DataFrame(visits, schema={"user": pl.Int32, "item": pl.Int32}, orient="row")
    events = events.with_columns(time=pl.int_range(pl.len(), dtype=pl.Int64), rating=pl.lit(1.0, pl.Float32))
    at = lambda lines: lambda row: f"{file}:{lines[row]}"
    return Tables(items, users_of(events), events, report, False, at(visit_lines), at(area_lines))


def _fault(row: list[str]) -> str:
    """What is wrong with a line; "" for nothing."""
    kind = row[0]
    if kind not in FIELDS:
        return f"a line of kind {kind!r}, expected one of {', '.join(FIELDS)}"
    if len(row) != FIELDS[kind]:
        return f"{len(row)} fields, expected {FIELDS[kind]} in a line of kind {kind}"
    number = row[2] if kind == "C" else row[1]
    if kind in "ACV" and not (number.isascii() and number.isdigit()):
        return f"the number is {number!r}, expected a whole number"
    return ""
