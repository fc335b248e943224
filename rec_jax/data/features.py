"""Features of items beside text and IDs, as `prepare` keeps them: columns of the items table, and given vectors.

In a prepared folder whose config names some:

    features.parquet    in index order: `categorical.NAME` (text), `multi_hot.NAME` (lists of text), `numeric.NAME` (numbers); null = none
    vectors/NAME.npy    given vectors [N, D_v] float32; a row of NaN where an item has none

What numbers the towers see instead is `feature_codes.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data import vectors as vectors_lib
from rec_jax.data.readers import item_file
from rec_jax.data.tables import Report, bad_input
from rec_jax.types import RecJaxError

COLUMNS = ("categorical", "multi_hot", "numeric")  # kinds of config.data.features that are columns
FILE, FOLDER = "features.parquet", "vectors"
USER_FILE = "user_features.parquet"  # of users, in index order, likewise


def columns_of(table: pl.DataFrame, data: Any, group: str = "features", what: str = "items") -> pl.DataFrame:
    """The columns of a table that `config.data.features` names, or another group of `config.data`, as text; `what` it is of, in words.

    Raises:
      RecJaxError: a name that is no column.
    """
    for kind in COLUMNS:
        for name in data[group][kind]:
            if name not in table.columns:
                raise RecJaxError(
                    f"config.data.{group}.{kind} names {name!r}, which is no column of the {what}; these have: "
                    f"{', '.join(table.columns) or 'none'}"
                )
    names = list(dict.fromkeys(name for kind in COLUMNS for name in data[group][kind]))
    return table.select(_text(table.schema[name], name, data.features.separator) for name in names)


def _text(dtype: Any, name: str, separator: str) -> pl.Expr:
    lists = isinstance(dtype, (pl.List, pl.Array))
    text = pl.col(name).cast(pl.List(pl.String)).list.join(separator) if lists else pl.col(name).cast(pl.String)
    return text.fill_null("").str.strip_chars()


def write(
    columns: pl.DataFrame, ids: Sequence[str], data: Any, report: Report, out: Path, place: Callable[[int], str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Columns of the catalogue's items [N rows] and their given vectors -> files under `out`; what meta.json says of each.

    Args:
      columns: of `columns_of`, in index order.
      ids: of the items [N].
      data: `config.data`.
      report: counts what items lack.
      out: the prepared folder.
      place: item -> "file:line".

    Raises:
      RecJaxError: bad input whose policy is "error"; a column without any value; a file of vectors that cannot be read or has none of these
        items.
    """
    meta = write_columns(columns, ids, data, report, out / FILE, place)
    for name, file in vectors_lib.sources(data.features.vectors).items():
        names, given = vectors_lib.read(file)
        mine = vectors_lib.aligned(names, given, ids)
        there = ~np.isnan(mine[:, 0])
        if not there.any():
            raise RecJaxError(f"{file}: no item of the catalogue has a vector; ids there are like {names[0]!r}, of items like {ids[0]!r}")
        _missing(~there, f"no vector in {file}", ids, data, report, place)
        (out / FOLDER).mkdir(exist_ok=True)
        np.save(out / FOLDER / f"{name}.npy", mine)
        used = int(there.sum())
        meta.setdefault(FOLDER, {})[name] = {"width": mine.shape[1], "missing": len(ids) - used, "unused": len(names) - used}
    return meta


def write_columns(
    columns: pl.DataFrame,
    ids: Sequence[str],
    data: Any,
    report: Report,
    file: Path,
    place: Callable[[int], str],
    *,
    group: str = "features",
    what: str = "item",
) -> dict[str, dict[str, dict[str, int]]]:
    """The columns alone, into a file; see `write`. `group` of `config.data` names them, `what` is what they are of, in a word."""
    made, meta = dict[str, pl.Series](), dict[str, dict[str, dict[str, int]]]()
    for kind in COLUMNS:
        for name in data[group][kind]:
            values = _VALUES[kind](columns[name], f"config.data.{group}", name, data, report, place)
            _missing(values.is_null().to_numpy(), f"column {name} is empty", ids, data, report, place, what)
            if values.null_count() == len(values):
                raise RecJaxError(f"config.data.{group}.{kind} names {name!r}, which has no value in any {what}; leave it out")
            each = values.explode(empty_as_null=True) if kind == "multi_hot" else values
            counts = {"values": each.drop_nulls().n_unique(), "missing": values.null_count()}
            made[f"{kind}.{name}"] = values
            meta.setdefault(kind, {})[name] = counts
    pl.DataFrame(made).write_parquet(file)
    return meta


def write_users(users: pl.DataFrame, data: Any, report: Report, out: Path) -> dict[str, dict[str, dict[str, int]]]:
    """The users table [U rows] -> USER_FILE under `out`; what meta.json says of each column.

    The columns are those of the file `config.data.users` or, where it names none, those that the reader gave.

    Raises:
      RecJaxError: as `write`; no such column, a user twice, a file with none of these users.
    """
    names = users["user"].to_list()
    if data.users:
        mine, where = _of_file(names, data, report)
    else:
        mine, where = _of_reader(users, data), lambda _: f"config.data.path={data.path!r}"
    return write_columns(mine, names, data, report, out / USER_FILE, where, group="user_features", what="user")


