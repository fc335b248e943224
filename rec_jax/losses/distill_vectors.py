"""What a student learns from a teacher's vectors: themselves, relations between them, hidden states and attention.

The teacher gets no gradient. Where widths differ, the caller projects the student first; relations and attention need no projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses.checks import check_shape
from rec_jax.losses.pointwise import huber
from rec_jax.losses.ranking import log_softmax
from rec_jax.types import Array, RecJaxError

VECTOR_FORMS = ("cosine", "mse")
LayerMap = Sequence[tuple[int, int]]  # (layer of the student, layer of the teacher), counted from 0

_TINY = 1e-30  # a largest magnitude below it is a zero vector
_ELEMENTS = 1 << 20  # of differences [rows, neighbours, D] that relations look at in one go


def vector_loss(student: Array, teacher: Array, *, form: str = "cosine") -> jax.Array:
    """student [..., D], teacher [..., D] -> loss [...]: 1 - cosine, or the mean squared difference of the components.

    Args:
      student: [..., D] float, after the projection to the teacher's width.
      teacher: [..., D] float.
      form: "cosine" or "mse". The cosine with a zero vector is 0, without gradient.

    Raises:
      RecJaxError: an unknown form, shapes that differ.

    Reference: Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation" (mse); Sanh et
    al. 2019, "DistilBERT" (cosine).
    """
    if form not in VECTOR_FORMS:
        raise RecJaxError(f"form is {form!r}; expected one of {', '.join(VECTOR_FORMS)}")
    if not np.ndim(student) or np.shape(student) != np.shape(teacher):
        raise RecJaxError(
            f"student has shape {np.shape(student)} and teacher {np.shape(teacher)}; expected one shape [..., D]: project the student first"
        )
    student, teacher = _wide(student), _taught(teacher)
    if form == "mse":
        return jnp.square(student - teacher).mean(-1)
    return 1 - jnp.sum(_unit(student) * _unit(teacher), -1)


def distance_loss(student: Array, teacher: Array, *, mask: Array | None = None, neighbours: int | None = None) -> jax.Array:
    """student [B, D], teacher [B, E] -> loss [B]: Huber's loss between the distances to other rows, each in units of their mean.

    The mean of the losses of the real rows is the loss of the source.

    Args:
      student, teacher: vectors of the same B texts, items or users; widths may differ.
      mask: [B] bool, False for padding: its loss is 0, and nobody looks at it.
      neighbours: each row looks at this many real rows that follow it (behind the last comes the first): O(B * neighbours * D). Rows of a
        shuffled batch are a random choice of pairs. None: at all others.

    Equal vectors have distance 0, without gradient. A row alone has loss 0.

    Raises:
      RecJaxError: shapes that do not fit, neighbours < 1.

    Reference: Park et al. 2019, "Relational Knowledge Distillation", section 3.2.1.
    """
    student, teacher, index, there = _related(student, teacher, mask, neighbours)
    width = max(student.shape[1], teacher.shape[1])

    def distances(row: Any) -> Any:
        i, index, there = row
        return tuple(jnp.where(there, _length(x[index] - x[i]), 0) for x in (student, teacher))

    both = _by_row(distances, (jnp.arange(len(index)), index, there), index.shape[1] * width)
    of_student, of_teacher = (_by_mean(d, there) for d in both)
    return _mean(huber(of_student - of_teacher), there)


def angle_loss(student: Array, teacher: Array, *, mask: Array | None = None, neighbours: int | None = 32) -> jax.Array:
    """student [B, D], teacher [B, E] -> loss [B]: Huber's loss between the cosines of the angles at each row, over pairs of other rows.

    The angle at row j between rows i and k has the cosine of i - j and k - j. All of them are O(B^3 D); here every row is the vertex of the
    angles between the `neighbours` real rows that follow it (behind the last comes the first), some rows at a time: O(B * neighbours^2 * D)
    and memory for those rows alone. Rows of a shuffled batch are a random choice of triples.

    Args:
      student, teacher: vectors of the same B texts, items or users; widths may differ.
      mask: [B] bool, False for padding: its loss is 0, and nobody looks at it.
      neighbours: at least 2; None: all others, which is the loss of the source.

    A row equal to the vertex makes angles of cosine 0, without gradient. A row with fewer than two others has loss 0.

    Raises:
      RecJaxError: shapes that do not fit, neighbours < 2.

    Reference: Park et al. 2019, "Relational Knowledge Distillation", section 3.2.2.
    """
    student, teacher, index, there = _related(student, teacher, mask, neighbours, least=2)
    c = index.shape[1]
    width = max(student.shape[1], teacher.shape[1])

    def at_vertex(row: Any) -> Any:
        i, index, there = row

        def cosines(x: Any) -> Any:
            towards = _unit(x[index] - x[i])
            return jnp.einsum("id,kd->ik", towards, towards, precision=jax.lax.Precision.HIGHEST)

        pairs = there[:, None] & there[None, :] & ~jnp.eye(c, dtype=bool)
        return _mean(huber(cosines(student) - cosines(teacher)).reshape(-1), pairs.reshape(-1))

    return _by_row(at_vertex, (jnp.arange(len(index)), index, there), c * max(width, c))


def hidden_states_loss(student: Sequence[Array], teacher: Sequence[Array], *, layer_map: LayerMap, mask: Array) -> jax.Array:
    """student and teacher [R, T, D] of each layer, mask [R, T] -> loss [R, T] per token: mean squared difference of the mapped layers.

    For the mean over the real tokens weigh it by mask / mask.sum().

    Args:
      student: hidden states, layer by layer, after the projection to the teacher's width.
      teacher: hidden states, layer by layer; need not be as many.
      layer_map: pairs (student's layer, teacher's layer), counted from 0 in the two sequences; the loss is the mean over the pairs.
      mask: [R, T] bool, False for padding: the loss is 0.

    Raises:
      RecJaxError: an empty map, a layer that is not there, shapes that do not fit.

    Reference: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", section 3.1.
    """
    there = jnp.asarray(mask, bool)

    def one(student: Any, teacher: Any) -> Any:
        check_shape("mask", mask, student.shape[:-1], "one per token")
        student, teacher = (jnp.where(there[..., None], x, 0) for x in (student, teacher))
        return vector_loss(student, teacher, form="mse")

    return _over_layers(student, teacher, layer_map, one, rank=3)


def attention_scores(query: Array, key: Array, *, heads: int) -> jax.Array:
    """query [R, T, D], key [R, T, D] -> scores [R, heads, T, T] in float32: products of the heads' parts, over sqrt(D / heads).

    With an attention's own heads that is its scores before the softmax. With key = query (or keys, or values, of both) it is a relation
    between tokens, which a student of another width or other heads can be compared by.

    Raises:
      RecJaxError: shapes that differ, heads that do not divide D.

    Reference: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation", section 3.
    """
    if np.ndim(query) != 3 or np.shape(query) != np.shape(key):
        raise RecJaxError(f"query has shape {np.shape(query)} and key {np.shape(key)}; expected [R, T, D] for both")
    r, t, d = np.shape(query)
    if heads < 1 or d % heads:
        raise RecJaxError(f"heads is {heads!r}, which does not divide the width {d}; expected a divisor")
    parts = (jnp.asarray(x).reshape(r, t, heads, d // heads) for x in (query, key))
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(query, key))
    return jnp.einsum("rqhd,rkhd->rhqk", *parts, preferred_element_type=dtype) / np.sqrt(d // heads)


def attention_loss(student: Sequence[Array], teacher: Sequence[Array], *, layer_map: LayerMap, mask: Array) -> jax.Array:
    """student and teacher [R, heads, T, T] of each layer, mask [R, T, T] -> loss [R, T] per token: KL(teacher || student) of its row.

    Mean over heads and pairs of layers. For the mean over the real tokens weigh it by real / real.sum().

    Args:
      student, teacher: attention scores before the softmax (or their log-probabilities), layer by layer: see `attention_scores`. As many
        heads in both.
      layer_map: pairs (student's layer, teacher's layer), counted from 0 in the two sequences.
      mask: [R, T, T] bool, which keys (last axis) a token sees: those of its own text. Who sees none is padding: its loss is 0.

    Raises:
      RecJaxError: an empty map, a layer that is not there, shapes that do not fit.

    Reference: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", section 3.1; Jiao et al. 2020, "TinyBERT", section 3.1.
    """
    seen = jnp.asarray(mask, bool)[:, None]

    def one(student: Any, teacher: Any) -> Any:
        r, _, t, k = student.shape
        check_shape("mask", mask, (r, t, k), "which keys each token sees")
        there = jnp.broadcast_to(seen, student.shape)
        log_student, log_teacher = (log_softmax(jnp.where(there, x, 0), there) for x in (_wide(student), _taught(teacher)))
        return jnp.where(there, jnp.exp(log_teacher) * (log_teacher - log_student), 0).sum(-1).mean(1)

    return _over_layers(student, teacher, layer_map, one, rank=4)


def _over_layers(
    student: Sequence[Array], teacher: Sequence[Array], layer_map: LayerMap, one: Callable[[Any, Any], Any], *, rank: int
) -> jax.Array:
    """Mean of one(student's layer, teacher's layer) over the map."""
    if not len(layer_map):
        raise RecJaxError("layer_map is empty; expected pairs (student's layer, teacher's layer), e.g. ((0, 1), (1, 3))")
    losses = []
    for of_student, of_teacher in layer_map:
        for name, layer, layers in (("student", of_student, student), ("teacher", of_teacher, teacher)):
            if not 0 <= layer < len(layers):
                raise RecJaxError(f"layer_map names layer {layer} of the {name}, which has {len(layers)}: expected 0 to {len(layers) - 1}")
        left, right = student[of_student], teacher[of_teacher]
        if np.ndim(left) != rank or np.shape(left) != np.shape(right):
            raise RecJaxError(
                f"layer {of_student} of the student has shape {np.shape(left)} and layer {of_teacher} of the teacher {np.shape(right)}; "
                f"expected one shape of {rank} axes"
            )
        losses.append(one(left, right))
    return jnp.stack(losses).mean(0)


def _related(
    student: Array, teacher: Array, mask: Array | None, neighbours: int | None, *, least: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Checks -> (student [B, D], teacher [B, E], the rows that each looks at [B, C], whether there are so many [B, C])."""
    shapes = np.shape(student), np.shape(teacher)
    if any(len(s) != 2 for s in shapes) or shapes[0][0] != shapes[1][0]:
        raise RecJaxError(f"student has shape {shapes[0]} and teacher {shapes[1]}; expected [B, D] and [B, E]: the same B rows")
    if neighbours is not None and neighbours < least:
        raise RecJaxError(f"neighbours is {neighbours!r}; expected an integer >= {least}, or None for all others")
    b = shapes[0][0]
    if mask is not None:
        check_shape("mask", mask, (b,), "one per row")
    real = jnp.ones(b, bool) if mask is None else jnp.asarray(mask, bool)
    student, teacher = (jnp.where(real[:, None], x, 0) for x in (_wide(student), _taught(teacher)))
    count = jnp.maximum(real.sum(), 1)
    order = jnp.argsort(~real, stable=True)  # real rows first
    place = jnp.cumsum(real) - 1
    step = jnp.arange(1, min(b - 1 if neighbours is None else neighbours, max(b - 1, 1)) + 1)
    index = order[(place[:, None] + step) % count]
    return student, teacher, index, real[:, None] & (step < count)


