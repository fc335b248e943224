"""Going on from a trained workdir with a larger data set (`config.start`): what it was trained on, and what is new against that."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax.data import places
from rec_jax.data import prepare as prepare_lib
from rec_jax.data.prepare import Prepared
from rec_jax.types import RecJaxError

FILE = "data.json"  # of a workdir: which prepared data it is trained on
# Keys that change no parameter's shape and yet what the parameters mean: those of the old workdir hold.
SAME = (
    "data.text.tokenizer", "towers.text.path", "towers.text.pooling", "towers.normalize", "towers.item.id_buckets",
    "towers.item.id_hashes", "towers.user.kind", "towers.user.heads", "towers.user.positions", "towers.user.session_gap",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Start:
    """The trained stage that a run goes on from.

    Attributes:
      workdir: where it was trained.
      whole: the config of that workdir.
      stage: its name, None if there are no stages.
      config: of the stage.
    """

    workdir: epath.Path
    whole: Any
    stage: str | None
    config: Any

    @property
    def folder(self) -> epath.Path:
        """Where the stage's checkpoints are."""
        return self.workdir / self.stage if self.stage else self.workdir

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The data that it was trained on.

        Raises:
          RecJaxError: it is not there any more, and cannot be prepared again.
        """
        return _trained_on(self.workdir, self.whole)


def start_of(config: Any) -> Start:
    """What `config.start` names.

    Raises:
      RecJaxError: no workdir, no such stage, or one that trained no towers.
    """
    path = epath.Path(config.start.path).expanduser()
    whole = config_lib.read_config(path)
    name, of_stage = config_lib.stage_with_towers(whole, config.start.stage, path, key="config.start.stage")
    return Start(path, whole, name, of_stage)


def check(config: Any) -> None:
    """Checks, without looking at data, whether a run can go on as `config.start` says; nothing where it is not set.

    Raises:
      RecJaxError: as `start_of` does; a first stage that cannot go on; towers that mean something else than those of the old workdir.
    """
    names = config.stages or ("",)
    configs = {name: config_lib.for_stage(config, name) if name else config for name in names}
    for name, c in configs.items():
        if c.start.to_dict() != config.start.to_dict():
            raise RecJaxError(f"config.stage.{name}.start: a run starts once; set config.start")
    if not config.start.path:
        return
    start, first = start_of(config), configs[names[0]]
    if first.batch.kind == "texts":
        raise RecJaxError(
            f"config.start.path={config.start.path!r}: the first stage {names[0]!r} is of texts (batch.kind), which would change "
            "the encoder below trained towers; begin with a stage of histories or impressions"
        )
    if config_lib.is_student(first):
        raise RecJaxError(
            f"config.start.path={config.start.path!r}: the first stage makes a student (config.towers.text.layers, width or static), "
            "but goes on from the encoder that is there: leave these keys alone, and distil in a later stage"
        )
    for name, c in configs.items():
        if c.start.replay < 1 and c.batch.kind == "impressions":
            raise RecJaxError(f"config.start.replay={c.start.replay}: stage {name!r} is of impressions, which all come: set it to 1.0")
    keys = (*SAME, *(("towers.text.scratch",) if first.towers.text.path == "scratch" else ()))
    for key in keys:
        old, new = config_lib.get(start.config, key), config_lib.get(first, key)
        if old != new:
            raise RecJaxError(f"config.{key} is {_plain(old)} in {start.workdir} and {_plain(new)} here; set it as it is there")


def check_ratings(start: Start, config: Any, prepared: Prepared) -> None:
    """Checks that ratings, where both history towers read them, fall into the same ranges on this data as on that of the old workdir.

    Raises:
      RecJaxError: they do not; says how to have the old ones.
    """
    new = places.rating_edges(config, prepared)
    old = places.rating_edges(start.config, dataclasses.replace(start.prepared, columns=("ratings",)))
    if old and new and old != new:
        raise RecJaxError(
            f"ratings are told apart by {new} here, and by {old} in {start.workdir} (config.start.path): "
            f"set config.towers.user.rating_edges={old}"
        )


def _plain(value: Any) -> str:
    return repr(value.to_dict() if hasattr(value, "to_dict") else value)


def keep(workdir: epath.Path, prepared: Prepared, *, start: str, write: bool = True) -> None:
    """Notes which data a workdir is trained on, and the mark of the weights that it went on from, "" = none. `write`: this process does."""
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        noted = {"folder": str(prepared.folder), "fingerprint": prepared.meta["fingerprint"], "start": start}
        temporary = workdir / (FILE + ".tmp")
        temporary.write_text(json.dumps(noted, indent=1) + "\n")
        temporary.replace(workdir / FILE)


def kept(workdir: epath.PathLike) -> dict[str, str]:
    """What `keep` has noted: "folder" and "fingerprint" of the data, "start"; empty where nothing was."""
    file = epath.Path(workdir) / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def check_kept(workdir: epath.Path, prepared: Prepared, *, start: str) -> None:
    """Checks that a workdir, where it was trained on something, was trained on this data and from these weights.

    Raises:
      RecJaxError: it was trained on other data, or from others.
    """
    before = kept(workdir)
    if before and before["fingerprint"] != prepared.meta["fingerprint"]:
        raise RecJaxError(
            f"{workdir} is trained on {before['folder']}, and the data is {prepared.folder} now: its input or settings have changed; use "
            f"another --workdir, and --config.start.path={workdir} to go on from what this one has learned"
        )
    if before and before["start"] != start:
        raise RecJaxError(f"{workdir} went on from a workdir that has been trained again since (config.start): use another --workdir")


def _trained_on(workdir: epath.Path, config: Any) -> Prepared:
    noted = kept(workdir)
    if not noted:
        raise RecJaxError(
            f"{workdir} does not say what it was trained on (it has no {FILE}): run its own training command once more, with the "
            "files that it was trained on"
        )
    place = epath.Path(noted["folder"])
    for folder in (place, config_lib.cache_dir(config) / place.name):
        if (folder / prepare_lib.META).exists():
            found = prepare_lib.open_prepared(folder)
            if found.meta["fingerprint"] == noted["fingerprint"]:
                return found
    try:
        same = prepare_lib.fingerprint_of(config) == noted["fingerprint"]
    except (RecJaxError, OSError):
        same = False
    if not same:
        raise RecJaxError(
            f"{place}, the prepared data that {workdir} was trained on, is not there, and {config.data.path} is not the input that it was "
            f"made from: bring back the folder, or that input, and run `python -m rec_jax.data prepare` with it"
        )
    return prepare_lib.prepare(config)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A larger data set against the one that a model was trained on; users and items are matched by their ids in the input.

    Attributes:
      items: [N] int64, row of each catalogue item in the old catalogue, -1 = new.
      users: [U] int64, row of each user in the old users table, -1 = new.
      events: [E] bool, train events (user by user, oldest first) that the old run did not train on.
      active: [U] bool, users with an event that the old data has in none of its parts.
    """

    items: np.ndarray
    users: np.ndarray
    events: np.ndarray
    active: np.ndarray


