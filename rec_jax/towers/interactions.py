"""Task heads: a user's vector, an item's and the circumstances -> one logit a task (click, like, watch time, ...).

Every head holds the dot product of both vectors, so that it begins as what retrieval has learned. "mlp" and "dcn" add a network on the
features: user, item, their elementwise product and the embedded context. `sharing` says how the tasks share that network. A cross-encoder
reads both texts at once and has no vectors: its head is `init_cross`, `cross_scores`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers.bert import BertSpec, encode
from rec_jax.towers.dropout import dropout, fold
from rec_jax.towers.pool import pool_segments
from rec_jax.types import Array, Params, RecJaxError

KINDS = ("dot", "mlp", "dcn")
SHARINGS = ("bottom", "mmoe", "ple")
ITEMS_ONCE = 1024  # items that `_score_once` takes at a time: what is made of them fits a cache
BLOCK = 1 << 24  # elements of features that `score_all` makes at a time: 64 MB


@dataclasses.dataclass(frozen=True)
class InteractionSpec:
    """What a task head is made of; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      kind: "dot" (scale * dot product + bias, and a bias of each category of the context), "mlp", or "dcn" (cross layers under the mlp).
      tasks: L, logits of an example.
      hidden: widths of the shared network's layers, or of each expert's; () = none, with sharing "bottom" alone.
      cross_layers, cross_rank: of "dcn"; rank 0 is a full matrix.
      sharing: between tasks: "bottom" (one network), "mmoe" (experts, mixed by a gate for each task) or "ple" (shared experts and
        experts of each task, in levels).
      experts: of "mmoe"; the shared ones of a level of "ple".
      task_experts, levels: of "ple".
      tower: widths of each task's own layers, on top of what is shared.
      context: number of categories of each context field; () = no context.
      context_dim: width of a category's embedding.
      dropout: rate after each layer of the networks; acts only where keys are given.
      scale: factor of the dot product at the start, e.g. the contrastive stage's 1 / temperature.
    """

    kind: str = "dot"
    tasks: int = 1
    hidden: tuple[int, ...] = (256, 128)
    cross_layers: int = 2
    cross_rank: int = 0
    sharing: str = "bottom"
    experts: int = 4
    task_experts: int = 1
    levels: int = 1
    tower: tuple[int, ...] = (64,)
    context: tuple[int, ...] = ()
    context_dim: int = 8
    dropout: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for field, allowed in (("kind", KINDS), ("sharing", SHARINGS)):
            if getattr(self, field) not in allowed:
                raise RecJaxError(f"InteractionSpec.{field}={getattr(self, field)!r}: expected one of {', '.join(allowed)}")
        least = {"tasks": 1, "cross_layers": 1, "cross_rank": 0, "experts": 1, "task_experts": 1, "levels": 1, "context_dim": 1}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise RecJaxError(f"InteractionSpec.{field}={getattr(self, field)!r}: must be at least {low}")
        for field in ("hidden", "tower", "context"):
            if not isinstance(getattr(self, field), tuple) or any(n < 1 for n in getattr(self, field)):
                raise RecJaxError(f"InteractionSpec.{field}={getattr(self, field)!r}: must be a tuple of numbers of at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise RecJaxError(f"InteractionSpec.dropout={self.dropout!r}: must be at least 0 and below 1")
        if self.sharing != "bottom" and (self.kind == "dot" or not self.hidden):
            raise RecJaxError(f"InteractionSpec.sharing={self.sharing!r} needs experts: kind 'mlp' or 'dcn', and hidden widths")


def init(key: jax.Array, spec: InteractionSpec, dim: int) -> dict[str, Any]:
    """A typed key, D -> parameters of a head: `dot/scale`, ..., and as the spec needs `context`, `cross`, `shared`, `level_0`, `tower`, ...

    What the experts or the tasks have each for themselves is stacked: kernels [experts, in, out], [L, in, out], [L, experts, in, out].
    """
    s, tasks = spec, spec.tasks
    params: dict[str, Any] = {"dot": {"scale": jnp.full(tasks, s.scale, jnp.float32), "bias": jnp.zeros(tasks)}}
    if s.context:
        shape = (sum(s.context) + len(s.context), tasks if s.kind == "dot" else s.context_dim)
        table = jnp.zeros(shape) if s.kind == "dot" else jax.random.normal(fold(key, "context"), shape)
        params["context"] = {"embedding": table}
    if s.kind == "dot":
        return params
    width = 3 * dim + len(s.context) * s.context_dim
    if s.kind == "dcn":
        params["cross"] = {f"layer_{n}": _init_cross_layer(fold(fold(key, "cross"), n), width, s.cross_rank) for n in range(s.cross_layers)}
    if s.sharing == "bottom":
        params["shared"] = _init_mlp(fold(key, "shared"), (width, *s.hidden))
    elif s.sharing == "mmoe":
        params["experts"] = _init_mlp(fold(key, "experts"), (width, *s.hidden), (s.experts,))
        params["gates"] = _init_gate(fold(key, "gates"), (tasks, width, s.experts))
    else:
        for n in range(s.levels):
            level, inputs = fold(key, f"level_{n}"), s.hidden[-1] if n else width
            params[f"level_{n}"] = {
                "experts": _init_mlp(fold(level, "experts"), (inputs, *s.hidden), (s.experts,)),
                "task_experts": _init_mlp(fold(level, "task_experts"), (inputs, *s.hidden), (tasks, s.task_experts)),
                "gates": _init_gate(fold(level, "gates"), (tasks, inputs, s.task_experts + s.experts)),
            }
            if n + 1 < s.levels:
                params[f"level_{n}"]["gate"] = _init_gate(fold(level, "gate"), (inputs, tasks * s.task_experts + s.experts))
    widths = (s.hidden[-1] if s.hidden else width, *s.tower)
    params["tower"] = _init_mlp(fold(key, "tower"), widths, (tasks,))
    params["out"] = {"kernel": jax.random.normal(fold(key, "out"), (tasks, widths[-1])) * 0.1 * widths[-1] ** -0.5}
    return params


def apply(
    params: Params, spec: InteractionSpec, user: Array, item: Array, context: Array | None = None, *, keys: jax.Array | None = None
) -> jax.Array:
    """user [..., D], item [..., D], context [..., C] -> logits [..., L].

    Args:
      params: of `init`.
      spec: the head's.
      user, item: of about unit length; leading axes broadcast, the context's too.
      context: [..., C] int32, category of each field; a negative one is unknown and has an embedding of its own, one of the field's number
        of categories or more gives NaN. None where the spec has no context.
      keys: typed keys, one per row of the leading axis; given, dropout acts.

    Raises:
      RecJaxError: a context that does not fit the spec's.

    Reference: Wang et al. 2021, "DCN V2", section 3 (cross layers under the deep network); Ma et al. 2018, "Modeling Task Relationships in
    Multi-task Learning with Multi-gate Mixture-of-Experts", section 4; Tang et al. 2020, "Progressive Layered Extraction", section 4.
    """
    user, item = jnp.asarray(user), jnp.asarray(item)
    return _logits(params, spec, jnp.einsum("...d,...d->...", user, item), user, item, _rows(spec, context), keys)


def score_all(
    params: Params,
    spec: InteractionSpec,
    users: Array,
    items: Array,
    context: Array | None = None,
    *,
    task: int = 0,
    block: int | None = None,
    once: bool = False,
) -> jax.Array:
    """users [U, D], items [N, D], context [U, C] -> logits [U, N] of one task; the features of a block of items are made at a time.

    Args:
      params, spec: as of `apply`.
      users, items: of about unit length.
      context: [U, C] int32, as of `apply`; None = unknown circumstances, -1 in all fields.
      task: column of the logits.
      block: items at a time; None = as many as BLOCK allows.
      once: what is of the user and the context alone is worked out once for a user, not for each item (`_score_once`): the same numbers but
        for their rounding, by a third of the products where many items are scored. For a network that all tasks share; others do without.

    Raises:
      RecJaxError: no such task, or a context that does not fit.
    """
    users, items = jnp.asarray(users), jnp.asarray(items)
    if not 0 <= task < spec.tasks:
        raise RecJaxError(f"task={task}: the head has the tasks 0 to {spec.tasks - 1}")
    if context is None and spec.context:
        context = jnp.full((users.shape[0], len(spec.context)), -1)
    rows = _rows(spec, context)
    rows = None if rows is None else rows[:, None]

    def score(some: jax.Array) -> jax.Array:
        dot = jnp.einsum("ud,nd->un", users, some)
        return _logits(params, spec, dot, users[:, None], some[None], rows, None)[..., task]

    if spec.kind == "dot":
        return score(items)
    if once and spec.sharing == "bottom" and spec.hidden:
        return _score_once(params, spec, users, items, rows, task)
    features = 3 * users.shape[-1] + len(spec.context) * spec.context_dim
    block = min(block or max(1, BLOCK // (users.shape[0] * features)), items.shape[0])
    blocks = -(-items.shape[0] // block)
    padded = jnp.pad(items, ((0, blocks * block - items.shape[0]), (0, 0))).reshape(blocks, block, -1)
    scores = jax.lax.map(score, padded)
    return jnp.moveaxis(scores, 0, 1).reshape(users.shape[0], -1)[:, : items.shape[0]]


def _score_once(params: Params, spec: InteractionSpec, users: jax.Array, items: jax.Array, rows: jax.Array | None, task: int) -> jax.Array:
    """users [U, D], items [N, D], rows [U, 1, C] -> logits [U, N] of one task, a user after the other.

    A head's input is own, what is the same for all items of a user, beside pair [N, 2 D]. Through the cross layers own becomes
    constant + known @ weights, with known [N, 2 D * layers] what pair was before each layer: nobody but the first dense layer asks for it,
    and there the weights join the kernel's.
    """
    dim, unit = users.shape[1], users.shape[1] ** 0.5
    apart = lambda x: (jnp.concatenate([x[:dim], x[3 * dim :]]), x[dim : 3 * dim])  # the features of own, and of pair
    size = min(ITEMS_ONCE, items.shape[0])
    blocks = jnp.pad(items, ((0, -items.shape[0] % size), (0, 0))).reshape(-1, size, dim)

    def joined(kernel: jax.Array, bias: jax.Array, constant: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """kernel [F, out] of own's and pair's features -> [known and pair, out], and the bias with own's constant in it."""
        of_own, of_pair = apart(kernel)
        return jnp.concatenate([weights @ of_own, of_pair]), constant @ of_own + bias

    def score(of_user: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        user, row = of_user
        context = [] if row is None else [jnp.take(params["context"]["embedding"], row[0], axis=0, mode="fill", fill_value=jnp.nan)]
        own = jnp.concatenate([user * unit, *(x.reshape(-1) for x in context)])
        constant, weights, crosses = own, jnp.zeros((0, len(own))), []
        for n in range(len(params.get("cross", {}))):
            layer = params["cross"][f"layer_{n}"]
            kernel = layer["down"] @ layer["kernel"] if "down" in layer else layer["kernel"]
            made, bias = joined(kernel, layer["bias"], constant, weights)
            (own_made, pair_made), (own_bias, pair_bias) = apart(made.T), apart(bias)
            crosses.append((pair_made.T, pair_bias))
            constant = own * own_bias + constant
            weights = own_made.T * own + jnp.pad(weights, ((0, 2 * dim), (0, 0)))
        dense = params["shared"]["layer_0"]
        kernel, bias = joined(dense["kernel"], dense["bias"], constant, weights)
        shared = {**params["shared"], "layer_0": {"kernel": kernel, "bias": bias}}

        def of_block(some: jax.Array) -> jax.Array:
            start = pair = jnp.concatenate([some * unit, (user * some) * unit**2], axis=-1)
            known = jnp.zeros((some.shape[0], 0))
            for kernel, bias in crosses:
                known = jnp.concatenate([known, pair], axis=-1)
                pair = start * (known @ kernel + bias) + pair
            x = _mlp(shared, jnp.concatenate([known, pair], axis=-1), "", "", None, "shared", 0.0)
            x = _mlp(params["tower"], x, "l", "", None, "tower", 0.0)
            out = jnp.einsum("nlh,lh->nl" if spec.tower else "nh,lh->nl", x, params["out"]["kernel"])[:, task]
            return params["dot"]["scale"][task] * (some @ user) + params["dot"]["bias"][task] + out

        return jax.lax.map(of_block, blocks).reshape(-1)[: items.shape[0]]

    return jax.lax.map(score, (users, rows))


def _rows(spec: InteractionSpec, context: Array | None) -> jax.Array | None:
    """context [..., C] -> rows [..., C] of the one table, in which each field has a row for the unknown and then one per category."""
    given = None if context is None else jnp.shape(context)[-1]
    if given != (len(spec.context) or None):
        raise RecJaxError(f"the head has {len(spec.context)} context fields, and the context given has {given}; -1 stands for unknown")
    if context is None:
        return None
    sizes = np.asarray(spec.context)
    first = np.cumsum(sizes + 1) - sizes - 1
    outside = int(sizes.sum()) + len(sizes)
    context = jnp.asarray(context)
    return jnp.where(context < sizes, first + 1 + jnp.maximum(context, -1), outside)


def _logits(
    params: Params,
    spec: InteractionSpec,
    dot: jax.Array,
    user: jax.Array,
    item: jax.Array,
    rows: jax.Array | None,
    keys: jax.Array | None,
) -> jax.Array:
    """dot [...], user, item [..., D], rows [..., C] -> logits [..., L]."""
    logits = params["dot"]["scale"] * dot[..., None] + params["dot"]["bias"]
    known = None if rows is None else jnp.take(params["context"]["embedding"], rows, axis=0, mode="fill", fill_value=jnp.nan)
    if spec.kind == "dot":
        return logits if known is None else logits + known.sum(-2)
    unit = user.shape[-1] ** 0.5  # an element of a unit vector is about D ** -0.5; networks start best from 1
    parts = [user * unit, item * unit, (user * item) * unit**2]
    if known is not None:
        parts.append(known.reshape(*known.shape[:-2], -1))
    leading = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    x = jnp.concatenate([jnp.broadcast_to(part, (*leading, part.shape[-1])) for part in parts], axis=-1)
    if spec.kind == "dcn":
        x = _cross(params["cross"], x)
    if spec.sharing == "bottom":
        x, axes = _mlp(params["shared"], x, "", "", keys, "shared", spec.dropout), ""
    elif spec.sharing == "mmoe":
        x, axes = _mmoe(params, spec, x, keys), "l"
    else:
        x, axes = _ple(params, spec, x, keys), "l"
    x = _mlp(params["tower"], x, "l", axes, keys, "tower", spec.dropout)
    return logits + jnp.einsum(f"...{'l' if spec.tower else axes}h,lh->...l", x, params["out"]["kernel"])


def _mmoe(params: Params, spec: InteractionSpec, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """x [..., F] -> [..., L, H]."""
    experts = _mlp(params["experts"], x, "e", "", keys, "experts", spec.dropout)
    gates = jax.nn.softmax(jnp.einsum("...i,lie->...le", x, params["gates"]["kernel"]), axis=-1)
    return jnp.einsum("...le,...eh->...lh", gates, experts)


def _ple(params: Params, spec: InteractionSpec, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """x [..., F] -> [..., L, H]."""
    mine, common, axes = x, x, ""  # what the tasks and the shared experts read; all the same at first
    own = spec.task_experts
    for n in range(spec.levels):
        level, name = params[f"level_{n}"], f"level_{n}"
        experts = _mlp(level["experts"], common, "e", "", keys, f"{name}/experts", spec.dropout)
        task_experts = _mlp(level["task_experts"], mine, "le", axes, keys, f"{name}/task_experts", spec.dropout)
        gates = jax.nn.softmax(jnp.einsum(f"...{axes}i,lie->...le", mine, level["gates"]["kernel"]), axis=-1)
        mine = jnp.einsum("...le,...leh->...lh", gates[..., :own], task_experts)
        mine = mine + jnp.einsum("...le,...eh->...lh", gates[..., own:], experts)
        if n + 1 < spec.levels:
            every = jnp.concatenate([task_experts.reshape(*experts.shape[:-2], -1, experts.shape[-1]), experts], axis=-2)
            gate = jax.nn.softmax(jnp.einsum("...i,ie->...e", common, level["gate"]["kernel"]), axis=-1)
            common = jnp.einsum("...e,...eh->...h", gate, every)
        axes = "l"
    return mine


def _cross(params: Params, x: jax.Array) -> jax.Array:
    """x [..., F] -> [..., F]: x_(n+1) = x_0 * (W x_n + b) + x_n."""
    start = x
    for n in range(len(params)):
        layer = params[f"layer_{n}"]
        inner = jnp.einsum("...i,io->...o", x, layer["down"]) if "down" in layer else x
        x = start * (jnp.einsum("...i,io->...o", inner, layer["kernel"]) + layer["bias"]) + x
    return x


def _init_cross_layer(key: jax.Array, width: int, rank: int) -> dict[str, Any]:
    draw = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    down = {"down": draw(fold(key, "down"), (width, rank))} if rank else {}
    return {**down, "kernel": draw(fold(key, "kernel"), (rank or width, width)), "bias": jnp.zeros(width)}


def _init_mlp(key: jax.Array, widths: Sequence[int], stack: tuple[int, ...] = ()) -> dict[str, Any]:
    layers = {}
    for n, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        draw = jax.nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal", batch_axis=tuple(range(len(stack))))
        layers[f"layer_{n}"] = {"kernel": draw(fold(key, n), (*stack, inputs, outputs)), "bias": jnp.zeros((*stack, outputs))}
    return layers


def _init_gate(key: jax.Array, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"kernel": jax.random.normal(key, shape) * shape[-2] ** -0.5}


def _mlp(params: Params, x: jax.Array, stack: str, axes: str, keys: jax.Array | None, name: str, rate: float) -> jax.Array:
    """x [..., *axes, in] -> [..., *stack, out]: dense and ReLU, of each member of the stack; `axes`: those of it that x has already."""
    for n in range(len(params)):
        layer = params[f"layer_{n}"]
        x = jax.nn.relu(jnp.einsum(f"...{axes}i,{stack}io->...{stack}o", x, layer["kernel"]) + layer["bias"])
        x = x if keys is None else dropout(x, fold(keys, f"{name}/{n}"), rate)
        axes = stack
    return x


def init_cross(key: jax.Array, spec: BertSpec) -> dict[str, Any]:
    """A typed key -> parameters of a cross-encoder's head: {"transform": {"kernel", "bias"}, "out": {"kernel", "bias"}}."""
    normal = jax.nn.initializers.truncated_normal(0.02)
    return {
        "transform": {"kernel": normal(fold(key, "transform"), (spec.width, spec.width)), "bias": jnp.zeros(spec.width)},
        "out": {"kernel": normal(fold(key, "out"), (spec.width, 1)), "bias": jnp.zeros(1)},
    }


def cross_scores(
    head: Params,
    text_params: Params,
    spec: BertSpec,
    tokens: Array,
    segment_ids: Array,
    *,
    texts_per_row: int,
    types: Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """tokens [R, T], segment_ids [R, T] -> logits [R, K]: each segment is one pair, "user text [SEP] item text".

    Args:
      head: of `init_cross`.
      text_params, spec: the encoder's; its pooling makes one vector of a pair.
      tokens: packed pairs.
      segment_ids: 1..K within a row, 0 is padding; a place without a pair has a logit of no meaning.
      texts_per_row: K.
      types: [R, T] token types, 1 for the item's text; None, or an encoder that knows one type only: all 0.
      keys: typed keys [R]; given, the encoder's dropout acts.

    Reference: Nogueira and Cho 2019, "Passage Re-ranking with BERT", section 3.
    """
    hidden = encode(text_params, spec, tokens, segment_ids, types=types if spec.type_vocab > 1 else None, keys=keys)
    pooled = pool_segments(hidden, jnp.asarray(segment_ids), segments=texts_per_row, kind=spec.pooling)
    inner = jnp.tanh(jnp.einsum("rkd,de->rke", pooled, head["transform"]["kernel"]) + head["transform"]["bias"])
    return (jnp.einsum("rke,eo->rko", inner, head["out"]["kernel"]) + head["out"]["bias"])[..., 0]
