"""Any Parquet, CSV or TSV of events, by a map of column names; with an optional items file."""

from __future__ import annotations

from typing import Any

import polars as pl

from rec_jax.data.readers import delimited, files, item_file
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, bad_input, items_of, users_of
from rec_jax.types import RecJaxError

ROLES = ("user", "item", "time", "rating")


def read(data: Any, report: Report) -> Tables:
    """Reads the columns that `data.columns` names; "" for time = the order in the file, for rating = 1.

    Ids keep the type of a Parquet column (integers save memory) and are text otherwise. Times are numbers (seconds) or dates.

    Raises:
      RecJaxError: a role without a column, a column that is not there, bad rows whose policy is "error".
    """
    named = {role: data.columns[role] for role in ROLES if data.columns.get(role)}
    for role in ("user", "item"):
        if role not in named:
            raise RecJaxError(f"config.data.columns.{role} is empty; set it to the name of the {role} column")
    unknown = [role for role in data.columns if role not in ROLES]
    if unknown:
        raise RecJaxError(f"config.data.columns.{unknown[0]}: no such role; roles: {', '.join(ROLES)}")
    for role, column in named.items():
        other = next(r for r, c in named.items() if c == column)
        if other != role:
            raise RecJaxError(f"config.data.columns.{role}={column!r} is also config.data.columns.{other}; each role needs its own column")
    where = files.resolve(data.path)
    if where.is_dir() or where.name.endswith(".parquet"):
        events, place = _read_parquet(where, named, data, report)
    else:
        events, place = _read_text(files.single(data.path), named, data, report)
    users, clock = users_of(events), "time" in named
    if not data["items"]:
        return Tables(items_of(events), users, events, report, clock, place)
    id_columns = (named["item"], *(c for c in item_file.ID_COLUMNS if c != named["item"]))
    items, item_place = item_file.read(data, report, events.schema["item"], id_columns)
    return Tables(items, users, events, report, clock, place, item_place)


def _read_parquet(where: Any, named: dict[str, str], data: Any, report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    paths = sorted(p for p in where.iterdir() if p.name.endswith(".parquet")) if where.is_dir() else [where]
    if not paths:
        raise RecJaxError(f"config.data.path={data.path!r}: no .parquet file in this folder")
    lazy = pl.scan_parquet([str(p) for p in paths])
    schema = lazy.collect_schema()
    missing = [f"{c!r} (config.data.columns.{role})" for role, c in named.items() if c not in schema]
    if missing:
        raise RecJaxError(f"{where}: no column {', '.join(missing)}; columns there: {', '.join(schema)}")
    columns = {role: _typed(role, pl.col(c), schema[c], f"{where}: column {c}").alias(role) for role, c in named.items()}
    events = _complete(lazy.select(**columns)).collect(engine="streaming")
    return _whole(events, lambda row: f"{where}: row {row + 1}", data, report)


def _read_text(file: File, named: dict[str, str], data: Any, report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    columns: dict[str, Any] = {named[role]: pl.String for role in ("user", "item", "time") if role in named}
    columns |= {named["rating"]: pl.Float32} if "rating" in named else {}
    frame, place = delimited.read(file, columns, data.on_bad, report, separator=delimited.separator_of(file))
    frame = frame.rename({column: role for role, column in named.items()})
    texts = frame["time"] if "time" in named else None
    if texts is not None:
        frame = frame.with_columns(time=_seconds(texts))
    return _whole(_complete(frame.lazy()).collect(), place, data, report, texts)


def _seconds(texts: pl.Series) -> pl.Series:
    """Times as text -> seconds, null where it is none: whole numbers, numbers, or, where none is a number, dates."""
    whole = texts.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return whole
    number = whole.fill_null(texts.cast(pl.Float64, strict=False).floor().cast(pl.Int64, strict=False))
    if number.null_count() < len(texts):
        return number
    return texts.str.to_datetime(strict=False, time_unit="us", time_zone="UTC").dt.epoch("s")


def _typed(role: str, column: pl.Expr, dtype: Any, place: str) -> pl.Expr:
    """A Parquet column in the type of its role."""
    if role in ("user", "item"):
        if dtype.is_integer():
            return column
        if dtype in (pl.String, pl.Categorical, pl.Enum):
            return column.cast(pl.String)
        raise RecJaxError(f"{place} is {dtype}; ids must be text or integers")
    if dtype.is_temporal() and role == "time":
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if not dtype.is_numeric():
        raise RecJaxError(f"{place} is {dtype}; expected {'seconds or a date' if role == 'time' else 'numbers'}")
    return column.cast(pl.Int64 if role == "time" else pl.Float32, strict=False)


def _complete(events: pl.LazyFrame) -> pl.LazyFrame:
    """The four columns of the events table."""
    names = events.collect_schema().names()
    time = pl.col("time") if "time" in names else pl.int_range(pl.len(), dtype=pl.Int64)
    rating = pl.col("rating") if "rating" in names else pl.lit(1.0, pl.Float32)
    return events.select("user", "item", time=time, rating=rating)


def _whole(
    events: pl.DataFrame, place: delimited.Place, data: Any, report: Report, texts: pl.Series | None = None
) -> tuple[pl.DataFrame, delimited.Place]:
    """Rows without an empty value and with a finite rating; the others go by the policy bad_row (`texts`: times as the file has them)."""
    bad = ~events["rating"].is_finite().fill_null(False)
    for column in ("user", "item", "time"):
        bad |= events[column].is_null()
    if not bad.any():
        return events, place
    for row in bad.arg_true():
        values = {c: texts[row] if c == "time" and texts is not None else events[c][row] for c in ROLES}
        shown = ", ".join(f"{c}={v!r}" for c, v in values.items())
        bad_input(report, data.on_bad, "bad_row", place(row), f"a value is empty, not finite or no number or date: {shown}")
    rows = (~bad).arg_true().to_numpy()
    return events.filter(~bad), lambda row: place(int(rows[row]))
