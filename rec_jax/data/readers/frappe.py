"""Frappe: which app was used by whom in which context; frappe.csv (the log) and meta.csv (the apps), tab-separated both.

Reference: Baltrunas et al., Frappe: Understanding the Usage and Perception of Mobile App Recommendations In-The-Wild, arXiv:1505.03014.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from rec_jax.config_places import EVENT
from rec_jax.data import impressions
from rec_jax.data.impressions import CONTEXT, LABEL, USED, ImpressionTable
from rec_jax.data.readers import delimited, files
from rec_jax.data.tables import Report, Tables, users_of

FIELDS = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
# Column of meta.csv -> of the items table.
TEXTS = {"name": "title", "category": "categories", "developer": "brand", "short desc": "description", "language": "language"}
MISSING = ("unknown", "None")  # what meta.csv has where an app is not described


def read(data: Any, report: Report) -> Tables:
    """Reads each row as an event, whose rating is how often the app was used, and as a positive impression with the row's context.

    The context's own value "unknown" is a category like any other. There is no time: the order is that of the file.

    Raises:
      RecJaxError: a missing file; bad rows whose policy is "error".
    """
    found = files.folder_with(data.path, "frappe.csv", "meta.csv")
    columns = {"user": pl.Int32, "item": pl.Int32, "cnt": pl.Float32} | dict.fromkeys(FIELDS, pl.String)
    rows, place = delimited.read(found["frappe.csv"], columns, data.on_bad, report, separator="\t", optional=FIELDS)
    texts = {"item": pl.Int32} | dict.fromkeys(TEXTS, pl.String)
    apps, item_place = delimited.read(found["meta.csv"], texts, data.on_bad, report, separator="\t", optional=tuple(TEXTS))
    items = apps.select("item", *(pl.col(c).replace(dict.fromkeys(MISSING, "")).alias(new) for c, new in TEXTS.items()))
    order = pl.int_range(pl.len(), dtype=pl.Int64)
    features = {EVENT + name: pl.col(name) for name in data.event_features if name in FIELDS}
    events = rows.select("user", "item", time=order, rating="cnt", **features)
    shown = None
    if impressions.asked(data):
        context = [pl.col(field).alias(CONTEXT + field) for field in FIELDS]
        label = pl.lit(1.0, pl.Float32).alias(LABEL + USED)
        shown = ImpressionTable(rows.select("user", "item", order.alias("time"), *context, label), positives=True, place=place)
        events = events.with_columns(impression=order)
    return Tables(items, users_of(events), events, report, False, place, item_place, shown)