def difference(new: Prepared, old: Prepared) -> Difference:
    """What is new in one prepared data set against another. The k-th event of a user and an item is the k-th of both there."""
    items = _matched(new.item_ids(), old.item_ids())
    users = _matched(new.users()["user"].to_list(), old.users()["user"].to_list())

    def unseen(parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        (user, item), (old_user, old_item) = _events(new, parts), _events(old, parts)
        width = old.n_items + 1  # the last column is that of new items
        keys = users[user] * width + np.where(items[item] < 0, old.n_items, items[item])
        out = _beyond(keys, old_user * width + old_item)
        return user, out | (users[user] < 0) | (items[item] < 0)

    user, flags = unseen(("train", "valid", "test"))
    active = np.bincount(user[flags], minlength=new.n_users) > 0
    return Difference(items, users, unseen(("train",))[1], active)


def _matched(ids: Sequence[str], old: Sequence[str]) -> np.ndarray:
    """Ids [N], unique old ids -> row of each among the old ones [N] int64, -1 where it is not there."""
    rows = {name: row for row, name in enumerate(old)}
    return np.fromiter((rows.get(name, -1) for name in ids), np.int64, len(ids))


def _events(prepared: Prepared, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """User and item of each event of some parts, part by part -> 2 x [E] int64."""
    users, items = [], []
    for part in parts:
        if part == "train":
            rows, events = np.arange(prepared.n_users), prepared.train_histories()
        else:
            chosen = prepared.eval_set(part)
            rows, events = chosen.users, chosen.targets
        users.append(np.repeat(rows, events.lengths()).astype(np.int64))
        items.append(events.flat.astype(np.int64))
    return np.concatenate(users), np.concatenate(items)


def _beyond(keys: np.ndarray, old: np.ndarray) -> np.ndarray:
    """keys [E], old keys -> whether each occurs for more times, up to here, than it does among the old ones [E] bool."""
    known, times = np.unique(old, return_counts=True)
    order = np.argsort(keys, kind="stable")
    first = np.flatnonzero(np.diff(keys[order], prepend=np.iinfo(np.int64).min))
    number = np.empty(len(keys), np.int64)
    number[order] = np.arange(len(keys)) - np.repeat(first, np.diff(np.append(first, len(keys))))
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return number >= np.where(known[place] == keys, times[place], 0)
