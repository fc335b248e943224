"""Batches of texts alone, for pre-training: packed rows without users, hidden or deleted tokens beside them, and the held-out texts.

The order and the place are those of `rec_jax.data.pipeline`: position i of the endless order belongs to shard i mod G, and a text that
does not fit waits for the shard's next part. What is drawn for a part is drawn from the seed and the position of its first text, so
that a resume and any number of processes draw the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rec_jax.data.augment import Corruption, corrupt
from rec_jax.data.draft import BatchSpec
from rec_jax.data.packing import TextRows
from rec_jax.data.pipeline import LOOK_AHEAD, ShardedBatches, Stream
from rec_jax.types import Batch, Ragged, RecJaxError

ORDER, TRAINING, HELD_OUT = 1, 2, 3  # streams of random numbers, each of a seed and a number


def text_spec(config: Any) -> BatchSpec:
    """The budgets of batches of texts: R, T, M and G as `config.batch` says, and a single query a shard, which is none."""
    spec = BatchSpec.from_config(config)
    return dataclasses.replace(spec, history_rows=1, history_length=1, user_kind="history", encode_items=True, views=None)


class TextBatches(ShardedBatches):
    """Endless batches [local shards, ...] of numpy arrays: each text of the corpus once an epoch, in an order that is new each time.

    `item_ids` and `examples` are rows of `tokens`; `targets` and `weights` say that there is no query.

    Args:
      tokens: of each text of the corpus, with [CLS] and [SEP].
      texts: the rows of `tokens` to train on.
      spec: the budgets, as from `text_spec`.
      seed: of the order and of what is hidden or deleted.
      corruption: what is hidden or deleted; None = nothing.
      shards: the global shards that this process makes; all by default.

    Raises:
      RecJaxError: no text to train on, or one that no row holds.
    """

    def __init__(
        self,
        tokens: Ragged,
        texts: Sequence[int] | np.ndarray,
        spec: BatchSpec,
        *,
        seed: int,
        corruption: Corruption | None = None,
        shards: range | None = None,
    ):
        super().__init__()
        self.tokens, self.spec, self.seed, self.corruption = tokens, spec, seed, corruption
        self.texts = _checked(tokens, texts, spec)
        self.examples_per_epoch = len(self.texts)
        self.shards = range(spec.shards) if shards is None else shards
        # A batch may lie across the end of an epoch, so two orders are kept. Grain's own shuffle costs more than packing the texts.
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def stream(self, shard: int) -> Stream:
        """See `ShardedBatches`."""
        return _Shard(self, shard)

    def example(self, position: int) -> int:
        """Position in the endless order -> row of `tokens`."""
        epoch, place = divmod(position, self.examples_per_epoch)
        return int(self._order(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch, ORDER)).permutation(self.texts)


class _Shard:
    """One shard's stream: its next text and those that wait, by their number within the shard."""

    def __init__(self, batches: TextBatches, shard: int):
        self._batches, self._shard = batches, shard
        self.next = 0
        self.waiting: list[int] = []

    def go_to(self, number: int, waiting: Sequence[int]) -> None:
        """Sets the place."""
        self.next, self.waiting = number, list(waiting)

    def _position(self, number: int) -> int:
        return number * self._batches.spec.shards + self._shard

    def fill(self) -> Batch:
        """The shard's next part of a batch (no shard axis)."""
        b = self._batches
        part = _Part(b.spec, b.tokens)
        left: list[int] = []
        queue = iter(self.waiting)
        first = self.waiting[0] if self.waiting else self.next
        while len(left) < LOOK_AHEAD and part.has_room():
            number = next(queue, self.next)
            self.next = max(self.next, number + 1)
            if not part.add(b.example(self._position(number))):
                left.append(number)
        self.waiting = [*left, *queue]
        return part.batch(b.corruption, (b.seed, self._position(first), TRAINING))


def held_out_batches(
    tokens: Ragged, texts: Sequence[int] | np.ndarray, spec: BatchSpec, *, seed: int, corruption: Corruption | None = None
) -> Iterator[Batch]:
    """Each of the texts once, in batches of one shard [1, ...]; what is hidden or deleted is the same each time.

    Args:
      tokens: of each text of the corpus.
      texts: the rows of `tokens` to go through.
      spec: the budgets of a shard.
      seed: of what is hidden or deleted.
      corruption: what is hidden or deleted; None = nothing.

    Raises:
      RecJaxError: no text, or one that no row holds.
    """
    waiting = _checked(tokens, texts, spec).tolist()
    number = 0
    while waiting:
        part = _Part(spec, tokens)
        left: list[int] = []
        for n, text in enumerate(waiting):
            if len(left) == LOOK_AHEAD or not part.has_room():
                left += waiting[n:]
                break
            if not part.add(text):
                left.append(text)
        waiting = left
        yield jax.tree.map(lambda leaf: leaf[None], part.batch(corruption, (seed, number, HELD_OUT)))
        number += 1


def _checked(tokens: Ragged, texts: Sequence[int] | np.ndarray, spec: BatchSpec) -> np.ndarray:
    """The rows of `tokens` that are named, once it is sure that each fits a packed row."""
    rows = np.asarray(texts, np.int64)
    if not len(rows):
        raise RecJaxError("there is no text here; look at the corpus, and at the share of it that is held out")
    lengths = tokens.lengths()[rows]
    if lengths.max() > spec.row_tokens:
        raise RecJaxError(f"text {rows[np.argmax(lengths)]} has {lengths.max()} tokens, but batch.row_tokens={spec.row_tokens}; raise it")
    return rows


class _Part:
    """A shard's part of a batch as it fills with texts, each of them once."""

    def __init__(self, spec: BatchSpec, tokens: Ragged):
        self._spec, self._tokens = spec, tokens
        self._packed = TextRows(spec.text_rows, spec.row_tokens)
        self._places: dict[int, int] = {}  # of each text

    def has_room(self) -> bool:
        """Whether the shortest text could still fit."""
        return len(self._places) < self._spec.items and self._packed.rows.has_room()

    def add(self, text: int) -> bool:
        """Adds a text, or returns False where it has no room or is there already, as at the border of two epochs."""
        if text in self._places:
            return False
        ids = self._tokens[text]
        at = self._packed.rows.place(len(ids))
        if at is None:
            return False
        self._places[text] = self._packed.write(ids, at)
        return True

    def batch(self, corruption: Corruption | None, seed: tuple[int, ...]) -> Batch:
        """The arrays, with what is hidden or deleted drawn from `seed`."""
        spec, n = self._spec, len(self._places)
        item_ids, item_places = np.full(spec.items, -1, np.int32), np.zeros(spec.items, np.int32)
        item_ids[:n], item_places[:n] = list(self._places), list(self._places.values())
        out = Batch(
            item_ids,
            np.full(spec.queries, -1, np.int32),
            np.zeros(spec.queries, np.float32),
            item_ids.copy(),
            item_tokens=self._packed.tokens,
            item_segments=self._packed.segments,
            item_places=item_places,
        )
        return out if corruption is None else corrupt(out, corruption, np.random.default_rng(seed))
