"""The item tower and the user tower: their parameters, and vectors of items and users. `batches` sends batches through them.

Item tower: text -> FlaxBert -> pooled -> head, whose vector IDs and features join (`features`), or items' own vectors instead of text.
User tower: `history`, a transformer over item vectors, `text`, the history written out and encoded by the same FlaxBert and head,
or `id`, a vector of each user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers import features as features_lib
from rec_jax.towers import gates, heads, history, interactions, lora
from rec_jax.towers import ids as ids_lib
from rec_jax.towers.bert import BertSpec, unit_length
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.checks import check_item
from rec_jax.towers.dropout import fold
from rec_jax.types import Array, Params, RecJaxError


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
      id_buckets, id_hashes: rows of the hashed table of these vectors, and how many of them are summed for an item; 0 = a row for each.
      item_text: False: an item is its own vector, and its features, alone; there is no head.
      id_dropout: probability that a training step does not know an item's own vector.
      id_shrinkage: of `as_ranked`; 0 = none.
      history_ids: items have own vectors of a second table, zero at the start, that are added to what a place of a history sees of them,
        so that an item may say something else there than as a candidate.
      features: what items have beside text and ID, or None.
      gates: text, own vector and features are weighed by gates (`gates.weighed`), not just added.
      text_dropout: probability that a training step does not know an item's text; one that has nothing else keeps it.
      text_length: root mean square length, at the start, of what a whitened head makes of texts; 0 = sqrt(D).
      user: "history", "text", "id", or "none": an encoder alone.
      history: the history tower, None for "text" and "id".
      n_users: U, with user "id".
      task: the head that scores pairs for tasks, or None.
      lora_rank, lora_alpha, lora_pattern: adapters of the kernels whose names the pattern matches; rank 0 = none.
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
    n_users: int = 0
    item_text: bool = True
    id_dropout: float = 0.0
    id_shrinkage: float = 0.0
    text_length: float = 0.0
    task: interactions.InteractionSpec | None = None
    lora_rank: int = 0
    lora_alpha: float = 1.0
    lora_pattern: str = ""
    features: features_lib.FeatureSpec | None = None
    id_buckets: int = 0
    id_hashes: int = 2
    history_ids: bool = False
    gates: bool = False
    text_dropout: float = 0.0

    @property
    def parts(self) -> int:
        """What an item is joined of: text, own vector, and each feature."""
        return int(self.item_text) + int(self.n_ids > 0) + len(self.features.names if self.features is not None else ())

    @property
    def id_rows(self) -> int:
        """Rows of the table of items' own vectors."""
        return ids_lib.table_rows(self.id_buckets or self.n_ids)

    @property
    def id_options(self) -> dict[str, int]:
        """How `ids` finds an item's own vector in the table."""
        return {"buckets": self.id_buckets, "hashes": self.id_hashes}


