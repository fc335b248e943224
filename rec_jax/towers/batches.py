"""Batches through the towers: every forward that objectives may ask for, each once.

Batches of users make user and item vectors, and what the task head says of pairs; batches of texts teach the encoder alone, and batches of
pairs a cross-encoder, which makes no vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rec_jax.config_places import said
from rec_jax.mesh import BATCH_AXES, over_batch
from rec_jax.towers import features as features_lib
from rec_jax.towers import history, interactions, interests, pretraining
from rec_jax.towers import ids as ids_lib
from rec_jax.towers.bert import encode, encode_layers, unit_length
from rec_jax.towers.packed_texts import packed_text_vectors
from rec_jax.towers.pool import pool_segments
from rec_jax.towers.two_tower import (
    TwoTowerSpec,
    in_history,
    item_vectors,
    merged,
    some_items,
    text_item_vectors,
    without_some_ids,
    without_some_texts,
)
from rec_jax.types import Array, Batch, Outputs, Params, RecJaxError


def _lookup(vectors: jax.Array, places: jax.Array) -> jax.Array:
    """Per shard: vectors [G, M, D], places [G, ...] -> [G, ..., D]; vmapped over G, so that it stays on its device. -1 gives row 0."""
    return jax.vmap(lambda v, i: jnp.take(v, jnp.maximum(i, 0), axis=0))(vectors, places)


def encode_batch(
    params: Params,
    spec: TwoTowerSpec,
    batch: Batch,
    *,
    table: Array | None,
    features: features_lib.Rows | None = None,
    of_users: features_lib.Rows | None = None,
    catalogue: bool,
    keys: Mapping[str, jax.Array] | None,
    views: bool = False,
    plain: bool = False,
    history_views: bool = False,
    drawn_ids: jax.Array | None = None,
    query_drawn_ids: jax.Array | None = None,
    texts: Mapping[str, Array] | None = None,
    layers: bool = False,
    scores: bool = False,
    chunk_rows: int = 0,
    mesh: Mesh | None = None,
) -> Outputs:
    """A batch of users in G shards -> user [G, Q, D], item [G, M, D], text [G, M, D_text], and what else is asked for (see `Outputs`).

    Args:
      params: of `two_tower.init`.
      spec: kinds and sizes.
      batch: see `types.Batch`.
      table: text vectors of the catalogue [N, D_text]; needed unless `spec.encode`, and not where items have no text.
      features: of the catalogue's items, kind -> name -> [N, ...]; needed where `spec.features` says that the towers read some.
      of_users: features of all users, likewise, kind -> name -> [U, ...]; needed where the history tower reads some.
      catalogue: also the vectors of all items, by the table, or by `texts` where they are given.
      keys: typed keys [G, rows] of the streams "text" (item rows), "user" (user rows) and "head" (one row) for dropout, "view" (item rows
        again) with `views`, "history_view" (twice the user rows) with `history_views`; keys [] for all shards, "ids", "features" and
        "texts", where items' own vectors, features or texts are dropped; None = no dropout.
      views: also the batch's items by their texts alone, twice, each time with dropout of its own.
      plain: also the batch's items without their own vectors, by text and features alone.
      history_views: also the user vectors of the batch's views of histories.
      drawn_ids: [U] int32, catalogue items whose vectors are also wanted, by the table.
      query_drawn_ids: [G, Q, K] int32, for each query catalogue items whose vectors are also wanted, by the table; -1 is none.
      texts: the catalogue's packed texts {"tokens" [R, T], "segments" [R, T], "places" [N]}, to encode all of them in this step.
      layers: also every layer's hidden states and attention weights of the batch's item texts.
      scores: also the task head's logits of each query with its target and, where items are drawn, with these.
      chunk_rows: packed rows of a shard that the encoder takes at a time; 0 = all.
      mesh: the devices over whose batch axes the shards lie, so that chunks add up their gradients before devices do; None = one device.

    Raises:
      RecJaxError: a table is needed and absent, views or layers without an encoder in the step, views of histories that are not in the
        batch, scores without a task head.
    """
    drawn = drawn_ids is not None or query_drawn_ids is not None
    if spec.item_text and table is None and ((catalogue and texts is None) or drawn or not spec.encode):
        raise RecJaxError("vectors of the catalogue need a table of text vectors: towers.text.source='frozen', or batch candidates")
    if (views or layers or texts is not None) and not spec.encode:
        raise RecJaxError("two views of a text, and its layers, need the encoder in the step: towers.text.source='tokens'")
    if history_views and batch.view_history is None:
        raise RecJaxError("views of histories are asked for, but not in the batch: set BatchSpec.views")
    if scores and spec.task is None:
        raise RecJaxError("scores of pairs need a task head: TwoTowerSpec.task")
    params = merged(params, spec)
    if keys is not None and spec.id_dropout:
        params = without_some_ids(params, spec, keys["ids"])
    if keys is not None and spec.text_dropout:
        params = without_some_texts(params, spec, keys["texts"])
    if keys is not None and spec.features is not None and spec.features.dropout and features is not None:
        features = features_lib.without_some(keys["features"], spec.features, features)

    def text_of_items(stream: str) -> jax.Array:
        pooled = _packed(params, spec, batch.item_tokens, batch.item_segments, _key(keys, stream), chunk_rows, mesh)
        return _lookup(pooled, batch.item_places)

    text = text_of_items("text") if spec.encode else _rows_of(table, batch.item_ids)
    if spec.user == "none":
        return Outputs(text=text)
    everything = None
    if catalogue:
        everything = item_vectors(params, spec, table if texts is None else _all_texts(params, spec, texts), features)
    if everything is not None and not spec.encode:  # the batch's items are among them: no need to make them twice
        item = over_batch(jnp.take(everything, jnp.maximum(batch.item_ids, 0), axis=0))
    else:
        item = over_batch(some_items(params, spec, text, batch.item_ids, features))
    out = Outputs(user=_users(params, spec, batch, item, of_users, keys, chunk_rows, mesh), item=item, text=text, drawn_ids=drawn_ids)
    if views:
        assert text is not None
        out.views = text_item_vectors(params, spec, jnp.stack([text, text_of_items("view")]))
    if plain:
        rows = None if features is None else features_lib.rows_of(features, batch.item_ids)
        out.plain = over_batch(text_item_vectors(params, spec, text, None, rows))
    if history_views:
        out.history_views = _history_views(params, spec, batch, item, _key(keys, "history_view"))
    out.catalogue = everything
    if drawn_ids is not None:
        out.drawn = some_items(params, spec, _rows_of(table, drawn_ids), drawn_ids, features)
    if query_drawn_ids is not None:
        out.query_drawn = _drawn_for_queries(params, spec, table, query_drawn_ids, features)
        out.query_drawn_ids = query_drawn_ids
    if layers:
        out.hidden, out.attention = _layers(params, spec, batch, _key(keys, "text"))
    if scores:
        out.scores, out.drawn_scores = _scores(params, spec, batch, out, _key(keys, "head"))
    return out


def _rows_of(table: Array | None, ids: Array) -> jax.Array | None:
    """Text vectors [..., D_text] of catalogue items [...]; None without a table. -1 gives row 0."""
    return None if table is None else jnp.take(jnp.asarray(table), jnp.maximum(ids, 0), axis=0)


def _drawn_for_queries(
    params: Params, spec: TwoTowerSpec, table: Array | None, ids: jax.Array, features: features_lib.Rows | None
) -> jax.Array:
    """Catalogue items [G, Q, K] -> vectors [G, Q, K, D], each made where it is drawn, or all once where more are drawn than there are."""
    ids = over_batch(jnp.maximum(ids, 0))
    if table is not None and ids.size > len(table) and "rows" not in params.get("ids", {}):
        return over_batch(jnp.take(item_vectors(params, spec, table, features), ids, axis=0))
    return over_batch(some_items(params, spec, _rows_of(table, ids), ids, features))


def _users(
    params: Params,
    spec: TwoTowerSpec,
    batch: Batch,
    item: jax.Array,
    of_users: features_lib.Rows | None,
    keys: Mapping[str, jax.Array] | None,
    chunk_rows: int,
    mesh: Mesh | None,
) -> jax.Array:
    """Items of the batch [G, M, D] -> user vectors [G, Q, D]; of several interests of a query, that which is nearest to its target."""
    if spec.user == "id":
        user = over_batch(ids_lib.look_up(params["users"], batch.user_ids))
        return unit_length(user) if spec.normalize else user
    if spec.history is None:
        pooled = _packed(params, spec, batch.user_tokens, batch.user_segments, _key(keys, "user"), chunk_rows, mesh)
        return text_item_vectors(params, spec, _lookup(pooled, batch.user_places))
    columns = {"times": batch.history_times, "ratings": batch.history_ratings, "users": batch.history_users}
    columns |= batch.history_events or {}
    if missing := [name for name in spec.history.columns if columns.get(name) is None]:
        raise RecJaxError(
            f"the history tower reads {said(missing[:1])} of events, and the batch has none: config.towers.user.inputs, time_bias and "
            "session_gap must ask for them in the stage that is trained, whose batches a teacher sees too"
        )
    columns = {name: columns[name] for name in spec.history.columns}
    places, segments, hides = jnp.asarray(batch.history), jnp.asarray(batch.history_segments), not spec.history.causal
    user = _histories(params, spec, batch, item, places, segments, _key(keys, "user"), hides=hides, columns=columns, features=of_users)
    return user if spec.history.interests == 1 else interests.nearest(user, _lookup(item, batch.targets))


def _histories(
    params: Params,
    spec: TwoTowerSpec,
    batch: Batch,
    item: jax.Array,
    places: jax.Array,
    segments: jax.Array,
    keys: jax.Array | None,
    *,
    hides: bool,
    columns: Mapping[str, Array] | None = None,
    features: features_lib.Rows | None = None,
) -> jax.Array:
    """Items of the batch [G, M, D], packed histories [G, R, S] of local indices -> user vectors [G, R * S, D]; [G, R * S, K, D] of several.

    With `hides`, a place of a segment that has no item gets the learned vector of hidden ones. `columns` are those of
    `HistorySpec.columns` of the places [G, R, S], "users" with the `features` of all users.
    """
    assert spec.history is not None
    shards, rows, length = places.shape
    seen = _lookup(item, places)
    if spec.history_ids:
        seen = in_history(params, spec, seen, _lookup(batch.item_ids, places))
    vectors = over_batch(seen.reshape(shards * rows, length, spec.dim))
    hidden = ((places < 0) & (segments > 0)).reshape(shards * rows, length) if hides else None
    flat, keys = segments.reshape(shards * rows, length), None if keys is None else keys.reshape(-1)
    known = history.arguments({name: jnp.asarray(column).reshape(flat.shape) for name, column in (columns or {}).items()})
    user = history.encode(params["user"], spec.history, vectors, flat, features=features, hidden=hidden, keys=keys, **known)
    user = over_batch(user.reshape(shards, rows * length, *user.shape[2:]))
    return unit_length(user) if spec.normalize else user


def _history_views(params: Params, spec: TwoTowerSpec, batch: Batch, item: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Items of the batch [G, M, D] -> user vectors of both views of its examples [2, G, E, D], at the last item of each view.

    Views know no features of users: by these, which both have, they would find each other without looking at their histories.
    """
    shards, two, rows, length = batch.view_history.shape
    stacked = lambda x: jnp.asarray(x).reshape(shards, two * rows, length)
    hides = spec.history is not None and spec.history.mask
    user = _histories(params, spec, batch, item, stacked(batch.view_history), stacked(batch.view_segments), keys, hides=hides)
    places = jnp.asarray(batch.view_places) + rows * length * jnp.arange(two, dtype=jnp.int32)[:, None]
    return jnp.moveaxis(_lookup(user, places), 1, 0)


