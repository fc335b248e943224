"""The two sides of a fold, and one tile of their logits: which pairs count, and what a loss accumulates of them.

A tile is a block of queries [r] against a block of candidates [c]. Its logits are scale * query @ item.T. The statistics of the queries
see them with the candidates' bias and the queries' shift added; those of the candidates with the queries' bias and the candidates' shift.

Sums, maxima and gradients are float32 (float64 for float64 inputs), whatever the vectors are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

NO_POSITIVE = -1  # numbers of a query's empty places, and ids that equal nothing
NO_CANDIDATE = -2  # numbers of padding among the candidates

_NO_ROW = 2**31 - 1

QUERIES, CANDIDATES = 1, 0  # whose statistics: the axis of a tile that they fold over


class Side(NamedTuple):
    """Queries or candidates, n rows of a fold.

    Attributes:
      vectors: [n, D] float.
      numbers: [n, K] int32. A candidate's is its place among all candidates; a query's are those of its positives, -1 for none.
      ids: [n, K] int32 or None; a pair with an equal id is left out of everything.
      bias: [n], added to the logits that the other side's statistics see; -inf takes the row out of them.
      shift: [n] or None, added to the logits that this side's own statistics see.
      teacher: [n, E] or None, vectors whose products are the teacher's logits.
      row: [n] int32, the row's own number among all rows of its side; `fold` sets it.
      left_out: [n, K] int32 or None; of queries, numbers of candidates that are left out as those of an equal id are, -1 for none. The
        numbers of the candidates then follow each other.
    """

    vectors: Any
    numbers: Any
    ids: Any
    bias: Any
    shift: Any = None
    teacher: Any = None
    row: Any = None
    left_out: Any = None


class Tile(NamedTuple):
    """A tile as the statistics of one side see it.

    Attributes:
      logits: [r, c].
      there: [r, c] bool, pairs of two real rows.
      positive: [r, c] bool, the query's positives among the candidates.
      same: [r, c] bool or None, pairs that an equal id, or the query, leaves out.
      teacher: [r, c] the teacher's logits or None.
      others: the rows' numbers of the other side, to broadcast with the tile.
      axis: the axis that is folded: QUERIES or CANDIDATES.
    """

    logits: Any
    there: Any
    positive: Any
    same: Any
    teacher: Any
    others: Any
    axis: int

    def pairs(self, over: str) -> Any:
        """[r, c] bool: the pairs that count, by a name in PAIRS."""
        if over == "positives":
            return self.there & self.positive
        left_out = self.positive if over == "others" else None
        if self.same is not None:
            # An equal id leaves a pair out, but a positive is no duplicate of itself.
            left_out = self.same | self.positive if over == "others" else self.same & ~self.positive
        return self.there if left_out is None else self.there & ~left_out

    def spread(self, values: Any) -> Any:
        """One value per row of the side whose statistics these are -> an array that broadcasts with the tile."""
        return jnp.expand_dims(values, self.axis)


PAIRS = ("others", "positives", "all")  # neither positive nor of its id; the positives; both


class Accumulator(Protocol):
    """What a fold keeps per row. `state` and `value` are pytrees of arrays [n]; `axis` of a tile says over which axis it adds up."""

    def start(self, rows: int, dtype: Any) -> Any:
        """State of nothing seen."""

    def add(self, state: Any, tile: Tile) -> Any:
        """The state with one more tile."""

    def finish(self, state: Any) -> Any:
        """The value, once all tiles are seen."""

    def d_logits(self, value: Any, cotangent: Any, tile: Tile) -> Any:
        """[r, c]: gradient of the logits, from the finished value and its cotangent; None where there is none."""


@dataclasses.dataclass(frozen=True)
class LogSumExp:
    """Log of the sum of exp(logit), by a running maximum: safe for logits of any size; -inf where nothing counts."""

    over: str = "others"

    def start(self, rows: int, dtype: Any) -> Any:
        return jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype)

    def add(self, state: Any, tile: Tile) -> Any:
        peak, total = state
        logits = jnp.where(tile.pairs(self.over), tile.logits, -jnp.inf)
        new_peak = jnp.maximum(peak, logits.max(tile.axis))
        shift = finite(new_peak)
        return new_peak, total * jnp.exp(peak - shift) + jnp.exp(logits - tile.spread(shift)).sum(tile.axis)

    def finish(self, state: Any) -> Any:
        peak, total = state
        return finite(peak) + jnp.log(total)

    def d_logits(self, value: Any, cotangent: Any, tile: Tile) -> Any:
        # exp(-inf - 0) is 0 also where nothing counts.
        logits = jnp.where(tile.pairs(self.over), tile.logits, -jnp.inf)
        return tile.spread(cotangent) * jnp.exp(logits - tile.spread(finite(value)))


class _Sum:
    """Sum of a function of the logits."""

    over: str

    def start(self, rows: int, dtype: Any) -> Any:
        return jnp.zeros(rows, dtype)

    def add(self, state: Any, tile: Tile) -> Any:
        return state + jnp.where(tile.pairs(self.over), self.term(tile.logits), 0).sum(tile.axis)

    def finish(self, state: Any) -> Any:
        return state

    def d_logits(self, value: Any, cotangent: Any, tile: Tile) -> Any:
        slope = self.slope(tile.logits)
        return None if slope is None else jnp.where(tile.pairs(self.over), tile.spread(cotangent) * slope, 0)

    def term(self, logits: Any) -> Any:
        raise NotImplementedError

    def slope(self, logits: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Total(_Sum):
    """Sum of the logits."""

    over: str = "others"

    def term(self, logits: Any) -> Any:
        return logits

    def slope(self, logits: Any) -> Any:
        return jnp.ones_like(logits)


@dataclasses.dataclass(frozen=True)
class Count(_Sum):
    """Number of pairs, as a float."""

    over: str = "others"

    def term(self, logits: Any) -> Any:
        return jnp.ones_like(logits)

    def slope(self, logits: Any) -> Any:
        return None


@dataclasses.dataclass(frozen=True)
class SoftplusSum(_Sum):
    """Sum of log(1 + exp(logit))."""

    over: str = "others"

    def term(self, logits: Any) -> Any:
        return jax.nn.softplus(logits)

    def slope(self, logits: Any) -> Any:
        return jax.nn.sigmoid(logits)


@dataclasses.dataclass(frozen=True)
class HingeSum(_Sum):
    """Sum of max(0, logit)."""

    over: str = "others"

    def term(self, logits: Any) -> Any:
        return jax.nn.relu(logits)

    def slope(self, logits: Any) -> Any:
        return (logits > 0).astype(logits.dtype)


@dataclasses.dataclass(frozen=True)
class ActiveCount(_Sum):
    """Number of logits above 0, as a float."""

    over: str = "others"

    def term(self, logits: Any) -> Any:
        return (logits > 0).astype(logits.dtype)

    def slope(self, logits: Any) -> Any:
        return None


@dataclasses.dataclass(frozen=True)
class Maximum:
    """The highest logit, of all or of those below 0, and the row of the other side that has it; -inf where there is none.

    Of equal ones the first row counts. It is remembered, for logits that are computed again need not be equal to the last bit.
    """

    over: str = "others"
    below_zero: bool = False

    def start(self, rows: int, dtype: Any) -> Any:
        return jnp.full(rows, -jnp.inf, dtype), jnp.full(rows, _NO_ROW, jnp.int32)

    def add(self, state: Any, tile: Tile) -> Any:
        peak, row = state
        pairs = tile.pairs(self.over)
        logits = jnp.where(pairs & (tile.logits < 0) if self.below_zero else pairs, tile.logits, -jnp.inf)
        here = logits.max(tile.axis)
        is_here = (logits == tile.spread(here)) & (logits > -jnp.inf)
        first = jnp.where(is_here, tile.others, _NO_ROW).min(tile.axis)
        better = (here > peak) | ((here == peak) & (first < row))
        return jnp.where(better, here, peak), jnp.where(better, first, row)

    def finish(self, state: Any) -> Any:
        return state

    def d_logits(self, value: Any, cotangent: Any, tile: Tile) -> Any:
        return jnp.where(tile.others == tile.spread(value[1]), tile.spread(cotangent[0]), 0)


class Expectation(NamedTuple):
    """Of the teacher's softmax, per row: its log-sum-exp, and the means of the teacher's and of the student's logits under it."""

    teacher_log_sum_exp: Any
    teacher_mean: Any
    student_mean: Any


