"""Readers: one small file per format, each `read(data, report) -> Tables`; look one up by `config.data.reader`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etils import epath

from rec_jax.config_places import EVENT
from rec_jax.data import tables as tables_lib
from rec_jax.data.readers import (
    amazon,
    files,
    frappe,
    goodbooks,
    lastfm,
    mind,
    movielens,
    msweb,
    open_bandit,
    recbole,
    sequences,
    steam,
    table,
)
from rec_jax.data.tables import Report, Tables
from rec_jax.types import RecJaxError

READERS: dict[str, Callable[[Any, Report], Tables]] = {
    "movielens": movielens.read,
    "sequences": sequences.read,
    "recbole": recbole.read,
    "amazon": amazon.read,
    "mind": mind.read,
    "table": table.read,
    "frappe": frappe.read,
    "open_bandit": open_bandit.read,
    "lastfm": lastfm.read,
    "steam": steam.read,
    "goodbooks": goodbooks.read,
    "msweb": msweb.read,
}

# What each reader expects at config.data.path.
EXPECTS = {
    "movielens": "a folder or .zip with u.data and u.item (100K), ratings.dat and movies.dat (1M, 10M), or ratings.csv and movies.csv",
    "sequences": 'a text file, one user a line: user item item ... in time order, or a .json file {"user": [item, ...]} (.gz too)',
    "recbole": "a folder with one .inter file, that file, or its path without the ending",
    "amazon": "a reviews file, JSON lines (.gz too), with the meta file in config.data.items",
    "mind": "a folder or .zip with behaviors.tsv and news.tsv",
    "table": "a Parquet file, a folder of them, or a .csv or .tsv file (.gz too)",
    "frappe": "a folder or .zip with frappe.csv and meta.csv",
    "open_bandit": "a folder POLICY/CAMPAIGN with CAMPAIGN.csv and item_context.csv (.gz too), or one with several of them below it",
    "lastfm": "a folder or .zip with user_artists.dat and artists.dat",
    "steam": "a folder or .zip with game_purchase.dat, game_play.dat and item_info.dat",
    "goodbooks": "a folder or .zip with ratings.csv (or a part of it, ratings_NAME.csv) and books.csv",
    "msweb": "the file anonymous-msweb.data (.gz too)",
}


def read(data: Any) -> Tables:
    """Reads the tables that `config.data` names, applies the policies for duplicate item ids, adds display names, and checks the schema.

    Raises:
      RecJaxError: no such reader, a missing file (says what the reader expects), or bad input whose policy is "error";
        features of events that the reader does not give.
    """
    reader = _reader(data)
    where = files.resolve(data.path)
    if not where.exists() and not (data.reader == "recbole" and recbole.inter_file(where)):
        raise RecJaxError(f"config.data.path={data.path!r}: no such file or folder; reader {data.reader!r} expects {EXPECTS[data.reader]}")
    tables = tables_lib.unique_items(reader(data, Report()), data.on_bad)
    tables.items = tables_lib.with_names(tables.items)
    if absent := [name for name in data.event_features if EVENT + name not in tables.events.columns]:
        raise RecJaxError(
            f"config.data.event_features names {absent[0]!r}, which config.data.reader={data.reader!r} does not find among the columns of "
            f"the events of {data.path}: the readers table and recbole take any column that they do not read anyway, frappe those of the "
            "context, and others none"
        )
    tables_lib.check(tables)
    return tables


def inputs(data: Any) -> list[epath.Path]:
    """The files that `read` may look at, sorted: for fingerprints."""
    _reader(data)
    out: list[epath.Path] = []
    for key, path in (("config.data.path", data.path), ("config.data.items", data["items"])):
        if not path and key == "config.data.items":
            continue
        where = files.resolve(path, key)
        if where.is_dir():
            out.extend(p for p in where.iterdir() if not p.is_dir())
            if data.reader == "open_bandit":
                out.extend(file.path for log in open_bandit.find(where) for file in (log.rows, log.items))
        elif where.exists():
            out.append(where)
        if data.reader == "recbole" and not where.is_dir():
            out.extend(p for p in where.parent.iterdir() if p.name.startswith(recbole.stem(where) + "."))
    return sorted(set(out))


def _reader(data: Any) -> Callable[[Any, Report], Tables]:
    if data.reader not in READERS:
        raise RecJaxError(f"config.data.reader={data.reader!r}: no such reader; readers: {', '.join(READERS)}")
    return READERS[data.reader]
