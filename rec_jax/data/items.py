"""An items file for user sequences (config.data.items), made of another format's table of items."""

from __future__ import annotations

import os
from collections.abc import Callable

import polars as pl
from etils import epath

from rec_jax.data.readers import delimited, files, movielens
from rec_jax.data.tables import Report
from rec_jax.types import RecJaxError

STRICT = {"bad_row": "error", "bad_encoding": "error"}  # nothing is left out in silence


def write(reader: str, path: str, out: str, ids: str = "") -> str:
    """Writes the items at `path` as TSV with item_id, title, year and genres -> what was written, in words.

    Args:
      reader: of ITEMS.
      path: the file of items that the reader knows by its name.
      out: the TSV.
      ids: a text file of two columns, "id in the sequence file, id in `path`": the items that it names, under the first. "" = all, as
        they are called in `path`.

    Raises:
      RecJaxError: a missing file, a bad line, an id twice, an id that no item has.
    """
    if reader not in ITEMS:
        raise RecJaxError(f"--reader={reader!r}: no such reader of items; there are {', '.join(ITEMS)}")
    frame, place = ITEMS[reader](files.single(path, "--path"))
    names = frame["item"].cast(pl.String).to_list()
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if rows.setdefault(name, row) != row:
            raise RecJaxError(f"{place(row)}: item id {name!r} occurs a second time; the first is at {place(rows[name])}")
    pairs = _ids(files.single(ids, "--ids"), rows) if ids else list(zip(names, range(len(names)), strict=True))
    columns = [c for c in ("title", "year", "genres") if c in frame.columns]
    texts = [[" ".join(text.split()) for text in frame[c].to_list()] for c in columns]  # a tab would end a field
    lines = ["\t".join(["item_id", *columns])] + ["\t".join([name, *(of[row] for of in texts)]) for name, row in pairs]
    file = epath.Path(out).expanduser()
    if not file.parent.is_dir():
        raise RecJaxError(f"--out={out}: there is no folder {file.parent}")
    temporary = file.parent / f".{file.name}.{os.getpid()}.tmp"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(file)
    left = f"; {len(names) - len(pairs):,} others are not in {ids}" if ids else ""
    return f"{len(pairs):,} items with {', '.join(columns)}: {out}{left}"


def _movielens(file: files.File) -> tuple[pl.DataFrame, delimited.Place]:
    if file.name not in movielens.MOVIES:
        raise RecJaxError(f"--path={file}: reader 'movielens' has items in {', '.join(movielens.MOVIES)}; name one of them")
    return movielens.MOVIES[file.name](file, STRICT, Report())


ITEMS: dict[str, Callable[[files.File], tuple[pl.DataFrame, delimited.Place]]] = {"movielens": _movielens}


def _ids(file: files.File, rows: dict[str, int]) -> list[tuple[str, int]]:
    """The map of ids -> (id in the sequence file, row of the item), in the order of the map."""
    out: dict[str, int] = {}
    for number, line in file.lines():
        pair = line.decode("utf-8", "replace").split()
        if len(pair) != 2:
            raise RecJaxError(f"{file}:{number}: {len(pair)} columns, expected 2: the id in the sequence file and the original id")
        name, original = pair
        if original not in rows:
            raise RecJaxError(f"{file}:{number}: no item has the id {original!r}; are the columns the other way round?")
        if name in out:
            raise RecJaxError(f"{file}:{number}: id {name!r} occurs a second time")
        out[name] = rows[original]
    if not out:
        raise RecJaxError(f"{file}: the file is empty; expected lines of two ids")
    return list(out.items())
