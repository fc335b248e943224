"""The history user tower: a transformer over the vectors of the items in a packed history, one user vector at every place, or several.

Reference: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), section 3, with pre-norm blocks and RMSNorm; where a place
sees all of its segment, Sun et al., "BERT4Rec" (2019), section 3. Other layers in `history_layers`, other positions, times and ratings in
`places`, several vectors in `interests`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rec_jax.config_places import EVENT
from rec_jax.towers import features as features_lib
from rec_jax.towers import places as places_lib
from rec_jax.towers.bert import segment_positions
from rec_jax.towers.dropout import dropout, fold
from rec_jax.towers.history_layers import LAYERS
from rec_jax.towers.history_spec import HistorySpec as HistorySpec
from rec_jax.towers.interests import Interests
from rec_jax.towers.products import dot_general
from rec_jax.types import Params, RecJaxError


def places_seen(segment_ids: jax.Array, *, causal: bool) -> jax.Array:
    """segment_ids [R, S] -> mask [R, S, S], True where a place (row) may see another (column): same segment and, if `causal`, not later."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    if not causal:
        return same
    places = jnp.arange(segment_ids.shape[1])
    return same & (places[:, None] >= places[None, :])


NEAR = 0.1  # of what layers and positions add in a tower that begins near its items
PAST = 0.5  # likewise, of the history's mean, where attention's scores have a bias by distance


