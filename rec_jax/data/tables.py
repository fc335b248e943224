"""The three tables that every reader yields, their checks, the count of bad input, and the coding to dense indices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data import filters
from rec_jax.data import impressions as impressions_lib
from rec_jax.data import split as split_lib
from rec_jax.data.impressions import Impressions, ImpressionTable
from rec_jax.types import RecJaxError

TEXT_COLUMNS = ("title", "genres", "categories", "brand", "author", "description", "abstract")  # an item with none of these has no text
CHUNK = 1 << 21  # events whose raw ids are looked up at a time

# What each kind of bad input is called in a report, and what its policy "skip" does. Kinds without a policy are filters.
KINDS = {
    "bad_row": ("rows with a wrong number of fields or a bad value", "to leave such rows out and count them"),
    "bad_encoding": ("rows with bytes that are not of the file's encoding", "to leave such rows out and count them"),
    "empty_text": ("items without text", "to leave such items out with their events, or to 'keep' to name them by their ids"),
    "duplicate_item": ("item ids that occur again", "to keep the first of each and count the others"),
    "duplicate_event": ("events of the same user and item again", "to keep the first in time of each, or to 'keep' to keep all"),
    "unknown_item": ("events whose item is not in the items table", "to leave such events out and count them"),
    "short_user": ("users with fewer events than filter.min_user_events", "to leave such users out and count them"),
    "missing_feature": ("features that items, users or events lack", "to count them as none"),
    "bad_feature": ("values of numeric features that are no numbers", "to count them as none"),
    "min_rating": ("events rated below filter.min_rating", ""),
    "k_core": ("events outside the k-core of filter.k_core", ""),
    "unknown_impression": ("impressions whose item is not in the items table", ""),  # by the policy unknown_item
}


@dataclasses.dataclass
class Report:
    """Bad input that was passed over: counts by kind, and the first three examples of each."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, place: str, detail: str, count: int = 1) -> None:
        """Counts `count` cases of `kind`; `place` ("file:line") and `detail` are kept for the first three calls."""
        if kind not in KINDS:
            raise KeyError(f"no kind {kind!r} of bad input; kinds: {', '.join(KINDS)}")
        self.counts[kind] = self.counts.get(kind, 0) + count
        kept = self.examples.setdefault(kind, [])
        if len(kept) < 3:
            kept.append(f"{place}: {detail}")

    def lines(self) -> list[str]:
        """Lines for people: one a kind, then its examples, indented."""
        out = []
        for kind, count in self.counts.items():
            out.append(f"left out {count:,} {KINDS[kind][0]} ({kind})")
            out.extend(f"  {example}" for example in self.examples[kind])
        return out

    def to_dict(self) -> dict[str, Any]:
        """{kind: {"count": n, "examples": [...]}} for JSON."""
        return {kind: {"count": count, "examples": list(self.examples[kind])} for kind, count in self.counts.items()}


def bad_input(report: Report, on_bad: Mapping[str, str], kind: str, place: str, detail: str, count: int = 1) -> None:
    """Raises where the policy of `kind` is "error"; counts in the report otherwise.

    Raises:
      RecJaxError: names the place, what is wrong, and the config key that turns it into a counted skip.
    """
    if on_bad[kind] == "error":
        raise RecJaxError(f"{place}: {detail}. Mend the input, or set config.data.on_bad.{kind}='skip' {KINDS[kind][1]}")
    report.add(kind, place, detail, count)


@dataclasses.dataclass
class Tables:
    """What a reader yields.

    Attributes:
      items: `item` (raw id, text or integer), `name` (what people call it) and any of title, year, genres, categories, brand, author,
        description, abstract and others (text; several values are joined with ", "; "" where there is none).
      users: `user` (raw id) and demographics, if any.
      events: `user`, `item` (raw ids, of the dtypes above), `time` (int64: seconds, or the order where there is no clock),
        `rating` (float32; 1.0 where there is none). Beside impressions also `impression` (int64), the row there that it is, -1 = none.
        `event_NAME` (text, "" = none) of each of config.data.event_features.
      report: bad input that was passed over.
      clock: whether `time` is a time; the order within a user otherwise.
      event_place: row of `events` -> "file:line", for messages.
      item_place: row of `items` -> "file:line".
      impressions: where config.data.impressions.split asks for them and the input has them. Their users are in the users table.
    """

    items: pl.DataFrame
    users: pl.DataFrame
    events: pl.DataFrame
    report: Report
    clock: bool = True
    event_place: Callable[[int], str] = lambda row: f"event {row + 1}"
    item_place: Callable[[int], str] = lambda row: f"item {row + 1}"
    impressions: ImpressionTable | None = None


