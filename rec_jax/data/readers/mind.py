"""MIND news: behaviors.tsv (impressions with the user's history) and news.tsv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data import impressions
from rec_jax.data.impressions import CONTEXT, LABEL, ImpressionTable
from rec_jax.data.readers import delimited, files
from rec_jax.data.tables import Report, Tables, bad_input, users_of

BEHAVIORS = ("impression", "user", "time", "history", "impressions")
NEWS = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
TIME = "%m/%d/%Y %I:%M:%S %p"


def read(data: Any, report: Report) -> Tables:
    """Reads clicks: of each user the history once, then the clicked items of the impressions in time order.

    Every row of a user repeats the history from before the log, without times: its clicks are put into the seconds before the
    log's first impression, in their order. Where a user's rows differ in it, the longest one counts.

    Each item that a row shows is an impression, with the label `click` and the day of the week and the hour as context.

    Raises:
      RecJaxError: a missing file; bad rows whose policy is "error".
    """
    found = files.folder_with(data.path, "behaviors.tsv", "news.tsv")
    file = found["behaviors.tsv"]
    columns = dict.fromkeys(BEHAVIORS[1:], pl.String)
    rows, place = delimited.read(file, columns, data.on_bad, report, separator="\t", names=BEHAVIORS, optional=("history", "impressions"))
    rows = rows.with_row_index("row").with_columns(seconds=pl.col("time").str.to_datetime(TIME, strict=False).dt.epoch("s"))
    rows = _good(rows, place, data.on_bad, report)
    shown = _shown(rows)
    history = _history(rows).with_columns(impression=pl.lit(-1, pl.Int64))  # it lies before the log
    events = pl.concat([history, shown.filter("clicked").select(history.columns)])
    event_row, shown_row = events["row"].to_numpy(), shown["row"].to_numpy()
    events = events.select("user", "item", pl.col("seconds").alias("time"), "impression", rating=pl.lit(1.0, pl.Float32))
    table = _table(shown, lambda row: place(int(shown_row[row]))) if impressions.asked(data) else None
    texts = dict.fromkeys(("item", "category", "subcategory", "title", "abstract"), pl.String)
    news, item_place = delimited.read(found["news.tsv"], texts, data.on_bad, report, separator="\t", names=NEWS, optional=tuple(texts)[1:])
    items = news.select("item", "title", "abstract", categories=pl.concat_str("category", "subcategory", separator=", "))
    return Tables(
        items,
        pl.concat([rows.select("user").unique(maintain_order=True), users_of(events)]).unique(maintain_order=True),
        events,
        report,
        event_place=lambda row: place(int(event_row[row])),
        item_place=item_place,
        impressions=table,
    )


def _good(rows: pl.DataFrame, place: delimited.Place, on_bad: Mapping[str, str], report: Report) -> pl.DataFrame:
    """Rows whose time and impressions can be read; the others go by the policy bad_row."""
    labelled = rows["impressions"].str.contains(r"^(\S+-[01]( |$))*$")
    for row in np.flatnonzero(rows["seconds"].is_null().to_numpy()):
        detail = f"column time is {rows['time'][int(row)]!r}, expected a time like 11/15/2019 8:55:22 AM"
        bad_input(report, on_bad, "bad_row", place(int(row)), detail)
    for row in np.flatnonzero((~labelled & rows["seconds"].is_not_null()).to_numpy()):
        detail = f"column impressions is {rows['impressions'][int(row)][:60]!r}, expected items with labels like N1-0 N2-1"
        bad_input(report, on_bad, "bad_row", place(int(row)), detail)
    return rows.filter(labelled & rows["seconds"].is_not_null())


def _history(rows: pl.DataFrame) -> pl.DataFrame:
    """Each user's history, once -> row, user, item, seconds."""
    first = rows["seconds"].min() or 0
    longest = rows.sort(pl.col("history").str.len_bytes(), descending=True, maintain_order=True).unique("user", maintain_order=True)
    items = longest.sort("row").select("row", "user", item=pl.col("history").str.split(" ")).explode("item").filter(pl.col("item") != "")
    after = pl.int_range(pl.len(), 0, -1, dtype=pl.Int64).over("user")  # the last click of the history is one second before the log
    return items.with_columns(seconds=first - after)


def _shown(rows: pl.DataFrame) -> pl.DataFrame:
    """Items of the impressions, in the order of the file -> row, user, item, seconds, clicked, impression (their number)."""
    items = rows.select("row", "user", "seconds", item=pl.col("impressions").str.split(" ")).explode("item").filter(pl.col("item") != "")
    clicked = pl.col("item").str.ends_with("-1")
    item = pl.col("item").str.replace(r"-[01]$", "")
    return items.select("row", "user", item, "seconds", clicked.alias("clicked"), impression=pl.int_range(pl.len(), dtype=pl.Int64))


def _table(shown: pl.DataFrame, place: delimited.Place) -> ImpressionTable:
    """Items of the impressions -> the table of impressions."""
    time = pl.from_epoch("seconds", time_unit="s")
    frame = shown.select(
        "user",
        "item",
        pl.col("seconds").alias("time"),
        time.dt.weekday().cast(pl.String).alias(CONTEXT + "weekday"),
        time.dt.hour().cast(pl.String).alias(CONTEXT + "hour"),
        pl.col("clicked").cast(pl.Float32).alias(LABEL + "click"),
    )
    return ImpressionTable(frame, place=place)
