"""Batches of G shards from a prepared data set by random access: one global order, a place that is saved and restored.

Position i of the endless order belongs to shard i mod G, whatever the number of processes, so every process count sees the same
batches. A shard fills its budgets in order; what does not fit waits for the next batch, as a position in the iterator's place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from rec_jax.data.packing import Rows, TextRows
from rec_jax.types import Batch, Ragged, RecJaxError

LOOK_AHEAD = 16  # examples that may wait for the next batch before a shard is closed


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Budgets of one shard, by the names of `config.batch`; `encode_items` is False where item vectors come from a table."""

    shards: int
    history_rows: int
    history_length: int
    max_items: int
    text_rows: int
    row_tokens: int
    user_rows: int
    user_history: int
    user_kind: str
    encode_items: bool

    @classmethod
    def from_config(cls, config: Any) -> BatchSpec:
        """The budgets that a config states."""
        b = config.batch
        return cls(
            shards=b.shards,
            history_rows=b.history_rows,
            history_length=b.history_length,
            max_items=b.max_items,
            text_rows=b.text_rows,
            row_tokens=b.row_tokens,
            user_rows=b.user_rows,
            user_history=b.user_history,
            user_kind=config.towers.user.kind,
            encode_items=config.towers.text.source == "tokens",
        )

    @property
    def items(self) -> int:
        """M. Where nothing is encoded the only bound is the number of places: each window brings its length + 1 items."""
        return self.max_items if self.encode_items else 2 * self.history_rows * self.history_length

    @property
    def queries(self) -> int:
        """Q. A written-out history fills at least half a row, or two of them share one."""
        return self.history_rows * self.history_length if self.user_kind == "history" else 2 * self.user_rows


@dataclasses.dataclass(frozen=True)
class Windows:
    """Examples of an epoch: window i is the events [start, stop) of a user; a window of n events trains n - 1 predictions.

    Windows of one user overlap by one event, so that every event but a user's first is a target exactly once an epoch.
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
    """Random access to windows of records, for `grain.MapDataset.source`."""

    def __init__(self, records: Any, windows: Windows):
        self._records, self._windows = records, windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        w = self._windows
        user = int(w.user[index])
        record = self._records[user]
        items = record["items"][record["splits"] == 0]
        return user, items[w.start[index] : w.stop[index]]


class Batches(grain.IterDataset):
    """Endless batches [local shards, ...] of numpy arrays; see the module's text for their order.

    Args:
      records: random access, record = one user's history {"items" [n], "splits" [n]}.
      train_lengths: [U] train events of each user.
      spec: the budgets.
      seed: of the order, a new one each epoch.
      texts: tokens of each catalogue item, with [CLS] and [SEP]; needed where texts are encoded.
      shards: the global shards that this process makes; all by default.

    Raises:
      RecJaxError: nothing to train on, a text or a window that no budget holds.
    """

    def __init__(
        self,
        records: Any,
        train_lengths: np.ndarray,
        spec: BatchSpec,
        *,
        seed: int,
        texts: Ragged | None = None,
        shards: range | None = None,
    ):
        super().__init__()
        windows = Windows.of(np.asarray(train_lengths), spec.history_length if spec.user_kind == "history" else None)
        if not len(windows):
            raise RecJaxError("no user has two events to train on; look at `python -m rec_jax.data describe` and config.data.filter")
        self.spec, self.seed, self.texts = spec, seed, texts
        self.examples_per_epoch = len(windows)
        self.shards = range(spec.shards) if shards is None else shards
        self._check(windows)
        self._order = grain.MapDataset.source(_Source(records, windows)).seed(seed).shuffle().repeat()

    def _check(self, windows: Windows) -> None:
        s = self.spec
        needs_text = s.encode_items or s.user_kind == "text"
        if needs_text and self.texts is None:
            raise RecJaxError("texts are encoded in the step, but no catalogue tokens were given")
        longest = int(self.texts.lengths().max()) if needs_text and self.texts is not None else 0
        if longest > s.row_tokens:
            raise RecJaxError(f"an item text has {longest} tokens, but batch.row_tokens={s.row_tokens}")
        if s.encode_items and s.user_kind == "history":
            # A window that alone overflows the item budget would wait for ever.
            most = int((windows.stop - windows.start).max())
            rows = Rows(s.text_rows, s.row_tokens, TextRows(1, s.row_tokens).per_row)
            fits = all(rows.place(longest) is not None for _ in range(most))
            if most > s.max_items or not fits:
                raise RecJaxError(
                    f"a window of {most} items of up to {longest} tokens does not fit one shard: raise batch.max_items={s.max_items} "
                    f"or batch.text_rows={s.text_rows} (x {s.row_tokens} tokens), or lower batch.history_length={s.history_length}"
                )

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def examples_per_step(self, probe: int = 32) -> float:
        """Examples that a global batch takes, measured over `probe` batches of shard 0 (or one epoch, if that is less)."""
        stream = _Shard(self, 0)
        batches = 0
        while batches < probe and stream.next * self.spec.shards < self.examples_per_epoch:
            stream.fill()
            batches += 1
        return (stream.next - len(stream.waiting)) / batches * self.spec.shards

    def example(self, position: int) -> tuple[int, np.ndarray]:
        """Position in the endless order -> (row of the users table, items of the window)."""
        return self._order[position]


class _Shard:
    """One shard's stream: its next example and those that wait, by their number within the shard."""

    def __init__(self, batches: Batches, shard: int):
        self._batches, self._shard = batches, shard
        self.next = 0
        self._waiting: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def waiting(self) -> list[int]:
        """Numbers of the examples that the next batch tries first."""
        return list(self._waiting)

    def go_to(self, number: int, waiting: Sequence[int]) -> None:
        """Sets the place; the examples that wait are read again."""
        self.next, self._waiting = number, {n: self._read(n) for n in waiting}

    def _position(self, number: int) -> int:
        return number * self._batches.spec.shards + self._shard

    def _read(self, number: int) -> tuple[int, np.ndarray]:
        return self._batches.example(self._position(number))

    def fill(self) -> Batch:
        """The shard's next part of a batch (no shard axis)."""
        draft = _Draft(self._batches)
        left: dict[int, tuple[int, np.ndarray]] = {}
        queue = iter(list(self._waiting.items()))
        while len(left) < LOOK_AHEAD and draft.has_room():
            number, example = next(queue, (self.next, None))
            if example is None:
                example, self.next = self._read(number), number + 1
            if not draft.add(*example, self._position(number)):
                left[number] = example
        self._waiting = {**left, **dict(queue)}
        return draft.batch()


