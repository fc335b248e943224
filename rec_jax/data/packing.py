"""Many short pieces in rows of fixed length, first fit, with segment ids 1.. and 0 for padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from rec_jax.types import Ragged, RecJaxError


def texts_per_row(row_tokens: int) -> int:
    """K, the most texts that one packed row of T tokens holds (8 tokens are about the shortest text worth a place of its own)."""
    return max(1, row_tokens // 8)


class Rows:
    """The free room of R rows of `length` places with at most `per_row` pieces each.

    `mark` and `reset` undo placements, so that a group of pieces is placed whole or not at all. Plain lists: numpy's calls take longer
    than a few comparisons, and this is asked for every history and text.
    """

    def __init__(self, rows: int, length: int, per_row: int):
        self._free, self._used = [length] * rows, [0] * rows
        self._length, self._per_row = length, per_row
        self._open = 0  # rows before it take nothing more

    def place(self, size: int) -> tuple[int, int, int] | None:
        """First row with room for `size` places -> (row, offset, segment from 1), or None."""
        free, used = self._free, self._used
        for row in range(self._open, len(free)):
            if free[row] >= size and used[row] < self._per_row:
                offset = self._length - free[row]
                free[row] -= size
                used[row] += 1
                return row, offset, used[row]
        return None

    def has_room(self) -> bool:
        """Whether any row takes a piece of one place."""
        while self._open < len(self._free) and not (self._free[self._open] > 0 and self._used[self._open] < self._per_row):
            self._open += 1
        return self._open < len(self._free)

    def mark(self) -> tuple[list[int], list[int], int]:
        """The present filling, for `reset`."""
        return self._free.copy(), self._used.copy(), self._open

    def reset(self, mark: tuple[list[int], list[int], int]) -> None:
        """Back to a filling that `mark` gave."""
        self._free, self._used, self._open = mark


class TextRows:
    """Texts packed into tokens [R, T] and segment_ids [R, T]; a text's place is row * K + segment - 1."""

    def __init__(self, rows: int, row_tokens: int):
        self.per_row = texts_per_row(row_tokens)
        self.rows = Rows(rows, row_tokens, self.per_row)
        self.tokens = np.zeros((rows, row_tokens), np.int32)
        self.segments = np.zeros((rows, row_tokens), np.int32)

    def write(self, text: np.ndarray, at: tuple[int, int, int]) -> int:
        """Writes a text where `rows.place` put it -> its place in the flattened [R * K]."""
        row, offset, segment = at
        self.tokens[row, offset : offset + len(text)] = text
        self.segments[row, offset : offset + len(text)] = segment
        return row * self.per_row + segment - 1


@dataclasses.dataclass(frozen=True)
class TextBlock:
    """Packed texts of one forward pass: tokens [R, T], segment_ids [R, T], and of each text its index and place in [R * K]."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    texts: np.ndarray
    places: np.ndarray
    per_row: int


def pack_texts(texts: Ragged, *, rows: int, row_tokens: int, order: Sequence[int] | None = None) -> Iterator[TextBlock]:
    """Texts as blocks of R x T packed tokens; every text stands in exactly one block.

    Args:
      texts: token ids of each text.
      rows: R, rows of a block.
      row_tokens: T, tokens of a row.
      order: indices of the texts to pack; all, longest first, by default (fewest blocks).

    Raises:
      RecJaxError: a text longer than a row.
    """
    lengths = texts.lengths()
    if len(lengths) and lengths.max() > row_tokens:
        raise RecJaxError(f"text {int(np.argmax(lengths))} has {lengths.max()} tokens, a packed row {row_tokens}; raise batch.row_tokens")
    waiting = np.argsort(-lengths, kind="stable") if order is None else np.asarray(order)
    while len(waiting):
        block = TextRows(rows, row_tokens)
        placed: list[int] = []
        places: list[int] = []
        left: list[int] = []
        room = rows * row_tokens
        for n, text in enumerate(waiting):
            if room < lengths[text] or len(left) > 64 * rows:
                left.extend(waiting[n:])
                break
            at = block.rows.place(int(lengths[text]))
            if at is None:
                left.append(text)
                continue
            room -= int(lengths[text])
            places.append(block.write(texts[int(text)], at))
            placed.append(text)
        yield TextBlock(block.tokens, block.segments, np.asarray(placed, np.int32), np.asarray(places, np.int32), block.per_row)
        waiting = np.asarray(left, np.int64)
