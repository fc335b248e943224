"""RecBole atomic files: NAME.inter, and NAME.item and NAME.user where they are there; tab-separated, `column:type` headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import polars as pl
from etils import epath

from rec_jax.config_places import EVENT
from rec_jax.data.readers import delimited, files
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, items_of, users_of
from rec_jax.types import RecJaxError

# Names that RecBole's data sets give to what we call otherwise.
COLUMNS = {
    "movie_title": "title", "item_name": "title", "name": "title", "class": "genres", "genre": "genres", "release_year": "year",
    "movie_year": "year", "category": "categories", "artist": "author", "book_title": "title",
}  # fmt: skip
LISTS = ("genres", "categories")  # token_seq columns whose words are values, not a sentence
ENDINGS = (".inter", ".item", ".user")


def stem(where: epath.Path) -> str:
    """The name that the atomic files at a path share: "ml-100k" of "ml-100k", "ml-100k.inter" or "ml-100k.inter.gz"."""
    name = where.name.removesuffix(".gz")
    return os.path.splitext(name)[0] if name.endswith(ENDINGS) else name


def inter_file(where: epath.Path) -> File | None:
    """The .inter file of a folder, of a file, or of a path without the ending; None where there is none.

    Raises:
      RecJaxError: a folder with several.
    """
    if where.is_dir():
        found = [f for name, f in files.folder(where).items() if name.endswith(".inter")]
        if len(found) > 1:
            names = ", ".join(f.name for f in found)
            raise RecJaxError(f"{where} holds several .inter files ({names}); set config.data.path to one of them")
        return found[0] if found else None
    return _beside(where.parent, stem(where) + ".inter")


def _beside(parent: epath.Path, name: str) -> File | None:
    for path in (parent / name, parent / f"{name}.gz"):
        if path.exists():
            return File(path, name)
    return None


def read(data: Any, report: Report) -> Tables:
    """Reads user_id, item_id and, where there, rating, timestamp and features of events of .inter; all columns of .item and .user.

    Raises:
      RecJaxError: no .inter file, a header without types, bad rows whose policy is "error".
    """
    where = files.resolve(data.path)
    inter = inter_file(where)
    if inter is None:
        raise RecJaxError(
            f"config.data.path={data.path!r}: no .inter file there; give the folder, the file, or its path without the ending"
        )
    header = _header(inter)
    columns: dict[str, Any] = {header["user_id"]: pl.String, header["item_id"]: pl.String}
    columns |= {header[c]: pl.Float64 for c in ("rating", "timestamp") if c in header}
    features = {EVENT + name: header[name] for name in data.event_features if name in header and header[name] not in columns}
    columns |= dict.fromkeys(features.values(), pl.String)
    events, event_place = delimited.read(inter, columns, data.on_bad, report, separator="\t", optional=list(features.values()))
    order = pl.int_range(pl.len(), dtype=pl.Int64)
    events = events.select(
        user=pl.col(header["user_id"]),
        item=pl.col(header["item_id"]),
        time=pl.col(header["timestamp"]).cast(pl.Int64) if "timestamp" in header else order,
        rating=pl.col(header["rating"]).cast(pl.Float32) if "rating" in header else pl.lit(1.0, pl.Float32),
        **{column: pl.col(full) for column, full in features.items()},
    )
    clock, name = "timestamp" in header, stem(inter.path)
    user_file, item_file = _beside(inter.path.parent, f"{name}.user"), _beside(inter.path.parent, f"{name}.item")
    users = users_of(events, _read_all(user_file, "user", data.on_bad, report)[0] if user_file else None)
    if item_file is None:
        return Tables(items_of(events), users, events, report, clock, event_place)
    items, item_place = _read_all(item_file, "item", data.on_bad, report)
    return Tables(items, users, events, report, clock, event_place, item_place)


def _header(file: File, required: tuple[str, ...] = ("user_id", "item_id")) -> dict[str, str]:
    """Column name -> "name:type" as the file has it."""
    names = delimited.header(file, "\t")
    missing = [r for r in required if r not in [n.partition(":")[0] for n in names]]
    if missing or not all(":" in n for n in names):
        raise RecJaxError(f"{file}:1: expected columns named column:type, with {' and '.join(required)}; found {', '.join(names)}")
    return {n.partition(":")[0]: n for n in names}


def _read_all(file: File, what: str, on_bad: Mapping[str, str], report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    """All columns of an .item or .user file as text, under our names."""
    header = _header(file, (f"{what}_id",))
    key = header[f"{what}_id"]
    others = [full for full in header.values() if full != key]
    frame, place = delimited.read(file, dict.fromkeys((key, *others), pl.String), on_bad, report, separator="\t", optional=others)
    out = {what: frame[key]}
    for column, full in header.items():
        if full == key:
            continue
        name = COLUMNS.get(column, column)
        values = frame[full]
        if name in LISTS and full.endswith(":token_seq"):
            commas = values.str.contains(",", literal=True)
            words = values.str.replace_all(" ", ", ", literal=True)
            values = pl.select(pl.when(commas).then(values).otherwise(words)).to_series()
        out[name if name not in out else column] = values
    return pl.DataFrame(out), place
