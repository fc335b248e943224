"""Parameters of another workdir on a larger data set: rows of tables go with their ids or categories, all else as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import mesh as mesh_lib
from rec_jax.config_places import EVENT
from rec_jax.types import Params, RecJaxError

# What both must agree on; heads of tasks and learned scalars belong to objectives.
GROUPS = ("item", "ids", "features", "gates", "user", "history_ids", "users")
OF_USERS = "user/features/"  # features of users, which the history tower reads
OF_EVENTS = "user/" + EVENT  # tables by features of events, which it reads too
TABLES = {"ids/embedding": "items", "history_ids/embedding": "items", "users/embedding": "users"}


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a run goes on from.

    Attributes:
      params: those of the old workdir, without its encoder.
      rows: {"items" [N], "users" [U]}, row of each item and user in the old data, -1 = new; {"event_NAME" [V + 1]}, likewise of the rows of
        tables by features of events.
      place: the old workdir, for messages.
      hashed: items' own vectors are those of a hashed table, with the same buckets in both (`data.start.check`).
    """

    params: Params
    rows: Mapping[str, np.ndarray]
    place: str
    hashed: bool = False


def laid_out(carried: Carried, fresh: Params) -> dict[str, Any]:
    """The old parameters with ID tables in the order of the new data: rows of new items and users are those of `fresh`.

    A hashed table is the old one as it is, for each item's place in it comes from its index alone: known items must have kept theirs. New
    items have then the vectors that their hashes give, of rows that others have trained.

    Args:
      carried: the old ones.
      fresh: parameters of the new run, or their shapes.

    Raises:
      RecJaxError: towers that do not fit; names the parameter and both shapes. A hashed table, and an item that stands elsewhere now.
    """
    check(carried, fresh)
    out: dict[str, Any] = {name: value for name, value in carried.params.items() if name in fresh}
    for name, kind in TABLES.items():
        group, leaf = name.split("/")
        if group in out and not (carried.hashed and kind == "items"):
            table, rows = jnp.asarray(fresh[group][leaf]), carried.rows[kind]
            kept = np.flatnonzero(rows >= 0)
            out[group] = {leaf: table.at[kept].set(jnp.asarray(carried.params[group][leaf])[rows[kept]])}
    if "features" in out:
        out["features"] = _features(carried.params["features"], fresh["features"])
    for name in (name for name in carried.rows if name.startswith(EVENT) and name in fresh.get("user", {})):
        rows, table = carried.rows[name], jnp.asarray(fresh["user"][name]["embedding"])
        kept = np.flatnonzero(rows >= 0)
        before = jnp.asarray(carried.params["user"][name]["embedding"])
        out["user"] = {**out["user"], name: {"embedding": table.at[kept].set(before[rows[kept]])}}
    if "features" in fresh.get("user", {}):
        out["user"] = {**out["user"], "features": _features(out["user"].get("features", {}), fresh["user"]["features"])}
    return out


def _features(old: Params, fresh: Params) -> dict[str, Any]:
    """Features' parameters of the new run: the old ones; rows of new categories, which come last, and new features are fresh ones."""
    names = {mesh_lib.path_name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(dict(old))}

    def laid_over(path: Any, new: Any) -> Any:
        before = names.get(mesh_lib.path_name(path))
        return new if before is None else jnp.asarray(new).at[: len(before)].set(before)

    return jax.tree_util.tree_map_with_path(laid_over, dict(fresh))


def check(carried: Carried, fresh: Params) -> None:
    """See `laid_out`."""
    old, new = _shapes(carried.params), _shapes(fresh)
    if carried.hashed and "ids" in carried.params:
        _check_hashed(carried)
    for name in sorted(old.keys() | new.keys()):
        group = name.partition("/")[0]
        if group not in GROUPS:
            if name in old and name in new and old[name] != new[name]:
                raise RecJaxError(_differ(name, old, new, carried.place))
            continue
        added = group not in carried.params  # a table, or gates, of the new run alone begin as fresh ones do
        a, b = (shapes.get(name) for shapes in (old, new))
        if name in TABLES and a and b and not (carried.hashed and TABLES[name] == "items"):
            a, b = a[1:], b[1:]
        if name.startswith(OF_EVENTS) and a and b:
            a, b = a[1:], b[1:]
        if (group == "features" or name.startswith(OF_USERS)) and _may_grow(name.removeprefix("user/"), a, b):
            a, b = b, b
        if a != b and not (added and (name in TABLES or group in ("features", "gates"))):
            raise RecJaxError(_differ(name, old, new, carried.place))


def _check_hashed(carried: Carried) -> None:
    rows = carried.rows["items"]
    moved = np.flatnonzero((rows >= 0) & (rows != np.arange(len(rows))))
    if len(moved):
        raise RecJaxError(
            f"item {moved[0]} of this data is item {rows[moved[0]]} in that of {carried.place} (config.start.path), and {len(moved) - 1} "
            "more have moved, but a hashed table (config.towers.item.id_buckets) goes by an item's number: let new items come last in the "
            "items file, or train that workdir with id_buckets=0, whose rows go with their ids"
        )


def _may_grow(name: str, old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> bool:
    """Whether a parameter of features is one of a new feature, or a table with new categories."""
    _, kind, *_ = name.split("/")
    if new is None or old is None:
        return new is not None and kind != "fusion"
    return kind in ("categorical", "multi_hot", "words") and old[0] <= new[0] and old[1:] == new[1:]


def _differ(name: str, old: Mapping[str, Any], new: Mapping[str, Any], place: str) -> str:
    keys = "config.data.features and config.towers.item" if name.startswith("features/") else "config.towers"
    keys = "config.data.user_features" if name.startswith(OF_USERS) else keys
    return (
        f"{name} is {old.get(name, 'absent')} in {place} (config.start.path) and {new.get(name, 'absent')} in this run; "
        f"set {keys} as they are in that workdir's config.json"
    )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {mesh_lib.path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params))}