def users_of(events: pl.DataFrame, demographics: pl.DataFrame | None = None) -> pl.DataFrame:
    """The users table: those with demographics, then the others in the order of their first event."""
    others = events.select(pl.col("user").unique(maintain_order=True))
    if demographics is None:
        return others
    return pl.concat([demographics, others.join(demographics, on="user", how="anti", maintain_order="left")], how="diagonal")


def items_of(events: pl.DataFrame) -> pl.DataFrame:
    """The items table where there is no items file: the title is the id; in the order of the first event."""
    return events.select(pl.col("item").unique(maintain_order=True)).with_columns(title=pl.col("item").cast(pl.String))


def unique_items(tables: Tables, on_bad: Mapping[str, str]) -> Tables:
    """Keeps the first row of each item id; the others go by the policy `duplicate_item`."""
    again = (~tables.items["item"].is_first_distinct()).to_numpy()
    if not again.any():
        return tables
    for row in np.flatnonzero(again):
        item = tables.items["item"][int(row)]
        bad_input(tables.report, on_bad, "duplicate_item", tables.item_place(int(row)), f"item id {item!r} occurs a second time")
    kept, place = np.flatnonzero(~again), tables.item_place
    return dataclasses.replace(tables, items=tables.items[kept], item_place=lambda row: place(int(kept[row])))


def with_names(items: pl.DataFrame) -> pl.DataFrame:
    """Adds what people call an item as `name`, where the reader has not: the title, or the id where that is empty."""
    columns = [pl.col(c).replace("", None) for c in ("name", "title") if c in items.columns]
    return items.with_columns(name=pl.coalesce(*columns, pl.col("item").cast(pl.String)))


def check(tables: Tables) -> None:
    """Checks the schema of `Tables`.

    Raises:
      RecJaxError: says which table and column, what is there and what was expected.
    """
    required = {"items": ("item", "name"), "users": ("user",), "events": ("user", "item", "time", "rating")}
    for table, columns in required.items():
        frame = getattr(tables, table)
        missing = [c for c in columns if c not in frame.columns]
        if missing:
            raise RecJaxError(f"table {table} has no column {', '.join(missing)}; it has: {', '.join(frame.columns) or 'none'}")
        for column in columns:
            if frame[column].null_count():
                raise RecJaxError(f"table {table}: column {column} has {frame[column].null_count():,} empty values; expected none")
    items, users, events = tables.items, tables.users, tables.events
    for table, frame, column in (("items", items, "item"), ("users", users, "user")):
        dtype = frame.schema[column]
        if dtype != pl.String and not dtype.is_integer():
            raise RecJaxError(f"table {table}: column {column} is {dtype}; expected text or integers")
        if events.schema[column] != dtype:
            raise RecJaxError(f"column {column} is {dtype} in table {table} but {events.schema[column]} in table events; make them equal")
        if frame[column].n_unique() != frame.height:
            raise RecJaxError(f"table {table}: column {column} has {frame.height - frame[column].n_unique():,} ids that occur again")
    for column, expected in (("time", pl.Int64), ("rating", pl.Float32)):
        if events.schema[column] != expected:
            raise RecJaxError(f"table events: column {column} is {events.schema[column]}; expected {expected}")
    for column in ("name", "year", *TEXT_COLUMNS):
        if column in items.columns and items.schema[column] != pl.String:
            raise RecJaxError(f"table items: column {column} is {items.schema[column]}; expected text")
    if not events.height:
        raise RecJaxError("table events is empty; check that config.data.path names the file that you mean")
    if tables.impressions is not None:
        impressions_lib.check(tables.impressions, events)


