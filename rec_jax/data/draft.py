"""A shard's part of a batch as it fills: windows in packed histories or texts, their items once each, within fixed budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rec_jax.config_places import EVENT, place_columns
from rec_jax.data.augment import HistoryViews
from rec_jax.data.cloze import Cloze
from rec_jax.data.event_weights import EventWeight
from rec_jax.data.packing import Rows, TextRows
from rec_jax.data.places import empty, of_places
from rec_jax.types import Batch, Ragged

NONE = np.zeros(0, np.int32)  # no mined negatives


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Budgets of one shard, by the names of `config.batch`.

    Attributes:
      encode_items: False where item vectors come from a table.
      negatives: K, mined negatives that each example brings; 0 = none.
      negative_items: places of M for them where nothing is encoded; see `with_negatives`.
      views: how two views of each packed history are made; None = none.
      drop_events: probability that an example leaves an event of its window out, drawn anew each epoch.
      columns: of the records, that travel with the places of histories: some of "times", "ratings", "users" and "event_NAME".
      cloze: what of a window is hidden and sought; None: each place seeks the next item.
      shuffle_events: the events of a window come in random order, drawn anew each epoch.
    """

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
    negatives: int = 0
    negative_items: int = 0
    views: HistoryViews | None = None
    drop_events: float = 0.0
    columns: tuple[str, ...] = ()
    cloze: Cloze | None = None
    shuffle_events: bool = False

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
            views=HistoryViews.from_config(config) if config.towers.user.kind == "history" else None,
            drop_events=b.drop_events,
            columns=place_columns(config),
            cloze=Cloze.from_config(config),
            shuffle_events=b.shuffle_events,
        )

    def with_negatives(self, negatives: int, mean_places: float) -> BatchSpec:
        """The budgets for examples that bring K mined negatives each; `mean_places` are the history places that one fills on average.

        As many windows as fill the shard on average have room for theirs. Where more and shorter ones come together, the places that
        windows of several items leave free take them, and what does not fit waits, as for every other budget.
        """
        windows = math.ceil(self.history_rows * self.history_length / mean_places)
        return dataclasses.replace(self, negatives=negatives, negative_items=windows * negatives)

    @property
    def window(self) -> int | None:
        """The most predictions of a window, as `Windows.of` takes it; None where a user is one window, whatever its length.

        In a cloze all of a window stands in the row, its last item too.
        """
        return self.history_length - (self.cloze is not None) if self.user_kind == "history" else None

    @property
    def items(self) -> int:
        """M. Where nothing is encoded the only bound is the number of places: each window brings its length + 1 items."""
        return self.max_items if self.encode_items else 2 * self.history_rows * self.history_length + self.negative_items

    @property
    def queries(self) -> int:
        """Q. A written-out history fills at least half a row, or two of them share one."""
        return self.history_rows * self.history_length if self.user_kind == "history" else 2 * self.user_rows


class _Window(NamedTuple):
    """A window of a draft: row, offset and segment, items [n], columns of them, mined negatives [K], position in the order."""

    at: tuple[int, int, int]
    items: np.ndarray
    columns: Mapping[str, np.ndarray]
    mined: np.ndarray
    position: int


