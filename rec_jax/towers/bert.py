"""BERT (Devlin et al., 2019) as pure functions: packed rows of texts -> token vectors.

Reference: https://arxiv.org/abs/1810.04805, section 3; the layer norm follows each residual sum ("post-norm"). There is no pooler
and no language-model head here (`pretraining` has one), and every token has token type 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rec_jax.mesh import over_batch
from rec_jax.towers.dropout import dropout, fold
from rec_jax.towers.pool import POOLINGS, pool_segments
from rec_jax.types import Array, Params, RecJaxError


def _gelu(x: jax.Array) -> jax.Array:
    """x [...] -> x * Phi(x), exact, computed in float32; by erf, which is cheaper on XLA's CPUs than jax.nn.gelu's erfc."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
MASKED = -1e30  # a score so low that its softmax weight is exactly 0 in float32, and finite so that no NaN can come of it


@dataclasses.dataclass(frozen=True)
class BertSpec:
    """What a BERT is made of; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      vocab_size: rows of the word table.
      width: D, width of the token vectors.
      layers: number of layers; 0 leaves the normalised embeddings, a bag of words with positions.
      heads: attention heads; divides width.
      mlp_width: width between the two matrices of the MLP.
      max_positions: the longest text, in tokens.
      type_vocab: rows of the token type table; row 0 is used where no types are given.
      layer_norm_eps: added to the variance.
      activation: "gelu" (exact, with erf), "gelu_new" (tanh form) or "relu".
      dropout: rate after the embeddings, the attention and the MLP; acts only where keys are given.
      attention_dropout: rate on the attention weights; acts only where keys are given.
      dtype: "float32" or "bfloat16", what matrices are multiplied in; parameters, layer norm and softmax are float32 always.
      remat: what the backward pass computes again to save memory: "none", "full" (all but each layer's input), "dots" (all but the
        products with weight matrices).
      scan: whether the layers are one `lax.scan` over stacked parameters, which compiles faster (deep models) and runs slower on CPUs.
      pooling: "mean", "cls" or "max": how `encode_texts` makes one vector of a text.
      normalize: whether `encode_texts` scales its vectors to length 1.
      pad_id: row of the word table that stands in empty places; kept for `save_hf`, the encoder goes by segment ids.
    """

    vocab_size: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    mlp_width: int = 1536
    max_positions: int = 512
    type_vocab: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False
    pooling: str = "mean"
    normalize: bool = False
    pad_id: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, Iterable[str]] = {"activation": ACTIVATIONS, "dtype": DTYPES, "remat": REMAT, "pooling": POOLINGS}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise RecJaxError(f"BertSpec.{field}={getattr(self, field)!r}: expected one of {', '.join(allowed)}")
        for field in ("vocab_size", "width", "heads", "mlp_width", "max_positions", "type_vocab"):
            if getattr(self, field) < 1:
                raise RecJaxError(f"BertSpec.{field}={getattr(self, field)!r}: must be at least 1")
        if self.layers < 0:
            raise RecJaxError(f"BertSpec.layers={self.layers!r}: must be at least 0")
        if self.width % self.heads:
            raise RecJaxError(f"BertSpec.width={self.width} is not divisible by heads={self.heads}")


class Dense(nn.Module):
    """x [..., in] -> [..., features] in the compute dtype."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.truncated_normal(0.02), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        # One flat product: XLA on CPUs runs it and its gradients about a tenth faster than the batched one.
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class _Embed(nn.Module):
    """ids [...] -> rows [..., features] float32; an id outside the table gives NaN, which no later step hides."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("embedding", nn.initializers.truncated_normal(0.02), (self.rows, self.features), jnp.float32)
        return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