@dataclasses.dataclass
class Coded:
    """Events by dense index, sorted by (user, time, place in the file).

    Attributes:
      user: [E] int32, row of the users table.
      item: [E] int32, row of the items table = catalogue index.
      time: [E] int64, seconds, or the order where there is no clock.
      rating: [E] float32.
      split: [E] uint8: 0 train, 1 validation, 2 test.
      n_users: users, each with at least one event or impression.
      n_items: items, each with at least one event or impression unless filter.unseen_items keeps the others.
      impressions: labelled impressions and their split [impressions] uint8; None where config.data.impressions.split is empty.
      backwards: events earlier than their user's event before them in the file, and users with such; of what the sort was given, which
        is before duplicates, k-core and short users are left out.
      rows: [E], of the events table; None where config.data.event_features names none.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    rating: np.ndarray
    split: np.ndarray
    n_users: int
    n_items: int
    impressions: tuple[Impressions, np.ndarray] | None = None
    backwards: tuple[int, int] = (0, 0)
    rows: np.ndarray | None = None


def code(tables: Tables, data: Any, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame, Coded]:
    """Filters, sorts and splits the events of checked tables -> (items in index order, users in index order, coded events).

    In this order: items without text, unknown items, minimum rating, duplicate events, then k-core and short users repeated until
    both hold. The catalogue is the items that have an event left, with filter.unseen_items all that have text, in the order of the items
    table; the users are those with an event left.
    The raw ids `item` and `user` of the returned tables are text.

    Of the impressions those of items without text and of unknown items are left out; no other filter touches them, and their items and
    users stay in the tables.

    Args:
      tables: from a reader; what is left out is added to its report.
      data: `config.data`.
      seed: of the split "cold_item", and of impressions.

    Raises:
      RecJaxError: bad input whose policy is "error"; no events left; a split without training events; impressions that are asked for
        and not there.
    """
    on_bad, limits, report = data.on_bad, data.filter, tables.report
    item = _rows(tables.events["item"], tables.items["item"])
    items, has_text = _texts(tables, on_bad, item)
    user = _rows(tables.events["user"], tables.users["user"])
    if (user < 0).any():
        row = int(np.argmax(user < 0))
        raise RecJaxError(f"{tables.event_place(row)}: user {tables.events['user'][row]!r} is not in the users table")
    shown = _shown(tables, data, has_text)
    rating = tables.events["rating"].to_numpy()
    keep = _known(tables, on_bad, item, has_text)
    low = keep & ~filters.min_rating(rating, limits.min_rating)
    if low.any():
        row = int(np.argmax(low))
        report.add("min_rating", tables.event_place(row), f"rating {rating[row]:g} is below {limits.min_rating:g}", int(low.sum()))
        keep &= ~low
    del low
    row_of = np.flatnonzero(keep)  # place of each event in the file, for messages
    time = tables.events["time"].to_numpy()
    order, backwards = filters.in_time_order(user[row_of], time[row_of])
    row_of = row_of[order]
    del order
    user, item = user[row_of], item[row_of]
    if on_bad.duplicate_event != "keep":
        first = _first_events(tables, on_bad, user, item, row_of)
        user, item, row_of = user[first], item[first], row_of[first]
        del first
    left = _enough_events(tables, items.height, data, user, item)
    if not left.all():
        user, item, row_of = user[left], item[left], row_of[left]
    del left
    if not len(user):
        raise RecJaxError("no events are left after the filters; " + "; ".join(line.strip() for line in report.lines() if line[0] != " "))
    user, shown.user, users_kept = _dense(user, shown.user, tables.users.height)
    others = np.concatenate([shown.item, np.flatnonzero(has_text).astype(np.int32)]) if limits.unseen_items else shown.item
    item, others, items_kept = _dense(item, others, items.height)
    shown.item = others[: len(shown.item)]
    time, rating = time[row_of], rating[row_of]
    n_users, n_items, kind, impressions = len(users_kept), len(items_kept), data.impressions.split, None
    if tables.impressions is not None and impressions_lib.asked(data):
        impressions = impressions_lib.code(tables.impressions, shown, n_items=n_items, data=data, seed=seed, clock=tables.clock)
    if data.split.kind == "impressions":
        split = impressions_lib.split_of_events(tables.events, row_of, shown, impressions)
    else:
        split = split_lib.split(user, item, time, n_users, n_items, data.split, clock=tables.clock, seed=seed)
    rows = row_of if data.event_features else None
    del row_of
    if kind == "events":
        impressions = impressions_lib.of_events(user, item, time, rating, split, n_items=n_items, data=data, seed=seed)
    coded = Coded(user, item, time, rating, split, n_users, n_items, impressions, backwards, rows)
    catalogue = items[items_kept].with_columns(pl.col("item").cast(pl.String))
    return catalogue, tables.users[users_kept].with_columns(pl.col("user").cast(pl.String)), coded


def _shown(tables: Tables, data: Any, has_text: np.ndarray) -> impressions_lib.Kept:
    """The impressions that are kept, by rows of the users and items tables; none where none are asked for."""
    table = impressions_lib.wanted(tables.impressions, data)
    if table is None:
        return impressions_lib.Kept(*(np.zeros(0, np.int32) for _ in range(3)))
    user, item = (_rows(table.frame[column], getattr(tables, f"{column}s")[column]) for column in ("user", "item"))
    return impressions_lib.keep(table, user, item, has_text, data.on_bad, tables.report)


def _dense(codes: np.ndarray, others: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of events [E] and of impressions in [0, n) -> (both without gaps; the old codes that occur in either, ascending)."""
    if not len(others):
        dense, kept = filters.dense(codes, n)
        return dense, others, kept
    both, kept = filters.dense(np.concatenate([codes, others]), n)
    return both[: len(codes)], both[len(codes) :], kept


