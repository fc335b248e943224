"""Layers of the history tower, by name: they take and give vectors of packed places, and see of each other what a mask lets them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rec_jax.mesh import over_batch
from rec_jax.towers import places as places_lib
from rec_jax.towers.dropout import dropout, fold
from rec_jax.towers.history_spec import HistorySpec
from rec_jax.towers.places import Places
from rec_jax.towers.products import dot_general

_linear = functools.partial(nn.DenseGeneral, use_bias=False, dot_general=dot_general)


def _drop(x: jax.Array, keys: jax.Array | None, name: str, rate: float) -> jax.Array:
    return x if keys is None else dropout(x, fold(keys, name), rate)


def _scores(q: jax.Array, k: jax.Array, spec: HistorySpec, places: Places, scale: float) -> jax.Array:
    """q, k [R, S, heads, d] -> scores [R, heads, S, S] of queries (rows) and keys, with what the layer adds by distance and time."""
    if places.positions is not None:
        q, k = places_lib.rotated(q, places.positions), places_lib.rotated(k, places.positions)
    scores = jnp.einsum("rshd,rthd->rhst", q, k) * scale
    if places.distances is not None:
        rows = places_lib.bucket_count(spec.max_positions - 1, bits=places_lib.DISTANCE_BITS)
        scores = scores + places_lib.Bias(rows, spec.heads, name="distance")(places.distances)
    if places.times is not None:
        scores = scores + places_lib.Bias(places_lib.TIME_ROWS, spec.heads, name="time")(places.times)
    return scores


class Attention(nn.Module):
    """Pre-norm softmax attention, then an MLP. Reference: Kang & McAuley 2018 (see `history`), section 3, with RMSNorm."""

    spec: HistorySpec

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, places: Places, keys: jax.Array | None) -> jax.Array:
        s, width = self.spec, self.spec.dim // self.spec.heads
        x = over_batch(x)
        y = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (_linear((s.heads, width), name=n)(y) for n in ("query", "key", "value"))
        logits = _scores(q, k, s, places, width**-0.5)
        # A finite mask: rows of padding stay finite, and exp gives an exact 0 for every hidden place that is not the row's only one.
        weights = jax.nn.softmax(jnp.where(mask[:, None], logits.astype(jnp.float32), -1e30), axis=-1).astype(x.dtype)
        y = jnp.einsum("rhst,rthd->rshd", _drop(weights, keys, "attention", s.dropout), v)
        x = over_batch(x + _drop(_linear(s.dim, axis=(-2, -1), name="out")(y), keys, "out", s.dropout))
        y = nn.gelu(_linear(s.mlp, name="mlp_in")(nn.RMSNorm(name="mlp_norm")(x)))
        return x + _drop(_linear(s.dim, name="mlp_out")(y), keys, "mlp", s.dropout)


class Hstu(nn.Module):
    """The layer of hierarchical sequential transduction units: SiLU instead of the softmax, and gates instead of an MLP.

    U, V, Q, K = SiLU(linear(norm(x))), A = SiLU(Q K^T + bias) / n where the mask lets a place see, x + linear(norm(A V) * U). Here n is
    how many places a place sees, so that no vector depends on how long its row is; as the norm follows, n changes nothing but the weight
    of the norm's epsilon. Norms are RMSNorm, as in the other layer.

    Reference: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative Recommendations"
    (2024), section 3.2.
    """

    spec: HistorySpec

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, places: Places, keys: jax.Array | None) -> jax.Array:
        s, width = self.spec, self.spec.dim // self.spec.heads
        x = over_batch(x)
        y = nn.silu(_linear(4 * s.dim, name="uvqk")(nn.RMSNorm(name="attention_norm")(x)))
        # Heads come before the four, so that devices that share the kernel's columns hold whole heads.
        u, v, q, k = jnp.moveaxis(y.reshape(*y.shape[:2], s.heads, 4, width), -2, 0)
        weights = jnp.where(mask[:, None], nn.silu(_scores(q, k, s, places, 1.0)), 0.0)
        y = jnp.einsum("rhst,rthd->rshd", weights, v) / mask.sum(-1)[..., None, None]
        y = nn.RMSNorm(name="value_norm")(y.reshape(x.shape)).reshape(u.shape) * u
        out = _linear(s.dim, axis=(-2, -1), name="out")
        return over_batch(x + out(_drop(y, keys, "gated", s.dropout)))


LAYERS: dict[str, Callable[..., nn.Module]] = {"attention": Attention, "hstu": Hstu}