class _History(nn.Module):
    spec: HistorySpec

    @nn.compact
    def __call__(
        self,
        vectors: jax.Array,
        segment_ids: jax.Array,
        times: jax.Array,
        ratings: jax.Array,
        events: Mapping[str, jax.Array],
        of_users: jax.Array | None,
        keys: jax.Array | None,
    ) -> jax.Array:
        s, positions = self.spec, segment_positions(segment_ids)
        x = nn.Dense(s.dim, use_bias=False, name="in", dot_general=dot_general)(vectors * s.dim**0.5)
        table = lambda name, rows: nn.Embed(rows, s.dim, embedding_init=nn.initializers.zeros, name=name)
        if s.positions == "learned":
            x = x + nn.Embed(s.max_positions, s.dim, name="position")(positions)
        if "gap" in s.inputs:
            x = x + table("gap", places_lib.TIME_ROWS)(places_lib.time_rows(places_lib.gaps(times, segment_ids)))
        if "rating" in s.inputs:
            x = x + table("rating", 1 + len(s.ratings))(places_lib.rating_rows(ratings, s.ratings))
        for name, rows in s.events:
            x = x + table(EVENT + name, rows)(events[EVENT + name])
        x = x if of_users is None else x + of_users
        x = x if keys is None else dropout(x, fold(keys, "in"), s.dropout)
        mask = places_seen(segment_ids, causal=s.causal)
        near = mask & places_lib.same_session(times, segment_ids, s.session_gap) if s.session_gap else mask
        seen = places_lib.Places(
            positions=positions if s.positions == "rotary" else None,
            distances=places_lib.distance_rows(segment_ids.shape[1], s.max_positions) if s.positions == "relative" else None,
            times=places_lib.time_difference_rows(times) if s.time_bias else None,
        )
        for n in range(s.layers):
            layer_keys = None if keys is None else fold(keys, n)
            x = LAYERS[s.layer](s, name=f"layer_{n}")(x, near if n < s.layers // 2 else mask, seen, layer_keys)
        if s.readout == "mean":
            share = mask.astype(x.dtype)
            x = jnp.einsum("rst,rtd->rsd", share / share.sum(-1, keepdims=True), x)
        x = nn.RMSNorm(name="norm")(x)
        x = x if s.interests == 1 else Interests(s.interests, name="interests")(x, mask)
        return nn.Dense(s.dim, use_bias=False, name="project", dot_general=dot_general)(x)


def init(key: jax.Array, spec: HistorySpec) -> Params:
    """Parameters of a history tower; `mask` [D] is of about unit length, as item vectors are.

    With `spec.near_items` the first and the last linear map are the identity, and what layers and positions add is NEAR times as large as
    it is drawn: a user begins near the items of the history, so that what is similar by text counts from the first step on, and for items
    that are seldom seen. A tower that is drawn has to find out first that an item's neighbours are near it, from the items it sees.
    With relative positions, attention begins near the newest item and PAST times a mean of the history: the heads' biases fall with the
    distance (`places.recency`), and the first layer hands on what it sees as it is, each head its part of the numbers.

    Raises:
      RecJaxError: ratings are read, and no ranges of them are given.
    """
    if "rating" in spec.inputs and not spec.ratings:
        raise RecJaxError("the history tower reads ratings and has no ranges of them: set HistorySpec.ratings (data.places.rating_edges)")
    places = jnp.ones((1, 2), jnp.int32)
    known = (places, places.astype(jnp.float32), {EVENT + name: places for name, _ in spec.events})
    params = _History(spec).init(key, jnp.zeros((1, 2, spec.dim)), places, *known, None, None)["params"]
    params = _near_items(params, spec) if spec.near_items else params
    if spec.features is not None:
        params = {**params, "features": features_lib.init(fold(key, "features"), spec.features, spec.dim)}
    return {**params, "mask": jax.random.normal(fold(key, "mask"), (spec.dim,)) * spec.dim**-0.5} if spec.mask else params


def _near_items(params: Params, spec: HistorySpec) -> Params:
    recent = spec.positions == "relative" and spec.layer == "attention"  # a bias far below zero is where SiLU learns nothing
    smaller = lambda part: jax.tree.map(lambda x: NEAR * x, part)
    out = {**params, "in": {"kernel": jnp.eye(spec.dim)}, "project": {"kernel": jnp.eye(spec.dim)}}
    out |= {name: smaller(params[name]) for name in ("position",) if name in params}
    for name in (f"layer_{n}" for n in range(spec.layers)):
        out[name] = {**params[name], **{last: smaller(params[name][last]) for last in ("out", "mlp_out") if last in params[name]}}
        if recent:
            out[name]["distance"] = {"bias": places_lib.recency(spec.max_positions, spec.heads)}
    if recent and spec.layers:
        whole, heads = jnp.eye(spec.dim), (spec.heads, spec.dim // spec.heads)
        out["layer_0"]["value"] = {"kernel": whole.reshape(spec.dim, *heads)}
        out["layer_0"]["out"] = {"kernel": PAST * whole.reshape(*heads, spec.dim)}
    return out


def arguments(columns: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Columns of places by name, of `HistorySpec.columns` -> the arguments of `encode` that they are."""
    events = {name: column for name, column in columns.items() if name.startswith(EVENT)}
    return {name: column for name, column in columns.items() if name not in events} | ({"events": events} if events else {})


def encode(
    params: Params,
    spec: HistorySpec,
    vectors: jax.Array,
    segment_ids: jax.Array,
    *,
    times: jax.Array | None = None,
    ratings: jax.Array | None = None,
    events: Mapping[str, jax.Array] | None = None,
    users: jax.Array | None = None,
    features: features_lib.Rows | None = None,
    hidden: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """vectors [R, S, D], segment_ids [R, S] (0 = padding) -> user vectors [R, S, D], or [R, S, K, D] of several interests.

    A place sees its own segment, up to itself where the tower is causal.

    Args:
      params: of `init`.
      spec: the tower's sizes.
      vectors: item vectors of the places, of about unit length.
      segment_ids: 1.. within a row; each segment lies in one piece.
      times: [R, S] int32, seconds of the places' events since any moment of their segment's own; -1 = unknown. None = all unknown.
      ratings: [R, S] float32, of the places' events; NaN = unknown. None = all unknown.
      events: "event_NAME" -> [R, S] int32, category of the places' events in a feature; 0 = none or unknown. What is absent is all unknown.
      users: [R, S] int32, rows of `features` of the places' users; -1 = unknown, which adds nothing. None = all unknown.
      features: of all users, kind -> name -> [U, ...]; needed with `users`.
      hidden: [R, S] bool, places whose item is hidden behind the learned vector, and time, rating and features of the event are unknown;
        needs `spec.mask`. None = none.
      keys: [R] typed keys, one a row, for dropout; None = no dropout.

    Raises:
      RecJaxError: hidden items, and no vector for them; users, and no features of them.
    """
    if hidden is not None:
        if not spec.mask:
            raise RecJaxError("items of a history are hidden, but the tower has no vector for them: set HistorySpec.mask")
        vectors = jnp.where(hidden[..., None], params["mask"].astype(vectors.dtype), vectors)
    times = jnp.full(segment_ids.shape, -1, jnp.int32) if times is None else jnp.asarray(times)
    ratings = jnp.full(segment_ids.shape, jnp.nan) if ratings is None else jnp.asarray(ratings)
    kinds = {EVENT + name: jnp.zeros(segment_ids.shape, jnp.int32) for name, _ in spec.events}
    kinds |= {name: jnp.asarray(column) for name, column in (events or {}).items() if name in kinds}
    if hidden is not None:
        times, ratings = jnp.where(hidden, -1, times), jnp.where(hidden, jnp.nan, ratings)
        kinds = {name: jnp.where(hidden, 0, column) for name, column in kinds.items()}
    of_users = None
    if spec.features is not None and users is not None:
        if features is None:
            raise RecJaxError("the history tower reads features of users (HistorySpec.features), and none are given: pass all users'")
        none = jnp.zeros((*segment_ids.shape, spec.dim), vectors.dtype)
        rows = features_lib.rows_of(features, users)
        of_users = features_lib.fuse(params["features"], spec.features, none, rows, vectors * spec.dim**0.5)
        of_users = jnp.where(jnp.asarray(users)[..., None] >= 0, of_users, 0.0)
    trained = {name: part for name, part in params.items() if name != "features"}
    return jnp.asarray(_History(spec).apply({"params": trained}, vectors, segment_ids, times, ratings, kinds, of_users, keys))
