"""Row-wise optimizers of ID tables: a step moves the rows that it looks up, and their optimizer state, and nothing behind them.

A step takes those rows out of the tables and out of what the optimizer keeps of them, differentiates with respect to them, updates them as
if they were the whole tables, and puts them back in place: nothing of a table's size is made, sent or read, and a step's cost does not grow
with the catalogue. Devices send each other the rows themselves and their gradients; of the optimizer's state each works on its own, as
[P, R, ...] for R rows and the P parts that a table lies in. Clipping, schedule, factors and freezing see what they see of a dense gradient,
whose other rows are zero. Weight decay is lazy: a row decays in the steps that look it up alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rec_jax.mesh import devices_along, path_name, replicated
from rec_jax.towers import ids as ids_lib
from rec_jax.towers.two_tower import TwoTowerSpec
from rec_jax.train import forwards
from rec_jax.train.forwards import StepSpec
from rec_jax.train.objectives import Objective
from rec_jax.types import Batch, Params, RecJaxError

TABLES = {group: f"{group}/embedding" for group in ("ids", "history_ids", "users")}  # group of parameters -> its table
EPSILON = 1e-8  # beside the root of a second moment, as optax.adam has it


class Rows(NamedTuple):
    """Rows of a table that a step looks up.

    Attributes:
      rows: [R] int32, each once and ascending; the places that are left name rows beyond the table, each another.
      local: [P, R] int32, the same in the parts that the table lies in; beyond a part's end where a row is not in it.
      lies: sharding of [P, R, D], the parts over the devices that hold them; of [P, R] by its first axes.
    """

    rows: jax.Array
    local: jax.Array
    lies: NamedSharding


Touched = Mapping[str, Rows]  # by group of parameters


class RowState(NamedTuple):
    """What a row-wise rule keeps: name -> tree of the tables' shapes, or of one number a row."""

    kept: dict[str, Any]


def tables_of(rows: str, objectives: tuple[Objective, ...], towers: TwoTowerSpec, *, kind: str) -> tuple[str, ...]:
    """`config.optimizer.rows` -> the groups of parameters whose tables move by the row; none where a stage makes no item vectors.

    Raises:
      RecJaxError: an objective that looks up, or moves, all rows in each step; towers without a table.
    """
    if rows == "dense" or kind in ("texts", "pairs"):
        return ()
    place = f"config.optimizer.rows={rows!r}"
    for o in objectives:
        if o.catalogue:
            raise RecJaxError(
                f"{place} is for steps that look up some items, and config.objectives.{o.name} scores the whole catalogue: set "
                "config.objectives.info_nce.candidates='batch', with queue or uniform for more negatives, or config.optimizer.rows='dense'"
            )
        if o.momentum:
            raise RecJaxError(
                f"{place}: config.objectives.{o.name}.momentum={o.momentum} moves every row of the momentum encoder's table in each step: "
                "set it to 0, with queue for negatives of earlier batches, or config.optimizer.rows='dense'"
            )
    there = {"ids": towers.n_ids, "history_ids": towers.history_ids, "users": towers.user == "id"}
    found = tuple(group for group in TABLES if there[group])
    if not found:
        raise RecJaxError(f"{place} is of tables of own vectors, and there is none: set config.towers.item.ids=True, or rows='dense'")
    return found


