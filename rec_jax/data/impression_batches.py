"""Batches of labelled impressions: G shards of B each in one global order, whose place is saved and restored; and a part in blocks.

Position i of the endless order belongs to shard i mod G, as in `pipeline.py`, and each epoch has an order of its own. Where item texts
are encoded, what does not fit a shard's rows waits for the next batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from rec_jax.data.impressions import Impressions
from rec_jax.data.packing import TextRows
from rec_jax.data.pipeline import LOOK_AHEAD, ShardedBatches, Stream
from rec_jax.types import Batch, Ragged, RecJaxError

__all__ = ["ImpressionBatches", "ImpressionSpec", "blocks"]


@dataclasses.dataclass(frozen=True)
class ImpressionSpec:
    """Budgets of one shard.

    Attributes:
      shards: G.
      queries: Q, impressions of a shard.
      encode_items: False where item vectors come from a table. The next two are for texts.
      text_rows: R, packed rows of item texts.
      row_tokens: T, tokens of a packed row.
    """

    shards: int
    queries: int
    encode_items: bool = False
    text_rows: int = 0
    row_tokens: int = 0

    @property
    def items(self) -> int:
        """M: each impression brings one item at most."""
        return self.queries


class ImpressionBatches(ShardedBatches):
    """Endless batches [local shards, ...] of numpy arrays; an epoch holds every impression once.

    `item_ids`, `targets`, `weights`, `examples`, `user_ids` and `labels` are there; `context` and `propensities` where the impressions have
    them; `item_tokens`, `item_segments` and `item_places` where texts are encoded. Of the places that stay empty the target is -1, the
    weight 0, the labels NaN and the propensity 1.

    Args:
      impressions: those to train on, [E].
      spec: the budgets.
      seed: of the order.
      texts: tokens of each catalogue item, with [CLS] and [SEP]; needed where texts are encoded.
      shards: the global shards that this process makes; all by default.

    Raises:
      RecJaxError: nothing to train on, or a text that no row holds.
    """

    def __init__(
        self, impressions: Impressions, spec: ImpressionSpec, *, seed: int, texts: Ragged | None = None, shards: range | None = None
    ):
        super().__init__()
        if not len(impressions):
            raise RecJaxError("there are no impressions to train on; look at config.data.split.valid and test")
        if spec.queries < 1:
            raise RecJaxError(f"{spec.queries} impressions a shard: expected at least 1")
        if spec.encode_items:
            if texts is None:
                raise RecJaxError("texts are encoded in the step, but no catalogue tokens were given")
            longest = int(texts.lengths().max())
            if longest > spec.row_tokens:
                raise RecJaxError(f"an item text has {longest} tokens, but batch.row_tokens={spec.row_tokens}")
        self.impressions, self.spec, self.seed, self.texts = impressions, spec, seed, texts
        self.examples_per_epoch = len(impressions)
        self.shards = range(spec.shards) if shards is None else shards
        # A batch may lie across the end of an epoch, so two orders are kept.
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def stream(self, shard: int) -> Stream:
        """See `ShardedBatches`."""
        return _Shard(self, shard)

    def examples_per_step(self, probe: int = 32, least: int = 4096) -> float:
        """See `ShardedBatches`; without texts it is known."""
        return super().examples_per_step(probe, least) if self.spec.encode_items else float(self.spec.shards * self.spec.queries)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the endless order [P] -> which impressions they are [P]."""
        epochs, places = np.divmod(positions, self.examples_per_epoch)
        out = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._order(epoch)[places[here]]
        return out

    def _epoch(self, epoch: int) -> np.ndarray:
        n = self.examples_per_epoch
        return np.random.default_rng((self.seed, epoch)).permutation(np.arange(n, dtype=np.int32 if n < 1 << 31 else np.int64))


class _Shard:
    """One shard's stream: the number of its next impression, and of those that wait."""

    def __init__(self, batches: ImpressionBatches, shard: int):
        self._batches, self._shard = batches, shard
        self.next = 0
        self.waiting: list[int] = []

    def go_to(self, number: int, waiting: Sequence[int]) -> None:
        """Sets the place."""
        self.next, self.waiting = number, list(waiting)

    def _rows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._batches.rows(np.asarray(numbers, np.int64) * self._batches.spec.shards + self._shard)

    def fill(self) -> Batch:
        """The shard's next part of a batch (no shard axis)."""
        b, s = self._batches, self._batches.spec
        if s.encode_items:
            return self._fill_with_texts()
        rows = self._rows(np.arange(self.next, self.next + s.queries))
        self.next += s.queries
        return _part(b.impressions[rows], s.queries)

    def _fill_with_texts(self) -> Batch:
        """Takes impressions while their items' texts fit."""
        b, s = self._batches, self._batches.spec
        assert b.texts is not None
        more = s.queries + LOOK_AHEAD
        numbers = [*self.waiting, *range(self.next, self.next + more)]
        items = b.impressions.item[self._rows(numbers)].tolist()
        text_rows, places = TextRows(s.text_rows, s.row_tokens), {}
        taken: list[int] = []
        left: list[int] = []
        looked_at = 0
        for number, item in zip(numbers, items, strict=True):
            if len(taken) == s.queries or len(left) == LOOK_AHEAD:
                break
            looked_at += 1
            if item not in places:
                at = text_rows.rows.place(len(b.texts[item]))
                if at is None:
                    left.append(number)
                    continue
                places[item] = text_rows.write(b.texts[item], at)
            taken.append(number)
        waited = len(self.waiting)
        self.next += max(0, looked_at - waited)
        self.waiting = [*left, *self.waiting[looked_at:]]
        out = _part(b.impressions[self._rows(taken)], s.queries)
        out.item_tokens, out.item_segments = text_rows.tokens, text_rows.segments
        out.item_places = np.asarray([places[item] if item >= 0 else 0 for item in out.item_ids.tolist()], np.int32)
        return out


def blocks(impressions: Impressions, queries: int, *, shards: int = 1) -> Iterator[Batch]:
    """Impressions [E] in their order, for evaluation -> batches [G, Q] of one shape, the last one filled up with places of weight 0.

    Flattened to [G * Q], block i holds the impressions from i * G * Q on.

    Args:
      queries: Q, impressions of a shard.
      shards: G.
    """
    for start in range(0, len(impressions), shards * queries):
        ends = [start + g * queries for g in range(shards + 1)]
        parts = [_part(impressions[slice(a, a + queries)], queries) for a in ends[:-1]]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def _part(impressions: Impressions, queries: int) -> Batch:
    """At most Q impressions -> one shard's part of a batch (no shard axis)."""
    items, local = np.unique(impressions.item, return_inverse=True)
    users = _filled(impressions.user, queries, -1)
    return Batch(
        item_ids=_filled(items, queries, -1),
        targets=_filled(local.astype(np.int32), queries, -1),
        weights=_filled(np.ones(len(impressions), np.float32), queries, 0.0),
        examples=users,
        user_ids=users,
        context=_filled(impressions.context, queries, -1) if impressions.fields else None,
        labels=_filled(impressions.labels, queries, np.nan),
        propensities=None if impressions.propensity is None else _filled(impressions.propensity, queries, 1.0),
    )


def _filled(values: np.ndarray, size: int, empty: float) -> np.ndarray:
    """values [E, ...] -> [size, ...], filled up with `empty`."""
    out = np.full((size, *values.shape[1:]), empty, values.dtype)
    out[: len(values)] = values
    return out