def make_spec(
    towers: Any,
    text: BertSpec,
    *,
    texts_per_row: int,
    n_items: int,
    n_users: int = 0,
    tasks: int = 0,
    context: tuple[int, ...] = (),
    mask: bool = False,
    causal: bool = True,
    features: Mapping[str, Mapping[str, int]] | None = None,
    of_users: Mapping[str, Mapping[str, int]] | None = None,
    ratings: tuple[float, ...] = (),
    events: Mapping[str, int] | None = None,
) -> TwoTowerSpec:
    """The spec that `config.towers` states.

    Args:
      towers: the config's group of that name.
      text: the encoder's own spec; it gets pooling, dtype, remat and dropout as the config says.
      texts_per_row: K of packed rows.
      n_items, n_users: of the data.
      tasks: L of the task head; 0 = none.
      context: categories of each context field that the head reads.
      mask: the history tower has a learned vector for hidden items.
      causal: see `history.HistorySpec`; a tower that is not has that vector.
      features: of items: kind -> name -> size, see `features.FeatureSpec`.
      of_users: features of users, likewise.
      ratings: of `HistorySpec`, where the history tower reads them.
      events: rows of the table of each feature of events that it reads, by name.

    Raises:
      RecJaxError: as `checks.check_item`.
    """
    t, u, h = towers.text, towers.user, towers.task
    check_item(towers.item, features=features is not None)
    rates = {"dropout": t.dropout, "attention_dropout": t.dropout}
    text = dataclasses.replace(text, pooling=t.pooling, dtype=t.dtype, remat=t.remat, scan=t.scan and text.layers > 0, **rates)
    tower = None
    if u.kind == "history":
        kinds = {"layer": u.layer, "positions": u.positions, "inputs": tuple(u.inputs), "ratings": ratings}
        kinds |= {"events": tuple((events or {}).items())}
        times = {"time_bias": u.time_bias, "session_gap": u.session_gap}
        forms = {"mask": mask or not causal, "causal": causal, "interests": u.interests, "readout": u.readout}
        mine = None if of_users is None else features_lib.make_sum(of_users, towers.dim, u.attended)
        starts = {"near_items": u.near_items, "features": mine}
        tower = history.HistorySpec(towers.dim, u.layers, u.heads, u.mlp, u.dropout, u.max_positions, **kinds, **times, **forms, **starts)
    return TwoTowerSpec(
        dim=towers.dim,
        normalize=towers.normalize,
        text=text,
        encode=t.source == "tokens",
        texts_per_row=texts_per_row,
        head=towers.item.head,
        hidden=towers.item.hidden,
        n_ids=n_items if towers.item.ids else 0,
        id_buckets=towers.item.id_buckets,
        id_hashes=towers.item.id_hashes,
        history_ids=u.kind == "history" and u.ids,
        item_text=towers.item.text,
        user=u.kind,
        history=tower,
        n_users=n_users if u.kind == "id" else 0,
        text_length=towers.item.text_length,
        id_dropout=towers.item.id_dropout,
        id_shrinkage=towers.item.id_shrinkage,
        gates=towers.item.gates,
        text_dropout=towers.item.text_dropout,
        task=interactions.InteractionSpec(
            kind=h.kind,
            tasks=tasks,
            hidden=tuple(h.hidden),
            cross_layers=h.cross_layers,
            cross_rank=h.cross_rank,
            sharing=h.sharing,
            experts=h.experts,
            tower=tuple(h.tower),
            context=context,
            context_dim=h.context_dim,
            dropout=h.dropout,
            scale=h.scale,
        )
        if tasks
        else None,
        lora_rank=t.lora.rank,
        lora_alpha=t.lora.alpha,
        lora_pattern=t.lora.pattern,
        features=None if features is None else features_lib.make_spec(towers.item, features, towers.dim),
    )


def init(key: jax.Array, spec: TwoTowerSpec, *, text_params: Params | None = None, table: np.ndarray | None = None) -> dict[str, Any]:
    """Fresh parameters {"item"?, "ids"?, "features"?, "gates"?, "user"?, "history_ids"?, "users"?, "text"?, "task"?, "lora"?}.

    ID vectors of items start at zero: an item begins as what its text says. Without text they are drawn, small. Their table has N rows,
    or as many as there are buckets, filled up to a multiple of `ids.ID_ROWS`, that of users has U so; nothing reads the rows behind.

    Args:
      key: typed key.
      spec: kinds and sizes.
      text_params: the encoder's pretrained weights; drawn at random if None and `spec.encode`.
      table: text vectors of the catalogue [N, D_text], to start the head as their whitening; None = a random head.
    """
    item_key, user_key, text_key = jax.random.split(key, 3)
    params: dict[str, Any] = {}
    if spec.item_text:
        # Under jit: op by op, the initialisers would compile one by one.
        item = jax.jit(lambda k: heads.init(k, text_width=spec.text.width, dim=spec.dim, hidden=spec.hidden, kind=spec.head))(item_key)
        params["item"] = item if table is None else heads.whitened(item, np.asarray(table), length=spec.text_length)
    if spec.n_ids:
        shape, scale = (spec.id_rows, spec.dim), ids_lib.ID_SCALE * (spec.id_hashes**-0.5 if spec.id_buckets else 1.0)
        params["ids"] = {"embedding": jnp.zeros(shape) if spec.item_text else scale * jax.random.normal(item_key, shape)}
    if spec.history_ids:
        params["history_ids"] = {"embedding": jnp.zeros((spec.id_rows, spec.dim))}
    if spec.features is not None:
        params["features"] = features_lib.init(fold(key, "features"), spec.features, spec.dim)
    if spec.gates:
        params["gates"] = gates.init(spec.parts, spec.dim)
    if spec.user == "id":
        draw = jax.random.normal(fold(key, "users"), (ids_lib.table_rows(spec.n_users), spec.dim))
        params["users"] = {"embedding": draw * spec.dim**-0.5}
    if spec.history is not None:
        tower = spec.history
        params["user"] = jax.jit(lambda k: history.init(k, tower))(user_key)
    if spec.encode:
        params["text"] = jax.jit(lambda k: init_text(k, spec.text))(text_key) if text_params is None else text_params
    if spec.task is not None:
        task = spec.task
        params["task"] = jax.jit(lambda k: interactions.init(k, task, spec.dim))(fold(key, "task"))
    if spec.lora_rank:
        params["lora"] = lora.init(fold(key, "lora"), params, rank=spec.lora_rank, pattern=spec.lora_pattern)
    return params