@dataclasses.dataclass(frozen=True)
class TeacherMean:
    """Mean of the logits under the teacher's softmax, sum_j p_j s_j -> Expectation. Only `student_mean` has a gradient."""

    over: str = "all"

    def start(self, rows: int, dtype: Any) -> Any:
        zeros = jnp.zeros(rows, dtype)
        return jnp.full(rows, -jnp.inf, dtype), zeros, zeros, zeros

    def add(self, state: Any, tile: Tile) -> Any:
        peak, total, of_teacher, of_student = state
        pairs = tile.pairs(self.over)
        teacher = jnp.where(pairs, tile.teacher, -jnp.inf)
        new_peak = jnp.maximum(peak, teacher.max(tile.axis))
        shift = finite(new_peak)
        share, old = jnp.exp(teacher - tile.spread(shift)), jnp.exp(peak - shift)

        def more(before: Any, values: Any) -> Any:
            return before * old + (share * values).sum(tile.axis)

        teacher, student = jnp.where(pairs, tile.teacher, 0), jnp.where(pairs, tile.logits, 0)
        return new_peak, more(total, 1), more(of_teacher, teacher), more(of_student, student)

    def finish(self, state: Any) -> Any:
        peak, total, of_teacher, of_student = state
        some = jnp.where(total > 0, total, 1)
        return Expectation(finite(peak) + jnp.log(total), of_teacher / some, of_student / some)

    def d_logits(self, value: Any, cotangent: Any, tile: Tile) -> Any:
        teacher = jnp.where(tile.pairs(self.over), tile.teacher, -jnp.inf)
        return tile.spread(cotangent.student_mean) * jnp.exp(teacher - tile.spread(finite(value.teacher_log_sum_exp)))


