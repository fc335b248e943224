"""Parameters of another workdir on a larger data set: rows of ID tables go with their ids, all else as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import mesh as mesh_lib
from rec_jax.types import Params, RecJaxError

GROUPS = ("item", "ids", "user", "users")  # what both must agree on; heads of tasks and learned scalars belong to objectives
TABLES = {"ids/embedding": "items", "users/embedding": "users"}


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a run goes on from.

    Attributes:
      params: those of the old workdir, without its encoder.
      rows: {"items" [N], "users" [U]}, row of each item and user in the old data, -1 = new.
      place: the old workdir, for messages.
    """

    params: Params
    rows: Mapping[str, np.ndarray]
    place: str


def laid_out(carried: Carried, fresh: Params) -> dict[str, Any]:
    """The old parameters with ID tables in the order of the new data: rows of new items and users are those of `fresh`.

    Args:
      carried: the old ones.
      fresh: parameters of the new run, or their shapes.

    Raises:
      RecJaxError: towers that do not fit; names the parameter and both shapes.
    """
    check(carried, fresh)
    out: dict[str, Any] = {name: value for name, value in carried.params.items() if name in fresh}
    for name, kind in TABLES.items():
        group, leaf = name.split("/")
        if group in out:
            table, rows = jnp.asarray(fresh[group][leaf]), carried.rows[kind]
            kept = np.flatnonzero(rows >= 0)
            out[group] = {leaf: table.at[kept].set(jnp.asarray(carried.params[group][leaf])[rows[kept]])}
    return out


def check(carried: Carried, fresh: Params) -> None:
    """See `laid_out`."""
    old, new = _shapes(carried.params), _shapes(fresh)
    for name in sorted(old.keys() | new.keys()):
        group = name.partition("/")[0]
        if group not in GROUPS:
            if name in old and name in new and old[name] != new[name]:
                raise RecJaxError(_differ(name, old, new, carried.place))
            continue
        added = group not in carried.params  # a table of the new run alone begins as a fresh one does
        a, b = (shapes.get(name) for shapes in (old, new))
        if name in TABLES and a and b:
            a, b = a[1:], b[1:]
        if a != b and not (added and name in TABLES):
            raise RecJaxError(_differ(name, old, new, carried.place))


def _differ(name: str, old: Mapping[str, Any], new: Mapping[str, Any], place: str) -> str:
    return (
        f"{name} is {old.get(name, 'absent')} in {place} (config.start.path) and {new.get(name, 'absent')} in this run; "
        "set config.towers as they are in that workdir's config.json"
    )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {mesh_lib.path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params))}