class _Draft:
    """A shard's part of a batch as it fills."""

    def __init__(self, batches: Batches):
        self._batches, spec = batches, batches.spec
        self._spec, self._texts = spec, batches.texts
        self._index: dict[int, int] = {}
        self._item_ids = np.full(spec.items, -1, np.int32)
        self._item_places = np.zeros(spec.items, np.int32)
        self._item_rows = TextRows(spec.text_rows, spec.row_tokens) if spec.encode_items else None
        self._targets = np.full(spec.queries, -1, np.int32)
        self._weights = np.zeros(spec.queries, np.float32)
        self._examples: list[int] = []
        if spec.user_kind == "history":
            shape = (spec.history_rows, spec.history_length)
            self._rows = Rows(*shape, per_row=shape[1])
            self._history, self._segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        else:
            self._user_rows = TextRows(spec.user_rows, spec.row_tokens)
            self._user_places = np.zeros(spec.queries, np.int32)

    def has_room(self) -> bool:
        """Whether the smallest example could still fit."""
        return self._rows.has_room() if self._spec.user_kind == "history" else self._user_rows.rows.has_room()

    def add(self, user: int, items: np.ndarray, position: int) -> bool:
        """Adds an example whole, or leaves the draft as it was and returns False."""
        added = self._add_history(items) if self._spec.user_kind == "history" else self._add_text(items, position)
        if added:
            self._examples.append(user)
        return added

    def _add_history(self, items: np.ndarray) -> bool:
        mark = self._rows.mark()
        at = self._rows.place(len(items) - 1)
        if at is None or not self._add_items(items):
            self._rows.reset(mark)
            return False
        row, offset, segment = at
        local = np.asarray([self._index[int(i)] for i in items], np.int32)
        here = slice(offset, offset + len(items) - 1)
        self._history[row, here], self._segments[row, here] = local[:-1], segment
        flat = row * self._spec.history_length + offset
        self._targets[flat : flat + len(items) - 1] = local[1:]
        self._weights[flat : flat + len(items) - 1] = 1.0
        return True

    def _add_text(self, items: np.ndarray, position: int) -> bool:
        number, texts = len(self._examples), self._texts
        assert texts is not None
        if number == self._spec.queries:
            return False
        # Which event is the target is drawn anew each epoch, by the position alone, so that a resume draws the same.
        random = np.random.default_rng((self._batches.seed, position))
        cut = int(random.integers(1, len(items)))
        text = history_text(texts, items[max(0, cut - self._spec.user_history) : cut], self._spec.row_tokens)
        mark = self._user_rows.rows.mark()
        at = self._user_rows.rows.place(len(text))
        if at is None or not self._add_items(items[cut : cut + 1]):
            self._user_rows.rows.reset(mark)
            return False
        self._user_places[number] = self._user_rows.write(text, at)
        self._targets[number] = self._index[int(items[cut])]
        self._weights[number] = 1.0
        return True

    def _add_items(self, items: np.ndarray) -> bool:
        """Gives each new item a local index and, where texts are encoded, a place in a packed row; all of them or none."""
        new = [i for i in dict.fromkeys(items.tolist()) if i not in self._index]
        if len(self._index) + len(new) > self._spec.items:
            return False
        if self._item_rows is not None:
            assert self._texts is not None
            mark = self._item_rows.rows.mark()
            places = []
            for i in new:
                at = self._item_rows.rows.place(len(self._texts[i]))
                if at is None:
                    self._item_rows.rows.reset(mark)
                    return False
                places.append(at)
            for local, (i, at) in enumerate(zip(new, places, strict=True), start=len(self._index)):
                self._item_places[local] = self._item_rows.write(self._texts[i], at)
        self._item_ids[len(self._index) : len(self._index) + len(new)] = new
        self._index.update({i: local for local, i in enumerate(new, start=len(self._index))})
        return True

    def batch(self) -> Batch:
        """The arrays; `examples` has one place a query, which no shard can exceed."""
        examples = np.full(self._spec.queries, -1, np.int32)
        examples[: len(self._examples)] = self._examples
        out = Batch(item_ids=self._item_ids, targets=self._targets, weights=self._weights, examples=examples)
        if self._item_rows is not None:
            out.item_tokens, out.item_segments = self._item_rows.tokens, self._item_rows.segments
            out.item_places = self._item_places
        if self._spec.user_kind == "history":
            out.history, out.history_segments = self._history, self._segments
        else:
            out.user_tokens, out.user_segments = self._user_rows.tokens, self._user_rows.segments
            out.user_places = self._user_places
        return out


