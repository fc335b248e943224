"""Features of items in the item tower: their own vectors, and how these join the vector of text and ID.

A categorical feature has a table of vectors, a multi-hot one too (an item gets the mean of its values'), and so have words of texts. A
number has a table by ranges, or sines and cosines of learned frequencies through a linear map; given vectors go through a linear map. All
of these begin at zero: an item begins as what its text says. What an item lacks adds nothing; of a number, "none" has a learned vector.

Features of users are added at the places of their histories (`history`). A place may weigh a multi-hot feature's values, such as friends,
by attention: which of them count depends on its item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.towers.dropout import fold
from rec_jax.types import Array, Params

KINDS = ("categorical", "multi_hot", "numeric", "vectors", "words")
Rows = Mapping[str, Any]  # kind -> name -> one row an item, and "kept" [..., F] where some are dropped


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Names and sizes of the features, F in all.

    Attributes:
      categorical, multi_hot: (name, rows of the table) pairs; row 0 is that of none.
      numeric: (name, rows of the table) pairs; 0 rows = periodic.
      vectors: (name, D_v) pairs.
      words: (name, rows of the table) pairs; row 0 is that of none.
      dim: width of a feature's own vector.
      fusion: "sum", "concat" or "gate".
      dropout: probability that a training step does not know a feature of an item.
      frequencies, sigma: number of learned frequencies of a periodic feature, and the standard deviation that they are drawn with.
      attended: multi-hot features whose values are weighed by a query, not averaged.
    """

    categorical: tuple[tuple[str, int], ...]
    multi_hot: tuple[tuple[str, int], ...]
    numeric: tuple[tuple[str, int], ...]
    vectors: tuple[tuple[str, int], ...]
    dim: int
    words: tuple[tuple[str, int], ...] = ()
    fusion: str = "sum"
    dropout: float = 0.0
    frequencies: int = 8
    sigma: float = 1.0
    attended: tuple[str, ...] = ()

    @property
    def names(self) -> list[tuple[str, str, int]]:
        """Kind, name and size of each feature; so they are numbered 0 to F - 1."""
        return [(kind, name, size) for kind in KINDS for name, size in vars(self)[kind]]


def make_spec(item: Any, sizes: Mapping[str, Mapping[str, int]], dim: int) -> FeatureSpec:
    """`config.towers.item`, kind -> name -> size, towers.dim -> spec."""
    f = item.features
    pairs: dict[str, Any] = {kind: tuple(sizes.get(kind, {}).items()) for kind in KINDS}
    return FeatureSpec(
        **pairs, dim=f.dim or dim, fusion=item.fusion, dropout=item.modality_dropout, frequencies=f.frequencies, sigma=f.sigma
    )


def make_sum(sizes: Mapping[str, Mapping[str, int]], dim: int, attended: Sequence[str] = ()) -> FeatureSpec:
    """kind -> name -> size, D -> spec of features that are added up, with those multi-hot ones weighed by attention."""
    pairs: dict[str, Any] = {kind: tuple(sizes.get(kind, {}).items()) for kind in KINDS}
    return FeatureSpec(**pairs, dim=dim, attended=tuple(attended))


def init(key: jax.Array, spec: FeatureSpec, dim: int) -> dict[str, Any]:
    """Parameters {kind: {name: ...}, "fusion"?} for item vectors of width D."""
    params: dict[str, Any] = {}
    for kind, name, size in spec.names:
        if kind == "numeric" and not size:
            frequency = spec.sigma * jax.random.normal(fold(key, name), (spec.frequencies,))
            made = {"frequency": frequency, "kernel": jnp.zeros((2 * spec.frequencies, spec.dim)), "missing": jnp.zeros((spec.dim,))}
        else:
            made = {"kernel" if kind == "vectors" else "embedding": jnp.zeros((size, spec.dim))}
        if kind == "multi_hot" and name in spec.attended:
            made["query"] = jnp.zeros((dim, spec.dim))
        params.setdefault(kind, {})[name] = made
    count = len(spec.names)
    if spec.fusion == "concat":
        drawn = jax.random.normal(fold(key, "fusion"), (count * spec.dim, dim)) * spec.dim**-0.5
        params["fusion"] = {"kernel": jnp.concatenate([jnp.eye(dim), drawn])}
    if spec.fusion == "gate":
        params["fusion"] = {"kernel": jnp.zeros((dim, count)), "bias": jnp.zeros((count,))}
    return params


def rows_of(rows: Rows, ids: Array) -> Rows:
    """Rows of the whole catalogue [N, ...], ids [...] -> their rows; -1 gives row 0."""
    return jax.tree.map(lambda x: jnp.take(jnp.asarray(x), jnp.maximum(ids, 0), axis=0), dict(rows))


