"""Batches of pairs for a cross-encoder: a written-out history and an item's text in one, the next item's beside those of drawn items.

The order and the place are those of `pipeline.py`. Which event is the next item and which items are drawn is drawn anew each epoch, by
the seed and the position alone, so that a resume and any number of processes draw the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rec_jax.data.draft import history_text
from rec_jax.data.packing import Rows, TextRows
from rec_jax.data.pipeline import WindowBatches
from rec_jax.data.windows import Windows
from rec_jax.types import Batch, Ragged, RecJaxError


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """Budgets of one shard, by the names of `config.batch`.

    Attributes:
      shards: G.
      text_rows: R, packed rows of pairs.
      row_tokens: T, tokens of a row, and the most of a pair.
      max_pairs: the most pairs of a shard.
      negatives: K, items drawn beside each positive.
      user_history: newest items that a written-out history names.
    """

    shards: int
    text_rows: int
    row_tokens: int
    max_pairs: int
    negatives: int
    user_history: int

    @classmethod
    def from_config(cls, config: Any) -> PairSpec:
        """The budgets that a config states."""
        b = config.batch
        return cls(b.shards, b.text_rows, b.row_tokens, b.max_items, b.pair_negatives, b.user_history)

    @property
    def queries(self) -> int:
        """E, the most examples of a shard, of 1 + K pairs each."""
        return self.max_pairs // (1 + self.negatives)

    @property
    def items(self) -> int:
        """M: the pairs of all examples."""
        return self.queries * (1 + self.negatives)


class PairBatches(WindowBatches):
    """Endless batches [local shards, ...] of numpy arrays: each user's train events once an epoch, cut at an event that is drawn.

    The 1 + K pairs of an example follow each other, the positive's first: `item_ids` [G, E (1 + K)] says which item a pair names,
    `item_tokens`, `item_segments`, `item_types` and `item_places` hold its text, `targets` [G, E] say where the positive stands.

    Args:
      histories: as of `rec_jax.data.pipeline.Batches`.
      train_lengths: [U] train events of each user.
      spec: the budgets.
      seed: of the order and of what is drawn.
      texts: tokens of each catalogue item, with [CLS] and [SEP].
      shards: the global shards that this process makes; all by default.

    Raises:
      RecJaxError: nothing to train on, pairs that no row or shard holds, users who know too much to draw from the rest.
    """

    def __init__(self, histories: Any, train_lengths: np.ndarray, spec: PairSpec, *, seed: int, texts: Ragged, shards: range | None = None):
        super().__init__()
        windows = Windows.of(np.asarray(train_lengths), None)
        if not len(windows):
            raise RecJaxError("no user has two events to train on; look at `python -m rec_jax.data describe` and config.data.filter")
        self.spec, self.seed, self.texts = spec, seed, texts
        self.room = user_room(texts, spec.row_tokens)
        longest = int((windows.stop - windows.start).max())
        if longest + spec.negatives > len(texts):
            raise RecJaxError(
                f"a user knows {longest} of {len(texts)} items: batch.pair_negatives={spec.negatives} others cannot be drawn; lower it"
            )
        pairs, rows = 1 + spec.negatives, Rows(spec.text_rows, spec.row_tokens, TextRows(1, spec.row_tokens).per_row)
        if spec.queries < 1 or any(rows.place(spec.row_tokens) is None for _ in range(pairs)):
            raise RecJaxError(
                f"the {pairs} pairs of an example, of up to {spec.row_tokens} tokens each, do not fit one shard: raise "
                f"batch.max_items={spec.max_pairs} or batch.text_rows={spec.text_rows}, or lower batch.pair_negatives={spec.negatives}"
            )
        self._set_order(histories, windows, shards)

    def draft(self) -> PairDraft:
        """See `WindowBatches`."""
        return PairDraft(self.spec, self.texts, self.room, self.seed)


class PairDraft:
    """A shard's part of a batch as it fills with examples of 1 + K pairs each.

    Args:
      spec: the budgets.
      texts: tokens of each catalogue item.
      room: of `user_room`.
      seed: of what is drawn.
    """

    def __init__(self, spec: PairSpec, texts: Ragged, room: int, seed: int):
        self._spec, self._texts, self._room, self._seed = spec, texts, room, seed
        self._rows = TextRows(spec.text_rows, spec.row_tokens)
        self._types = TextRows(spec.text_rows, spec.row_tokens)
        self._item_ids = np.full(spec.items, -1, np.int32)
        self._places = np.zeros(spec.items, np.int32)
        self._examples: list[int] = []

    def has_room(self) -> bool:
        """Whether the smallest example could still fit."""
        return len(self._examples) < self._spec.queries and self._rows.rows.has_room()

    def add(self, user: int, items: np.ndarray, columns: Mapping[str, np.ndarray], position: int) -> bool:
        """Adds an example whole, or leaves the draft as it was and returns False; a pair is made of items alone, and no columns are."""
        assert not columns
        random = np.random.default_rng((self._seed, position))
        cut = int(random.integers(1, len(items)))
        drawn = other_items(random, self._spec.negatives, items, len(self._texts))
        candidates = np.concatenate([items[cut : cut + 1], drawn])
        text = written_out(self._texts, items[:cut], self._spec.user_history, self._room)
        pairs = [pair_text(text, self._texts[int(item)]) for item in candidates]
        mark, places = self._rows.rows.mark(), []
        for tokens, _ in pairs:
            at = self._rows.rows.place(len(tokens))
            if at is None:
                self._rows.rows.reset(mark)
                return False
            places.append(at)
        first = len(self._examples) * len(pairs)
        for n, ((tokens, types), at) in enumerate(zip(pairs, places, strict=True), start=first):
            self._places[n] = self._rows.write(tokens, at)
            self._types.write(types, at)
        self._item_ids[first : first + len(pairs)] = candidates
        self._examples.append(user)
        return True

    def batch(self) -> Batch:
        """The arrays."""
        n, examples = len(self._examples), np.full(self._spec.queries, -1, np.int32)
        examples[:n] = self._examples
        there = examples >= 0
        positives = np.arange(self._spec.queries, dtype=np.int32) * (1 + self._spec.negatives)
        return Batch(
            self._item_ids,
            np.where(there, positives, -1).astype(np.int32),
            there.astype(np.float32),
            examples,
            item_tokens=self._rows.tokens,
            item_segments=self._rows.segments,
            item_places=self._places,
            item_types=self._types.tokens,
        )


def user_room(texts: Ragged, row_tokens: int) -> int:
    """Tokens that a pair leaves for the history, whatever the item: those of a row less the longest item text.

    Raises:
      RecJaxError: not even the longest item text fits there.
    """
    longest = int(texts.lengths().max())
    room = row_tokens - longest + 1  # the item's [CLS] is left out
    if room < longest:
        raise RecJaxError(
            f"batch.row_tokens={row_tokens} holds no pair of a history and an item of {longest} tokens each: raise it to "
            f"{2 * longest - 1} or more, or lower data.text.max_tokens"
        )
    return room


def written_out(texts: Ragged, history: np.ndarray, newest: int, room: int) -> np.ndarray:
    """History, oldest first -> tokens of its newest items, "[CLS] newest [SEP] second newest [SEP] ...", cut at `room`; none for none."""
    return history_text(texts, history[-newest:], room)


def pair_text(user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Written-out history and an item's text -> tokens of "[CLS] newest [SEP] ... [SEP] item [SEP]", and their types: 1 for the item's.

    An empty history leaves "[CLS] item [SEP]".
    """
    user = user if len(user) else item[:1]
    return np.concatenate([user, item[1:]]), np.repeat(np.asarray([0, 1], np.int32), [len(user), len(item) - 1])


def other_items(random: np.random.Generator, count: int, known: Sequence[int] | np.ndarray, n_items: int) -> np.ndarray:
    """`count` different catalogue items [K] int32 drawn uniformly from those that are not `known`."""
    known = np.unique(np.asarray(known, np.int64))
    drawn = np.sort(random.choice(n_items - len(known), count, replace=False))
    # Number d of the rest is item d + the known ones at or below it: known[j] - j of the rest lie before known item j.
    return random.permutation(drawn + np.searchsorted(known - np.arange(len(known)), drawn, side="right")).astype(np.int32)
