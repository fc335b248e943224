"""The one streaming fold over pairs of queries and candidates: tile by tile on a device, by a ring over devices.

`fold` gives statistics of each query, of each candidate, or of both from one pass; what is kept is said by accumulators (`tiles`). No
[B, N] array exists. A custom VJP computes the tiles again: 8 B N D FLOP in all, O(B + N) statistics and a tile of memory. Any
per-example loss is built on it by ordinary autodiff. Where all candidates are on one device and only a weighted sum of losses is wanted,
`forward_gradients` does it in 6 B N D.

On a mesh each device holds a share of both sides. One side stays, the other travels: at each of P steps a device folds what visits it and
passes it on, so that no device ever holds more than two shares. Gradients of the visitors travel one step behind them, and may do so while
the next tile is computed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from rec_jax.losses.tiles import CANDIDATES, QUERIES, Accumulator, Side, tiles
from rec_jax.mesh import Axis, axis_names, devices_along, ring_of
from rec_jax.types import RecJaxError

# Elements of a tile of logits, by platform. CPU: tests/bench/info_nce.py --blocks; a few live copies should stay in the caches. The others
# hold what a matrix unit needs to be busy, a few copies of which fit beside a model (tests/bench/tpu_compile.py). Other names are GPUs.
TILE = {"cpu": 1 << 18, "gpu": 1 << 26, "tpu": 1 << 24}
_LONGEST = 8192  # queries of a tile
_SHORTEST = 128  # candidates of a tile, or matmuls turn memory-bound
_ALIGN = 16  # rows of a block come in this multiple: vector width of the matmul kernels


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is folded, and how: accumulators of the queries and of the candidates, block sizes, devices, which side travels."""

    of_query: tuple[Accumulator, ...]
    of_item: tuple[Accumulator, ...]
    block: int | None
    mesh: Mesh | None
    axis: Axis | None
    travelling: str

    @property
    def axes(self) -> tuple[int, ...]:
        """Whose statistics are kept."""
        return (QUERIES,) * bool(self.of_query) + (CANDIDATES,) * bool(self.of_item)

    @property
    def devices(self) -> int:
        """P."""
        return devices_along(self.mesh, self.axis)

    @property
    def tile(self) -> int:
        """Elements of a tile, by the platform that it is compiled for."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return TILE.get(platform, TILE["gpu"])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients somebody asks for; the others cost nothing."""

    query: tuple[bool, bool, bool]  # vectors, bias, shift
    item: tuple[bool, bool, bool]
    scale: bool


class _Gradients(NamedTuple):
    """Of one side: vectors [n, D] (before the factor scale), bias [n], shift [n]; None where not wanted."""

    vectors: Any
    bias: Any
    shift: Any


class _Known(NamedTuple):
    """A side in the backward pass, with the finished values of its accumulators and their cotangents."""

    side: Side
    values: Any
    cotangents: Any


def check_axis(mesh: Mesh | None, axis: Axis | None, *, queries: int, candidates: int) -> None:
    """Raises RecJaxError unless mesh and axis go together, the axis is in the mesh, and its devices divide both sides."""
    devices = devices_along(mesh, axis)
    for what, rows in (("query", queries), ("item", candidates)):
        if rows % devices:
            raise RecJaxError(
                f"{what} has {rows} rows, which the {devices} devices of axis {axis!r} do not divide; pad it to "
                f"{-(-rows // devices) * devices} rows and mask them"
            )


