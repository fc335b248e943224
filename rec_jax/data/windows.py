"""Windows of users' train events: the examples of histories, which of them an epoch takes, and their endless order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from rec_jax.types import Ragged, RecJaxError

Turns = tuple[np.ndarray, np.ndarray, int]  # of `Replay.turns`


class Example(NamedTuple):
    """A window: row of the users table, items [n] of its events, and what else was asked for of these: name of the records -> [n]."""

    user: int
    items: np.ndarray
    columns: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Examples of an epoch: window i is the events [start, stop) of a user; a window of n events trains n - 1 predictions.

    Windows of one user overlap by one event, so that every event but a user's first is a target exactly once an epoch. In the cloze form
    (`data.cloze`) any event of a window may be a target.
    """

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, size: int | None) -> Windows:
        """Cuts each user's train events [U] into windows of at most size + 1 events, from the newest back; None = one window a user."""
        pairs = np.maximum(lengths.astype(np.int64) - 1, 0)
        count = np.minimum(pairs, 1) if size is None else -(-pairs // size)
        user = np.repeat(np.arange(len(lengths)), count)
        number = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
        stop = lengths[user].astype(np.int64) - number * (size or 0)
        start = np.zeros_like(stop) if size is None else np.maximum(stop - size - 1, 0)
        return cls(user.astype(np.int64), start, stop)

    def __len__(self) -> int:
        return len(self.user)


class _Source:
    """Random access to the events of windows: of all train histories in memory, or of records, which are read one by one."""

    def __init__(self, histories: Ragged | Sequence[Mapping[str, np.ndarray]], windows: Windows, columns: tuple[str, ...]):
        if isinstance(histories, Ragged):
            histories = Ragged(histories.flat, histories.offsets, {name: histories.columns[name] for name in columns})
        self._histories, self._windows, self._columns = histories, windows, columns

    def __getitem__(self, index: np.ndarray) -> tuple[np.ndarray, Ragged]:
        """Windows [n] -> their users [n] and their events, with the columns."""
        w = self._windows
        users, start, stop = w.user[index], w.start[index], w.stop[index]
        if isinstance(self._histories, Ragged):
            return users, self._histories.pieces(users, start, stop)
        parts: list[list[np.ndarray]] = []
        for user, first, last in zip(users.tolist(), start.tolist(), stop.tolist(), strict=True):
            record = self._histories[user]
            train = record["splits"] == 0
            whole = {**record, "users": np.full(len(train), user, np.int32)} if "users" in self._columns else record
            parts.append([whole[name][train][first:last] for name in ("items", *self._columns)])
        offsets = np.concatenate([[0], np.cumsum(stop - start)])
        items, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return users, Ragged(items, offsets, dict(zip(self._columns, columns, strict=True)))


@dataclasses.dataclass(frozen=True)
class Replay:
    """How much of the data that an earlier run was trained on comes again; a window is new if it may predict an event that is.

    Attributes:
      share: of the other windows, how many an epoch takes; the next epochs take others until all have had their turn.
      new: [E] bool, which train events are new, user by user, oldest first.
    """

    share: float
    new: np.ndarray

    def turns(self, windows: Windows, train_lengths: np.ndarray, *, whole: bool = False) -> Turns:
        """The new windows, the others, and how many of the others an epoch takes; `whole`: a window may predict its first event too.

        Raises:
          RecJaxError: flags of other events, no new window.
        """
        first = np.concatenate([[0], np.cumsum(train_lengths, dtype=np.int64)])
        before = np.concatenate([[0], np.cumsum(self.new, dtype=np.int64)])  # new events before each place
        if len(self.new) != first[-1]:
            raise RecJaxError(f"{len(self.new)} flags of new events for {first[-1]} train events")
        start = first[windows.user]
        new = before[start + windows.stop] > before[start + windows.start + (not whole)]
        if not new.any() and self.share < 1:
            raise RecJaxError(
                f"config.start.replay={self.share}: no window predicts an event that the old workdir was not trained on; "
                "set it to 1.0, or look at config.data.path"
            )
        others = np.flatnonzero(~new)
        return np.flatnonzero(new), others, round(self.share * len(others))


class Order:
    """The endless order of windows by position, a new one each epoch; random access to many at once.

    Args:
      histories: train events of each user, or records {"items" [n], "splits" [n]} with the columns.
      windows: what there is.
      seed: of the order.
      turns: of `Replay`; None = every window each epoch.
      columns: that come with the items.
    """

    def __init__(self, histories: Any, windows: Windows, seed: int, turns: Turns | None, columns: tuple[str, ...] = ()):
        self._source, self._turns = _Source(histories, windows, columns), turns
        self.per_epoch = len(windows) if turns is None else len(turns[0]) + turns[2]
        self._seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    def _shuffled(self, position: int, size: int) -> int:
        """Position in an endless order of `size` things, all of them each epoch -> which of them."""
        epoch, place = divmod(position, size)
        return index_shuffle(place, max_index=size - 1, seed=(self._seed + epoch) % 2**32, rounds=4)

    def _window(self, position: int) -> int:
        place = self._shuffled(position, self.per_epoch)
        if self._turns is None:
            return place
        always, others, count = self._turns
        if place < len(always):
            return int(always[place])
        turn = position // self.per_epoch * count + place - len(always)
        return int(others[self._shuffled(turn, len(others))])

    def __getitem__(self, positions: Sequence[int]) -> tuple[np.ndarray, Ragged]:
        """Positions [n] -> users [n] and the events of their windows, with the columns."""
        return self._source[np.asarray([self._window(p) for p in positions], np.int64)]
