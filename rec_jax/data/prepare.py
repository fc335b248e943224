"""Tables -> a prepared folder: histories as ArrayRecord, items and users as Parquet; made once, keyed by a fingerprint, atomically.

A prepared folder, `<cache>/<name>-<fingerprint>/`:

    histories/     TFDS data set, record i = the history of user i
    events/        items.npy, splits.npy, offsets.npy: the same events end to end, for evaluation and baselines
    lengths.npy    train events of each user
    impressions/   labelled impressions, where config.data.impressions.split asks for them (`impressions.py`)
    items.parquet  in index order, with the rendered `text`
    users.parquet  in index order
    features.parquet, vectors/   of items, where config.data.features names some (`features.py`)
    user_features.parquet        of users, where config.data.user_features names some
    meta.json      counts, settings, bad input; a folder without it does not count
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from etils import epath

from rec_jax.config_features import has_columns, has_user_features
from rec_jax.config_places import columns_of
from rec_jax.data import event_features, folders, places, readers, records, text
from rec_jax.data import features as features_lib
from rec_jax.data import impressions as impressions_lib
from rec_jax.data.identity import FORMAT, identify, settings_of
from rec_jax.data.impressions import Impressions
from rec_jax.data.tables import TEXT_COLUMNS, Coded, Report, Tables, code
from rec_jax.processes import place_of
from rec_jax.types import EvalSet, Ragged, RecJaxError

META = "meta.json"
SPLITS = {"train": 0, "valid": 1, "test": 2}
_found: set[str] = set()  # folders that were said to be there: once each
WAIT_SECONDS = 2 * 3600.0  # that other processes wait for the one that prepares
IN_MEMORY = 1 << 28  # events whose items a process holds to train on: 1 GiB
ROW = "row of the items table"  # a column, until the catalogue is coded
MAX_RATING_VALUES = 20  # more distinct ratings than that are counted in as many bins


def prepare(config: Any) -> Prepared:
    """Prepares the data that `config.data` names, or opens what an earlier call has prepared from the same input and settings.

    With several JAX processes the first one prepares and the others wait for it, so the cache must be a folder that all of them see.

    Raises:
      RecJaxError: bad input or settings, a catalogue of one item; another process did not finish in time; times are asked for that the
        input does not have.
    """
    folder, fingerprint, inputs = identify(config)
    process, processes = _process()
    if (folder / META).exists():
        if process == 0 and str(folder) not in _found:
            _say(f"prepared data is there: {folder}")
            _found.add(str(folder))
    elif process == 0:
        _make(config, folder, fingerprint, inputs)
    else:
        _wait(folder, process, processes)
    prepared = dataclasses.replace(open_prepared(folder), columns=columns_of(config))
    places.check(config, prepared.meta)
    return prepared


def fingerprint_of(config: Any) -> str:
    """What `prepare` knows the input and settings of `config.data` by."""
    return identify(config)[1]


def open_prepared(folder: epath.PathLike) -> Prepared:
    """A folder that `prepare` has made -> Prepared.

    Raises:
      RecJaxError: the folder is missing, incomplete, or of another format.
    """
    folder = epath.Path(folder)
    if not (folder / META).exists():
        raise RecJaxError(f"{folder} is no complete prepared folder (it has no {META}); run `python -m rec_jax.data prepare --config=...`")
    meta = json.loads((folder / META).read_text())
    if meta["format"] != FORMAT:
        raise RecJaxError(f"{folder} has format {meta['format']}, this version reads {FORMAT}; run `python -m rec_jax.data prepare` again")
    return Prepared(folder, meta)


@dataclasses.dataclass
class Prepared:
    """A prepared folder: what is in it is read where it is first asked for.

    Attributes:
      folder: where it lies, maybe on gs://.
      meta: what meta.json says: counts, splits, settings, bad input.
      columns: of the records, that histories come with ("times", "ratings", "event_NAME"), or "users".
    """

    folder: epath.Path
    meta: dict[str, Any]
    columns: tuple[str, ...] = ()

    @property
    def n_users(self) -> int:
        """U."""
        return self.meta["users"]

    @property
    def n_items(self) -> int:
        """N."""
        return self.meta["items"]

    @functools.cached_property
    def local(self) -> Path:
        """The folder on this machine: itself, or a copy of a remote one (ArrayRecord and memory maps need files)."""
        return folders.local_copy(self.folder, META)

    def source(self) -> records.Records:
        """Random access to records: user [U rows] -> {"user" [], "items" [n], "times" [n], "ratings" [n], "splits" [n]}, oldest first.

        With `config.data.event_features` also "event_NAME" [n] int32 of each (`event_features.py`).
        """
        return records.Records(self.local)

    def items(self) -> pl.DataFrame:
        """The items table in index order [N rows], ids as text, with `name` and `text`."""
        return self._items

    def users(self) -> pl.DataFrame:
        """The users table in index order [U rows], ids as text."""
        return pl.read_parquet(self.local / "users.parquet")

    def names(self) -> list[str]:
        """What people call each item [N]."""
        return self._items["name"].to_list()

    def texts(self) -> list[str]:
        """Each item's text by the template [N]."""
        return self._items["text"].to_list()

    def item_ids(self) -> list[str]:
        """Each item's id in the input [N]."""
        return self._items["item"].to_list()

    def train_lengths(self) -> np.ndarray:
        """Train events of each user -> [U] int32."""
        return np.load(self.local / "lengths.npy")

    def lengths(self) -> np.ndarray:
        """All events of each user -> [U] int64."""
        return np.diff(self._events[2])

    def train_histories(self) -> Ragged:
        """Items of each user's train events, oldest first, with `columns` -> [U rows] int32."""
        items, splits, offsets = self._events
        train = splits == SPLITS["train"]
        return Ragged(items[train], _counted(train)[offsets], {name: column[train] for name, column in self._columns.items()})

    def train_source(self) -> Ragged | records.Records:
        """What windows of train events are read from: all of them in memory or, beyond IN_MEMORY events, the records on disk."""
        return self.train_histories() if len(self._events[0]) <= IN_MEMORY else self.source()

    def item_counts(self) -> np.ndarray:
        """Train events of each item -> [N] int64."""
        items, splits, _ = self._events
        return np.bincount(items[splits == SPLITS["train"]], minlength=self.n_items).astype(np.int64)

    def eval_set(self, split: str) -> EvalSet:
        """Users with an event in `split` ("valid" or "test") -> their targets, and the history before the first of them.

        The targets are all events of the split. The history is what the user had before the first target and belongs to an earlier
        part: train for validation, train and validation for test. With the split "cold_item" it may be empty; with "random" it is all of
        the earlier parts, whenever it was. With config.data.split.history="train" it is the train events of that alone, and the ranking
        leaves the validation events out nevertheless. It has `columns`.

        Raises:
          RecJaxError: no such split.
        """
        if split not in ("valid", "test"):
            raise RecJaxError(f"split {split!r}: expected valid or test")
        items, splits, offsets = self._events
        target = splits == SPLITS[split]
        targets_before = _counted(target)
        users = np.flatnonzero(np.diff(targets_before[offsets]))
        places = np.flatnonzero(target)
        starts, firsts = offsets[users], places[targets_before[offsets[users]]]
        # +1 where a history opens and -1 where it ends: the running sum is 1 inside.
        edges = np.zeros(len(items) + 1, np.int8)
        edges[starts] += 1
        edges[offsets[users + 1] if self.meta["settings"]["split"]["kind"] == "random" else firsts] -= 1
        known = (np.cumsum(edges[:-1], dtype=np.int8) == 1) & (splits < SPLITS[split])
        history = self._histories(known, starts)
        targets = Ragged(items[places], np.append(targets_before[starts], len(places)))
        if self.meta["settings"]["split"].get("history", "earlier") == "train":
            return EvalSet(users, self._histories(known & (splits == SPLITS["train"]), starts), targets, self.n_items, removed=history)
        return EvalSet(users, history, targets, self.n_items)

    def _histories(self, taken: np.ndarray, starts: np.ndarray) -> Ragged:
        """The events of the mask `taken` [E], of the users whose events begin at `starts`, with their columns."""
        before = _counted(taken)
        columns = {name: column[taken] for name, column in self._columns.items()}
        return Ragged(self._events[0][taken], np.append(before[starts], before[-1]), columns)

    def impressions(self, split: str) -> Impressions:
        """Labelled impressions of a part ("train", "valid", "test"), mapped from disk: user [E], item [E], context [E, C], labels [E, L].

        Raises:
          RecJaxError: none were prepared, or no such part.
        """
        if "impressions" not in self.meta:
            raise RecJaxError(
                f"{self.folder} has no impressions: set config.data.impressions.split to {', '.join(impressions_lib.KINDS[:-1])} "
                f"(what the input has) or {impressions_lib.KINDS[-1]} (its events, with negatives), and prepare again"
            )
        return impressions_lib.read(self.local, self.meta["impressions"], split)

    @functools.cached_property
    def _items(self) -> pl.DataFrame:
        return pl.read_parquet(self.local / "items.parquet")

    @functools.cached_property
    def _events(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All events sorted by (user, time), mapped from disk: item [E] int32, split [E] uint8, offsets of users [U + 1] int64."""
        items, splits, offsets = (np.load(self.local / "events" / f"{name}.npy", mmap_mode="r") for name in ("items", "splits", "offsets"))
        return np.asarray(items), np.asarray(splits), np.asarray(offsets)

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Each of `columns` of all events [E], in the order of `_events`: of the records, which are read once for it; users as they are."""
        offsets, wanted = self._events[2], [name for name in self.columns if name != "users"]
        parts = [[record[name] for name in wanted] for record in (self.source() if wanted else [])]
        out = {name: np.concatenate(column) for name, column in zip(wanted, zip(*parts, strict=True), strict=True)}
        if "users" in self.columns:
            out["users"] = np.repeat(np.arange(self.n_users, dtype=np.int32), np.diff(offsets))
        return out


def _counted(mask: np.ndarray) -> np.ndarray:
    """mask [E] -> how many are set before each place, and in all [E + 1] int64."""
    out = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask, out=out[1:])
    return out


