"""Heads that teach an encoder from text alone: masked language model, and the decoder of a denoising auto-encoder.

Both end in hidden states whose product with the encoder's own word table, plus a bias, are the logits of the words; that softmax over the
vocabulary is a loss, which takes (hidden, table, bias) and works in blocks.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rec_jax.mesh import over_batch
from rec_jax.towers.bert import ACTIVATIONS, DTYPES, Attention, BertSpec, Dense, Embeddings, LayerNorm, Mlp, drop, segment_positions
from rec_jax.towers.dropout import fold
from rec_jax.towers.history import places_seen
from rec_jax.types import Array, Params, RecJaxError


class _Transform(nn.Module):
    """x [..., D] -> [..., D]: dense, activation, norm."""

    spec: BertSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, dtype = self.spec, DTYPES[self.spec.dtype]
        x = ACTIVATIONS[s.activation](Dense(s.width, dtype, name="transform")(x))
        return LayerNorm(s.layer_norm_eps, dtype, name="norm")(x)


def word_table(text_params: Params) -> jax.Array:
    """An encoder's parameters -> its word table [V, D], which the heads here are tied to."""
    return text_params["embeddings"]["word"]["embedding"]


def init_mlm(key: jax.Array, spec: BertSpec) -> dict[str, Any]:
    """A typed key -> parameters of the masked language model's head: `transform/kernel`, ..., `norm/scale`, ..., and `bias` [V]."""
    return {**_Transform(spec).init(key, jnp.zeros((1, spec.width)))["params"], "bias": jnp.zeros(spec.vocab_size)}


def masked_hidden(head: Params, spec: BertSpec, hidden: Array, places: Array) -> jax.Array:
    """hidden [G, R, T, D], places [G, P] -> [G, P, D] in the compute dtype: what the head makes of the masked places.

    The logits of the words are ``masked_hidden @ word_table.T + head["bias"]``. Places are gathered first, within their shard, so that the
    head works on them alone and no device asks another.

    Args:
      head: of `init_mlm` or `load_mlm`.
      spec: the encoder's.
      hidden: the encoder's, of the masked tokens.
      places: places in the flattened [R * T]; -1 is none, and gives what place 0 gives: leave it out of the loss.

    Raises:
      RecJaxError: shapes that do not fit each other.

    Reference: Devlin et al. 2019, "BERT", section 3.1.
    """
    hidden, places = jnp.asarray(hidden), jnp.asarray(places)
    if hidden.ndim != 4 or places.ndim != 2 or hidden.shape[0] != places.shape[0]:
        raise RecJaxError(f"hidden must be [G, R, T, D] and places [G, P]; got {hidden.shape} and {places.shape}")
    flat = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    masked = jax.vmap(lambda vectors, at: jnp.take(vectors, jnp.maximum(at, 0), axis=0))(flat, places)
    return jnp.asarray(_Transform(spec).apply({"params": head}, over_batch(masked)))


class _DecoderLayer(nn.Module):
    """x [R, T, D], visible [R, T, T], pooled [R, K, D], member [R, T, K] (whose text a place belongs to) -> [R, T, D].

    A text's memory is one vector, so the weights of cross-attention would all be 1, whatever its queries and keys: what is left of it
    is the map from that vector, here `memory`.
    """

    spec: BertSpec

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, pooled: jax.Array, member: jax.Array, keys: jax.Array | None) -> jax.Array:
        s, dtype = self.spec, DTYPES[self.spec.dtype]
        mixed = drop(Attention(s, name="attention")(x, visible, keys), keys, "attention", s.dropout)
        x = LayerNorm(s.layer_norm_eps, dtype, name="attention_norm")(x + mixed)
        memory = Dense(s.width, dtype, name="memory")(pooled)
        # A product with 0/1 masks, whose gradient is a product too; at highest precision it copies the vectors exactly.
        recalled = jnp.einsum("rtk,rkd->rtd", member.astype(dtype), memory, precision=jax.lax.Precision.HIGHEST)
        x = LayerNorm(s.layer_norm_eps, dtype, name="memory_norm")(x + drop(recalled, keys, "memory", s.dropout))
        transformed = drop(Mlp(s, name="mlp")(x), keys, "mlp", s.dropout)
        return LayerNorm(s.layer_norm_eps, dtype, name="mlp_norm")(x + transformed)


