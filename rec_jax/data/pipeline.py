"""Batches of G shards from a prepared data set by random access: one global order, a place that is saved and restored.

Position i of the endless order belongs to shard i mod G, whatever the number of processes, so every process count sees the same
batches. A shard fills its budgets in order; what does not fit waits for the next batch, as a position in the iterator's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np

from rec_jax.data.augment import kept_events, uniform_by_place
from rec_jax.data.draft import BatchSpec, Draft
from rec_jax.data.event_weights import EventWeight
from rec_jax.data.packing import Rows, TextRows
from rec_jax.data.windows import Example, Order, Replay, Turns, Windows
from rec_jax.types import Batch, Ragged, RecJaxError

__all__ = ["BatchIterator", "BatchSpec", "Batches", "ShardedBatches", "Stream", "WindowBatches", "prefetched"]

LOOK_AHEAD = 16  # examples that may wait for the next batch before a shard is closed
READ_AT_ONCE = 128  # examples that a shard reads together: many cost little more than one
DROPPED, SHUFFLED = range(2)  # streams of what is drawn by an example's position


class Stream(Protocol):
    """One shard's part of the endless order: its next example and those that wait, by their number within the shard."""

    next: int

    @property
    def waiting(self) -> list[int]: ...

    def go_to(self, number: int, waiting: Sequence[int]) -> None: ...

    def fill(self) -> Batch: ...


class WindowDraft(Protocol):
    """A shard's part of a batch as it fills with windows."""

    def has_room(self) -> bool: ...

    def add(self, user: int, items: np.ndarray, columns: Mapping[str, np.ndarray], position: int) -> bool: ...

    def batch(self) -> Batch: ...


class ShardedBatches(grain.IterDataset):
    """What endless batches share, whatever they are made of: a stream of each shard, an iterator over them, and how much a batch takes.

    Attributes:
      spec: the budgets, with the number of `shards`.
      shards: the global shards that this process makes.
      examples_per_epoch: of the whole order.
    """

    spec: Any
    shards: range
    examples_per_epoch: int

    def stream(self, shard: int) -> Stream:
        """A shard's stream from its first example on."""
        raise NotImplementedError

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def examples_per_step(self, probe: int = 32, least: int = 4096) -> float:
        """Examples that a global batch takes, measured over `probe` batches of shard 0 and `least` examples, or one epoch if that is less.

        So many, for their lengths differ: over 32 rows of one or two histories each the mean is a fifth too high or too low.
        """
        stream = self.stream(0)
        batches = 0
        while (batches < probe or stream.next < least) and stream.next * self.spec.shards < self.examples_per_epoch:
            stream.fill()
            batches += 1
        return (stream.next - len(stream.waiting)) / batches * self.spec.shards


class WindowBatches(ShardedBatches):
    """Batches whose examples are windows of histories, in one endless order; each is added whole to a draft, or waits.

    Attributes:
      seed: of the order, and of what a draft draws by the position of an example.
    """

    seed: int

    def _set_order(
        self, histories: Any, windows: Windows, shards: range | None, *, turns: Turns | None = None, columns: tuple[str, ...] = ()
    ) -> None:
        """The windows of `histories`, with these columns of them, in a new order each epoch; `spec` and `seed` are set."""
        self.shards = range(self.spec.shards) if shards is None else shards
        self._order = Order(histories, windows, self.seed, turns, columns)
        self.examples_per_epoch = self._order.per_epoch

    def draft(self) -> WindowDraft:
        """An empty part of a batch."""
        raise NotImplementedError

    def stream(self, shard: int) -> Stream:
        """See `ShardedBatches`."""
        return _Shard(self, shard)

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """Positions in the endless order -> the windows there."""
        return self._changed(np.asarray(positions, np.int64), *self._order[positions])

    def example(self, position: int) -> Example:
        """Position in the endless order -> the window there."""
        return self.examples([position])[0]

    def _changed(self, positions: np.ndarray, users: np.ndarray, events: Ragged) -> list[Example]:
        """The examples at positions [n] of users [n] and the events of their windows, as they come to a draft."""
        edges, columns = events.offsets.tolist(), events.columns.items()
        return [
            Example(user, events.flat[a:b], {name: column[a:b] for name, column in columns})
            for user, a, b in zip(users.tolist(), edges, edges[1:], strict=False)
        ]


