"""Amazon reviews, JSON lines (.gz too): the 2018 and the 2023 release, told apart by their fields; meta file in config.data.items."""

from __future__ import annotations

import html
import math
import re
from array import array
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data.readers import files, json_lines
from rec_jax.data.tables import Report, Tables, bad_input, items_of, users_of

# Release -> fields of (user, item, rating, time), and how many units of time are a second.
RELEASES = {
    "2018": (("reviewerID", "asin", "overall", "unixReviewTime"), 1),
    "2023": (("user_id", "parent_asin", "rating", "timestamp"), 1000),
}
META_ID = ("parent_asin", "asin")  # 2023 meta have both in some categories; reviews of 2023 name the parent
META = {"title": "title", "brand": "brand", "store": "brand", "category": "categories", "categories": "categories"}
TEXT = ("description", "feature", "features")  # sentences, joined by a space into the description
TAG = re.compile(r"<[^<>]+>")


def read(data: Any, report: Report) -> Tables:
    """Reads reviews (user, item, rating, time) and, of the items that were reviewed, title, brand, categories and description.

    The meta file lists every product of the shop; those without a review are passed over as they come, since they are not in the catalogue.

    Raises:
      RecJaxError: bad input whose policy is "error".
    """
    file = files.single(data.path)
    user_ids: dict[str, int] = {}
    item_ids: dict[str, int] = {}
    u: Any
    i: Any
    r: Any
    t: Any
    user, item, rating, time, lines = array("i"), array("i"), array("f"), array("q"), array("q")
    for number, review in json_lines.objects(file, data.on_bad, report):
        names, per_second = RELEASES["2023" if "user_id" in review else "2018"]
        u, i, r, t = values = [review.get(n) for n in names]
        wrong = [n for n, v in zip(names[:2], values[:2], strict=True) if not isinstance(v, str) or not v]
        wrong += [n for n, v in zip(names[2:], values[2:], strict=True) if not _is_number(v)]
        if wrong:
            expected = "text" if wrong[0] in names[:2] else "a number"
            detail = f"field {wrong[0]} is {review.get(wrong[0])!r}, expected {expected}"
            bad_input(report, data.on_bad, "bad_row", f"{file}:{number}", detail)
            continue
        user.append(user_ids.setdefault(u, len(user_ids)))
        item.append(item_ids.setdefault(i, len(item_ids)))
        rating.append(r)
        time.append(int(t) // per_second)
        lines.append(number)
    events = pl.DataFrame(
        {
            "user": pl.Series(list(user_ids), dtype=pl.String).gather(np.frombuffer(user, np.int32)),
            "item": pl.Series(list(item_ids), dtype=pl.String).gather(np.frombuffer(item, np.int32)),
            "time": np.frombuffer(time, np.int64),
            "rating": np.frombuffer(rating, np.float32),
        }
    )

    def place(row: int) -> str:
        return f"{file}:{lines[row]}"

    if not data["items"]:
        return Tables(items_of(events), users_of(events), events, report, event_place=place)
    meta = files.single(data["items"], "config.data.items")
    rows, meta_lines = [], array("q")
    for number, product in json_lines.objects(meta, data.on_bad, report):
        key = next((k for k in META_ID if k in product), None)
        if key is None:
            bad_input(report, data.on_bad, "bad_row", f"{meta}:{number}", f"no field {' or '.join(META_ID)}; fields: {', '.join(product)}")
        elif product[key] in item_ids:
            rows.append({"item": product[key], **_texts(product)})
            meta_lines.append(number)
    items = pl.DataFrame(rows, schema=dict.fromkeys(("item", "title", "brand", "categories", "description"), pl.String))
    return Tables(items, users_of(events), events, report, event_place=place, item_place=lambda row: f"{meta}:{meta_lines[row]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(product: dict[str, Any]) -> dict[str, str]:
    """The text columns of a product."""
    out = {"title": "", "brand": "", "categories": "", "description": ""}
    for field, column in META.items():
        if field in product:
            out[column] = ", ".join(_clean(v) for v in _flat(product[field]))
    out["description"] = " ".join(_clean(v) for field in TEXT if field in product for v in _flat(product[field]))
    return out


def _flat(value: Any) -> list[str]:
    """Text, or lists of text in lists -> the texts that are not empty, in order."""
    if isinstance(value, list):
        return [text for v in value for text in _flat(v)]
    return [value] if isinstance(value, str) and value.strip() else []


def _clean(text: str) -> str:
    """Text without the shop's HTML."""
    return " ".join(html.unescape(TAG.sub(" ", text)).split())