def touched(params: Params, spec: StepSpec, batch: Batch, *, n_items: int, draw: jax.Array, placed: Any, mesh: Mesh) -> Touched:
    """The rows that a step looks up: those of the batch's items and of what is drawn from the catalogue, and of its users.

    Their number is a constant of the config: as many as there are places for them, or rows of the table. Rows of empty places are not
    among them, for they must not move.

    Args:
      params, spec, batch: of the step.
      n_items: N of the catalogue.
      draw: typed key of the items that are drawn, as for `forwards.outputs`.
      placed: shardings of the parameters.
      mesh: of the run.
    """
    if not spec.row_tables:
        return {}
    looked_up = {
        "users": [batch.user_ids],
        "history_ids": [batch.item_ids],
        "ids": [batch.item_ids, *forwards.draws(spec, batch, draw, n_items=n_items)],
    }

    def rows_of(group: str) -> Rows:
        ids = jnp.concatenate([jnp.asarray(x).reshape(-1) for x in looked_up[group] if x is not None])
        found = (ids_lib.places(ids, **spec.towers.id_options) if group != "users" else ids).reshape(-1)
        size = len(params[group]["embedding"])
        rows = once(jax.lax.with_sharding_constraint(found, replicated(mesh)), rows=size)
        axes, *columns = placed[group]["embedding"].spec or (None,)
        parts = devices_along(mesh, axes) if axes else 1
        local = rows - size // parts * jnp.arange(parts, dtype=rows.dtype)[:, None]
        there = (local >= 0) & (local < size // parts)
        beyond = size // parts + jnp.arange(len(rows), dtype=rows.dtype)
        lies = NamedSharding(mesh, PartitionSpec(axes, None, *columns))
        return Rows(rows, _lying(jnp.where(there, local, beyond), lies), lies)

    return {group: rows_of(group) for group in spec.row_tables}


def once(looked_up: jax.Array, *, rows: int) -> jax.Array:
    """Rows of a table [...], -1 = none -> each once, ascending [R] int32; places that are left name rows beyond the table, each another."""
    ascending = jnp.sort(jnp.where(looked_up < 0, rows, looked_up))
    again = jnp.concatenate([jnp.zeros(1, bool), ascending[1:] == ascending[:-1]])
    found = jnp.sort(jnp.where(again, rows, ascending))[: min(len(looked_up), rows)]
    return jnp.where(found < rows, found, rows + jnp.arange(len(found), dtype=found.dtype))


def taken(tree: Any, touched: Touched) -> Any:
    """Parameters or optimizer state -> the same with [P, R, ...] in place of each table: the touched rows, zero but in their own part.

    No device needs another's part for it, nor to put them back.
    """

    def take(at: Rows, table: jax.Array) -> jax.Array:
        part = _parts(table, at)
        held = jax.vmap(lambda t, i: t.at[i].get(mode="fill", fill_value=0, unique_indices=True))(part, at.local)
        return _lying(held, at.lies)

    return _over_tables(take, touched, tree)


def put_back(tree: Any, part: Any, touched: Touched) -> Any:
    """The tree with rows [P, R, ...] or, the same for all parts, [R, ...] in place of those `taken`; what is no table is that of `part`."""

    def put(at: Rows, table: jax.Array, held: jax.Array) -> jax.Array:
        held = jnp.broadcast_to(held, (*at.local.shape, *table.shape[1:]))
        write = lambda t, i, h: t.at[i].set(h, mode="drop", unique_indices=True)
        return jax.vmap(write)(_parts(table, at), at.local, held).reshape(table.shape)

    return _over_tables(put, touched, tree, part)


def _parts(table: jax.Array, at: Rows) -> jax.Array:
    """A table [N, ...] as the parts that it lies in [P, N / P, ...]."""
    return _lying(table.reshape(len(at.local), -1, *table.shape[1:]), at.lies)


def _lying(x: jax.Array, lies: NamedSharding) -> jax.Array:
    """An array of parts [P, ...] where its table lies."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(lies.mesh, PartitionSpec(*lies.spec[: x.ndim])))


def whole_rows(params: Params, touched: Touched) -> Params:
    """Parameters with the touched rows [R, D] on every device in place of each table."""
    add = lambda at, held: jax.lax.with_sharding_constraint(held.sum(0), replicated(at.lies.mesh))
    return _over_tables(add, touched, taken(params, touched))


def looked_up_in(params: Params, touched: Touched) -> dict[str, Any]:
    """Parameters of touched rows, with which rows these are, as the towers' look-ups take them (`towers.ids`)."""
    return {**params, **{group: {**params[group], "rows": at.rows} for group, at in touched.items()}}


def _over_tables(function: Callable[..., jax.Array], touched: Touched, *trees: Any) -> Any:
    """function(Rows, *leaves) for every table's leaf, of parameters and in the RowStates of an optimizer; else the last tree's leaf."""
    if not touched:
        return trees[-1]
    rows_of = {TABLES[group]: at for group, at in touched.items()}

    def leaf(path: Any, *leaves: Any) -> Any:
        name = path_name(path)
        return function(rows_of[name], *leaves) if name in rows_of else leaves[-1]

    def node(*nodes: Any) -> Any:
        if not isinstance(nodes[0], RowState):
            return nodes[-1]
        kept = {name: jax.tree_util.tree_map_with_path(leaf, *(n.kept[name] for n in nodes)) for name in nodes[0].kept}
        return RowState(kept)

    if isinstance(trees[0], dict):  # parameters
        return jax.tree_util.tree_map_with_path(leaf, *trees)
    return jax.tree.map(node, *trees, is_leaf=lambda x: isinstance(x, RowState))


def _numbers(params: Any) -> Any:
    """A zero for each row of each table."""
    return jax.tree.map(lambda table: jnp.zeros(len(table)), params)


def scale_by_row_adam(*, b1: float, b2: float) -> optax.GradientTransformation:
    """Adam of each row by itself: its moments are those of the steps that touched it, and so is the count that corrects their bias.

    Where every row is touched in every step, it is Adam.

    Reference: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), algorithm 1; kept by the row as the "lazy" and "sparse"
    Adam of the common libraries keep it, but for the count, which there is one of all rows.
    """

    def init(params: Any) -> RowState:
        return RowState({"mu": optax.tree.zeros_like(params), "nu": optax.tree.zeros_like(params), "count": _numbers(params)})

    def update(updates: Any, state: RowState, params: Any = None) -> tuple[Any, RowState]:
        del params
        count = jax.tree.map(lambda c: c + 1, state.kept["count"])
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.kept["mu"], updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.kept["nu"], updates)

        def direction(m: jax.Array, v: jax.Array, c: jax.Array) -> jax.Array:
            unbiased = lambda x, beta: x / (1 - beta ** c[..., None])
            return unbiased(m, b1) / (jnp.sqrt(unbiased(v, b2)) + EPSILON)

        return jax.tree.map(direction, mu, nu, count), RowState({"mu": mu, "nu": nu, "count": count})

    return optax.GradientTransformation(init, update)