def _by_row(function: Callable[[Any], Any], rows: Any, elements: int) -> Any:
    """Maps a function over rows, some at once; its inner arrays, of `elements` a row, are made again for the gradient."""
    n = len(jax.tree.leaves(rows)[0])
    at_once = max(1, min(n, _ELEMENTS // max(elements, 1)))
    return jax.lax.map(jax.checkpoint(function), rows, batch_size=at_once)


def _by_mean(distances: Any, there: Any) -> jax.Array:
    # First in units of the largest, so that no square leaves the range.
    largest = jax.lax.stop_gradient(distances.max())
    distances = distances / jnp.where(largest > 0, largest, 1)
    mean = _mean(distances.reshape(-1), there.reshape(-1))
    return distances / jnp.where(mean > 0, mean, 1)


def _mean(values: Any, there: Any) -> jax.Array:
    """Mean over the last axis of those that are there; 0 where none is."""
    return jnp.where(there, values, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)


def _scaled(vectors: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., D] -> (vectors over their largest magnitude, so that no square leaves the range; that magnitude [...]; whether any)."""
    largest = jax.lax.stop_gradient(jnp.abs(vectors).max(-1))
    there = largest > _TINY
    largest = jnp.where(there, largest, 1)
    return jnp.where(there[..., None], vectors / largest[..., None], 0), largest, there


def _length(vectors: Any) -> jax.Array:
    """[..., D] -> Euclidean length [...]; of a zero vector 0, with gradient 0."""
    scaled, largest, there = _scaled(vectors)
    squares = jnp.where(there, jnp.square(scaled).sum(-1), 1)
    return jnp.where(there, largest * jnp.sqrt(squares), 0)


def _unit(vectors: Any) -> jax.Array:
    """[..., D] -> the same direction at length 1; a zero vector stays zero, with gradient 0."""
    scaled, _, there = _scaled(vectors)
    squares = jnp.where(there, jnp.square(scaled).sum(-1), 1)
    return scaled * jax.lax.rsqrt(squares)[..., None]


def _wide(values: Array) -> jax.Array:
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _taught(values: Array) -> jax.Array:
    return jax.lax.stop_gradient(_wide(values))