class LayerNorm(nn.Module):
    """x [..., D] -> [..., D] in the compute dtype; computed in float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inverse * scale + bias).astype(self.dtype)


def drop(x: jax.Array, keys: jax.Array | None, name: str, rate: float) -> jax.Array:
    """x [R, ...] -> [R, ...] with dropout of the sub-stream `name` of typed keys [R]; without keys x as it is."""
    return x if keys is None else dropout(x, fold(keys, name), rate)


class Embeddings(nn.Module):
    """tokens [R, T], positions [R, T] -> [R, T, D]: the sum of word, position and token type, normalised."""

    spec: BertSpec

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, keys: jax.Array | None, types: jax.Array | None = None) -> jax.Array:
        s = self.spec
        x = _Embed(s.vocab_size, s.width, name="word")(tokens)
        x = x + _Embed(s.max_positions, s.width, name="position")(positions)
        x = x + _Embed(s.type_vocab, s.width, name="token_type")(jnp.zeros((), jnp.int32) if types is None else types)
        x = LayerNorm(s.layer_norm_eps, DTYPES[s.dtype], name="norm")(x)
        return drop(x, keys, "embeddings", s.dropout)


class Attention(nn.Module):
    """x [R, T, D], visible [R, T, T] -> [R, T, D]."""

    spec: BertSpec

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, keys: jax.Array | None) -> jax.Array:
        s, dtype = self.spec, DTYPES[self.spec.dtype]
        split = (*x.shape[:2], s.heads, s.width // s.heads)
        query, key, value = (Dense(s.width, dtype, name=name)(x).reshape(split) for name in ("query", "key", "value"))
        query = query * jnp.asarray((s.width // s.heads) ** -0.5, dtype)  # here and not on the scores, which are larger
        scores = jnp.einsum("rqhd,rkhd->rhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, MASKED), axis=-1)
        self.sow("intermediates", "weights", weights)  # for `encode_layers`; does nothing elsewhere
        weights = drop(weights, keys, "attention_weights", s.attention_dropout)
        mixed = jnp.einsum("rhqk,rkhd->rqhd", weights.astype(dtype), value)
        return Dense(s.width, dtype, name="out")(mixed.reshape(x.shape))


class Mlp(nn.Module):
    """x [R, T, D] -> [R, T, D]."""

    spec: BertSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, dtype = self.spec, DTYPES[self.spec.dtype]
        x = ACTIVATIONS[s.activation](Dense(s.mlp_width, dtype, name="up")(x))
        return Dense(s.width, dtype, name="down")(x)


class _Layer(nn.Module):
    """x [R, T, D], visible [R, T, T] -> [R, T, D]."""

    spec: BertSpec

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, keys: jax.Array | None) -> jax.Array:
        s, dtype = self.spec, DTYPES[self.spec.dtype]
        mixed = drop(Attention(s, name="attention")(x, visible, keys), keys, "attention", s.dropout)
        x = LayerNorm(s.layer_norm_eps, dtype, name="attention_norm")(x + mixed)
        transformed = drop(Mlp(s, name="mlp")(x), keys, "mlp", s.dropout)
        return LayerNorm(s.layer_norm_eps, dtype, name="mlp_norm")(x + transformed)


def init(key: jax.Array, spec: BertSpec) -> Params:
    """A typed key -> random parameters, a plain nested dict of float32 arrays: `embeddings/...`, `layer_0/attention/query/kernel`, ..."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    x, visible = jnp.zeros((1, 1, spec.width)), jnp.ones((1, 1, 1), bool)
    params = {"embeddings": Embeddings(spec).init(fold(key, "embeddings"), tokens, tokens, None)["params"]}
    for i in range(spec.layers):
        params[f"layer_{i}"] = _Layer(spec).init(fold(key, f"layer_{i}"), x, visible, None)["params"]
    return params


def segment_positions(segment_ids: Array) -> jax.Array:
    """segment_ids [R, T] -> positions [R, T] int32, from 0 in each run of equal segment ids."""
    segment_ids = jnp.asarray(segment_ids)
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)