def _all_texts(params: Params, spec: TwoTowerSpec, texts: Mapping[str, Array]) -> jax.Array:
    """The catalogue's packed texts -> text vectors [N, D_text]; rows lie over the batch axes. No dropout: they are candidates."""
    tokens, segments = over_batch(jnp.asarray(texts["tokens"])), over_batch(jnp.asarray(texts["segments"]))
    pooled = packed_text_vectors(params["text"], spec.text, tokens, segments, texts_per_row=spec.texts_per_row)
    return jnp.take(pooled.reshape(-1, pooled.shape[-1]), texts["places"], axis=0)


def _layers(params: Params, spec: TwoTowerSpec, batch: Batch, keys: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """-> hidden [layers + 1, G, R, T, D_text] and attention [layers, G, R, heads, T, T] of the batch's item texts."""
    shards, rows, length = batch.item_tokens.shape
    flat = (jnp.asarray(x).reshape(-1, length) for x in (batch.item_tokens, batch.item_segments))
    made = encode_layers(params["text"], spec.text, *flat, keys=None if keys is None else keys.reshape(-1))
    split = lambda stack: jnp.stack(stack).reshape(len(stack), shards, rows, *stack[0].shape[1:])
    return split(made.hidden), split(made.attention) if made.attention else None


def _scores(params: Params, spec: TwoTowerSpec, batch: Batch, out: Outputs, keys: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """-> the head's logits of each query with its target [G, Q, L], and with the drawn items [G, Q, U] for the first task."""
    assert spec.task is not None
    keys = None if keys is None else keys[:, 0]
    target = _lookup(out.item, batch.targets)
    scores = interactions.apply(params["task"], spec.task, out.user, target, batch.context, keys=keys)
    if out.drawn is None:
        return scores, None
    context = None if batch.context is None else jnp.asarray(batch.context)[:, :, None]
    drawn = interactions.apply(params["task"], spec.task, out.user[:, :, None], out.drawn, context, keys=keys)
    return scores, drawn[..., 0]


def encode_texts(
    params: Params,
    spec: TwoTowerSpec,
    batch: Batch,
    *,
    keys: Mapping[str, jax.Array] | None,
    masked: bool = False,
    denoised: bool = False,
    views: bool = False,
) -> Outputs:
    """A batch of texts in G shards -> masked [G, P, D_text], denoised [G, R, T, D_text], vocabulary, views [2, G, M, D_text], as asked for.

    Args:
      params: {"text", "mlm"?, "denoise"?}.
      spec: the encoder's part of it counts.
      batch: item texts, and what of them is masked or deleted.
      keys: typed keys [G, R] of the streams "text" and "view" for dropout; None = no dropout.
      masked: what the masked language model's head makes of the hidden tokens.
      denoised: what the decoder makes of texts whose tokens were deleted before they were pooled.
      views: text vectors of unit length under two draws of dropout.
    """
    params = merged(params, spec)
    text, shards = params["text"], batch.item_tokens.shape[0]
    split = lambda x: x.reshape(shards, -1, *x.shape[1:])
    flat = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])
    rows = lambda stream: None if keys is None else keys[stream].reshape(-1)
    segments = flat(batch.item_segments)
    out = Outputs(vocabulary={"table": pretraining.word_table(text)})
    if masked:
        hidden = split(encode(text, spec.text, flat(batch.masked_tokens), segments, keys=rows("text")))
        out.masked = pretraining.masked_hidden(params["mlm"], spec.text, over_batch(hidden), batch.masked_places)
        out.vocabulary["masked_bias"] = params["mlm"]["bias"]
    if denoised:
        noisy = flat(batch.noisy_segments)
        hidden = encode(text, spec.text, flat(batch.noisy_tokens), noisy, keys=rows("text"))
        pooled = pool_segments(hidden, noisy, segments=spec.texts_per_row, kind=spec.text.pooling)
        out.denoised = split(
            pretraining.decode(params["denoise"], text, spec.text, pooled, flat(batch.item_tokens), segments, keys=rows("view"))
        )
        out.vocabulary["denoised_bias"] = params["denoise"]["bias"]
    if views:

        def view(stream: str) -> jax.Array:
            tokens, k = flat(batch.item_tokens), spec.texts_per_row
            pooled = packed_text_vectors(text, spec.text, tokens, segments, texts_per_row=k, keys=rows(stream))
            return unit_length(_lookup(pooled.reshape(shards, -1, pooled.shape[-1]), batch.item_places))

        out.views = jnp.stack([view("text"), view("view")])
    return out


def encode_pairs(params: Params, spec: TwoTowerSpec, batch: Batch, *, keys: Mapping[str, jax.Array] | None) -> Outputs:
    """A batch of pairs in G shards -> pairs [G, E, 1 + K].

    Args:
      params: {"text", "cross"}.
      spec: the encoder's part of it counts.
      batch: pairs of texts, the 1 + K of an example one after the other.
      keys: typed keys [G, R] of the stream "text" for dropout; None = no dropout.
    """
    (shards, _, length), examples = batch.item_tokens.shape, batch.targets.shape[1]
    flat = lambda x: over_batch(jnp.asarray(x).reshape(-1, length))
    logits = interactions.cross_scores(
        params["cross"],
        params["text"],
        spec.text,
        flat(batch.item_tokens),
        flat(batch.item_segments),
        types=flat(batch.item_types),
        texts_per_row=spec.texts_per_row,
        keys=None if keys is None else keys["text"].reshape(-1),
    )
    return Outputs(pairs=_lookup(over_batch(logits.reshape(shards, -1)), batch.item_places).reshape(shards, examples, -1))


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