# -- writing --


def _make(config: Any, folder: epath.Path, fingerprint: str, inputs: list[dict[str, Any]]) -> None:
    begin = time.monotonic()
    with folders.new(folder, META) as unfinished:
        meta = {"format": FORMAT, "fingerprint": fingerprint, "settings": settings_of(config), "inputs": inputs}
        meta |= _write(config, unfinished)
        (unfinished / META).write_text(json.dumps(meta, indent=1) + "\n")
    _say(f"prepared in {time.monotonic() - begin:.0f} s: {folder}")


def _write(config: Any, out: Path) -> dict[str, Any]:
    """Reads, codes and writes everything but meta.json into the empty folder `out` -> what meta.json says about it."""
    _say(f"reading {config.data.path} ({config.data.reader})")
    tables = readers.read(config.data)
    report, clock = tables.report, tables.clock
    template = config.data.text.template or text.default_template(tables.items.columns)
    named, item_place = features_lib.columns_of(tables.items, config.data), tables.item_place
    items, users, events = code(_with_texts(tables, template), config.data, config.seed)
    if len(items) < 2:
        left_out = "; ".join(line.strip() for line in report.lines() if line[0] != " ") or "nothing was left out"
        raise RecJaxError(
            f"config.data.path={config.data.path!r}: the catalogue has one item, {items['item'][0]!r}, and there is nothing to rank it "
            f"against; look at the file, config.data.filter and config.data.on_bad ({left_out})"
        )
    rows = items[ROW].to_list()
    items = items.drop(ROW)
    of_events, features = dict[str, np.ndarray](), dict[str, Any]()
    if events.rows is not None:
        train = events.split == SPLITS["train"]
        of_events, found = event_features.code(tables.events, events.rows, train, config.data, report, tables.event_place)
        features[event_features.META] = found
    del tables
    # An item that `empty_text` keeps without a text goes by its name.
    items = items.with_columns(text=pl.when(pl.col("text") == "").then("name").otherwise("text"))
    items.write_parquet(out / "items.parquet")
    users.write_parquet(out / "users.parquet")
    _say(f"writing {len(events.user):,} events of {events.n_users:,} users and {events.n_items:,} items")
    offsets = np.zeros(events.n_users + 1, np.int64)
    np.cumsum(np.bincount(events.user, minlength=events.n_users), out=offsets[1:])
    train = _counted(events.split == SPLITS["train"])
    np.save(out / "lengths.npy", np.diff(train[offsets]).astype(np.int32))
    (out / "events").mkdir()
    for name, array in (("items", events.item), ("splits", events.split), ("offsets", offsets)):
        np.save(out / "events" / f"{name}.npy", array)
    columns = {"items": events.item, "times": events.time, "ratings": events.rating, "splits": events.split, **of_events}
    records.write(columns, offsets, out)
    shown = {}
    if events.impressions is not None:
        _say(f"writing {len(events.impressions[0]):,} impressions")
        shown = {"impressions": impressions_lib.write(*events.impressions, out)}
    if has_columns(config):
        place = lambda item: item_place(rows[item])
        mine = named.select(pl.all().gather(rows))
        features["features"] = features_lib.write(mine, items["item"].to_list(), config.data, report, out, place)
    if has_user_features(config):
        features["user_features"] = features_lib.write_users(users, config.data, report, out)
    return {"template": template, **_counts(events, report, clock), **shown, **features}


