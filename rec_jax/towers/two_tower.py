"""The item tower and the user tower as one pure function of a batch.

Item tower: text -> FlaxBert -> pooled -> head (IDs and features join at the head's input). User tower: `history`, a causal
transformer over item vectors, or `text`, the history written out and encoded by the same FlaxBert and head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.mesh import BATCH_AXES, over_batch
from rec_jax.towers import heads, history
from rec_jax.towers.bert import BertSpec, unit_length
from rec_jax.towers.bert import encode as encode_text
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.pool import pool_segments
from rec_jax.types import Array, Batch, Outputs, Params, RecJaxError

ID_ROWS = 256  # a table of ID vectors has a multiple of this many rows, so that up to 256 devices hold equal parts of it, whatever N is


@dataclasses.dataclass(frozen=True)
class TwoTowerSpec:
    """Sizes and kinds of both towers.

    Attributes:
      dim: D of user and item vectors.
      normalize: vectors of unit length.
      text: the encoder; its weights are part of the parameters only if `encode`.
      encode: texts go through the encoder in every step; else a table of text vectors stands in for it.
      texts_per_row: K of packed rows.
      head, hidden: kind and inner width of the item head.
      n_ids: N where each catalogue item also has a vector of its own, added to the head's; 0 = text only.
      user: "history" or "text".
      history: the history tower, None for "text".
    """

    dim: int
    normalize: bool
    text: BertSpec
    encode: bool
    texts_per_row: int
    head: str
    hidden: int
    n_ids: int
    user: str
    history: history.HistorySpec | None


def make_spec(towers: Any, text: BertSpec, *, texts_per_row: int, n_items: int) -> TwoTowerSpec:
    """The spec that `config.towers` states; `text` is the encoder's own spec, with pooling, dtype, remat and dropout as the config says."""
    t, u = towers.text, towers.user
    text = dataclasses.replace(text, pooling=t.pooling, dtype=t.dtype, remat=t.remat, dropout=t.dropout, attention_dropout=t.dropout)
    tower = history.HistorySpec(towers.dim, u.layers, u.heads, u.mlp, u.dropout, u.max_positions) if u.kind == "history" else None
    return TwoTowerSpec(
        dim=towers.dim,
        normalize=towers.normalize,
        text=text,
        encode=t.source == "tokens",
        texts_per_row=texts_per_row,
        head=towers.item.head,
        hidden=towers.item.hidden,
        n_ids=n_items if towers.item.ids else 0,
        user=u.kind,
        history=tower,
    )


