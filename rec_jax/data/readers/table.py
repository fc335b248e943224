"""Any Parquet, CSV or TSV of events or impressions, by a map of column names; with an optional items file."""

from __future__ import annotations

from typing import Any

import polars as pl

from rec_jax.config_places import EVENT
from rec_jax.data import impressions
from rec_jax.data.impressions import CONTEXT, LABEL, USED, ImpressionTable
from rec_jax.data.readers import delimited, files, item_file
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, bad_input, items_of, users_of
from rec_jax.types import RecJaxError

ROLES = ("user", "item", "time", "rating")
IMPRESSION_ROLES = {CONTEXT: "context", LABEL: "labels", "propensity": "propensity"}  # column of a table of impressions -> role


def read(data: Any, report: Report) -> Tables:
    """Reads the columns that `data.columns` and `data.event_features` name; "" for time = the order in the file, for rating = 1.

    Ids keep the type of a Parquet column (integers save memory) and are text otherwise. Times are numbers (seconds) or dates.

    Where `data.impressions.split` asks for what the input has, each row is an impression with the labels, the context and the propensity
    that `data.columns` names, and the events are the rows whose first label is above 0. Without labels all rows are positives.

    Raises:
      RecJaxError: a role without a column, a column that is not there, bad rows whose policy is "error".
    """
    named = {role: data.columns[role] for role in ROLES if data.columns.get(role)}
    for role in ("user", "item"):
        if role not in named:
            raise RecJaxError(f"config.data.columns.{role} is empty; set it to the name of the {role} column")
    roles = (*ROLES, *IMPRESSION_ROLES.values())
    unknown = [role for role in data.columns if role not in roles]
    if unknown:
        raise RecJaxError(f"config.data.columns.{unknown[0]}: no such role; roles: {', '.join(roles)}")
    named |= _of_impressions(data) | {EVENT + name: name for name in data.event_features}
    for role, column in named.items():
        other = next(r for r, c in named.items() if c == column)
        if other != role:
            raise RecJaxError(f"{_key(role)}={column!r} is also {_key(other)}; each role needs its own column")
    where = files.resolve(data.path)
    if where.is_dir() or where.name.endswith(".parquet"):
        events, place = _read_parquet(where, named, data, report)
    else:
        events, place = _read_text(files.single(data.path), named, data, report)
    users, clock, shown = users_of(events), "time" in named, None
    catalogue = items_of(events)
    if impressions.asked(data):
        events, place, shown = _impressions(*_observed(events, place, data, report))
    if not data["items"]:
        return Tables(catalogue, users, events, report, clock, place, impressions=shown)
    id_columns = (named["item"], *(c for c in item_file.ID_COLUMNS if c != named["item"]))
    items, item_place = item_file.read(data, report, events.schema["item"], id_columns)
    return Tables(items, users, events, report, clock, place, item_place, shown)


def _of_impressions(data: Any) -> dict[str, str]:
    """Columns of the table of impressions -> their names in the file, where such are asked for."""
    columns = data.columns
    out = {CONTEXT + name: name for name in columns.get("context", ())} | {LABEL + name: name for name in columns.get("labels", ())}
    out |= {"propensity": columns.propensity} if columns.get("propensity", "") else {}
    if out and not impressions.asked(data):
        role = next(iter(out))
        raise RecJaxError(
            f"{_key(role)} names {out[role]!r}, but config.data.impressions.split is {data.impressions.split!r}; set that to 'random' or "
            "'temporal'"
        )
    return out


def _key(role: str) -> str:
    """The config key that names the column of a role."""
    if role.startswith(EVENT):
        return "config.data.event_features"
    return "config.data.columns." + next((key for start, key in IMPRESSION_ROLES.items() if role.startswith(start)), role)