def merged(params: Params, spec: TwoTowerSpec) -> Params:
    """Parameters whose adapters, where there are any, are part of the kernels: what every forward and an export work with."""
    if "lora" not in params:
        return params
    return lora.merge({name: value for name, value in params.items() if name != "lora"}, params["lora"], alpha=spec.lora_alpha)


def with_encoder(spec: TwoTowerSpec, encode: bool) -> TwoTowerSpec:
    """The same towers with the encoder in them, or on a table of text vectors; without adapters, which are in the kernels by then."""
    return dataclasses.replace(spec, encode=encode, lora_rank=0)


def text_item_vectors(
    params: Params,
    spec: TwoTowerSpec,
    text: Array | None,
    ids: jax.Array | None = None,
    features: features_lib.Rows | None = None,
    kept: jax.Array | None = None,
) -> jax.Array:
    """Text vectors [..., D_text] -> item vectors [..., D].

    Args:
      params, spec: of the towers.
      text: text vectors; None where items have none (`spec.item_text`), and are their own vectors alone.
      ids: [..., D], added where items have vectors of their own.
      features: rows of these items, where they have features; None = by text and ID alone.
      kept: [...] whether an item's text is known; one that is nothing without keeps it. None = all are.
    """
    said = None
    if spec.item_text:
        assert text is not None
        said = heads.apply(params["item"], text, dim=spec.dim, hidden=spec.hidden, kind=spec.head)
    out = _joined(params, spec, said, ids, features)
    if kept is not None:
        assert said is not None
        rest = _joined(params, spec, jnp.zeros_like(said), ids, features)
        out = jnp.where((kept | ~rest.any(-1))[..., None], out, rest)
    return unit_length(out) if spec.normalize else out


def _joined(
    params: Params, spec: TwoTowerSpec, said: jax.Array | None, ids: jax.Array | None, features: features_lib.Rows | None
) -> jax.Array:
    """What text, own vector (None = not known) and features make of the same items [..., D], not yet of unit length."""
    read = features if spec.features is not None else None
    if spec.gates:
        known = [x for x, there in ((said, spec.item_text), (ids, spec.n_ids > 0)) if there]
        if spec.features is not None:
            known += [None] * len(spec.features.names) if read is None else features_lib.parts_of(params["features"], spec.features, read)
        like = next(x for x in known if x is not None)
        return gates.weighed(params["gates"], [jnp.zeros_like(like) if x is None else x for x in known])
    base = ids if said is None else said if ids is None else said + ids
    assert base is not None  # `config.check`
    return base if spec.features is None or read is None else features_lib.fuse(params["features"], spec.features, base, read)


def item_vectors(params: Params, spec: TwoTowerSpec, text: Array | None, features: features_lib.Rows | None = None) -> jax.Array:
    """Text vectors of the whole catalogue [N, D_text] -> item vectors [N, D].

    Args:
      params, spec: of the towers.
      text: None where items have no text (`spec.item_text`).
      features: rows of all items [N, ...], if the towers read some.

    Raises:
      RecJaxError: the towers read features, and none are given.
    """
    own = ids_lib.all_vectors(params["ids"], spec.n_ids, **spec.id_options) if spec.n_ids else None
    return text_item_vectors(params, spec, text, own, _given(spec, features), _kept_texts(params, spec, text))


def some_items(params: Params, spec: TwoTowerSpec, text: Array | None, ids: Array, features: features_lib.Rows | None = None) -> jax.Array:
    """Text vectors [..., D_text] of the catalogue items `ids` [...], features of the whole catalogue -> item vectors [..., D].

    Raises:
      RecJaxError: as `item_vectors`.
    """
    own = ids_lib.vectors(params["ids"], ids, **spec.id_options) if spec.n_ids else None
    rows = _given(spec, features)
    rows = None if rows is None else features_lib.rows_of(rows, ids)
    return text_item_vectors(params, spec, text, own, rows, _kept_texts(params, spec, text, ids))


