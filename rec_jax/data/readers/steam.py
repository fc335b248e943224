"""Steam (Kaggle "Steam Video Games" as CaseRecommender keeps it): who bought and who played which game for how long; tab-separated."""

from __future__ import annotations

from typing import Any

import polars as pl

from rec_jax.data.readers import delimited, files
from rec_jax.data.tables import Report, Tables, users_of

PAIR = {"User_ID": pl.Int32, "Game_ID": pl.Int32}


def read(data: Any, report: Report) -> Tables:
    """Reads each purchase as an event whose rating is the hours played, 0 for none, in the order of the file: there is no time.

    So config.data.filter.min_rating keeps the games that were played for so many hours at least.

    Raises:
      RecJaxError: a missing file; bad rows whose policy is "error".
    """
    found = files.folder_with(data.path, "game_purchase.dat", "game_play.dat", "item_info.dat")
    bought, place = delimited.read(found["game_purchase.dat"], PAIR, data.on_bad, report, separator="\t")
    played, _ = delimited.read(found["game_play.dat"], {**PAIR, "Hours": pl.Float32}, data.on_bad, report, separator="\t")
    hours = played.group_by("User_ID", "Game_ID").agg(pl.col("Hours").sum())
    rows = bought.join(hours, on=("User_ID", "Game_ID"), how="left", maintain_order="left")
    order = pl.int_range(pl.len(), dtype=pl.Int64)
    events = rows.select(user="User_ID", item="Game_ID", time=order, rating=pl.col("Hours").fill_null(0))
    names = {"Game_ID": pl.Int32, "Game Name": pl.String}
    games, item_place = delimited.read(found["item_info.dat"], names, data.on_bad, report, separator="\t", optional=("Game Name",))
    return Tables(games.select(item="Game_ID", title="Game Name"), users_of(events), events, report, False, place, item_place)