def _with_texts(tables: Tables, template: str) -> Tables:
    """Adds the rendered `text` and the row to the items. One whose template is empty counts as one without text, whatever else it has."""
    rendered = pl.Series(text.render(tables.items, template), dtype=pl.String)
    columns = [c for c in TEXT_COLUMNS if c in tables.items.columns]
    blanked = [pl.when(rendered == "").then(pl.lit("")).otherwise(c).alias(c) for c in columns]
    return dataclasses.replace(tables, items=tables.items.with_columns(*blanked, text=rendered).with_row_index(ROW))


def _counts(events: Coded, report: Report, clock: bool) -> dict[str, Any]:
    """The figures of meta.json; the same input and settings give the same ones."""
    n = len(events.user)
    users_in = {name: len(np.unique(events.user[events.split == value])) for name, value in SPLITS.items()}
    return {
        "users": events.n_users,
        "items": events.n_items,
        "events": n,
        "density": n / (events.n_users * events.n_items),
        "splits": {name: int((events.split == value).sum()) for name, value in SPLITS.items()},
        "users_in_split": users_in,
        "clock": clock,
        "times": [int(events.time.min()), int(events.time.max())],
        "backwards": dict(zip(("events", "users"), events.backwards, strict=True)),
        "ratings": _histogram(events.rating),
        "bad_input": report.to_dict(),
    }