def fold(
    query: Side,
    item: Side,
    scale: Any,
    *,
    of_query: tuple[Accumulator, ...] = (),
    of_item: tuple[Accumulator, ...] = (),
    teacher_scale: Any = 1.0,
    travelling: str = "item",
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Queries [B, D] against candidates [N, D] -> (values of `of_query` [B], values of `of_item` [N]).

    Differentiable in vectors, bias and shift of both sides and in scale; not in the teacher.

    Args:
      query, item: both sides, global arrays.
      scale: scalar that multiplies the products.
      of_query, of_item: what is accumulated per query, over the candidates; and per candidate, over the queries.
      teacher_scale: scalar that multiplies the teacher's products.
      travelling: "item" or "query", the side that goes round: the smaller one.
      block: candidates of a tile; None chooses.
      mesh: with `axis`, rows of both sides are sharded over that mesh axis (or axes), and a ring goes over its devices.

    Raises:
      RecJaxError: an axis that is not in the mesh, rows that its devices do not divide.
    """
    check_axis(mesh, axis, queries=query.vectors.shape[0], candidates=item.vectors.shape[0])
    plan = _Plan(of_query, of_item, block, mesh, axis, travelling)
    dtype = item.bias.dtype
    query, item = (side._replace(row=jnp.arange(side.vectors.shape[0], dtype=jnp.int32)) for side in (query, item))
    return _fold(plan, query, item, jnp.asarray(scale, dtype), jnp.asarray(teacher_scale, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fold(plan: _Plan, query: Side, item: Side, scale: Any, teacher_scale: Any) -> Any:
    return _on_mesh(plan, _forward, (query, item), (scale, teacher_scale))


def _fold_forward(plan: _Plan, query: Any, item: Any, scale: Any, teacher_scale: Any) -> Any:
    def perturbed(side: Side) -> tuple[bool, bool, bool]:
        vectors, bias, shift = (x is not None and x.perturbed for x in (side.vectors, side.bias, side.shift))
        return vectors, bias, shift

    wanted = _Wanted(perturbed(query), perturbed(item), scale.perturbed)
    query, item, scale, teacher_scale = jax.tree.map(
        lambda x: x.value, (query, item, scale, teacher_scale), is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    values = _fold(plan, query, item, scale, teacher_scale)
    return values, (query, item, scale, teacher_scale, values, wanted)


def _fold_backward(plan: _Plan, residuals: Any, cotangents: Any) -> Any:
    query, item, scale, teacher_scale, values, wanted = residuals
    zero = lambda value, cotangent: jnp.zeros_like(value) if isinstance(cotangent, SymbolicZero) else cotangent
    cotangents = jax.tree.map(zero, values, cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
    sides = tuple(_Known(side, v, c) for side, v, c in zip((query, item), values, cotangents, strict=True))
    of_query, of_item, d_scale = _on_mesh(plan, functools.partial(_backward, wanted=wanted), sides, (scale, teacher_scale))

    def like(side: Side, gradients: _Gradients) -> Side:
        vectors = None if gradients.vectors is None else gradients.vectors.astype(side.vectors.dtype)
        return Side(vectors, None, None, gradients.bias, gradients.shift)

    return like(query, of_query), like(item, of_item), d_scale, None


_fold.defvjp(_fold_forward, _fold_backward, symbolic_zeros=True)


def _on_mesh(plan: _Plan, work: Callable[..., Any], sides: Any, scalars: Any) -> Any:
    """Runs work(plan, sides, scalars) on each device's share of the rows."""
    run = functools.partial(work, plan)
    if plan.mesh is None:
        return run(sides, scalars)
    rows, whole = PartitionSpec(plan.axis), PartitionSpec()
    out = jax.eval_shape(functools.partial(work, dataclasses.replace(plan, mesh=None, axis=None)), sides, scalars)
    specs = jax.tree.map(lambda x: rows if x.ndim else whole, out)
    # Replicated results are equal on all devices by a psum, which shard_map cannot prove.
    return jax.shard_map(run, mesh=plan.mesh, in_specs=(rows, whole), out_specs=specs, check_vma=False)(sides, scalars)


def _forward(plan: _Plan, sides: tuple[Side, Side], scalars: tuple[Any, Any]) -> Any:
    query, item = sides
    dtype = item.bias.dtype

    def start(side: Side, accumulators: tuple[Accumulator, ...]) -> Any:
        return tuple(a.start(side.vectors.shape[0], dtype) for a in accumulators)

    def tile(query: Side, of_query: Any, item: Side, of_item: Any) -> Any:
        seen = {t.axis: t for t in tiles(query, item, *scalars, axes=plan.axes)}
        of_query = tuple(a.add(s, seen[QUERIES]) for a, s in zip(plan.of_query, of_query, strict=True))
        of_item = tuple(a.add(s, seen[CANDIDATES]) for a, s in zip(plan.of_item, of_item, strict=True))
        return of_query, of_item

    states = start(query, plan.of_query), start(item, plan.of_item)
    of_query, of_item = _round(plan, tile, (query, item), states, additive=False)
    return (
        tuple(a.finish(s) for a, s in zip(plan.of_query, of_query, strict=True)),
        tuple(a.finish(s) for a, s in zip(plan.of_item, of_item, strict=True)),
    )


def _backward(plan: _Plan, sides: tuple[_Known, _Known], scalars: tuple[Any, Any], *, wanted: _Wanted) -> Any:
    dtype = sides[1].side.bias.dtype
    query_wanted = (wanted.query[0] or wanted.scale, *wanted.query[1:])

    def start(known: _Known, asked: tuple[bool, bool, bool]) -> _Gradients:
        shapes = known.side.vectors.shape, known.side.bias.shape, known.side.bias.shape
        return _Gradients(*(jnp.zeros(shape, dtype) if yes else None for shape, yes in zip(shapes, asked, strict=True)))

    def tile(query: _Known, of_query: _Gradients, item: _Known, of_item: _Gradients) -> Any:
        seen = tiles(query.side, item.side, *scalars, axes=plan.axes)
        d_logits, by_axis = None, dict[int, Any]()
        for t in seen:
            known, accumulators = (query, plan.of_query) if t.axis == QUERIES else (item, plan.of_item)
            parts = [a.d_logits(v, c, t) for a, v, c in zip(accumulators, known.values, known.cotangents, strict=True)]
            parts = [p for p in parts if p is not None]
            if parts:
                by_axis[t.axis] = functools.reduce(jnp.add, parts)
                d_logits = by_axis[t.axis] if d_logits is None else d_logits + by_axis[t.axis]
        if d_logits is None:
            return of_query, of_item

        def more(old: _Gradients, axis: int, vectors: Any, equation: str) -> _Gradients:
            own, other = by_axis.get(axis), by_axis.get(1 - axis)
            new = old
            if old.vectors is not None:
                product = jnp.einsum(equation, d_logits.astype(vectors.dtype), vectors, preferred_element_type=dtype)
                new = new._replace(vectors=old.vectors + product)
            if old.bias is not None and other is not None:
                new = new._replace(bias=old.bias + other.sum(axis))
            if old.shift is not None and own is not None:
                new = new._replace(shift=old.shift + own.sum(axis))
            return new

        of_query = more(of_query, QUERIES, item.side.vectors, "rc,cd->rd")
        return of_query, more(of_item, CANDIDATES, query.side.vectors, "rc,rd->cd")

    states = start(sides[0], query_wanted), start(sides[1], wanted.item)
    of_query, of_item = _round(plan, tile, sides, states, additive=True)
    scale, d_scale = scalars[0], None
    if wanted.scale:
        d_scale = jnp.sum(of_query.vectors * sides[0].side.vectors)
        d_scale = d_scale if plan.axis is None else lax.psum(d_scale, axis_names(plan.axis))
    if not wanted.query[0]:
        of_query = of_query._replace(vectors=None)
    times = lambda g: g._replace(vectors=None if g.vectors is None else scale * g.vectors)
    return times(of_query), times(of_item), d_scale


def _round(plan: _Plan, tile: Callable[..., Any], sides: Any, states: Any, *, additive: bool) -> Any:
    """Folds all pairs: tile(query block, state, candidate block, state) -> states. `additive`: states start at zero and only add up."""
    if plan.travelling == "query":
        sides, states = sides[::-1], states[::-1]
        turned = lambda resident, own, visitor, its: tile(visitor, its, resident, own)[::-1]
    else:
        turned = tile
    longest = even_block(_rows(sides[0]), _LONGEST)
    width = plan.block or max(_SHORTEST, plan.tile // longest)
    blocks = longest, even_block(_rows(sides[1]), width)
    sweep = functools.partial(_sweep, turned, blocks)
    resident, visitor = sides
    own, its = states
    if plan.devices > 1 and plan.mesh is not None and plan.axis is not None:
        own, its = _ring(sweep, resident, own, visitor, its, plan.mesh, plan.axis, additive=additive)
    else:
        own, its = sweep(resident, own, visitor, its)
    return (its, own) if plan.travelling == "query" else (own, its)


def _ring(
    sweep: Callable[..., Any], resident: Any, own: Any, visitor: Any, its: Any, mesh: Mesh, axis: Axis, *, additive: bool
) -> tuple[Any, Any]:
    """P steps: fold the visitor, pass it on. States of visitors travel with them, additive ones a step behind; all come home."""
    ring = ring_of(mesh, axis)
    onward = list(zip(ring, ring[1:] + ring[:1], strict=True))
    move = lambda tree: jax.tree.map(lambda x: lax.ppermute(x, axis_names(axis), onward), tree)

    def step(carry: Any, _: Any) -> Any:
        own, visitor, its = carry
        coming = move(visitor)  # needs nothing of this step, so that it is sent meanwhile (tests/bench/tpu_compile.py shows it)
        if additive:
            arriving = move(its)
            own, share = sweep(resident, own, visitor, jax.tree.map(jnp.zeros_like, its))
            its = jax.tree.map(jnp.add, arriving, share)
        else:
            own, its = sweep(resident, own, visitor, its)
            its = move(its)
        return (own, coming, its), None

    (own, _, its), _ = lax.scan(step, (own, visitor, its), None, length=len(ring))
    return own, move(its) if additive else its


def _rows(side: Any) -> int:
    return int(jax.tree.leaves(side)[0].shape[0])


def even_block(rows: int, block: int) -> int:
    """Block size, a multiple of 16, that covers the rows with as many blocks as `block` needs, evenly."""
    blocks = max(1, -(-rows // block))
    return max(_ALIGN, -(-rows // (blocks * _ALIGN)) * _ALIGN)


def _sweep(tile: Callable[..., Any], blocks: tuple[int, int], resident: Any, own: Any, visitor: Any, its: Any) -> tuple[Any, Any]:
    """All tiles of two shares: blocks of visitors outside, blocks of residents inside."""
    rows = _rows(resident), _rows(visitor)
    residents, owns = split((resident, own), blocks[0])
    visitors, theirs = split((visitor, its), blocks[1])

    def row(state: Any, part: Any) -> Any:
        visitor, its = state
        resident, own = part
        own, its = tile(resident, own, visitor, its)
        return (visitor, its), own

    def column(owns: Any, part: Any) -> Any:
        (_, its), owns = _scan(row, part, (residents, owns))
        return owns, its

    owns, theirs = _scan(column, owns, (visitors, theirs))
    return join(owns, rows[0]), join(theirs, rows[1])


def _scan(step: Callable[..., Any], carry: Any, parts: Any) -> Any:
    """lax.scan, without a loop where there is one part."""
    if _rows(parts) > 1:
        return lax.scan(step, carry, parts)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], out)


def split(tree: Any, block: int) -> Any:
    """[n, ...] -> [blocks, block, ...]; rows that fill up the last block count for nothing."""

    def one(path: Any, x: Any) -> Any:
        extra = -x.shape[0] % block
        if extra:
            x = jnp.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1)), constant_values=_fill(path))
        return x.reshape(-1, block, *x.shape[1:])

    return jax.tree_util.tree_map_with_path(one, tree)


def join(tree: Any, rows: int) -> Any:
    """[blocks, block, ...] -> [rows, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)


_FILL = {"bias": -np.inf, "row": -1}


def _fill(path: Any) -> float:
    return _FILL.get(getattr(path[-1], "name", ""), 0) if path else 0