def finite(peak: Any) -> Any:
    """The shift that keeps exp in range; 0 where nothing counts, or -inf - -inf would be NaN."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def any_equal(left: Any, right: Any) -> Any:
    """[r, K], [c, L] integers -> [r, c] bool: whether any of the row's equals any of the column's; no [r, c, K] array."""
    out = None
    for k in range(left.shape[1]):
        for n in range(right.shape[1]):
            equal = left[:, k, None] == right[None, :, n]
            out = equal if out is None else out | equal
    return out


def left_out_pairs(query: Side, item: Side) -> Any:
    """[r, c] bool: candidates that a query leaves out by their numbers, which count up from the block's first."""
    rows, columns = query.left_out.shape[0], item.numbers.shape[0]
    place = query.left_out - item.numbers[0, 0]
    place = jnp.where((query.left_out >= 0) & (place >= 0), place, columns)
    return jnp.zeros((rows, columns), bool).at[jnp.arange(rows)[:, None], place].set(True, mode="drop")


def similarities(query: Side, item: Side, scale: Any) -> Any:
    """Blocks of queries [r] and candidates [c] -> logits [r, c], in the dtype of the bias."""
    return scale * jnp.einsum("rd,cd->rc", query.vectors, item.vectors, preferred_element_type=item.bias.dtype)


def tiles(query: Side, item: Side, scale: Any, teacher_scale: Any, *, axes: tuple[int, ...]) -> tuple[Tile, ...]:
    """The tile of two blocks as each of `axes` (QUERIES, CANDIDATES) sees it; the matrix product is made once."""
    logits = similarities(query, item, scale)
    positive = any_equal(query.numbers, item.numbers)
    same = None if query.ids is None or item.ids is None else any_equal(query.ids, item.ids)
    if query.left_out is not None:
        same = left_out_pairs(query, item) if same is None else same | left_out_pairs(query, item)
    teacher = None
    if query.teacher is not None and item.teacher is not None:
        teacher = teacher_scale * jnp.einsum("rd,cd->rc", query.teacher, item.teacher, preferred_element_type=logits.dtype)
    there = (query.bias > -jnp.inf)[:, None] & (item.bias > -jnp.inf)[None, :]
    out = []
    for axis in axes:
        own, other = (query, item) if axis == QUERIES else (item, query)
        seen = logits + jnp.expand_dims(jnp.where(other.bias == -jnp.inf, 0, other.bias), 1 - axis)
        if own.shift is not None:
            seen = seen + jnp.expand_dims(own.shift, axis)
        out.append(Tile(seen, there, positive, same, teacher, jnp.expand_dims(other.row, 1 - axis), axis))
    return tuple(out)
