"""Last.fm HetRec 2011: who listened to which artist how often, the artists' names and tags, and who is whose friend; tab-separated.

Reference: Cantador et al., Second Workshop on Information Heterogeneity and Fusion in Recommender Systems (HetRec), RecSys 2011.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from rec_jax.data.readers import delimited, files
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, users_of

TAGS = 5  # of an artist that become part of its text: those that most users gave it


def read(data: Any, report: Report) -> Tables:
    """Reads each (user, artist) as an event whose rating is the count of listens, in the order of the file: there is no time.

    An artist's `title` is its name, its `genres` the TAGS tags that most users gave it, where tags.dat and user_taggedartists.dat are
    there. A user's `friends` are their ids, joined by ", ", where user_friends.dat is there; "" for none.

    Raises:
      RecJaxError: a missing file; bad rows whose policy is "error".
    """
    found = files.folder_with(data.path, "user_artists.dat", "artists.dat")
    columns = {"userID": pl.Int32, "artistID": pl.Int32, "weight": pl.Float32}
    rows, place = delimited.read(found["user_artists.dat"], columns, data.on_bad, report, separator="\t")
    order = pl.int_range(pl.len(), dtype=pl.Int64)
    events = rows.select(user="userID", item="artistID", time=order, rating="weight")
    names = {"id": pl.Int32, "name": pl.String}
    artists, item_place = delimited.read(found["artists.dat"], names, data.on_bad, report, separator="\t", optional=("name",))
    items = artists.select(item="id", title="name")
    if "tags.dat" in found and "user_taggedartists.dat" in found:
        tags = _top_tags(found, data.on_bad, report)
        items = items.join(tags, on="item", how="left", maintain_order="left").with_columns(pl.col("genres").fill_null(""))
    users = users_of(events)
    if "user_friends.dat" in found:
        friends = _friends(found["user_friends.dat"], data.on_bad, report)
        users = users.join(friends, on="user", how="left", maintain_order="left").with_columns(pl.col("friends").fill_null(""))
    return Tables(items, users, events, report, False, place, item_place)


def _top_tags(found: Mapping[str, File], on_bad: Mapping[str, str], report: Report) -> pl.DataFrame:
    """-> item, genres: its most given tags, joined by ", "; of equally many the tag that comes first in tags.dat."""
    words = {"tagID": pl.Int32, "tagValue": pl.String}
    tags, _ = delimited.read(found["tags.dat"], words, on_bad, report, separator="\t", optional=("tagValue",), latin1=True)
    given, _ = delimited.read(found["user_taggedartists.dat"], {"artistID": pl.Int32, "tagID": pl.Int32}, on_bad, report, separator="\t")
    counts = given.group_by("artistID", "tagID").len()
    tags = tags.with_row_index("place").filter(pl.col("tagValue") != "")
    ranked = counts.join(tags, on="tagID").sort("artistID", -pl.col("len").cast(pl.Int64), "place")
    return (
        ranked.group_by("artistID", maintain_order=True)
        .agg(pl.col("tagValue").head(TAGS).str.join(", "))
        .rename({"artistID": "item", "tagValue": "genres"})
    )


def _friends(file: File, on_bad: Mapping[str, str], report: Report) -> pl.DataFrame:
    """-> user, friends: their ids in the order of the file, joined by ", "."""
    pairs, _ = delimited.read(file, {"userID": pl.Int32, "friendID": pl.Int32}, on_bad, report, separator="\t")
    joined = pairs.group_by("userID", maintain_order=True).agg(pl.col("friendID").cast(pl.String).str.join(", "))
    return joined.rename({"userID": "user", "friendID": "friends"})
