"""Delimited text -> a frame: polars where the file is clean; where it is not, row by row, so that each bad row is named and counted."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data.readers.files import BLOCK, File
from rec_jax.data.tables import Report, bad_input
from rec_jax.types import RecJaxError

Place = Callable[[int], str]
STAND_IN = "\x1f"  # polars takes separators of one byte; this one stands in for longer ones


def header(file: File, separator: str) -> list[str]:
    """Column names of the first line.

    Raises:
      RecJaxError: an empty file, or a first line that is not UTF-8.
    """
    for _, line in file.lines():
        try:
            text = line.decode("utf-8-sig")
            return next(csv.reader([text])) if separator == "," else text.split(separator)
        except UnicodeDecodeError as e:
            raise RecJaxError(f"{file}:1: the header is not UTF-8 ({e})") from e
    raise RecJaxError(f"{file}: the file is empty; expected a header and rows")


def separator_of(file: File) -> str:
    """The separator by the file's name: a comma for .csv, a tab otherwise."""
    return "," if file.name.endswith(".csv") else "\t"


def read(
    file: File,
    columns: Mapping[str, Any],
    on_bad: Mapping[str, str],
    report: Report,
    *,
    separator: str,
    names: Sequence[str] = (),
    optional: Sequence[str] = (),
    latin1: bool = False,
) -> tuple[pl.DataFrame, Place]:
    """Reads the named columns -> (frame, row -> "file:line").

    Commas mean CSV with double quotes (RFC 4180); any other separator takes quotes as they are. Blank lines are no rows.

    Args:
      columns: column name -> polars type (String, integers, floats) in the order wanted.
      names: all columns, where the file has no header.
      optional: text columns that may be empty; they become "". An empty field of any other column is a bad row.
      latin1: the format's encoding is latin-1 (a file that is valid UTF-8 is taken as that: some copies were converted).

    Raises:
      RecJaxError: a column that is not there, or a bad row whose policy is "error".
    """
    all_names = list(names) or header(file, separator)
    missing = [c for c in columns if c not in all_names]
    if missing:
        raise RecJaxError(f"{file}: no column {', '.join(map(repr, missing))}; columns there: {', '.join(all_names)}")
    if len(set(all_names)) < len(all_names):
        raise RecJaxError(f"{file}:1: a column name occurs twice: {', '.join(all_names)}")
    first = 1 if names else 2
    frame = _read_clean(file, columns, all_names, separator, not names, optional, latin1)
    if frame is not None:
        return frame, lambda row: f"{file}:{row + first}"
    frame, lines = _read_rows(file, columns, all_names, separator, not names, optional, latin1, on_bad, report)
    return frame, lambda row: f"{file}:{lines[row]}"


def _read_clean(
    file: File, columns: Mapping[str, Any], names: list[str], separator: str, has_header: bool, optional: Sequence[str], latin1: bool
) -> pl.DataFrame | None:
    """The frame, if every row is good and on one line; None otherwise."""
    quoted = separator == ","
    if quoted and optional:
        return None  # a short row cannot be told from an empty last field: read row by row
    if latin1 or len(separator) > 1:
        data = file.read()
        data = _decode(data, latin1).encode() if latin1 and not data.isascii() else data
        source: Any = data.replace(separator.encode(), STAND_IN.encode()) if len(separator) > 1 else data
        blocks: Iterator[bytes] = iter((source,))
        separator = STAND_IN if len(separator) > 1 else separator
    elif file.plain():
        source, blocks = file.plain(), _blocks(file)
    else:
        source = file.read()
        blocks = iter((source,))
    try:
        frame = pl.read_csv(
            source,
            has_header=has_header,
            separator=separator,
            quote_char='"' if quoted else None,
            schema={n: columns.get(n, pl.String) for n in names},
            columns=[names.index(c) for c in columns],
            raise_if_empty=False,
        ).select(list(columns))
    except (pl.exceptions.ComputeError, pl.exceptions.NoDataError):
        return None
    frame = frame.with_columns(pl.col(c).fill_null("") for c in optional if c in columns)
    bad = sum(frame.null_count().row(0)) if frame.width else 0
    bad += sum(int((~frame[c].is_finite()).sum()) for c, t in columns.items() if t.is_float())
    breaks, separators, last = 0, 0, b"\n"
    for block in blocks:
        breaks += block.count(b"\n")
        separators += 0 if quoted else block.count(separator.encode())
        last = block[-1:] or last
    lines = frame.height + has_header
    on_one_line = breaks + (last != b"\n") == lines
    return frame if not bad and on_one_line and (quoted or separators == lines * (len(names) - 1)) else None