def init(key: jax.Array, spec: TwoTowerSpec, *, text_params: Params | None = None, table: np.ndarray | None = None) -> dict[str, Any]:
    """Fresh parameters {"item", "ids"?, "user"?, "text"?}. ID vectors start at zero: an item begins as what its text says.

    Their table has N rows filled up to a multiple of ID_ROWS; nothing reads the rows behind N.

    Args:
      key: typed key.
      spec: kinds and sizes.
      text_params: the encoder's pretrained weights; drawn at random if None and `spec.encode`.
      table: text vectors of the catalogue [N, D_text], to start the head as their whitening; None = a random head.
    """
    item_key, user_key, text_key = jax.random.split(key, 3)
    # Under jit: op by op, the initialisers would compile one by one.
    item = jax.jit(lambda k: heads.init(k, text_width=spec.text.width, dim=spec.dim, hidden=spec.hidden, kind=spec.head))(item_key)
    params: dict[str, Any] = {"item": item if table is None else heads.whitened(item, np.asarray(table))}
    if spec.n_ids:
        params["ids"] = {"embedding": jnp.zeros((-(-spec.n_ids // ID_ROWS) * ID_ROWS, spec.dim))}
    if spec.history is not None:
        tower = spec.history
        params["user"] = jax.jit(lambda k: history.init(k, tower))(user_key)
    if spec.encode:
        params["text"] = jax.jit(lambda k: init_text(k, spec.text))(text_key) if text_params is None else text_params
    return params


def text_item_vectors(params: Params, spec: TwoTowerSpec, text: Array, ids: jax.Array | None = None) -> jax.Array:
    """Text vectors [..., D_text] -> item vectors [..., D]; `ids` [..., D] are added where items have vectors of their own."""
    out = heads.apply(params["item"], text, dim=spec.dim, hidden=spec.hidden, kind=spec.head)
    out = out if ids is None else out + ids
    return unit_length(out) if spec.normalize else out


def item_vectors(params: Params, spec: TwoTowerSpec, text: Array) -> jax.Array:
    """Text vectors of the whole catalogue [N, D_text] -> item vectors [N, D]."""
    return text_item_vectors(params, spec, text, params["ids"]["embedding"][: spec.n_ids] if spec.n_ids else None)


def _some_items(params: Params, spec: TwoTowerSpec, text: Array, ids: Array) -> jax.Array:
    """Text vectors [..., D_text] of the catalogue items `ids` [...] -> item vectors [..., D]."""
    own = jnp.take(params["ids"]["embedding"], jnp.maximum(ids, 0), axis=0) if spec.n_ids else None
    return text_item_vectors(params, spec, text, own)


def packed_text_vectors(
    text_params: Params, spec: BertSpec, tokens: Array, segment_ids: Array, *, texts_per_row: int, keys: jax.Array | None = None
) -> jax.Array:
    """Packed tokens [R, T], segment_ids [R, T] -> text vectors [R, K, D_text]."""
    hidden = encode_text(text_params, spec, tokens, segment_ids, keys=keys)
    pooled = pool_segments(hidden, jnp.asarray(segment_ids), segments=texts_per_row, kind=spec.pooling)
    return unit_length(pooled) if spec.normalize else pooled


def _lookup(vectors: jax.Array, places: jax.Array) -> jax.Array:
    """Per shard: vectors [G, M, D], places [G, ...] -> [G, ..., D]; vmapped over G, so that it stays on its device. -1 gives row 0."""
    return jax.vmap(lambda v, i: jnp.take(v, jnp.maximum(i, 0), axis=0))(vectors, places)


def encode_batch(
    params: Params,
    spec: TwoTowerSpec,
    batch: Batch,
    *,
    table: Array | None,
    catalogue: bool,
    keys: Mapping[str, jax.Array] | None,
    views: bool = False,
    drawn_ids: jax.Array | None = None,
    chunk_rows: int = 0,
    mesh: Mesh | None = None,
) -> Outputs:
    """A batch of G shards -> user [G, Q, D], item [G, M, D] and, if asked for, catalogue [N, D], views [2, G, M, D], drawn [U, D].

    Args:
      params: of `init`.
      spec: kinds and sizes.
      batch: see `types.Batch`.
      table: text vectors of the catalogue [N, D_text]; needed unless `spec.encode`.
      catalogue: also the vectors of all items, by the table.
      keys: typed keys [G, rows] of the streams "text" (item rows), "user" (user rows) for dropout, and "view" (item rows again) with
        `views`; None = no dropout.
      views: also the batch's items by their texts alone, twice, each time with dropout of its own.
      drawn_ids: [U] int32, catalogue items whose vectors are also wanted, by the table.
      chunk_rows: packed rows of a shard that the encoder takes at a time; 0 = all.
      mesh: the devices over whose batch axes the shards lie, so that chunks add up their gradients before devices do; None = one device.

    Raises:
      RecJaxError: a table is needed and absent, or views without an encoder in the step.
    """
    if table is None and (catalogue or drawn_ids is not None or not spec.encode):
        raise RecJaxError("vectors of the catalogue need a table of text vectors: towers.text.source='frozen', or batch candidates")
    if views and not spec.encode:
        raise RecJaxError("two views of a text need the encoder in the step: towers.text.source='tokens'")

    def text_of_items(stream: str) -> jax.Array:
        pooled = _packed(params, spec, batch.item_tokens, batch.item_segments, _key(keys, stream), chunk_rows, mesh)
        return _lookup(pooled, batch.item_places)

    two_views = None
    if spec.encode:
        text = text_of_items("text")
        item = _some_items(params, spec, text, batch.item_ids)
        two_views = text_item_vectors(params, spec, jnp.stack([text, text_of_items("view")])) if views else None
    else:
        item = _some_items(params, spec, jnp.take(jnp.asarray(table), jnp.maximum(batch.item_ids, 0), axis=0), batch.item_ids)
    item = over_batch(item)
    if spec.history is not None:
        shards, rows, places = batch.history.shape
        vectors = over_batch(_lookup(item, batch.history).reshape(shards * rows, places, spec.dim))
        segments = batch.history_segments.reshape(shards * rows, places)
        user_keys = _key(keys, "user")
        user = history.encode(params["user"], spec.history, vectors, segments, keys=None if user_keys is None else user_keys.reshape(-1))
        user = over_batch(user.reshape(shards, rows * places, spec.dim))
        user = unit_length(user) if spec.normalize else user
    else:
        pooled = _packed(params, spec, batch.user_tokens, batch.user_segments, _key(keys, "user"), chunk_rows, mesh)
        user = text_item_vectors(params, spec, _lookup(pooled, batch.user_places))
    everything = item_vectors(params, spec, table) if catalogue and table is not None else None
    out = Outputs(user=user, item=item, catalogue=everything, views=two_views, drawn_ids=drawn_ids)
    if drawn_ids is not None:
        out.drawn = _some_items(params, spec, jnp.take(jnp.asarray(table), drawn_ids, axis=0), drawn_ids)
    return out


def _key(keys: Mapping[str, jax.Array] | None, name: str) -> jax.Array | None:
    return None if keys is None else keys[name]


def _packed(
    params: Params, spec: TwoTowerSpec, tokens: Array, segments: Array, keys: jax.Array | None, chunk_rows: int, mesh: Mesh | None
) -> jax.Array:
    """tokens [G, R, T] -> pooled vectors [G, R * K, D_text]: all shards together, `chunk_rows` rows of each at a time (0 = all rows).

    In chunks, only the activations of one are ever held: the backward pass encodes a chunk again, with the same keys, when it comes to it.

    Reference: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021), section 3; the gradients that
    are cached there are here the cotangents of the scan's outputs.
    """
    tokens, segments = jnp.asarray(tokens), jnp.asarray(segments)
    rows, length = tokens.shape[1:]

    def encode_rows(text: Params, tokens: jax.Array, segments: jax.Array, keys: jax.Array | None) -> jax.Array:
        flat = packed_text_vectors(
            text,
            spec.text,
            tokens.reshape(-1, length),
            segments.reshape(-1, length),
            texts_per_row=spec.texts_per_row,
            keys=None if keys is None else keys.reshape(-1),
        )
        return flat.reshape(tokens.shape[0], -1, flat.shape[-1])

    if not 0 < chunk_rows < rows:
        return encode_rows(params["text"], tokens, segments, keys)
    chunks = -(-rows // chunk_rows)

    def split(x: jax.Array) -> jax.Array:
        # [g, R, ...] -> [chunks, g, chunk_rows, ...]; the last chunk is filled up with the last row, whose copies nobody looks up.
        x = jnp.take(x, jnp.minimum(jnp.arange(chunks * chunk_rows), rows - 1), axis=1)
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk_rows, *x.shape[2:]), 1, 0)

    def encode_chunks(text: Params, tokens: jax.Array, segments: jax.Array, keys: jax.Array | None) -> jax.Array:
        if mesh is not None:
            text = jax.lax.pcast(text, BATCH_AXES, to="varying")
        body = jax.checkpoint(encode_rows, prevent_cse=False)
        inputs = (split(tokens), split(segments), None if keys is None else split(keys))
        _, vectors = jax.lax.scan(lambda _, chunk: (None, body(text, *chunk)), None, inputs)
        return jnp.moveaxis(vectors, 0, 1).reshape(vectors.shape[1], -1, vectors.shape[-1])[:, : rows * spec.texts_per_row]

    if mesh is not None:
        # Each device sums the gradients of its own chunks, and the devices meet once; without this they would meet after each chunk.
        over, whole = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
        encode_chunks = jax.shard_map(
            encode_chunks, mesh=mesh, in_specs=(whole, over, over, over), out_specs=over, axis_names=set(BATCH_AXES)
        )
    return encode_chunks(params["text"], tokens, segments, keys)


def user_vectors(params: Params, spec: TwoTowerSpec, items: Array, histories: Array) -> jax.Array:
    """Item vectors [N, D], histories [U, S] (oldest first, then -1) -> user vectors [U, D], at the last item of each history.

    An empty history gives the vector of zeros: it prefers nothing.
    """
    if spec.history is None:
        raise RecJaxError("a text user tower encodes written-out histories: use packed_text_vectors and item_vectors")
    histories = jnp.asarray(histories)
    vectors = jnp.take(jnp.asarray(items), jnp.maximum(histories, 0), axis=0)
    there = histories >= 0
    out = history.encode(params["user"], spec.history, vectors, there.astype(jnp.int32))
    last = jnp.maximum(there.sum(-1) - 1, 0)
    user = jnp.take_along_axis(out, last[:, None, None], axis=1)[:, 0]
    user = unit_length(user) if spec.normalize else user
    return jnp.where(there.any(-1)[:, None], user, 0.0)


def encode_blocks(text_params: Params, spec: BertSpec, blocks: Iterable[Any], n_texts: int) -> np.ndarray:
    """Blocks of packed texts (tokens, segment_ids, texts, places, per_row) -> text vectors [N, D_text] float32, on the host."""
    encode = jax.jit(packed_text_vectors, static_argnames=("spec", "texts_per_row"))
    out = np.zeros((n_texts, spec.width), np.float32)
    for block in blocks:
        vectors = encode(text_params, spec, block.tokens, block.segment_ids, texts_per_row=block.per_row)
        out[block.texts] = np.asarray(vectors).reshape(-1, spec.width)[block.places]
    return out
