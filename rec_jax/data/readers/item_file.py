"""The items file of config.data.items, and the users file of config.data.users: Parquet, CSV or TSV (.gz too), ids and columns of text."""

from __future__ import annotations

from typing import Any

import polars as pl

from rec_jax.data.readers import delimited, files
from rec_jax.data.tables import Report, bad_input
from rec_jax.types import RecJaxError

ID_COLUMNS = ("item_id", "item", "id")
USER_COLUMNS = ("user_id", "user", "id")


def read(
    data: Any, report: Report, dtype: Any, id_columns: tuple[str, ...] = ID_COLUMNS, *, key: str = "items"
) -> tuple[pl.DataFrame, delimited.Place]:
    """Items file -> (items table with ids of `dtype` and all other columns as text, row -> "file:line").

    Args:
      id_columns: names the id column may have; the first one that is there is it. It comes as `item`.
      key: of `config.data`, which names the file.

    Raises:
      RecJaxError: no id column, or bad rows whose policy is "error".
    """
    file = files.single(data[key], f"config.data.{key}")
    if file.name.endswith(".parquet"):
        frame = pl.read_parquet(file.plain() or file.read())
        key = _id_column(file, frame.columns, id_columns)
        texts = [_text(frame.schema[c], c) for c in frame.columns if c != key]
        frame = frame.select(pl.col(key).cast(dtype, strict=False).alias("item"), *texts)
        place: delimited.Place = lambda row: f"{file}: row {row + 1}"
    else:
        separator = delimited.separator_of(file)
        names = delimited.header(file, separator)
        key = _id_column(file, names, id_columns)
        texts_there = [n for n in names if n != key]
        columns = {key: dtype} | dict.fromkeys(texts_there, pl.String)
        frame, place = delimited.read(file, columns, data.on_bad, report, separator=separator, optional=texts_there)
        frame = frame.rename({key: "item"} if key != "item" else {})
    empty = frame["item"].is_null()
    if not empty.any():
        return frame, place
    rows = frame.with_row_index("row").filter(~empty)["row"].to_list()
    for row in empty.arg_true():
        bad_input(report, data.on_bad, "bad_row", place(row), f"column {key} is empty or not {dtype}")
    return frame.filter(~empty), lambda row: place(rows[row])


def _id_column(file: files.File, names: list[str], id_columns: tuple[str, ...]) -> str:
    for column in id_columns:
        if column in names:
            return column
    raise RecJaxError(f"{file}: no id column ({' or '.join(id_columns)}); columns there: {', '.join(names)}")


def _text(dtype: Any, column: str) -> pl.Expr:
    """A column as text, "" for none; lists are joined with ", "."""
    text = pl.col(column).cast(pl.List(pl.String)).list.join(", ") if dtype == pl.List else pl.col(column).cast(pl.String)
    return text.fill_null("").alias(column)