class Draft:
    """A shard's part of a batch as it fills.

    Args:
      spec: the budgets.
      texts: tokens of each catalogue item; None where nothing is encoded.
      negatives: [U, K] mined negatives of each user; None without.
      seed: of the places where written-out histories are cut, of views, and of what is hidden.
      event_weight: what targets weigh by the column "ratings" of their windows; None: they weigh the same.
    """

    def __init__(
        self, spec: BatchSpec, texts: Ragged | None, negatives: np.ndarray | None, seed: int, event_weight: EventWeight | None = None
    ):
        self._spec, self._texts, self._mined, self._seed, self._event_weight = spec, texts, negatives, seed, event_weight
        # Items get their local indices as they come where they may not all fit, else all at once in the end, which is quicker.
        self._bounded = spec.encode_items or negatives is not None or spec.user_kind != "history"
        self._index: dict[int, int] = {}
        self._item_ids = np.full(spec.items, -1, np.int32)
        self._item_places = np.zeros(spec.items, np.int32)
        self._item_rows = TextRows(spec.text_rows, spec.row_tokens) if spec.encode_items else None
        self._targets = np.full(spec.queries, -1, np.int32)
        self._weights = np.zeros(spec.queries, np.float32)
        self._event_weights = None if event_weight is None else np.zeros(spec.queries, np.float32)
        self._negatives = None if negatives is None else np.full((spec.queries, spec.negatives), -1, np.int32)
        self._examples: list[int] = []
        if spec.user_kind == "history":
            shape = (spec.history_rows, spec.history_length)
            self._rows = Rows(*shape, per_row=shape[1])
            self._windows: list[_Window] = []
            self._history, self._segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
            self._columns = {name: np.full(shape, empty(name), empty(name).dtype) for name in spec.columns}
            if spec.views is not None:
                self._views, self._view_segments = np.full((2, *shape), -1, np.int32), np.zeros((2, *shape), np.int32)
                self._view_places = np.full((2, spec.queries), -1, np.int32)
                self._view_targets = np.full(spec.queries, -1, np.int32)
        else:
            self._user_rows = TextRows(spec.user_rows, spec.row_tokens)
            self._user_places = np.zeros(spec.queries, np.int32)

    def has_room(self) -> bool:
        """Whether the smallest example could still fit."""
        return self._rows.has_room() if self._spec.user_kind == "history" else self._user_rows.rows.has_room()

    def add(self, user: int, items: np.ndarray, columns: Mapping[str, np.ndarray], position: int) -> bool:
        """Adds an example whole, or leaves the draft as it was and returns False."""
        if self._spec.user_kind == "history":
            added = self._add_history(user, items, columns, position)
        else:
            added = self._add_text(items, columns, self._negatives_of(user, items), position)
        if added:
            self._examples.append(user)
        return added

    def _negatives_of(self, user: int, items: np.ndarray) -> np.ndarray:
        """The user's mined negatives -> [K] catalogue indices, -1 where it is an item of the window: that is a positive of some place."""
        if self._mined is None:
            return NONE
        mined = self._mined[user]
        return np.where(np.isin(mined, items), -1, mined)

    def _add_history(self, user: int, items: np.ndarray, columns: Mapping[str, np.ndarray], position: int) -> bool:
        mark = self._rows.mark() if self._bounded else None
        at = self._rows.place(len(items) - (self._spec.cloze is None))  # without a cloze the last event is a target alone
        if at is None:
            return False
        mined = NONE
        if mark is not None:
            mined = self._negatives_of(user, items)
            if not self._add_items(items, mined):
                self._rows.reset(mark)
                return False
        self._windows.append(_Window(at, items, columns, mined, position))
        return True

    def _write_histories(self) -> None:
        """Writes all windows into their places."""
        windows, cloze, length = self._windows, self._spec.cloze, self._spec.history_length
        if not windows:
            return
        items = np.concatenate([w.items for w in windows])
        sizes = np.fromiter((len(w.items) for w in windows), np.int64, len(windows))
        local = self._local(items)
        first = np.cumsum(sizes) - sizes
        segments = np.asarray([w.at[2] for w in windows], np.int32)
        begin = np.asarray([w.at[0] * length + w.at[1] for w in windows])
        window = np.repeat(np.arange(len(windows)), sizes)
        place = np.arange(len(items)) + (begin - first)[window]  # of each event, in the flattened [H * S]
        last = np.zeros(len(items), bool)
        if cloze is None:
            last[first + sizes - 1] = True
        here = ~last
        self._segments.reshape(-1)[place[here]] = segments[window[here]]
        if cloze is None:
            inputs, sought, targets = local[here], place[here], np.flatnonzero(here) + 1
        else:
            draws = (cloze.draw(len(w.items), self._seed, w.position) for w in windows)
            hidden = np.concatenate(list(draws))
            inputs, sought, targets = np.where(hidden, -1, local), place[hidden], np.flatnonzero(hidden)
        self._history.reshape(-1)[place[here]] = inputs
        self._targets[sought], self._weights[sought] = local[targets], 1.0
        if self._event_weight is not None and self._event_weights is not None:
            self._event_weights[sought] = self._event_weight(np.concatenate([w.columns["ratings"] for w in windows]))[targets]
        if self._columns:
            columns = {name: np.concatenate([w.columns[name] for w in windows]) for name in self._columns}
            for name, values in of_places(columns, first[window]).items():
                self._columns[name].reshape(-1)[place[here]] = values[here]
        if self._negatives is not None:
            end = begin + sizes - (cloze is None)
            for w, a, b in zip(windows, begin.tolist(), end.tolist(), strict=True):
                self._put_negatives(sought[(sought >= a) & (sought < b)], w.mined)
        if self._spec.views is not None:
            for number, (w, own) in enumerate(zip(windows, np.split(local, first[1:]), strict=True)):
                self._put_views(self._spec.views, own, w.at, w.position, number)

    def _local(self, items: np.ndarray) -> np.ndarray:
        """Catalogue indices [n] -> the shard's own [n] int32, in the order in which items first came."""
        if self._bounded:
            return np.fromiter(map(self._index.__getitem__, items.tolist()), np.int32, len(items))
        unique, first, inverse = np.unique(items, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self._item_ids[: len(unique)] = unique[order]
        local = np.empty(len(unique), np.int32)
        local[order] = np.arange(len(unique), dtype=np.int32)
        return local[inverse]

    def _put_views(self, views: HistoryViews, window: np.ndarray, at: tuple[int, int, int], position: int, number: int) -> None:
        """Two views of a window's history, where the history itself stands: none is longer. Drawn by the position alone."""
        row, offset, segment = at
        for n, view in enumerate(views.draw(window[:-1], np.random.default_rng((self._seed, position)))):
            here = slice(offset, offset + len(view))
            self._views[n, row, here], self._view_segments[n, row, here] = view, segment
            self._view_places[n, number] = row * self._spec.history_length + offset + len(view) - 1
        self._view_targets[number] = window[-1]

    def _add_text(self, items: np.ndarray, columns: Mapping[str, np.ndarray], mined: np.ndarray, position: int) -> bool:
        number, texts = len(self._examples), self._texts
        assert texts is not None
        if number == self._spec.queries:
            return False
        # Which event is the target is drawn anew each epoch, by the position alone, so that a resume draws the same.
        random = np.random.default_rng((self._seed, position))
        cut = int(random.integers(1, len(items)))
        text = history_text(texts, items[max(0, cut - self._spec.user_history) : cut], self._spec.row_tokens)
        mark = self._user_rows.rows.mark()
        at = self._user_rows.rows.place(len(text))
        if at is None or not self._add_items(items[cut : cut + 1], mined):
            self._user_rows.rows.reset(mark)
            return False
        self._user_places[number] = self._user_rows.write(text, at)
        self._targets[number] = self._index[int(items[cut])]
        self._weights[number] = 1.0
        if self._event_weight is not None and self._event_weights is not None:
            self._event_weights[number] = self._event_weight(columns["ratings"][cut : cut + 1])[0]
        self._put_negatives(np.asarray([number]), mined)
        return True

    def _put_negatives(self, places: np.ndarray, mined: np.ndarray) -> None:
        """The same K negatives stand at each of the example's queries [q], as local indices."""
        if self._negatives is not None:
            self._negatives[places] = [self._index[i] if i >= 0 else -1 for i in mined.tolist()]

    def _add_items(self, items: np.ndarray, mined: np.ndarray) -> bool:
        """Gives each new item a local index and, where texts are encoded, a place in a packed row; all of them or none."""
        new = [i for i in dict.fromkeys([*items.tolist(), *mined.tolist()]) if i >= 0 and i not in self._index]
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
        if self._spec.user_kind == "history":
            self._write_histories()
        examples = np.full(self._spec.queries, -1, np.int32)
        examples[: len(self._examples)] = self._examples
        out = Batch(self._item_ids, self._targets, self._weights, examples, negatives=self._negatives, event_weights=self._event_weights)
        if self._item_rows is not None:
            out.item_tokens, out.item_segments = self._item_rows.tokens, self._item_rows.segments
            out.item_places = self._item_places
        if self._spec.user_kind == "history":
            out.history, out.history_segments = self._history, self._segments
            out.history_times, out.history_ratings = self._columns.get("times"), self._columns.get("ratings")
            out.history_users = self._columns.get("users")
            out.history_events = {name: column for name, column in self._columns.items() if name.startswith(EVENT)} or None
            if self._spec.views is not None:
                out.view_history, out.view_segments = self._views, self._view_segments
                out.view_places, out.view_targets = self._view_places, self._view_targets
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
