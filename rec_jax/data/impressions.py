"""Impressions: what was shown to whom, under which circumstances, and what came of it; how they are coded, split, drawn and kept.

`config.data.impressions.split` asks for them. In a prepared folder they stand in `impressions/`, train, validation and test one after
another, so that each part is a slice that is mapped from disk:

    user.npy, item.npy, context.npy, labels.npy, time.npy, and propensity.npy where the log has it
    context.json   the categories of each context field, in the order of their codes
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data import split as split_lib
from rec_jax.types import RecJaxError

FOLDER = "impressions"
KINDS = ("random", "temporal", "events")
CONTEXT, LABEL = "context.", "label."  # what the names of such columns begin with
USED = "used"  # the label of data with positives only: 1 for what is there, 0 for a negative that was drawn
PARTS = {"train": split_lib.TRAIN, "valid": split_lib.VALID, "test": split_lib.TEST}


@dataclasses.dataclass
class ImpressionTable:
    """What a reader yields of impressions, beside its three tables.

    Attributes:
      frame: `user`, `item` (raw ids, of the events' dtypes), `time` (int64), a column `context.NAME` of each field (text, "" = unknown),
        a column `label.NAME` of each task (float32, null = not observed), and `propensity` (float32, in (0, 1]) where the log has it.
      positives: every row is a positive, so negatives are to be drawn.
      place: row of `frame` -> "file:line", for messages.
    """

    frame: pl.DataFrame
    positives: bool = False
    place: Callable[[int], str] = lambda row: f"impression {row + 1}"


@dataclasses.dataclass
class Kept:
    """The rows of a table that are kept [E], with their users and items: rows of those tables first, dense indices then."""

    rows: np.ndarray
    user: np.ndarray
    item: np.ndarray


@dataclasses.dataclass(frozen=True)
class Impressions:
    """Labelled impressions by index.

    Attributes:
      user: [E] int32, row of the users table.
      item: [E] int32, catalogue index.
      context: [E, C] int32, category of each field, -1 is unknown.
      labels: [E, L] float32, NaN is not observed.
      propensity: [E] float32, probability with which the logging policy showed the item; None where the log has none.
      time: [E] int64, seconds, or the order where there is no clock.
      categories: context field -> its categories in the order of their codes.
      tasks: names of the labels.
    """

    user: np.ndarray
    item: np.ndarray
    context: np.ndarray
    labels: np.ndarray
    propensity: np.ndarray | None
    time: np.ndarray
    categories: Mapping[str, Sequence[str]]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, rows: Any) -> Impressions:
        """The impressions of some rows (a slice, a mask or indices)."""
        taken: dict[str, Any] = {name: None if value is None else value[rows] for name, value in _arrays(self).items()}
        return dataclasses.replace(self, **taken)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the context fields, C."""
        return tuple(self.categories)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Categories of each context field, C."""
        return tuple(len(values) for values in self.categories.values())


def _arrays(impressions: Impressions) -> dict[str, np.ndarray | None]:
    names = ("user", "item", "context", "labels", "propensity", "time")
    return {name: vars(impressions)[name] for name in names}


# -- tables to codes --


def check(table: ImpressionTable, events: pl.DataFrame) -> None:
    """Checks the schema of a table against that of the events.

    Raises:
      RecJaxError: says which column, what is there and what was expected.
    """
    frame = table.frame
    expected = {"user": events.schema["user"], "item": events.schema["item"], "time": pl.Int64}
    expected |= {c: pl.String for c in frame.columns if c.startswith(CONTEXT)}
    expected |= {c: pl.Float32 for c in frame.columns if c.startswith(LABEL) or c == "propensity"}
    for column, dtype in expected.items():
        if column not in frame.columns:
            raise RecJaxError(f"table impressions has no column {column}; it has: {', '.join(frame.columns)}")
        if frame.schema[column] != dtype:
            raise RecJaxError(f"table impressions: column {column} is {frame.schema[column]}; expected {dtype}")
        if not column.startswith(LABEL) and frame[column].null_count():
            raise RecJaxError(f"table impressions: column {column} has {frame[column].null_count():,} empty values; expected none")
    if not any(c.startswith(LABEL) for c in frame.columns):
        raise RecJaxError(f"table impressions has no column {LABEL}NAME; it has: {', '.join(frame.columns)}")
    if "propensity" in frame.columns:
        wrong = ~((frame["propensity"] > 0) & (frame["propensity"] <= 1))
        if wrong.any():
            row = int(wrong.arg_true()[0])
            raise RecJaxError(f"{table.place(row)}: propensity {frame['propensity'][row]:g}; expected a probability, above 0 and at most 1")


def asked(data: Any) -> bool:
    """Whether a reader is to give the impressions of its input."""
    return data.impressions.split in ("random", "temporal")


def wanted(table: ImpressionTable | None, data: Any) -> ImpressionTable | None:
    """The reader's table, if `config.data.impressions.split` asks for it.

    Raises:
      RecJaxError: no such split, or no table where one is asked for.
    """
    kind = data.impressions.split
    if kind and kind not in KINDS:
        raise RecJaxError(f"config.data.impressions.split={kind!r}: expected '' or one of {', '.join(KINDS)}")
    if not asked(data):
        return None
    if table is None:
        raise RecJaxError(
            f"config.data.impressions.split={kind!r}, but reader {data.reader!r} gives no impressions of this input; "
            "set it to 'events' to make them of the events, or to '' for none"
        )
    return table


def keep(table: ImpressionTable, user: np.ndarray, item: np.ndarray, has_text: np.ndarray, on_bad: Mapping[str, str], report: Any) -> Kept:
    """Leaves out the rows of items without text and, by the policy `unknown_item`, of unknown items.

    Args:
      user, item: [rows], rows of those tables, -1 where the id is not there.
      has_text: [rows of the items table].
      report: a `tables.Report`, which counts them.

    Raises:
      RecJaxError: an unknown item whose policy is "error", an unknown user, nothing left.
    """
    unknown = np.flatnonzero(item < 0)
    for i, row in enumerate(unknown[:3].tolist()):
        detail = f"item {table.frame['item'][row]!r} is not in the items table"
        if on_bad["unknown_item"] == "error":
            raise RecJaxError(f"{table.place(row)}: {detail}. Mend the input, or set config.data.on_bad.unknown_item='skip'")
        report.add("unknown_impression", table.place(row), detail, len(unknown) - 2 if i == 2 else 1)  # the third stands for the others
    if (user < 0).any():
        row = int(np.argmax(user < 0))
        raise RecJaxError(f"{table.place(row)}: user {table.frame['user'][row]!r} is not in the users table")
    rows = np.flatnonzero((item >= 0) & has_text[item])
    if not len(rows):
        raise RecJaxError(f"none of the {len(item):,} impressions is left: they are all of unknown items or of items without text")
    return Kept(rows, user[rows], item[rows])


def code(table: ImpressionTable, kept: Kept, *, n_items: int, data: Any, seed: int, clock: bool) -> tuple[Impressions, np.ndarray]:
    """The kept rows, by dense indices -> (impressions, split [E] uint8): the rows in their order, then the negatives drawn for them.

    Args:
      n_items: N.
      data: `config.data`.
      seed: of negatives and split.
      clock: whether `time` is a time; "temporal" needs one.

    Raises:
      RecJaxError: a context field without any value, a user without items left to draw, a split that leaves nothing to train on.
    """
    frame = table.frame[kept.rows]
    context, categories = _codes(frame)
    labels = [c for c in frame.columns if c.startswith(LABEL)]
    made = Impressions(
        user=kept.user,
        item=kept.item,
        context=context,
        labels=frame.select(labels).fill_null(np.nan).to_numpy().astype(np.float32, copy=False).reshape(len(frame), len(labels)),
        propensity=frame["propensity"].to_numpy() if "propensity" in frame.columns else None,
        time=frame["time"].to_numpy(),
        categories=categories,
        tasks=tuple(c.removeprefix(LABEL) for c in labels),
    )
    if table.positives:
        made, _ = with_negatives(made, data.impressions.negatives, n_items=n_items, seed=seed)
    return made, split(made.time, data, seed=seed, clock=clock)


def of_events(
    user: np.ndarray, item: np.ndarray, time: np.ndarray, rating: np.ndarray, part: np.ndarray, *, n_items: int, data: Any, seed: int
) -> tuple[Impressions, np.ndarray]:
    """Coded events [E] with their split -> (impressions, split): each event is a positive of its own part, its negatives are too.

    The labels are `used`, and `rating`, which is not observed of a negative.
    """
    labels = np.stack([np.ones_like(rating), rating], axis=1)
    made = Impressions(user, item, np.zeros((len(user), 0), np.int32), labels, None, time, {}, (USED, "rating"))
    made, positive = with_negatives(made, data.impressions.negatives, n_items=n_items, seed=seed)
    made.labels[len(user) :, 1] = np.nan
    return made, part[positive]


def _codes(frame: pl.DataFrame) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Columns context.NAME -> (codes [E, C] int32, -1 = "", categories of each field in alphabetical order)."""
    columns = [c for c in frame.columns if c.startswith(CONTEXT)]
    out, categories = np.empty((frame.height, len(columns)), np.int32), {}
    for i, column in enumerate(columns):
        known = frame[column].replace("", None)
        values = known.drop_nulls().unique().sort()
        if not len(values):
            raise RecJaxError(f"context field {column.removeprefix(CONTEXT)!r} has no value in any impression; leave it out")
        out[:, i] = known.cast(pl.Enum(values)).to_physical().cast(pl.Int32).fill_null(-1).to_numpy()
        categories[column.removeprefix(CONTEXT)] = values.to_list()
    return out, categories


def split(time: np.ndarray, data: Any, *, seed: int, clock: bool) -> np.ndarray:
    """time [E] -> split [E] uint8 by `config.data.impressions.split`; the shares are those of `config.data.split`.

    random: drawn by seed, impression by impression. temporal: by two dates, for everybody.

    Raises:
      RecJaxError: shares that leave nothing to train on, or "temporal" without times.
    """
    spec, kind = data.split, data.impressions.split
    if spec.valid < 0 or spec.test < 0 or spec.valid + spec.test >= 1:
        raise RecJaxError(f"config.data.split.valid={spec.valid} and test={spec.test}: expected shares of at least 0 that sum to below 1")
    if kind == "temporal":
        if not clock:
            raise RecJaxError("config.data.impressions.split='temporal' needs times, and this input has only an order; use random")
        out = split_lib.temporal(time, time, time, valid=spec.valid, test=spec.test)
    else:
        n_test, n_valid = (int(share * len(time) + 1e-9) for share in (spec.test, spec.valid))
        order = np.random.default_rng((seed, 1)).permutation(len(time))
        out = np.zeros(len(time), np.uint8)
        out[order[:n_test]] = split_lib.TEST
        out[order[n_test : n_test + n_valid]] = split_lib.VALID
    if not (out == split_lib.TRAIN).any():
        raise RecJaxError(f"config.data.impressions.split={kind!r} leaves none of the {len(time):,} impressions to train on")
    return out


def split_of_events(events: pl.DataFrame, row_of: np.ndarray, kept: Kept, impressions: tuple[Impressions, np.ndarray] | None) -> np.ndarray:
    """Events, those that are left in their order [E] -> the split of each one's impression [E] uint8, so that no target is known before.

    An event without an impression was there before the log began, and is train.

    Raises:
      RecJaxError: no impressions with a split of their own, or no training events.
    """
    if impressions is None or "impression" not in events.columns:
        raise RecJaxError("config.data.split.kind='impressions' needs config.data.impressions.split='random' or 'temporal'")
    impression = events["impression"].to_numpy()[row_of]
    of_row = np.zeros(max(int(kept.rows.max()), int(impression.max(initial=-1))) + 2, np.uint8)  # the last place is for -1
    of_row[kept.rows] = impressions[1][: len(kept.rows)]
    out = of_row[impression]
    if not (out == split_lib.TRAIN).any():
        raise RecJaxError("config.data.split.kind='impressions' leaves no training events")
    return out


def with_negatives(positives: Impressions, count: int, *, n_items: int, seed: int) -> tuple[Impressions, np.ndarray]:
    """Positives [E] -> (they and then `count` negatives of each [E * (1 + count)], the positive behind each row).

    A negative has its positive's user, context and time, labels of 0, and an item drawn uniformly from those that the user has not used
    in that context.

    Raises:
      RecJaxError: a negative count, or a user who has used the whole catalogue in one context.
    """
    if count < 0:
        raise RecJaxError(f"config.data.impressions.negatives={count}: expected 0 or more")
    everything = np.arange(len(positives), dtype=np.int64)
    if not count:
        return positives, everything
    case = cases(positives.user, positives.context, positives.sizes)  # one number for each pair of user and context
    used = np.unique(case * n_items + positives.item)
    all_used = np.flatnonzero(np.bincount(used // n_items) >= n_items)
    if len(all_used):
        user = int(positives.user[np.argmax(case == all_used[0])])
        raise RecJaxError(
            f"no negative can be drawn for user {user} (row of the users table), who has used all {n_items:,} items in one context; "
            "set config.data.impressions.negatives=0"
        )
    positive = np.repeat(everything, count)
    item, wrong, random = np.empty(len(positive), np.int32), np.arange(len(positive)), np.random.default_rng((seed, 0))
    while len(wrong):
        item[wrong] = random.integers(n_items, size=len(wrong))
        wrong = wrong[_member(case[positive[wrong]] * n_items + item[wrong], used)]
    negatives = dataclasses.replace(positives[positive], item=item, labels=np.zeros((len(positive), len(positives.tasks)), np.float32))
    pairs = zip(_arrays(positives).items(), _arrays(negatives).values(), strict=True)
    joined: dict[str, Any] = {name: None if a is None else np.concatenate([a, b]) for (name, a), b in pairs}
    return dataclasses.replace(positives, **joined), np.concatenate([everything, positive])


def cases(user: np.ndarray, context: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """user [E], context [E, C] with sizes [C] -> a number from 0 without gaps for each pair of user and context [E] int64."""
    _, case = np.unique(user, return_inverse=True)
    for column, size in zip(context.T, sizes, strict=True):
        _, case = np.unique(case * (size + 1) + column + 1, return_inverse=True)
    return case.astype(np.int64)


def _member(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """keys [E], ordered [M] ascending -> whether each key is among them [E] bool."""
    place = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return ordered[place] == keys


# -- files --


def write(impressions: Impressions, part: np.ndarray, out: Path) -> dict[str, Any]:
    """Impressions with their split [E] -> files under the prepared folder `out`; what its meta.json says about them."""
    order = np.argsort(part, kind="stable")
    folder = out / FOLDER
    folder.mkdir()
    for name, array in _arrays(impressions[order]).items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    (folder / "context.json").write_text(json.dumps({name: list(values) for name, values in impressions.categories.items()}) + "\n")
    meta: dict[str, Any] = {"splits": {}, "users_in_split": {}, "items_in_split": {}, "labels": {}}
    for name, value in PARTS.items():
        here = impressions[part == value]
        meta["splits"][name] = len(here)
        meta["users_in_split"][name], meta["items_in_split"][name] = (len(np.unique(x)) for x in (here.user, here.item))
        for task, column in zip(impressions.tasks, here.labels.T, strict=True):
            observed = column[~np.isnan(column)].astype(np.float64)
            mean = float(observed.mean()) if len(observed) else None
            meta["labels"].setdefault(task, {})[name] = {"observed": len(observed), "mean": mean}
    meta["context"] = dict(zip(impressions.fields, impressions.sizes, strict=True))
    p = impressions.propensity
    meta["propensity"] = None if p is None else [float(p.min()), float(p.max())]
    return meta


def read(out: Path, meta: Mapping[str, Any], name: str) -> Impressions:
    """The part `name` of the impressions under a prepared folder; `meta` is what `write` gave. Arrays are mapped from disk.

    Raises:
      RecJaxError: no such part.
    """
    if name not in PARTS:
        raise RecJaxError(f"split {name!r}: expected {', '.join(PARTS)}")
    counts = [meta["splits"][part] for part in PARTS]
    place = list(PARTS).index(name)
    rows = slice(sum(counts[:place]), sum(counts[: place + 1]))

    def mapped(array: str) -> np.ndarray:
        return np.asarray(np.load(out / FOLDER / f"{array}.npy", mmap_mode="r"))[rows]

    return Impressions(
        user=mapped("user"),
        item=mapped("item"),
        context=mapped("context"),
        labels=mapped("labels"),
        propensity=mapped("propensity") if meta["propensity"] else None,
        time=mapped("time"),
        categories=json.loads((out / FOLDER / "context.json").read_text()),
        tasks=tuple(meta["labels"]),
    )