def history_text(texts: Ragged, items: Sequence[int] | np.ndarray, row_tokens: int) -> np.ndarray:
    """Catalogue texts and a history, oldest first -> tokens of "[CLS] newest [SEP] second newest [SEP] ...", cut at row_tokens."""
    parts = [texts[int(i)] for i in reversed(items)]
    if not parts:
        return texts.flat[:0]
    joined = np.concatenate([parts[0], *(p[1:] for p in parts[1:])])
    if len(joined) > row_tokens:
        joined = joined[:row_tokens].copy()
        joined[-1] = parts[0][-1]
    return joined


class BatchIterator(grain.DatasetIterator):
    """Iterator over `Batches`; its state is, per shard, the next example and those that wait."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self._shards = {g: _Shard(batches, g) for g in range(batches.spec.shards)}

    def __next__(self) -> Batch:
        parts = [self._shards[g].fill() for g in self._batches.shards]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

    def get_state(self) -> dict[str, Any]:
        """{"shards": {global shard: {"next", "waiting"}}} of the shards that this process makes."""
        return {"shards": {str(g): {"next": self._shards[g].next, "waiting": self._shards[g].waiting} for g in self._batches.shards}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave; a place saved by other processes may hold more shards than are made here.

        Raises:
          RecJaxError: the place lacks a shard of this process.
        """
        for g in self._batches.shards:
            if str(g) not in state["shards"]:
                raise RecJaxError(f"the saved place has shards {sorted(state['shards'])}, but not {g}: batch.shards was changed")
            place = state["shards"][str(g)]
            self._shards[g].go_to(int(place["next"]), [int(n) for n in place["waiting"]])


def prefetched(batches: Batches, ahead: int) -> Iterator[Batch]:
    """An iterator that makes `ahead` batches in a thread of its own; `get_state` is the place of the last batch handed out."""
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead))