def _given(spec: TwoTowerSpec, features: features_lib.Rows | None) -> features_lib.Rows | None:
    """The features, if the towers read some."""
    if spec.features is None:
        return None
    if features is None:
        raise RecJaxError("the item tower reads features of items (TwoTowerSpec.features), and none are given: pass those of the catalogue")
    return features


def in_history(params: Params, spec: TwoTowerSpec, vectors: jax.Array, ids: Array) -> jax.Array:
    """Item vectors [..., D] of the catalogue items `ids` [...] -> what the history tower sees of them; -1 gives any."""
    return vectors + ids_lib.vectors(params["history_ids"], ids, **spec.id_options) if spec.history_ids else vectors


def as_ranked(params: Params, spec: TwoTowerSpec, counts: Array | None) -> Params:
    """Parameters as the catalogue is ranked with them: own vectors of seldom seen items shrunk by `spec.id_shrinkage` (`ids.shrunk`).

    Training works with the whole vectors: with the factor in the step, learning makes up for a part of it.

    Args:
      params, spec: of the towers; an own vector of each item where `spec.id_shrinkage` is not 0.
      counts: [N] train events of each item; read where it is not 0.
    """
    if not spec.id_shrinkage:
        return params
    assert counts is not None
    return {**params, "ids": ids_lib.shrunk(params["ids"], counts, spec.id_shrinkage)}


def without_some_ids(params: Params, spec: TwoTowerSpec, key: jax.Array) -> Params:
    """Parameters in which each item's own vector is zero with probability `spec.id_dropout`; see `ids.without_some`."""
    return {**params, "ids": ids_lib.without_some(params["ids"], key, rate=spec.id_dropout, buckets=spec.id_buckets)}


def without_some_texts(params: Params, spec: TwoTowerSpec, key: jax.Array) -> Params:
    """Parameters with which an item's text is not known with probability `spec.text_dropout`: the same items on both sides of the loss."""
    return {**params, "dropped_texts": key}


def _kept_texts(params: Params, spec: TwoTowerSpec, text: Array | None, ids: Array | None = None) -> jax.Array | None:
    """Whether the text of each of the items `ids` [...], or of the whole catalogue, is known; None = all are."""
    if "dropped_texts" not in params or text is None:
        return None
    return ids_lib.kept(params["dropped_texts"], spec.text_dropout, jnp.arange(len(text)) if ids is None else ids)


def user_vectors(
    params: Params,
    spec: TwoTowerSpec,
    items: Array,
    histories: Array,
    columns: Mapping[str, Array] | None = None,
    features: features_lib.Rows | None = None,
) -> jax.Array:
    """Item vectors [N, D], histories [U, S] (oldest first, then -1) -> user vectors [U, D], at the last item of each history; [U, K, D] of
    several interests.

    A tower that is not causal gets a hidden place behind the last item, and its vector there; where a history fills all S places, its
    oldest item makes room. An empty history gives the vector of zeros: it prefers nothing. `columns` are those of `HistorySpec.columns`
    [U, S] of the events, as `history.encode` takes them, with the `features` of users; without them they are unknown.
    """
    if spec.history is None:
        raise RecJaxError(f"user tower {spec.user!r} is no history tower; written-out histories go through packed_text_vectors")
    histories = jnp.asarray(histories)
    there, hidden = histories >= 0, None
    any_item = there.any(-1)
    last = jnp.maximum(there.sum(-1) - 1, 0)
    if not spec.history.causal:
        places = jnp.arange(histories.shape[1])
        histories = jnp.where(there.all(-1)[:, None], jnp.roll(histories, -1, axis=1), histories)
        last = jnp.minimum(there.sum(-1), histories.shape[1] - 1)
        there, hidden = places <= last[:, None], places == last[:, None]
    vectors = in_history(params, spec, jnp.take(jnp.asarray(items), jnp.maximum(histories, 0), axis=0), histories)
    known = history.arguments({name: jnp.asarray(column) for name, column in (columns or {}).items()})
    out = history.encode(params["user"], spec.history, vectors, there.astype(jnp.int32), features=features, hidden=hidden, **known)
    behind = (1,) * (out.ndim - 2)  # of users and places
    user = jnp.take_along_axis(out, last.reshape(-1, 1, *behind), axis=1)[:, 0]
    user = unit_length(user) if spec.normalize else user
    return jnp.where(any_item.reshape(-1, *behind), user, 0.0)