def init_decoder(key: jax.Array, spec: BertSpec, *, layers: int) -> dict[str, Any]:
    """A typed key -> parameters of a decoder: `layer_0/...` and, as the masked language model's head, `transform`, `norm`, `bias` [V].

    Raises:
      RecJaxError: no layer.
    """
    if layers < 1:
        raise RecJaxError(f"a decoder of {layers} layers cannot read the text so far; set at least 1")
    x, one = jnp.zeros((1, 1, spec.width)), jnp.ones((1, 1, 1), bool)
    params = init_mlm(fold(key, "head"), spec)
    for i in range(layers):
        params[f"layer_{i}"] = _DecoderLayer(spec).init(fold(key, f"layer_{i}"), x, one, x, one, None)["params"]
    return params


def decode(
    decoder: Params,
    text_params: Params,
    spec: BertSpec,
    pooled: Array,
    tokens: Array,
    segment_ids: Array,
    *,
    keys: jax.Array | None = None,
) -> jax.Array:
    """pooled [R, K, D], tokens [R, T], segment_ids [R, T] -> hidden [R, T, D] in the compute dtype; padding gives zeros.

    The hidden state at a place predicts the token there (logits ``hidden @ word_table.T + decoder["bias"]``), from the pooled vector of
    its text and the tokens before it. A text begins with the row `spec.pad_id` of the word table. Embeddings are the encoder's.

    Args:
      decoder: of `init_decoder`.
      text_params: the encoder's.
      spec: the encoder's, which gives the decoder its sizes and dropout.
      pooled: what the encoder made of each damaged text; place k is that of segment k + 1. A segment beyond K is told nothing.
      tokens: the undamaged texts, to be told one token at a time.
      segment_ids: 1..K within a row, each a run of neighbouring places; 0 is padding.
      keys: typed keys [R], one per row; given, dropout acts.

    Raises:
      RecJaxError: shapes that do not fit each other.

    Reference: Wang, Reimers and Gurevych 2021, "TSDAE", section 3.
    """
    pooled, tokens, segment_ids = jnp.asarray(pooled), jnp.asarray(tokens), jnp.asarray(segment_ids)
    if tokens.ndim != 2 or tokens.shape != segment_ids.shape or pooled.ndim != 3 or pooled.shape[0] != tokens.shape[0]:
        raise RecJaxError(
            f"pooled must be [R, K, D], tokens and segment_ids [R, T]; got {pooled.shape}, {tokens.shape} and {segment_ids.shape}"
        )
    real = segment_ids > 0
    positions = jnp.where(real, segment_positions(segment_ids), 0)
    told = jnp.where(positions == 0, spec.pad_id, jnp.roll(tokens, 1, axis=1))
    x: Any = Embeddings(spec).apply({"params": text_params["embeddings"]}, told, positions, keys)
    member = segment_ids[:, :, None] == jnp.arange(1, pooled.shape[1] + 1, dtype=segment_ids.dtype)
    visible = places_seen(segment_ids, causal=True)
    for i in range(sum(name.startswith("layer_") for name in decoder)):
        layer_keys = None if keys is None else fold(keys, i)
        x = _DecoderLayer(spec).apply({"params": decoder[f"layer_{i}"]}, over_batch(x), visible, pooled, member, layer_keys)
    x = _Transform(spec).apply({"params": {name: decoder[name] for name in ("transform", "norm")}}, x)
    return jnp.where(real[:, :, None], x, jnp.zeros((), x.dtype))
