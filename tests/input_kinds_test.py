"""Every kind of input on and off: its parameters are there where it is on alone, it changes the loss, and a gradient reaches them."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.towers import two_tower
from rec_jax.train import forwards, stages
from rec_jax.train.state import RNG
from rec_jax.types import Params

N, U = tiny.N_ITEMS, tiny.N_USERS
BASE = {"batch.shards": 2, "batch.history_rows": 1, "objectives.info_nce.candidates": "batch", "towers.user.dropout": 0.0}
KEY = jax.random.key(3, impl=RNG)
EDGES = (1.0, 2.0, 3.0, 4.0, 5.0)
# Features by name -> kind, size, and rows of n items or users, of whom some lack it
FEATURES: dict[str, tuple[str, int, Any]] = {
    "brand": ("categorical", 5, lambda r, n: r.integers(0, 5, n)),
    "tags": ("multi_hot", 7, lambda r, n: r.integers(0, 7, (n, 3))),
    "price": ("numeric", 4, lambda r, n: r.integers(0, 4, n)),
    "year": ("numeric", 0, lambda r, n: np.where(np.arange(n) % 3 == 0, np.nan, r.normal(size=n)).astype(np.float32)),
    "image": ("vectors", 6, lambda r, n: r.normal(size=(n, 6)).astype(np.float32) * (r.random((n, 1)) < 0.8)),
    "text": ("words", 9, lambda r, n: r.integers(0, 9, (n, 2))),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
      on: keys of the config that turn it on; "items" and "users" name features.
      new: names of its parameters.
      off: keys that hold on both sides.
      zero: with its parameters at zero it is off.
      training: it has a part in training alone.
    """

    on: dict[str, Any]
    new: tuple[str, ...] = ()
    off: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: bool = True
    training: bool = False


def of_items(name: str, *leaves: str) -> Kind:
    return Kind({"items": (name,)}, tuple(f"features/{FEATURES[name][0]}/{name}/{leaf}" for leaf in leaves))


def of_users(name: str, *leaves: str) -> Kind:
    return Kind({"users": (name,)}, tuple(f"user/features/{FEATURES[name][0]}/{name}/{leaf}" for leaf in leaves))


IDS, TWO = {"towers.item.ids": True}, {"items": ("brand", "image")}
WAVES = ("frequency", "kernel", "missing")
KINDS = {
    "item ids": Kind(IDS, ("ids/embedding",)),
    "item ids, hashed": Kind({**IDS, "towers.item.id_buckets": 20}, ("ids/embedding",)),
    "item ids, dropped": Kind({"towers.item.id_dropout": 0.5}, off=IDS, training=True),
    "item ids, dropped and hashed": Kind({"towers.item.id_dropout": 0.5}, off={**IDS, "towers.item.id_buckets": 20}, training=True),
    "item ids of histories": Kind({"towers.user.ids": True}, ("history_ids/embedding",), off=IDS),
    "item text, frozen": Kind(
        {"towers.item.text": True}, ("item/project/bias", "item/project/kernel"), off={**IDS, "towers.item.text": False}
    ),
    "item words": of_items("text", "embedding"),
    "item category": of_items("brand", "embedding"),
    "item multi-hot": of_items("tags", "embedding"),
    "item number, by ranges": of_items("price", "embedding"),
    "item number, periodic": of_items("year", *WAVES),
    "item vectors": of_items("image", "kernel"),
    "item features, joined by a linear layer": Kind({"towers.item.fusion": "concat"}, ("features/fusion/kernel",), off=TWO, zero=False),
    "item features, gated": Kind({"towers.item.fusion": "gate"}, ("features/fusion/bias", "features/fusion/kernel"), off=TWO, zero=False),
    "item features, dropped": Kind({"towers.item.modality_dropout": 0.5}, off=TWO, training=True),
    "item text, dropped": Kind({"towers.item.text_dropout": 0.5}, off=IDS, training=True),
    "item gates": Kind({"towers.item.gates": True}, ("gates/bias", "gates/kernel"), off={**IDS, **TWO}),
    "user category": of_users("brand", "embedding"),
    "user multi-hot": of_users("tags", "embedding"),
    "user multi-hot, attended": Kind(
        {"towers.user.attended": ("tags",)}, ("user/features/multi_hot/tags/query",), off={"users": ("tags",)}
    ),
    "user number, by ranges": of_users("price", "embedding"),
    "user number, periodic": of_users("year", *WAVES),
    "gap": Kind({"towers.user.inputs": ("gap",)}, ("user/gap/embedding",)),
    "rating": Kind({"towers.user.inputs": ("rating",), "towers.user.rating_edges": EDGES}, ("user/rating/embedding",)),
    "time": Kind({"towers.user.time_bias": True}, ("user/layer_0/time/bias",)),
    "sessions": Kind({"towers.user.session_gap": 3600}, off={"towers.user.layers": 2}),
}


