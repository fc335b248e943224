"""The history user tower: a causal transformer over the vectors of the items in a packed history, one user vector at every place.

Reference: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), section 3, with pre-norm blocks and RMSNorm.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rec_jax.mesh import over_batch
from rec_jax.towers.bert import segment_positions
from rec_jax.towers.dropout import dropout, fold
from rec_jax.types import Params, RecJaxError


@dataclasses.dataclass(frozen=True)
class HistorySpec:
    """dim D, layers, heads, mlp (inner width), dropout rate, max_positions (longest history), mask: a learned vector for hidden items."""

    dim: int
    layers: int
    heads: int
    mlp: int
    dropout: float
    max_positions: int
    mask: bool = False


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """segment_ids [R, S] -> mask [R, S, S], True where a place (row) may see another (column): same segment, not later."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    places = jnp.arange(segment_ids.shape[1])
    return same & (places[:, None] >= places[None, :])


class _Block(nn.Module):
    spec: HistorySpec

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, keys: jax.Array | None) -> jax.Array:
        s, width = self.spec, self.spec.dim // self.spec.heads
        drop = lambda x, name: x if keys is None else dropout(x, fold(keys, name), s.dropout)
        x = over_batch(x)
        y = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (nn.DenseGeneral((s.heads, width), use_bias=False, name=n)(y) for n in ("query", "key", "value"))
        logits = jnp.einsum("rshd,rthd->rhst", q, k) * width**-0.5
        # A finite mask: rows of padding stay finite, and exp gives an exact 0 for every hidden place that is not the row's only one.
        weights = jax.nn.softmax(jnp.where(mask[:, None], logits.astype(jnp.float32), -1e30), axis=-1).astype(x.dtype)
        y = jnp.einsum("rhst,rthd->rshd", drop(weights, "attention"), v)
        x = over_batch(x + drop(nn.DenseGeneral(s.dim, axis=(-2, -1), use_bias=False, name="out")(y), "out"))
        y = nn.gelu(nn.Dense(s.mlp, use_bias=False, name="mlp_in")(nn.RMSNorm(name="mlp_norm")(x)))
        return x + drop(nn.Dense(s.dim, use_bias=False, name="mlp_out")(y), "mlp")


class _History(nn.Module):
    spec: HistorySpec

    @nn.compact
    def __call__(self, vectors: jax.Array, segment_ids: jax.Array, keys: jax.Array | None) -> jax.Array:
        s = self.spec
        position = nn.Embed(s.max_positions, s.dim, name="position")(segment_positions(segment_ids))
        x = nn.Dense(s.dim, use_bias=False, name="in")(vectors * s.dim**0.5) + position
        x = x if keys is None else dropout(x, fold(keys, "in"), s.dropout)
        mask = causal_mask(segment_ids)
        for n in range(s.layers):
            x = _Block(s, name=f"layer_{n}")(x, mask, None if keys is None else fold(keys, n))
        return nn.Dense(s.dim, use_bias=False, name="project")(nn.RMSNorm(name="norm")(x))


def init(key: jax.Array, spec: HistorySpec) -> Params:
    """Parameters of a history tower; `mask` [D] is of about unit length, as item vectors are."""
    params = _History(spec).init(key, jnp.zeros((1, 2, spec.dim)), jnp.ones((1, 2), jnp.int32), None)["params"]
    return {**params, "mask": jax.random.normal(fold(key, "mask"), (spec.dim,)) * spec.dim**-0.5} if spec.mask else params


def encode(
    params: Params,
    spec: HistorySpec,
    vectors: jax.Array,
    segment_ids: jax.Array,
    *,
    hidden: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """vectors [R, S, D], segment_ids [R, S] (0 = padding) -> user vectors [R, S, D]; a place sees its own segment up to itself.

    Args:
      params: of `init`.
      spec: the tower's sizes.
      vectors: item vectors of the places, of about unit length.
      segment_ids: 1.. within a row; each segment lies in one piece.
      hidden: [R, S] bool, places whose item is hidden behind the learned vector; needs `spec.mask`. None = none.
      keys: [R] typed keys, one a row, for dropout; None = no dropout.

    Raises:
      RecJaxError: hidden items, and no vector for them.
    """
    if hidden is not None:
        if not spec.mask:
            raise RecJaxError("items of a history are hidden, but the tower has no vector for them: set HistorySpec.mask")
        vectors = jnp.where(hidden[..., None], params["mask"].astype(vectors.dtype), vectors)
    return jnp.asarray(_History(spec).apply({"params": params}, vectors, segment_ids, keys))
