"""Open Bandit Dataset: impressions of a fashion shop's items by logging policies whose probabilities are known.

Reference: Saito et al., Open Bandit Dataset and Pipeline: Towards Realistic and Reproducible Off-Policy Evaluation, arXiv:2008.07146.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl
from etils import epath

from rec_jax.data import impressions
from rec_jax.data.impressions import CONTEXT, LABEL, ImpressionTable
from rec_jax.data.readers import delimited, files
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, bad_input, users_of
from rec_jax.types import RecJaxError

ITEMS = "item_context.csv"
USER_FEATURES = tuple(f"user_feature_{i}" for i in range(4))
ITEM_FEATURES = tuple(f"item_feature_{i}" for i in range(4))
AFFINITY = "user-item_affinity_"  # how often the visitor has clicked each item before, a column an item
MOST_CLICKS = 3  # more of them count as that many
PROPENSITY = ("propensity_score", "action_prob")  # names of that column, in different releases
TIME = "%Y-%m-%d %H:%M:%S%.f%:z"


@dataclasses.dataclass(frozen=True)
class Log:
    """The files of one campaign under one policy: <policy>/<campaign>/<campaign>.csv, and item_context.csv beside it."""

    policy: str
    campaign: str
    rows: File
    items: File


def read(data: Any, report: Report) -> Tables:
    """Reads the log of a folder (policy/campaign), or all that lie below it. An event is a click; an impression is a row.

    There are no user ids: all visitors with the same four features are one user. The context is the four features, the position, how
    often the visitor has clicked the item before (`affinity`), and, where the folder holds several, the policy and the campaign. Items
    have no text; their ids are then campaign/item. The hashed item features of a log say nothing in another, so that of an item in
    several logs those of the first one are kept.

    Raises:
      RecJaxError: no log here; bad rows whose policy is "error".
    """
    where = files.resolve(data.path)
    logs = find(where)
    if not logs:
        there = ", ".join(sorted(p.name for p in where.iterdir())) if where.is_dir() else "a file"
        raise RecJaxError(
            f"config.data.path={data.path!r}: expected a folder CAMPAIGN with CAMPAIGN.csv and {ITEMS} (.gz too), or one with such folders "
            f"in it; found {there or 'nothing'}"
        )
    campaigns, policies = ({getattr(log, name) for log in logs} for name in ("campaign", "policy"))
    frames, places, items, item_places = [], [], [], []
    known: set[str] = set()
    for log in logs:
        prefix = f"{log.campaign}/" if len(campaigns) > 1 else ""
        rows, place = _rows(log, data, report)
        names = {"policy": pl.lit(log.policy), "campaign": pl.lit(log.campaign)}
        frames.append(rows.with_columns(item=prefix + pl.col("item").cast(pl.String), **names))
        places.append(place)
        features, place = delimited.read(
            log.items, dict.fromkeys(("item_id", *ITEM_FEATURES), pl.String), data.on_bad, report, separator=","
        )
        features = features.select((prefix + pl.col("item_id")).alias("item"), *ITEM_FEATURES).with_row_index("row")
        features = features.filter(~pl.col("item").is_in(sorted(known)))
        known |= set(features["item"])
        items.append(features)
        item_places.append(place)
    place, item_place = _joined(places, [np.arange(f.height) for f in frames]), _joined(item_places, [f["row"].to_numpy() for f in items])
    rows = pl.concat(frames).with_columns(user=pl.concat_str(USER_FEATURES, separator="-"))
    clicks = rows.select("user", "item", "time", "click", impression=pl.int_range(pl.len(), dtype=pl.Int64)).filter(pl.col("click") == 1)
    events = clicks.select("user", "item", "time", "impression", rating=pl.lit(1.0, pl.Float32))
    impression = clicks["impression"].to_numpy()
    shown = None
    if impressions.asked(data):
        several = (["policy"] if len(policies) > 1 else []) + (["campaign"] if len(campaigns) > 1 else [])
        context = [pl.col(c).alias(CONTEXT + c) for c in (*USER_FEATURES, "position", "affinity", *several) if c in rows.columns]
        label = pl.col("click").cast(pl.Float32).alias(LABEL + "click")
        shown = ImpressionTable(rows.select("user", "item", "time", *context, label, "propensity"), place=place)
    users = users_of(rows, rows.select("user", *USER_FEATURES).unique("user", maintain_order=True))
    return Tables(pl.concat(items).drop("row"), users, events, report, True, lambda row: place(int(impression[row])), item_place, shown)


def find(where: epath.Path) -> list[Log]:
    """The logs of a folder or below it, by policy and campaign."""
    if not where.is_dir():
        return []
    found = files.folder(where)
    if f"{where.name}.csv" in found and ITEMS in found:
        return [Log(where.parent.name, where.name, found[f"{where.name}.csv"], found[ITEMS])]
    return [log for folder in sorted(where.iterdir()) if folder.is_dir() for log in find(folder)]


def _rows(log: Log, data: Any, report: Report) -> tuple[pl.DataFrame, delimited.Place]:
    """The rows of a log -> item (whole number), time, click, propensity, position, affinity, user features."""
    names = delimited.header(log.rows, ",")
    affinities = [f"{AFFINITY}{i}" for i in range(sum(name.startswith(AFFINITY) for name in names))]
    propensity = next((name for name in PROPENSITY if name in names), PROPENSITY[0])
    columns: dict[str, Any] = {
        "timestamp": pl.String,
        "item_id": pl.Int32,
        "click": pl.Int32,
        propensity: pl.Float32,
        "position": pl.String,
    }
    columns |= dict.fromkeys(USER_FEATURES, pl.String) | dict.fromkeys(affinities, pl.Float32)
    rows, place = delimited.read(log.rows, columns, data.on_bad, report, separator=",")
    rows = rows.with_columns(time=pl.col("timestamp").str.to_datetime(TIME, strict=False, time_unit="us").dt.epoch("s"))
    last = len(affinities) - 1 if affinities else np.iinfo(np.int32).max
    expected = {
        "timestamp": (pl.col("time").is_not_null(), "a time like 2019-11-24 00:01:03.979311+00:00"),
        "item_id": (pl.col("item_id").is_between(0, last), f"a number from 0 to {last}, the last item with an affinity"),
        "click": (pl.col("click").is_in([0, 1]), "0 or 1"),
        propensity: ((pl.col(propensity) > 0) & (pl.col(propensity) <= 1), "a probability, above 0 and at most 1"),
    }
    good = np.ones(rows.height, bool)
    for column, (condition, words) in expected.items():
        right = rows.select(right=condition)["right"].to_numpy()
        for row in np.flatnonzero(good & ~right):
            detail = f"column {column} is {rows[column][int(row)]!r}, expected {words}"
            bad_input(report, data.on_bad, "bad_row", place(int(row)), detail)
        good &= right
    kept = np.flatnonzero(good)
    rows = rows.filter(good)
    if affinities:
        clicks = rows.select(affinities).to_numpy()[np.arange(rows.height), rows["item_id"].to_numpy()]
        rows = rows.with_columns(affinity=pl.Series(np.minimum(clicks, MOST_CLICKS).astype(np.int32)).cast(pl.String))
    wanted = ("time", "click", "position", *(("affinity",) if affinities else ()), *USER_FEATURES)
    return rows.select(*wanted, item="item_id", propensity=propensity), lambda row: place(int(kept[row]))


def _joined(places: list[delimited.Place], rows: list[np.ndarray]) -> delimited.Place:
    """Places of several frames, and which rows of each are kept -> the place of a row of them end to end."""
    ends = np.cumsum([len(r) for r in rows])

    def place(row: int) -> str:
        frame = int(np.searchsorted(ends, row, "right"))
        return places[frame](int(rows[frame][row - ends[frame]]))

    return place