@functools.cache
def batch() -> Any:
    """One batch with all columns, of which towers read what they are made for."""
    everything = {"towers.user.inputs": ("gap", "rating"), "data.users": "users.tsv", "data.user_features.numeric": ("price",)}
    world = tiny.TimedWorld()
    spec = BatchSpec.from_config(tiny.config(**BASE, **everything))
    return next(iter(Batches(world.source(), world.train_lengths(), spec, seed=0)))


def rows_of(names, n):
    out: dict[str, Any] = {}
    for name in names:
        kind, _, make = FEATURES[name]
        out.setdefault(kind, {})[name] = make(np.random.default_rng(len(name)), n)
    return out


def sizes_of(names):
    out: dict[str, Any] = {}
    for name in names:
        out.setdefault(FEATURES[name][0], {})[name] = FEATURES[name][1]
    return out or None


def keys_of(group, names):
    kinds = {FEATURES[name][0] for name in names} - {"words"}
    return {f"data.{group}.{kind}": tuple(name for name in names if FEATURES[name][0] == kind) for kind in kinds}


def made(changes: dict[str, Any]) -> tuple[Params, forwards.StepSpec, forwards.Constants]:
    """Keys -> parameters, none of them zero, the step's spec and its constants; a parameter's values go by its name and shape alone."""
    changes = dict(changes)
    items, users = changes.pop("items", ()), changes.pop("users", ())
    changes |= {**keys_of("features", items), **keys_of("user_features", users)}
    changes |= {"towers.item.words": 9} if "text" in items else {}
    changes |= {"data.users": "users.tsv"} if users else {}
    c = tiny.config(**{**BASE, **changes})
    sizes = {"features": sizes_of(items), "of_users": sizes_of(users), "ratings": c.towers.user.rating_edges}
    towers = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=N, **sizes)
    spec = stages.make_step(c, towers, BatchSpec.from_config(c))
    features = rows_of(items, N) or None
    table = tiny.table() if towers.item_text else None
    constants = forwards.Constants(table, np.zeros(N, np.float32), features=features, of_users=rows_of(users, U) or None)

    def drawn(path, shape):
        random = np.random.default_rng(zlib.crc32(mesh_lib.path_name(path).encode()))
        return jnp.asarray(0.3 * random.normal(size=shape.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(lambda: two_tower.init(jax.random.key(0), towers)))
    return params, spec, constants


def loss(params: Params, spec: forwards.StepSpec, constants: forwards.Constants, key: jax.Array | None) -> jax.Array:
    """A plain softmax over the shard's items; op by op, since kinds share their operations and so what is compiled."""
    b, draw = batch(), jax.random.key(0, impl=RNG)
    out = forwards.outputs(params, spec, b, constants, key, draw, None)
    logits = jnp.where(b.item_ids[:, None] >= 0, 5 * jnp.einsum("gqd,gmd->gqm", out.user, out.item), -jnp.inf)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(b.targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(b.weights > 0, chosen, 0.0).sum() / (b.weights > 0).sum()


def by_name(tree: Any) -> dict[str, Any]:
    return {mesh_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def without(changes: tuple[tuple[str, Any], ...]) -> tuple[set[str], float]:
    """Keys -> names of the parameters, and the loss: most kinds have the same off."""
    params, spec, constants = made(dict(changes))
    return set(by_name(params)), float(loss(params, spec, constants, KEY))


@pytest.mark.parametrize("name", KINDS)
def test_on_and_off(name):
    kind = KINDS[name]
    params, *rest = made({**kind.off, **kind.on})
    names, off = without(tuple(kind.off.items()))
    assert set(by_name(params)) == names | set(kind.new)
    assert not names & set(kind.new)
    on, gradient = jax.value_and_grad(loss)(params, *rest, KEY)
    assert np.isfinite(on)
    assert abs(float(on) - off) > 1e-4, "it has no part in the loss"
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    reached = {name: float(np.abs(g).max()) for name, g in by_name(gradient).items() if name in kind.new}
    assert min(reached.values(), default=1.0) > 1e-6, f"no gradient reaches some of {reached}"
    if kind.training:
        assert float(loss(params, *rest, None)) == pytest.approx(off, abs=1e-6), "evaluation knows all"
    elif kind.new and kind.zero:
        nothing = jax.tree_util.tree_map_with_path(lambda p, x: 0 * x if mesh_lib.path_name(p) in kind.new else x, params)
        assert float(loss(nothing, *rest, KEY)) == pytest.approx(off, abs=1e-6)
