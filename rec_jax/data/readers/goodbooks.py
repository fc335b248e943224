"""goodbooks-10k: who rated which book, with the books' titles and authors; comma-separated.

Both layouts are read: the later one, whose books.csv has `book_id` as the ratings have it and `goodreads_book_id` beside it, and the first
one, where the ratings' `book_id` is the `id` of books.csv, and its `book_id` that of Goodreads.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from rec_jax.data.readers import delimited, files
from rec_jax.data.tables import Report, Tables, users_of
from rec_jax.types import RecJaxError


def read(data: Any, report: Report) -> Tables:
    """Reads each rating as an event, in the order of the file: there is no time.

    Raises:
      RecJaxError: a missing file, several files of ratings; bad rows whose policy is "error".
    """
    where = files.resolve(data.path)
    found = files.folder(where) if where.is_dir() or where.name.endswith(".zip") else {}
    ratings = ["ratings.csv"] if "ratings.csv" in found else [n for n in found if n.startswith("ratings_") and n.endswith(".csv")]
    if "books.csv" not in found or len(ratings) != 1:
        there = ", ".join(sorted(found)) or "nothing"
        raise RecJaxError(
            f"config.data.path={data.path!r}: expected a folder or .zip with books.csv and ratings.csv, or one ratings_NAME.csv; "
            f"found {there}"
        )
    columns = {"user_id": pl.Int32, "book_id": pl.Int32, "rating": pl.Float32}
    rows, place = delimited.read(found[ratings[0]], columns, data.on_bad, report, separator=",")
    events = rows.select(user="user_id", item="book_id", time=pl.int_range(pl.len(), dtype=pl.Int64), rating="rating")
    key = "book_id" if "goodreads_book_id" in delimited.header(found["books.csv"], ",") else "id"
    texts = {key: pl.Int32, "title": pl.String, "authors": pl.String}
    books, item_place = delimited.read(found["books.csv"], texts, data.on_bad, report, separator=",", optional=("title", "authors"))
    return Tables(books.select(item=key, title="title", author="authors"), users_of(events), events, report, False, place, item_place)
