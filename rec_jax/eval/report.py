"""Tables for people, JSON for machines; both the same on every run of the same figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from etils import epath

from rec_jax.types import RecJaxError

DIGITS = 4
JSON_DIGITS = 8  # significant


def table(results: Mapping[str, Mapping[str, float]], columns: Sequence[str] | None = None, *, best: bool = True) -> str:
    """{name: {metric: value}} -> aligned plain text, a row a name in the order given, four decimals.

    Args:
      columns: metric names, by default all in the order they come; one that a row lacks shows as "-", one that every row lacks is an error.
      best: marks the highest value of each column with "*", where there are several rows.

    Raises:
      RecJaxError: a column that no row has, a value that is NaN or infinite.
    """
    head, *body = _cells(results, columns, best)
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in (head, *body)
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def show(results: Mapping[str, Mapping[str, float]], columns: Sequence[str] | None = None, *, title: str = "", file: Any = None) -> None:
    """Prints the table: with rules and colour on a terminal, as `table` elsewhere."""
    file = sys.stdout if file is None else file
    if not file.isatty():
        file.write((title + "\n" if title else "") + table(results, columns))
        return
    head, *body = _cells(results, columns, True)
    grid = rich.table.Table(title=title or None)
    for i, name in enumerate(head):
        grid.add_column(name, justify="left" if i == 0 else "right")
    for row in body:
        grid.add_row(*(f"[bold green]{cell}[/]" if cell.endswith("*") else cell for cell in row))
    rich.console.Console(file=file).print(grid)


def write_json(path: Any, metrics: Mapping[str, Any]) -> None:
    """Writes figures with sorted keys and eight significant digits, one a line; the file appears whole or not at all.

    Nothing of the run but its figures gets in: no clock, path or duration.

    Raises:
      RecJaxError: a value that is NaN, infinite or no number.
    """
    path = epath.Path(path)
    rounded = {name: _number(name, value) for name, value in metrics.items()}
    text = json.dumps(rounded, indent=1, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)


def _number(name: str, value: Any) -> int | float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RecJaxError(f"metric {name!r} is {value!r}, no number") from None
    if not math.isfinite(number):
        raise RecJaxError(f"metric {name!r} is {number}; it must be finite")
    return int(value) if isinstance(value, int) else float(f"{number:.{JSON_DIGITS}g}")


def _cells(results: Mapping[str, Mapping[str, float]], columns: Sequence[str] | None, best: bool) -> list[list[str]]:
    if not results:
        raise RecJaxError("a table needs at least one row of results")
    columns = list(dict.fromkeys(metric for row in results.values() for metric in row)) if columns is None else columns
    rows = [["", *columns]] + [[name] for name in results]
    for column in columns:
        values = {name: _number(f"{name}/{column}", row[column]) for name, row in results.items() if column in row}
        if not values:
            raise RecJaxError(f"no result has the metric {column!r}; there are {', '.join(sorted(set().union(*results.values())))}")
        shown = {name: f"{value:.{DIGITS}f}" for name, value in values.items()}
        top = max(shown.values(), key=float)
        mark = best and len(values) > 1
        for row in rows[1:]:
            text = shown.get(row[0], "-")
            row.append(text + ("*" if mark and text == top else " " if mark else ""))
    return rows