class Batches(WindowBatches):
    """Endless batches [local shards, ...] of numpy arrays; see the module's text for their order.

    Args:
      histories: train events of each user, with the columns that `spec` names, and "ratings" for weights; or, where memory does not hold
        them, random access to records, one user's whole history {"items" [n], "splits" [n]} each, with the columns.
      train_lengths: [U] train events of each user.
      spec: the budgets.
      seed: of the order, a new one each epoch.
      texts: tokens of each catalogue item, with [CLS] and [SEP]; needed where texts are encoded.
      negatives: [U, K] int32, mined negatives of each user, -1 is none; they travel in `Batch.negatives`.
      replay: what is new, and how much of the rest comes; None = all.
      shards: the global shards that this process makes; all by default.
      event_weight: what targets weigh by the ratings of their events; None: they weigh the same.

    Raises:
      RecJaxError: nothing to train on, or nothing new; a text or a window that no budget holds, negatives of other users.
    """

    def __init__(
        self,
        histories: Any,
        train_lengths: np.ndarray,
        spec: BatchSpec,
        *,
        seed: int,
        texts: Ragged | None = None,
        negatives: np.ndarray | None = None,
        replay: Replay | None = None,
        shards: range | None = None,
        event_weight: EventWeight | None = None,
    ):
        super().__init__()
        windows = Windows.of(np.asarray(train_lengths), spec.window)
        if not len(windows):
            raise RecJaxError("no user has two events to train on; look at `python -m rec_jax.data describe` and config.data.filter")
        if negatives is not None:
            if negatives.ndim != 2 or len(negatives) != len(train_lengths):
                raise RecJaxError(f"negatives {negatives.shape}: expected [U, K] with U = {len(train_lengths)} users")
            places = windows.stop - windows.start - (spec.cloze is None)
            spec = spec.with_negatives(negatives.shape[1], float(places.mean()))
        self.spec, self.seed, self.texts, self.negatives, self.event_weight = spec, seed, texts, negatives, event_weight
        self._check(windows)
        whole = spec.cloze is not None
        turns = None if replay is None or replay.share == 1 else replay.turns(windows, np.asarray(train_lengths), whole=whole)
        self._windows, self._lengths, self._turns = windows, np.asarray(train_lengths, np.int64), turns
        rated = ("ratings",) if event_weight is not None and "ratings" not in spec.columns else ()
        self._set_order(histories, windows, shards, turns=turns, columns=(*spec.columns, *rated))

    def _check(self, windows: Windows) -> None:
        s = self.spec
        needs_text = s.encode_items or s.user_kind == "text"
        if needs_text and self.texts is None:
            raise RecJaxError("texts are encoded in the step, but no catalogue tokens were given")
        longest = int(self.texts.lengths().max()) if needs_text and self.texts is not None else 0
        if longest > s.row_tokens:
            raise RecJaxError(f"an item text has {longest} tokens, but batch.row_tokens={s.row_tokens}")
        if s.encode_items:
            # An example that alone overflows the item budget would wait for ever. A written-out history brings its target only.
            window = int((windows.stop - windows.start).max()) if s.user_kind == "history" else 1
            most = window + s.negatives
            rows = Rows(s.text_rows, s.row_tokens, TextRows(1, s.row_tokens).per_row)
            fits = all(rows.place(longest) is not None for _ in range(most))
            if most > s.max_items or not fits:
                mined = f" and {s.negatives} mined negatives" if s.negatives else ""
                fewer = ", or mine fewer negatives (--k)" if s.negatives else ""
                raise RecJaxError(
                    f"a window of {window} items{mined} of up to {longest} tokens does not fit one shard: "
                    f"raise batch.max_items={s.max_items} or batch.text_rows={s.text_rows} (x {s.row_tokens} tokens), "
                    f"or lower batch.history_length={s.history_length}{fewer}"
                )

    def _changed(self, positions: np.ndarray, users: np.ndarray, events: Ragged) -> list[Example]:
        """See `WindowBatches`; what is left out, and a random order, are drawn by the position alone, so that a resume draws the same."""
        lengths = events.lengths()
        if self.spec.drop_events:
            kept = kept_events(uniform_by_place(self.seed, positions, lengths, DROPPED), lengths, self.spec.drop_events)
            events = events.where(kept)
            lengths = events.lengths()
        if self.spec.shuffle_events:
            window = np.repeat(np.arange(len(lengths)), lengths)
            order = np.lexsort((uniform_by_place(self.seed, positions, lengths, SHUFFLED), window))
            events = Ragged(events.flat[order], events.offsets, {name: column[order] for name, column in events.columns.items()})
        return super()._changed(positions, users, events)

    def draft(self) -> Draft:
        """See `WindowBatches`."""
        return Draft(self.spec, self.texts, self.negatives, self.seed, self.event_weight)

    def times_predicted(self) -> np.ndarray:
        """How often an epoch predicts each train event, on average [E] float64, user by user; a user's first event never but in a cloze."""
        w, times, cloze = self._windows, np.ones(len(self._windows)), self.spec.cloze
        if self._turns is not None:
            _, others, count = self._turns
            times[others] = count / max(1, len(others))
        first = (np.cumsum(self._lengths) - self._lengths)[w.user]
        each = times if cloze is None else times * cloze.times(w.stop - w.start)
        edges = np.zeros(int(self._lengths.sum()) + 1)
        np.add.at(edges, first + w.start + (cloze is None), each)
        np.add.at(edges, first + w.stop, -each)
        out = np.cumsum(edges[:-1])
        if cloze is not None:
            np.add.at(out, first + w.stop - 1, times * cloze.last)
        return out