def without_some(key: jax.Array, spec: FeatureSpec, rows: Rows) -> Rows:
    """Rows of the whole catalogue, in which each feature of each item is left out with probability `spec.dropout`: on both sides of a loss.

    What stays is not scaled up: an item that has a feature is trained with all of it, as it is used later.

    Reference: Neverova et al., "ModDrop: Adaptive Multi-Modal Gesture Recognition" (2016).
    """
    n = jax.tree.leaves(dict(rows))[0].shape[0]
    return {**rows, "kept": jax.random.bernoulli(key, 1.0 - spec.dropout, (n, len(spec.names)))}


def parts_of(params: Params, spec: FeatureSpec, rows: Rows, query: jax.Array | None = None) -> list[jax.Array]:
    """Rows of items [..., ...] -> the F features' own vectors [..., d]; zero where an item lacks one, or it is left out."""
    parts = []
    for number, (kind, name, _) in enumerate(spec.names):
        numbers, mine = jnp.asarray(rows[kind][name]), params[kind][name]
        part = _attended(mine, numbers, query) if kind == "multi_hot" and name in spec.attended else _PARTS[kind](mine, numbers)
        parts.append(part * rows["kept"][..., number, None] if "kept" in rows else part)
    return parts


def fuse(params: Params, spec: FeatureSpec, base: jax.Array, rows: Rows, query: jax.Array | None = None) -> jax.Array:
    """Vectors of text and ID [..., D], rows of the same items -> item vectors [..., D], not yet of unit length.

    With gates, feature f adds sigmoid(base . w_f + b_f) times its vector. `query` [..., D] is what weighs values of attended features.

    Reference: Arevalo et al., "Gated Multimodal Units for Information Fusion" (2017), section 3; here text and ID need no gate.
    """
    parts = parts_of(params, spec, rows, query)
    if spec.fusion == "concat":
        return jnp.concatenate([base, *parts], axis=-1) @ params["fusion"]["kernel"]
    if spec.fusion == "gate":
        gates = jax.nn.sigmoid(base @ params["fusion"]["kernel"] + params["fusion"]["bias"])
        parts = [gates[..., number, None] * part for number, part in enumerate(parts)]
    return base + sum(parts)


def _with_none(params: Params) -> jax.Array:
    """The table [V, d] with zeros for none, its first row: many look-ups need no masks, which the backward pass would have to keep."""
    return jnp.asarray(params["embedding"]).at[0].set(0.0)


def _categorical(params: Params, numbers: jax.Array) -> jax.Array:
    return jnp.where((numbers > 0)[..., None], jnp.take(params["embedding"], numbers, axis=0), 0.0)


def _multi_hot(params: Params, numbers: jax.Array) -> jax.Array:
    """numbers [..., K] -> mean of their vectors [..., d]; one after the other, so that no [..., K, d] array exists."""
    table = _with_none(params)
    start = jnp.zeros((*numbers.shape[:-1], table.shape[1]), table.dtype)
    total, _ = jax.lax.scan(lambda sum, k: (sum + jnp.take(table, k, axis=0), None), start, jnp.moveaxis(numbers, -1, 0))
    return total / jnp.maximum((numbers > 0).sum(-1), 1)[..., None]


def _attended(params: Params, numbers: jax.Array, query: jax.Array | None) -> jax.Array:
    """numbers [..., K], query [..., D] -> sum of their vectors [..., d], weighed by a softmax over query W vector / sqrt(d).

    W begins at zero, and the sum as their mean. One after the other, as in `_multi_hot`.
    """
    assert query is not None
    table = _with_none(params)
    asked = query @ params["query"] * table.shape[1] ** -0.5
    product = jax.checkpoint(lambda k: (asked * jnp.take(table, k, axis=0)).sum(-1))
    there = numbers > 0
    logits = jnp.moveaxis(jax.lax.map(product, jnp.moveaxis(numbers, -1, 0)), 0, -1)
    shares = jnp.where(there, jax.nn.softmax(jnp.where(there, logits, -1e9), axis=-1), 0.0)
    weighed = jax.checkpoint(lambda sum, x: (sum + x[1][..., None] * jnp.take(table, x[0], axis=0), None))
    start = jnp.zeros((*numbers.shape[:-1], table.shape[1]))
    return jax.lax.scan(weighed, start, (jnp.moveaxis(numbers, -1, 0), jnp.moveaxis(shares, -1, 0)))[0]


def _numeric(params: Params, values: jax.Array) -> jax.Array:
    """values [...] -> vectors [..., d].

    Reference: Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning" (2022), section 3.3.
    """
    if "embedding" in params:
        return jnp.take(params["embedding"], values, axis=0)
    there = ~jnp.isnan(values)
    angles = 2 * jnp.pi * jnp.where(there, values, 0.0)[..., None] * params["frequency"]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.where(there[..., None], waves @ params["kernel"], params["missing"])


def _vectors(params: Params, values: jax.Array) -> jax.Array:
    return values @ params["kernel"]


_PARTS = {"categorical": _categorical, "multi_hot": _multi_hot, "numeric": _numeric, "vectors": _vectors, "words": _multi_hot}
