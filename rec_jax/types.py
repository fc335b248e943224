"""The shapes that rooms hand to each other, and the axis letters of every docstring.

Axis letters: G shards of a batch, B examples, M unique items of a shard, R packed rows, T tokens a row, K texts a row,
H packed history rows, S places of a history row, Q user vectors (queries) of a shard, N candidates or catalogue items,
D vector width, U users, V words of a vocabulary, C context fields, L tasks (labels), P devices or masked places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]


class RecJaxError(ValueError):
    """Bad input: the message names the value, the place and the fix."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, end to end: row i is ``flat[offsets[i]:offsets[i + 1]]``; offsets [rows + 1] int64.

    `columns` are what else is known of each element, by name: [len(flat)] each, such as the times of a history's events.
    """

    flat: np.ndarray
    offsets: np.ndarray
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = row % len(self)
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        """Length of each row -> [rows] int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray, *, without_last: int = 0) -> Ragged:
        """Some rows, in the order given, with their columns; of each the last `without_last` elements are left out."""
        lengths = np.maximum(self.offsets[np.asarray(rows) + 1] - without_last - self.offsets[rows], 0)
        return self.pieces(rows, 0, lengths)

    def pieces(self, rows: np.ndarray, start: np.ndarray | int, stop: np.ndarray) -> Ragged:
        """Of each of some rows [n] the elements [start, stop), places within the row, with their columns."""
        starts, lengths = self.offsets[rows] + start, stop - start
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.flat[places], offsets, {name: column[places] for name, column in self.columns.items()})

    def where(self, mask: np.ndarray) -> Ragged:
        """The elements of a mask [len(flat)] alone, in as many rows, with their columns; flat must begin with the first row."""
        before = np.zeros(len(mask) + 1, np.int64)
        np.cumsum(mask, out=before[1:])
        return Ragged(self.flat[mask], before[self.offsets], {name: column[mask] for name, column in self.columns.items()})

    @classmethod
    def from_rows(cls, rows: list[Any], dtype: Any = np.int32) -> Ragged:
        """Builds it from a list of sequences."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(r) for r in rows], out=offsets[1:])
        flat = np.concatenate([np.asarray(r, dtype) for r in rows]) if rows else np.zeros(0, dtype)
        return cls(flat.astype(dtype, copy=False), offsets)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Who is ranked and against what.

    Attributes:
      users: [U], rows of the users table.
      history, targets: of each user, catalogue indices, oldest first. Columns of the history: "times", "ratings" and "event_NAME" of its
        events, where the config has a history tower that reads them.
      n_items: N, all of which are ranked.
      removed: items that the ranking leaves out; None = those of the history.
    """

    users: np.ndarray
    history: Ragged
    targets: Ragged
    n_items: int
    removed: Ragged | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """One step's input. Every array has the leading shard axis G; an absent part is None.

    Indices named *local* point into the same shard's M unique items, so that a look-up never leaves the device.

    Attributes:
      item_ids: [G, M] int32, catalogue index of each unique item of the shard; -1 is an empty place.
      item_tokens: [G, R, T] int32, the items' texts packed into rows; None where item vectors come from a table.
      item_segments: [G, R, T] int32, 1..K within a row, 0 is padding.
      item_places: [G, M] int32, where the item's pooled vector stands in the flattened [R * K].
      item_types: [G, R, T] int32, token types of pairs of texts: 1 for the second text, 0 before it. None where texts stand alone.
      history: [G, H, S] int32 local, packed histories; -1 is padding, or, where its segment is above 0, a hidden item. None with a text
        user tower.
      history_segments: [G, H, S] int32, 1.. within a row, 0 is padding.
      history_times: [G, H, S] int32, seconds since the first event of the place's window, -1 is unknown. None unless the history tower
        reads times.
      history_ratings: [G, H, S] float32, rating of each place's event, NaN is unknown. None unless the history tower reads ratings.
      history_events: {"event_NAME": [G, H, S] int32}, category of each place's event in each feature of events that the history tower
        reads, 0 is none or unknown. None where it reads none.
      history_users: [G, H, S] int32, row of the users table of each place, -1 is none. None unless the tower reads features of users.
      user_tokens: [G, R, T] int32, histories written out as text and packed; None with a history user tower.
      user_segments: [G, R, T] int32.
      user_places: [G, Q] int32, where each query's pooled vector stands in the flattened [R * K].
      targets: [G, Q] int32 local, the item that follows each query (Q = H * S for a history tower), or that is hidden there; -1 is none.
      weights: [G, Q] float32, 1 for a query with a target, 0 for padding.
      examples: [G, E] int32, row of the users table behind each example, -1 is empty; for messages only.
      negatives: [G, Q, K] int32 local, mined negatives of each query's user, -1 is none; an item of the query's own window is none.
        None without `config.data.negatives`.
      masked_tokens: [G, R, T] int32, `item_tokens` with some of them hidden for masked language modelling.
      masked_places: [G, P] int32, places of the hidden tokens in the flattened [R * T], -1 is none.
      noisy_tokens, noisy_segments: [G, R, T] int32, the texts with tokens deleted; what is left of a text keeps its segment id and order.
      view_history, view_segments: [G, 2, H, S] int32, two random views of each window's history, packed at its place: local, -1 where an
        item is hidden, or with segment 0 where there is none. None unless an objective asks for them, and so the next two.
      view_places: [G, 2, E] int32, where the last item of each example's view stands in the flattened [H * S], -1 is none.
      view_targets: [G, E] int32 local, the item that follows each example's window, -1 is none.
      user_ids: [G, Q] int32, row of the users table of each query, -1 is none.
      context: [G, Q, C] int32, categories of each query's circumstances, -1 is unknown.
      labels: [G, Q, L] float32, what was observed of each query's target, a column per task; NaN is not observed.
      propensities: [G, Q] float32, probability with which the logging policy showed the target.
      event_weights: [G, Q] float32, what the event of each query's target weighs in means over queries, which may be 0; 0 for padding.
        None unless `config.batch.event_weight` says that they differ.
    """

    item_ids: Any
    targets: Any
    weights: Any
    examples: Any
    item_tokens: Any = None
    item_segments: Any = None
    item_places: Any = None
    item_types: Any = None
    history: Any = None
    history_segments: Any = None
    history_times: Any = None
    history_ratings: Any = None
    history_users: Any = None
    history_events: Any = None
    user_tokens: Any = None
    user_segments: Any = None
    user_places: Any = None
    negatives: Any = None
    masked_tokens: Any = None
    masked_places: Any = None
    noisy_tokens: Any = None
    noisy_segments: Any = None
    view_history: Any = None
    view_segments: Any = None
    view_places: Any = None
    view_targets: Any = None
    user_ids: Any = None
    context: Any = None
    labels: Any = None
    propensities: Any = None
    event_weights: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Outputs:
    """What the towers made of a batch; what no objective asked for is None.

    Attributes:
      user: [G, Q, D].
      item: [G, M, D].
      catalogue: [N, D], vectors of all items.
      views: [2, G, M, D], the batch's items by their texts alone, under two draws of dropout.
      plain: [G, M, D], the batch's items without their own vectors.
      history_views: [2, G, E, D], user vectors of each example's two views; of no meaning where there is no example.
      drawn: [U, D], vectors of the catalogue items `drawn_ids`.
      drawn_ids: [U] int32, drawn uniformly from the catalogue, with replacement.
      query_drawn: [G, Q, K, D], vectors of the catalogue items `query_drawn_ids`.
      query_drawn_ids: [G, Q, K] int32, drawn uniformly for each query from the items that are not its own; -1 is none.
      text: [G, M, D_text], what the encoder or the table says of the batch's items, before the head.
      masked: [G, P, D_text], of the hidden tokens' places, ready for the vocabulary's softmax.
      denoised: [G, R, T, D_text], the decoder's, each place for the token that stands there.
      vocabulary: {"table" [V, D_text], "bias" [V]} of that softmax.
      hidden: [layers + 1, G, R, T, D_text], of the batch's item texts behind the embeddings and each layer.
      attention: [layers, G, R, heads, T, T], attention weights of each layer.
      pairs: [G, E, 1 + K], the cross-encoder's logits of each example's positive and of its K drawn items.
      scores: [G, Q, L], the task head's logits of each query and its target.
      drawn_scores: [G, Q, U], its logits of each query and the drawn items, for the first task.
    """

    user: Any = None
    item: Any = None
    catalogue: Any = None
    views: Any = None
    plain: Any = None
    history_views: Any = None
    drawn: Any = None
    drawn_ids: Any = None
    query_drawn: Any = None
    query_drawn_ids: Any = None
    text: Any = None
    masked: Any = None
    denoised: Any = None
    vocabulary: Any = None
    hidden: Any = None
    attention: Any = None
    pairs: Any = None
    scores: Any = None
    drawn_scores: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Context:
    """What an objective may use beside the batch.

    Attributes:
      scalars: learned scalars by name, e.g. ``log_temperature``; empty where nothing is learned.
      log_q: [N] float32, log sampling frequency of each catalogue item in the training targets.
      rng: the step's key for this objective.
      neighbours: (ids [N, M], shares [N, M]) of each catalogue item's neighbours, or None.
      queue: item vectors of earlier batches {"vectors" [G, slots, Q, D], "ids" [G, slots, Q], -1 = empty}, or None.
      momentum: what the momentum encoder made of the batch, without gradient, or None.
      teacher: what the teacher made of the batch, without gradient, or None.
      teacher_scalars: what the teacher had learned beside its towers, by name.
      normalize: vectors have unit length, and so must their prefixes.
      mesh, axes: the devices that the batch's shards lie on, and the mesh axes; None on one device.
    """

    scalars: Any
    log_q: Any
    rng: Any
    neighbours: Any = None
    queue: Any = None
    momentum: Outputs | None = None
    teacher: Outputs | None = None
    teacher_scalars: Any = None
    normalize: bool = dataclasses.field(default=False, metadata={"static": True})
    mesh: Any = dataclasses.field(default=None, metadata={"static": True})
    axes: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})