def _rows(ids: pl.Series, table: pl.Series) -> np.ndarray:
    """ids [E], unique ids of a table [N] -> row of each in the table [E] int32, -1 where it is not there; by chunks, to stay small."""
    lookup = pl.DataFrame({"id": table, "row": np.arange(len(table), dtype=np.int32)})
    out = np.empty(len(ids), np.int32)
    for start in range(0, len(ids), CHUNK):
        chunk = ids.slice(start, CHUNK).alias("id").to_frame()
        rows = chunk.join(lookup, on="id", how="left", maintain_order="left")["row"].fill_null(-1)
        out[start : start + CHUNK] = rows.to_numpy()
    return out


def _texts(tables: Tables, on_bad: Mapping[str, str], item: np.ndarray) -> tuple[pl.DataFrame, np.ndarray]:
    """Applies the policy `empty_text`; item [E] row of the items table or -1 -> (items, whether each has text [N] bool)."""
    items = tables.items
    columns = [c for c in TEXT_COLUMNS if c in items.columns]
    has_text = np.zeros(items.height, bool)
    for column in columns:
        has_text |= (items[column].fill_null("").str.strip_chars() != "").to_numpy()
    if has_text.all():
        return items, has_text
    if on_bad["empty_text"] == "keep":
        title = pl.col("title") if "title" in items.columns else pl.lit("")
        named = pl.when(pl.Series(has_text)).then(title).otherwise(pl.col("item").cast(pl.String))
        return items.with_columns(title=named), np.ones(items.height, bool)
    events = np.bincount(item[item >= 0], minlength=items.height)
    looked_at = ", ".join(columns) or f"none of {', '.join(TEXT_COLUMNS)} is there"
    for row in np.flatnonzero(~has_text):
        detail = f"item {items['item'][int(row)]!r}, of {events[row]:,} events, has no text (columns looked at: {looked_at})"
        bad_input(tables.report, on_bad, "empty_text", tables.item_place(int(row)), detail)
    return items, has_text


def _known(tables: Tables, on_bad: Mapping[str, str], item: np.ndarray, has_text: np.ndarray) -> np.ndarray:
    """Applies the policy `unknown_item` -> whether each event's item is known and has text [E] bool."""
    known = item >= 0
    unknown = np.flatnonzero(~known)
    for i, row in enumerate(unknown[:3]):
        count = len(unknown) - 2 if i == 2 else 1  # the third example stands for all the others
        detail = f"item {tables.events['item'][int(row)]!r} is not in the items table"
        bad_input(tables.report, on_bad, "unknown_item", tables.event_place(int(row)), detail, count)
    return known & has_text[item] if not has_text.all() else known


def _first_events(tables: Tables, on_bad: Mapping[str, str], user: np.ndarray, item: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Applies the policy `duplicate_event` to events in time order -> whether each is the first of its user and item [E] bool."""
    again = filters.duplicates(user, item)
    places = np.flatnonzero(again)
    for i, place in enumerate(places[:3]):
        count = len(places) - 2 if i == 2 else 1  # the third example stands for all the others
        event = f"user {tables.users['user'][int(user[place])]!r} has item {tables.items['item'][int(item[place])]!r}"
        bad_input(tables.report, on_bad, "duplicate_event", tables.event_place(int(row_of[place])), f"{event} a second time", count)
    return ~again


def _enough_events(tables: Tables, n_items: int, data: Any, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Applies filter.k_core and filter.min_user_events in turn until both hold -> events left [E] bool."""
    k, minimum, n_users = data.filter.k_core, data.filter.min_user_events, tables.users.height
    left = np.ones(len(user), bool)
    # Users without any event are short too, unless the k-core took their events or they have impressions.
    looked_at = np.ones(n_users, bool) if tables.impressions is None else np.bincount(user, minlength=n_users) > 0
    while True:
        core = filters.k_core(user[left], item[left], n_users, n_items, k)
        if not core.all():
            lost = int((~core).sum())
            left[left] = core
            looked_at = np.bincount(user[left], minlength=n_users) > 0
            tables.report.add("k_core", f"filter.k_core={k}", f"{lost:,} events of users or items with fewer events than that", lost)
        events = np.bincount(user[left], minlength=n_users)
        short = looked_at & (events < minimum)
        for row in np.flatnonzero(short):
            detail = f"{events[row]} events are left; filter.min_user_events={minimum}"
            bad_input(tables.report, data.on_bad, "short_user", f"user {tables.users['user'][int(row)]!r}", detail)
        looked_at &= ~short
        drop = left & short[user]
        if not drop.any():
            return left
        left &= ~drop