def _of_reader(users: pl.DataFrame, data: Any) -> pl.DataFrame:
    """The columns of the users table that `config.data.user_features` names [U rows], as text."""
    try:
        return columns_of(users.drop("user"), data, "user_features", "users")
    except RecJaxError as e:
        raise RecJaxError(
            f"{e} (config.data.users='' means what config.data.reader={data.reader!r} reads of users; a file that it names may have more)"
        ) from e


def _of_file(users: Sequence[str], data: Any, report: Report) -> tuple[pl.DataFrame, Callable[[int], str]]:
    """Users [U] -> their columns in the file `config.data.users` [U rows], as text, and user -> "file:line"."""
    frame, place = item_file.read(data, report, pl.String, item_file.USER_COLUMNS, key="users")
    names, rows = frame["item"].to_list(), dict[str, int]()
    for row, name in enumerate(names):
        if rows.setdefault(name, row) != row:
            raise RecJaxError(f"{place(row)}: user id {name!r} occurs a second time; the first is at {place(rows[name])}")
    found = [rows.get(name, -1) for name in users]
    if max(found, default=-1) < 0:
        there = f"like {names[0]!r}" if names else "none"
        raise RecJaxError(f"config.data.users={data.users!r} has none of the users; ids there are {there}, of users like {users[0]!r}")
    columns = columns_of(frame, data, "user_features", "users")
    wanted = pl.Series([row if row >= 0 else None for row in found], dtype=pl.UInt32)
    mine = columns.select(pl.all().gather(wanted)).fill_null("")
    return mine, lambda user: place(found[user]) if found[user] >= 0 else f"config.data.users={data.users!r}"


def read_columns(folder: Path, file: str = FILE) -> dict[str, dict[str, pl.Series]]:
    """Prepared folder -> kind -> name -> values of the catalogue's items [N], or of what else `file` has."""
    frame = pl.read_parquet(folder / file)
    out: dict[str, dict[str, pl.Series]] = {}
    for column in frame.columns:
        kind, _, name = column.partition(".")
        out.setdefault(kind, {})[name] = frame[column]
    return out


def read_vectors(folder: Path, name: str) -> np.ndarray:
    """Prepared folder -> given vectors of the catalogue's items [N, D_v]; rows of NaN where there are none."""
    return np.load(folder / FOLDER / f"{name}.npy")


def _missing(
    missing: np.ndarray, why: str, ids: Sequence[str], data: Any, report: Report, place: Callable[[int], str], what: str = "item"
) -> None:
    """Applies the policy `missing_feature` to items, or users, that lack one [N] bool."""
    rows = np.flatnonzero(missing)
    for i, row in enumerate(rows[:3].tolist()):
        count = len(rows) - 2 if i == 2 else 1  # the third example stands for all the others
        bad_input(report, data.on_bad, "missing_feature", place(row), f"{what} {ids[row]!r}: {why}", count)


def _categorical(text: pl.Series, key: str, name: str, data: Any, report: Report, place: Callable[[int], str]) -> pl.Series:
    return text.replace("", None)


def _multi_hot(text: pl.Series, key: str, name: str, data: Any, report: Report, place: Callable[[int], str]) -> pl.Series:
    """Cells -> their values, each once, in their order; null where there is none.

    Raises:
      RecJaxError: no cell has the separator, but some have "|".
    """
    separator = data.features.separator.strip()
    if not text.str.contains(separator, literal=True).any() and text.str.contains("|", literal=True).any():
        cell = text.filter(text.str.contains("|", literal=True))[0]
        raise RecJaxError(
            f"{key}.multi_hot names {name!r}: no cell has config.data.features.separator={data.features.separator!r}, but "
            f"{cell!r} has '|'; set the separator to '|'"
        )
    parts = text.str.split(separator).list.eval(pl.element().str.strip_chars())
    parts = parts.list.eval(pl.element().filter(pl.element() != "")).list.unique(maintain_order=True)
    return pl.select(pl.when(parts.list.len() > 0).then(parts)).to_series()


def _numeric(text: pl.Series, key: str, name: str, data: Any, report: Report, place: Callable[[int], str]) -> pl.Series:
    """Cells -> numbers; null where there is none. "NaN" is none too.

    Raises:
      RecJaxError: a cell that is no finite number, whose policy is "error".
    """
    values = text.cast(pl.Float64, strict=False)
    wrong = ((values.is_null() & (text != "")) | values.is_infinite()).fill_null(False)
    rows = wrong.arg_true().to_list()
    for i, row in enumerate(rows[:3]):
        count = len(rows) - 2 if i == 2 else 1
        bad_input(report, data.on_bad, "bad_feature", place(row), f"column {name} is {text[row]!r}, expected a number or nothing", count)
    return pl.select(pl.when(wrong).then(None).otherwise(values.fill_nan(None))).to_series()


_VALUES: dict[str, Callable[..., pl.Series]] = {"categorical": _categorical, "multi_hot": _multi_hot, "numeric": _numeric}