def _blocks(file: File) -> Iterator[bytes]:
    with file.open() as f:
        while block := f.read(BLOCK):
            yield block


def _decode(data: bytes, latin1: bool) -> str:
    """Text; bytes that are not of the encoding become lone surrogates, which the caller looks for."""
    if latin1:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data.decode("latin-1")
    return data.decode("utf-8", "surrogateescape")


def _records(file: File, separator: str, latin1: bool) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row."""
    if separator != ",":
        lines: Any = enumerate(_decode(file.read(), True).split("\n"), 1) if latin1 else None
        for number, line in lines or ((n, _decode(raw, False)) for n, raw in file.lines()):
            if line.strip():
                yield number, line.rstrip("\r\n").split(separator)
        return
    rows, number = csv.reader((_decode(raw, latin1) for raw in file.raw_lines()), strict=True), 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise RecJaxError(f"{file}:{number}: the quotes do not match from here on ({e}); mend the file") from e
        if row is None:
            return
        if row:
            yield number, row
        number = rows.line_num + 1


def _read_rows(
    file: File,
    columns: Mapping[str, Any],
    names: list[str],
    separator: str,
    has_header: bool,
    optional: Sequence[str],
    latin1: bool,
    on_bad: Mapping[str, str],
    report: Report,
) -> tuple[pl.DataFrame, np.ndarray]:
    """Row by row -> (frame of the good rows, their line numbers); the others go by their policies."""
    parsers = [(names.index(c), _parser(dtype), c not in optional) for c, dtype in columns.items()]
    values: list[list[Any]] = [[] for _ in columns]
    lines: list[int] = []
    name = str(file)
    for number, row in itertools.islice(_records(file, separator, latin1), int(has_header), None):
        place = f"{name}:{number}"
        if len(row) != len(names):
            detail = f"{len(row)} fields, expected {len(names)} ({', '.join(names)})"
            bad_input(report, on_bad, "bad_row", place, detail)
            continue
        broken = None if "".join(row).isascii() else next((f for f in row if any("\udc80" <= c <= "\udcff" for c in f)), None)
        if broken is not None:
            raw = broken.encode("utf-8", "surrogateescape")
            bad_input(report, on_bad, "bad_encoding", place, f"{raw!r} is not UTF-8")
            continue
        parsed = [parse(row[i]) for i, parse, _ in parsers]
        wrong = [c for c, v, (_, _, needed) in zip(columns, parsed, parsers, strict=True) if v is None or (needed and v == "")]
        if wrong:
            text, dtype = row[names.index(wrong[0])], columns[wrong[0]]
            expected = "a value" if dtype == pl.String else "a number" if dtype.is_float() else "a whole number"
            bad_input(report, on_bad, "bad_row", place, f"column {wrong[0]} is {text!r}, expected {expected}")
            continue
        lines.append(number)
        for column, value in zip(values, parsed, strict=True):
            column.append(value)
    series = [pl.Series(c, v, dtype=t) for (c, t), v in zip(columns.items(), values, strict=True)]
    return pl.DataFrame(series), np.asarray(lines, np.int64)


def _parser(dtype: Any) -> Callable[[str], Any]:
    """A polars type -> a function of a field to its value, None where it is none."""
    if dtype == pl.String:
        return str
    if dtype.is_float():
        return _float
    bounds = np.iinfo(str(dtype).lower())
    low, high = int(bounds.min), int(bounds.max)

    def whole(text: str) -> int | None:
        try:
            value = int(text) if text.isascii() and "_" not in text else None  # Python takes 1_000 for a number
        except ValueError:
            return None
        return value if value is not None and low <= value <= high else None

    return whole


def _float(text: str) -> float | None:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