def encode(
    params: Params,
    spec: BertSpec,
    tokens: Array,
    segment_ids: Array,
    *,
    positions: Array | None = None,
    types: Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """tokens [R, T], segment_ids [R, T] -> hidden [R, T, D] in the compute dtype; padding gives zeros.

    A row may hold several texts: tokens see each other only within the same segment, and what one text is changes no bit of
    another's vectors. A text's vectors do not depend on where it stands in its row, up to rounding.

    Args:
      params: as from `init` or `load_hf`.
      spec: the model's.
      tokens: ids of the word table; an id outside it gives NaN.
      segment_ids: 1.. within a row, each a run of neighbouring places; 0 is padding.
      positions: position of each token in its text; by default 0.. in each segment. One of max_positions or more gives NaN.
      types: [R, T] int32 token types; by default all 0. One of type_vocab or more gives NaN.
      keys: typed keys [R], one per row; given, dropout acts.

    Raises:
      RecJaxError: shapes that do not fit each other.
    """
    return _encode(params, spec, tokens, segment_ids, positions, keys, types=types, every_layer=False).hidden[-1]


class Layers(NamedTuple):
    """What each layer made of packed rows, for a student to imitate.

    Attributes:
      hidden: layers + 1 arrays [R, T, D] in the compute dtype: the embeddings, then each layer's output; padding holds zeros.
      attention: one array [R, heads, T, T] float32 per layer: what each token (third axis) takes from each other one, before dropout;
        padding takes nothing.
    """

    hidden: tuple[jax.Array, ...]
    attention: tuple[jax.Array, ...]


def encode_layers(
    params: Params, spec: BertSpec, tokens: Array, segment_ids: Array, *, positions: Array | None = None, keys: jax.Array | None = None
) -> Layers:
    """tokens [R, T], segment_ids [R, T] -> hidden states [R, T, D] and attention weights [R, heads, T, T] of every layer.

    Arguments, errors and the last hidden states are those of `encode`. Under `jit`,
    what is not used is not kept.
    """
    return _encode(params, spec, tokens, segment_ids, positions, keys, every_layer=True)


def _encode(
    params: Params,
    spec: BertSpec,
    tokens: Array,
    segment_ids: Array,
    positions: Array | None,
    keys: jax.Array | None,
    *,
    types: Array | None = None,
    every_layer: bool,
) -> Layers:
    """`encode_layers`, or with every_layer=False the last hidden states alone."""
    tokens, segment_ids = jnp.asarray(tokens), jnp.asarray(segment_ids)
    if tokens.ndim != 2 or tokens.shape != segment_ids.shape:
        raise RecJaxError(f"tokens and segment_ids must both be [R, T]; got {tokens.shape} and {segment_ids.shape}")
    if keys is not None and keys.shape != tokens.shape[:1]:
        raise RecJaxError(f"keys must be one typed key per row, [{tokens.shape[0]}]; got shape {keys.shape}")
    real = segment_ids > 0
    if positions is None:
        positions = jnp.where(real, segment_positions(segment_ids), 0)
    visible = segment_ids[:, :, None] == segment_ids[:, None, :]
    x: Any = Embeddings(spec).apply({"params": params["embeddings"]}, tokens, positions, keys, types)

    def layer(x: Any, inputs: tuple[Params, Any]) -> tuple[Any, Any]:
        layer_params, number = inputs
        layer_keys = None if keys is None else fold(keys, number)
        arguments = ({"params": layer_params}, over_batch(x), visible, layer_keys)
        if not every_layer:
            return _Layer(spec).apply(*arguments), None
        x, sown = _Layer(spec).apply(*arguments, mutable=["intermediates"])
        return x, (x, *sown["intermediates"]["attention"]["weights"])

    if REMAT[spec.remat] is not None:
        layer = jax.checkpoint(layer, policy=REMAT[spec.remat], prevent_cse=not spec.scan)
    stack = [params[f"layer_{i}"] for i in range(spec.layers)]
    numbers = jnp.arange(spec.layers, dtype=jnp.uint32)
    first, outputs = x, []
    if spec.scan and stack:
        x, kept = jax.lax.scan(layer, x, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack), numbers))
        outputs = [jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i in range(spec.layers)]
    else:
        for inputs in zip(stack, numbers, strict=True):
            x, kept = layer(x, inputs)
            outputs.append(kept)
    hidden = [first, *(states for states, _ in outputs)] if every_layer else [x]
    attention = [jnp.where(real[:, None, :, None], weights, 0.0) for _, weights in outputs] if every_layer else []
    return Layers(tuple(jnp.where(real[:, :, None], h, jnp.zeros((), h.dtype)) for h in hidden), tuple(attention))


def encode_texts(params: Params, spec: BertSpec, tokens: Array, mask: Array, *, keys: jax.Array | None = None) -> jax.Array:
    """tokens [N, T], mask [N, T] -> vectors [N, D] float32: one text a row, pooled by spec.pooling, of length 1 if spec.normalize.

    Args:
      params: as from `init` or `load_hf`.
      spec: the model's.
      tokens: ids of the word table.
      mask: nonzero where there is a token.
      keys: typed keys [N], one per text; given, dropout acts.
    """
    segment_ids = (jnp.asarray(mask) != 0).astype(jnp.int32)
    hidden = encode(params, spec, tokens, segment_ids, keys=keys)
    vectors = pool_segments(hidden, segment_ids, segments=1, kind=spec.pooling)[:, 0]
    return unit_length(vectors) if spec.normalize else vectors


def unit_length(vectors: jax.Array) -> jax.Array:
    """vectors [..., D] -> vectors / length; zeros, and what is shorter than 1e-12, become zeros with zero gradient."""
    square = jnp.sum(jnp.square(vectors), -1, keepdims=True)
    return vectors * jnp.where(square > 1e-24, jax.lax.rsqrt(jnp.maximum(square, 1e-24)), 0.0)