def scale_by_row_adagrad() -> optax.GradientTransformation:
    """Adagrad with one accumulator a row: the sum, over the steps that touched it, of the mean square of its gradient.

    Reference: Duchi et al., "Adaptive Subgradient Methods" (2011); by the row after Mudigere et al., "Software-Hardware Co-design for Fast
    and Scalable Training of Deep Learning Recommendation Models" (2022).
    """

    def init(params: Any) -> RowState:
        return RowState({"square": _numbers(params)})

    def update(updates: Any, state: RowState, params: Any = None) -> tuple[Any, RowState]:
        del params
        square = jax.tree.map(lambda s, g: s + jnp.mean(g**2, axis=-1), state.kept["square"], updates)
        directions = jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + EPSILON)[..., None], square, updates)
        return directions, RowState({"square": square})

    return optax.GradientTransformation(init, update)


def by_kind(rows: str, dense: optax.GradientTransformation, *, b1: float, b2: float) -> optax.GradientTransformation:
    """`dense` for all parameters but the tables, which `config.optimizer.rows` states the rule of."""
    rule = {"adam": lambda: scale_by_row_adam(b1=b1, b2=b2), "adagrad": scale_by_row_adagrad}[rows]()

    def labels(params: Any) -> Any:
        tables = TABLES.values()
        return jax.tree_util.tree_map_with_path(lambda path, _: "rows" if path_name(path) in tables else "dense", params)

    return optax.multi_transform({"dense": dense, "rows": rule}, labels)
