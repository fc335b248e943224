"""MovieLens: 100K, 1M, 10M, and the CSV layout of latest-small, 20M, 25M and 32M; told apart by the files that are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from rec_jax.data.readers import delimited, files
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, users_of
from rec_jax.types import RecJaxError

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
NO_GENRES = ("(no genres listed)", "unknown")
YEAR = re.compile(r"^(.*?)\s*\((\d{4})(?:[-\u2013]\d{0,4})?\)$")
ARTICLES = "The|A|An|Le|La|Les|L'|Un|Une|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Den|Det|O|Os"
INVERTED = re.compile(rf"^(.+), ({ARTICLES})$")
ALTERNATIVE = re.compile(r"\(([^()]*)\)")
RATINGS = {"user": pl.Int32, "item": pl.Int32, "rating": pl.Float32, "time": pl.Int64}


def read(data: Any, report: Report) -> Tables:
    """Reads a folder or .zip: `title` in natural word order, `year`, `genres`, and `name`, the title as MovieLens prints it.

    Raises:
      RecJaxError: no known layout; bad rows whose policy is "error".
    """
    where = files.resolve(data.path)
    if not where.is_dir() and not where.name.endswith(".zip"):
        raise RecJaxError(f"config.data.path={data.path!r} is a file; reader 'movielens' takes the folder or .zip")
    found = files.folder(where)
    for (ratings, movies), layout in LAYOUTS.items():
        if ratings in found and movies in found:
            return layout(found, data.on_bad, report)
    expected = "; ".join(" and ".join(names) for names in LAYOUTS)
    raise RecJaxError(f"{where}: no MovieLens layout here; expected {expected}; found {', '.join(sorted(found)) or 'nothing'}")


def split_title(text: str) -> tuple[str, str]:
    """ "American President, The (1995)" -> ("The American President", "1995"); the year is "" where the title has none."""
    text = text.strip()
    match = YEAR.match(text)
    title, year = match.groups() if match else (text, "")
    title = ALTERNATIVE.sub(lambda m: f"({_natural(m[1].strip())})", title)
    main, bracket, rest = title.partition(" (")
    return _natural(main) + bracket + rest, year


def _natural(title: str) -> str:
    """ "Postino, Il" -> "Il Postino"."""
    match = INVERTED.match(title)
    if not match:
        return title
    return f"{match[2]}{'' if match[2].endswith(chr(39)) else ' '}{match[1]}"


def _items(frame: pl.DataFrame) -> pl.DataFrame:
    """item, name (raw title), genres (list or "A|B") -> the items table."""
    titles = [split_title(name) for name in frame["name"]]
    genres = [", ".join(g for g in text.split("|") if g and g not in NO_GENRES) for text in frame["genres"]]
    return pl.DataFrame(
        {
            "item": frame["item"],
            "name": frame["name"].str.strip_chars(),
            "title": pl.Series([t for t, _ in titles], dtype=pl.String),
            "year": pl.Series([y for _, y in titles], dtype=pl.String),
            "genres": pl.Series(genres, dtype=pl.String),
        }
    )


def _movies_100k(file: File, on_bad: Mapping[str, str], report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    flags = [f"genre {i}" for i in range(len(GENRES_100K))]
    names = ("item", "name", "release", "video", "url", *flags)
    columns = {"item": pl.Int32, "name": pl.String} | dict.fromkeys(flags, pl.String)
    movies, place = delimited.read(file, columns, on_bad, report, separator="|", names=names, optional=("name",), latin1=True)
    marks = [pl.when(pl.col(f) == "1").then(pl.lit(g)) for f, g in zip(flags, GENRES_100K, strict=True)]
    return _items(movies.select("item", "name", genres=pl.concat_str(marks, separator="|", ignore_nulls=True))), place


def _movies_dat(file: File, on_bad: Mapping[str, str], report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    columns = {"item": pl.Int32, "name": pl.String, "genres": pl.String}
    movies, place = delimited.read(
        file, columns, on_bad, report, separator="::", names=tuple(columns), optional=("name", "genres"), latin1=True
    )
    return _items(movies), place


def _movies_csv(file: File, on_bad: Mapping[str, str], report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    columns = {"movieId": pl.Int32, "title": pl.String, "genres": pl.String}
    movies, place = delimited.read(file, columns, on_bad, report, separator=",", optional=("title", "genres"))
    return _items(movies.rename({"movieId": "item", "title": "name"})), place


# The file of films in each layout -> its reader: (items table, row -> "file:line").
MOVIES: dict[str, Callable[..., tuple[pl.DataFrame, delimited.Place]]] = {
    "u.item": _movies_100k,
    "movies.dat": _movies_dat,
    "movies.csv": _movies_csv,
}


def _read_100k(found: Mapping[str, File], on_bad: Mapping[str, str], report: Report) -> Tables:
    events, event_place = delimited.read(found["u.data"], RATINGS, on_bad, report, separator="\t", names=tuple(RATINGS))
    items, item_place = _movies_100k(found["u.item"], on_bad, report)
    users = None
    if "u.user" in found:
        people = {"user": pl.Int32, "age": pl.Int32, "gender": pl.String, "occupation": pl.String, "zip": pl.String}
        users, _ = delimited.read(found["u.user"], people, on_bad, report, separator="|", names=tuple(people), latin1=True)
    return Tables(items, users_of(events, users), events, report, event_place=event_place, item_place=item_place)


def _read_dat(found: Mapping[str, File], on_bad: Mapping[str, str], report: Report) -> Tables:
    events, event_place = delimited.read(found["ratings.dat"], RATINGS, on_bad, report, separator="::", names=tuple(RATINGS))
    items, item_place = _movies_dat(found["movies.dat"], on_bad, report)
    users = None
    if "users.dat" in found:  # 10M has none
        people = {"user": pl.Int32, "gender": pl.String, "age": pl.Int32, "occupation": pl.Int32, "zip": pl.String}
        users, _ = delimited.read(found["users.dat"], people, on_bad, report, separator="::", names=tuple(people), latin1=True)
    return Tables(items, users_of(events, users), events, report, event_place=event_place, item_place=item_place)


def _read_csv(found: Mapping[str, File], on_bad: Mapping[str, str], report: Report) -> Tables:
    columns = {"userId": pl.Int32, "movieId": pl.Int32, "rating": pl.Float32, "timestamp": pl.Int64}
    events, event_place = delimited.read(found["ratings.csv"], columns, on_bad, report, separator=",")
    events = events.rename({"userId": "user", "movieId": "item", "timestamp": "time"})
    items, item_place = _movies_csv(found["movies.csv"], on_bad, report)
    return Tables(items, users_of(events), events, report, event_place=event_place, item_place=item_place)


LAYOUTS: dict[tuple[str, str], Callable[[Mapping[str, File], Mapping[str, str], Report], Tables]] = {
    ("u.data", "u.item"): _read_100k,
    ("ratings.dat", "movies.dat"): _read_dat,
    ("ratings.csv", "movies.csv"): _read_csv,
}