class _Shard:
    """One shard's stream: its next example and those that wait, by their number within the shard."""

    def __init__(self, batches: WindowBatches, shard: int):
        self._batches, self._shard = batches, shard
        self.next = 0
        self._waiting: dict[int, Example] = {}
        self._read: list[Example] = []  # the examples from number `_first` on
        self._first = 0

    @property
    def waiting(self) -> list[int]:
        """Numbers of the examples that the next batch tries first."""
        return list(self._waiting)

    def go_to(self, number: int, waiting: Sequence[int]) -> None:
        """Sets the place; the examples that wait are read again."""
        again = self._batches.examples([self._position(n) for n in waiting]) if waiting else []
        self.next, self._waiting = number, dict(zip(waiting, again, strict=True))

    def _position(self, number: int) -> int:
        return number * self._batches.spec.shards + self._shard

    def _example(self, number: int) -> Example:
        if not 0 <= number - self._first < len(self._read):
            self._first = number
            self._read = self._batches.examples([self._position(n) for n in range(number, number + READ_AT_ONCE)])
        return self._read[number - self._first]

    def fill(self) -> Batch:
        """The shard's next part of a batch (no shard axis)."""
        draft = self._batches.draft()
        left: dict[int, Example] = {}
        queue = iter(list(self._waiting.items()))
        while len(left) < LOOK_AHEAD and draft.has_room():
            number, example = next(queue, (self.next, None))
            if example is None:
                example, self.next = self._example(number), number + 1
            if not draft.add(*example, self._position(number)):
                left[number] = example
        self._waiting = {**left, **dict(queue)}
        return draft.batch()


class BatchIterator(grain.DatasetIterator):
    """Iterator over batches; its state is, per shard, the next example and those that wait."""

    def __init__(self, batches: ShardedBatches):
        super().__init__()
        self._batches = batches
        self._shards = {g: batches.stream(g) for g in batches.shards}

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


def prefetched(batches: ShardedBatches, ahead: int) -> Iterator[Batch]:
    """An iterator that makes `ahead` batches in a thread of its own; `get_state` is the place of the last batch handed out."""
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead))