def _observed(rows: pl.DataFrame, place: delimited.Place, data: Any, report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    """Rows whose labels are finite numbers or empty, and whose propensity is a probability; the others go by the policy bad_row."""
    numbers, bad = rows, pl.repeat(False, rows.height, eager=True)
    for column in (c for c in rows.columns if c.startswith(LABEL) or c == "propensity"):
        text = rows[column].dtype == pl.String
        value = rows[column].cast(pl.Float64, strict=False).cast(pl.Float32)
        if column == "propensity":
            wrong, expected = ~((value > 0) & (value <= 1)).fill_null(False), "a probability, above 0 and at most 1"
        else:
            wrong, expected = value.is_infinite().fill_null(False), "a number, or nothing where it was not observed"
            wrong |= value.is_null() & (rows[column].str.strip_chars() != "") if text else wrong
        for row in (wrong & ~bad).arg_true():
            detail = f"column {data.columns.propensity if column == 'propensity' else column.removeprefix(LABEL)} is {rows[column][row]!r}"
            bad_input(report, data.on_bad, "bad_row", place(row), f"{detail}, expected {expected}")
        bad |= wrong
        numbers = numbers.with_columns(value.fill_nan(None).alias(column))
    if not bad.any():
        return numbers, place
    kept = (~bad).arg_true().to_numpy()
    return numbers.filter(~bad), lambda row: place(int(kept[row]))


def _impressions(rows: pl.DataFrame, place: delimited.Place) -> tuple[pl.DataFrame, delimited.Place, ImpressionTable]:
    """All rows -> (events, row of them -> "file:line", impressions)."""
    labels = [c for c in rows.columns if c.startswith(LABEL)]
    features = [c for c in rows.columns if c.startswith(EVENT)]
    frame = rows.drop("rating", *features)
    frame = frame if labels else frame.with_columns(pl.lit(1.0, pl.Float32).alias(LABEL + USED))
    table = ImpressionTable(frame, positives=not labels, place=place)
    events = rows.select(*ROLES, *features, *labels[:1]).with_columns(impression=pl.int_range(pl.len(), dtype=pl.Int64))
    if labels:
        events = events.filter(pl.col(labels[0]) > 0).drop(labels[0])
    impression = events["impression"].to_numpy()
    return events, lambda row: place(int(impression[row])), table


def _read_parquet(where: Any, named: dict[str, str], data: Any, report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    paths = sorted(p for p in where.iterdir() if p.name.endswith(".parquet")) if where.is_dir() else [where]
    if not paths:
        raise RecJaxError(f"config.data.path={data.path!r}: no .parquet file in this folder")
    lazy = pl.scan_parquet([str(p) for p in paths])
    schema = lazy.collect_schema()
    missing = [f"{c!r} ({_key(role)})" for role, c in named.items() if c not in schema]
    if missing:
        raise RecJaxError(f"{where}: no column {', '.join(missing)}; columns there: {', '.join(schema)}")
    columns = {role: _typed(role, pl.col(c), schema[c], f"{where}: column {c}").alias(role) for role, c in named.items()}
    events = _complete(lazy.select(**columns)).collect(engine="streaming")
    return _whole(events, lambda row: f"{where}: row {row + 1}", data, report)


def _read_text(file: File, named: dict[str, str], data: Any, report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    columns: dict[str, Any] = {named[role]: pl.String for role in ("user", "item", "time") if role in named}
    columns |= {named["rating"]: pl.Float32} if "rating" in named else {}
    extra = [column for role, column in named.items() if role not in ROLES]
    columns |= dict.fromkeys(extra, pl.String)
    frame, place = delimited.read(file, columns, data.on_bad, report, separator=delimited.separator_of(file), optional=extra)
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
    if role.startswith((CONTEXT, EVENT)):
        if dtype.is_float() or dtype.is_nested():
            what = "context fields" if role.startswith(CONTEXT) else "features of events"
            raise RecJaxError(f"{place} is {dtype}; {what} are categories: text or whole numbers")
        return column.cast(pl.String).fill_null("")
    if role not in ROLES and dtype == pl.Boolean:
        return column.cast(pl.Float32)
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
    """The four columns of the events table, and those of impressions and of features of events."""
    names = events.collect_schema().names()
    time = pl.col("time") if "time" in names else pl.int_range(pl.len(), dtype=pl.Int64)
    rating = pl.col("rating") if "rating" in names else pl.lit(1.0, pl.Float32)
    more = [name for name in names if name not in ROLES]
    return events.select("user", "item", time.alias("time"), rating.alias("rating"), *more)


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