def _histogram(rating: np.ndarray) -> list[list[float]]:
    """rating [E] -> [value, events] each; of more than MAX_RATING_VALUES values, [lower end, events] of bins of equal width."""
    values, counts = np.unique(rating, return_counts=True)
    if len(values) > MAX_RATING_VALUES:
        counts, edges = np.histogram(rating, MAX_RATING_VALUES)
        values = edges[:-1]
    return [[float(v), int(c)] for v, c in zip(values, counts, strict=True)]


# -- processes --


def _wait(folder: epath.Path, process: int, processes: int) -> None:
    begin = time.monotonic()
    told = 0.0
    while not (folder / META).exists():
        waited = time.monotonic() - begin
        if waited > WAIT_SECONDS:
            raise RecJaxError(
                f"process {process} of {processes} waited {waited:.0f} s for process 0 to prepare {folder / META}; "
                "if process 0 is done, set config.data.cache to a folder that all processes see (a shared disk or gs://)"
            )
        if waited >= told + 60:
            told = waited
            _say(f"process {process} of {processes} has waited {waited:.0f} s for {folder}")
        time.sleep(min(1.0, WAIT_SECONDS / 10))


def _process() -> tuple[int, int]:
    """(index of this JAX process, number of processes); (0, 1) where jax.distributed is not started."""
    return place_of()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
