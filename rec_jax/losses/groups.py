"""InfoNCE within one set of vectors, where those of a group seek each other, on the streaming fold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_jax.losses.blockwise import fold
from rec_jax.losses.checks import check_block, check_shape, check_vectors
from rec_jax.losses.contrastive import scale_of
from rec_jax.losses.tiles import NO_CANDIDATE, NO_POSITIVE, Count, LogSumExp, Side, Total
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError


def group_info_nce(
    vectors: Array,
    groups: Array,
    *,
    temperature: Any,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """vectors [B, D], groups [B] -> loss [B]: -log softmax at the mean logit of a row's group, against the rows of other groups.

    With s the mean of the row's logits with the others of its group: softplus(log-sum-exp of the logits with other groups - s). No row of
    the group is a negative. A row that is alone in its group has loss 0.

    Args:
      vectors: [B, D] float; unit vectors give cosines.
      groups: [B] int32, -1 is padding: neither row nor candidate.
      temperature: scalar > 0 that divides the logits; may be traced and learned.
      block: candidates per block; None chooses.
      mesh: with `axis`, rows are sharded and go round a ring over that mesh axis (or axes).
      axis: a name or several.

    Raises:
      RecJaxError: a temperature <= 0 (where its value is known), shapes that do not fit, an axis that is not in the mesh, rows that its
        devices do not divide.

    Reference: Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2 (the sum over positives outside the logarithm), here with the
    positives in the denominator by their mean logit alone.
    """
    check_block(block)
    check_vectors(vectors, vectors)
    check_shape("groups", groups, np.shape(vectors)[:1], "one group per row")
    if not jnp.issubdtype(jnp.asarray(groups).dtype, jnp.integer):
        raise RecJaxError(f"groups has dtype {jnp.asarray(groups).dtype}; expected integers, -1 for padding")
    vectors, groups = jnp.asarray(vectors), jnp.asarray(groups, jnp.int32)
    dtype = jnp.promote_types(jnp.float32, vectors.dtype)
    there = groups >= 0
    vectors, bias = jnp.where(there[:, None], vectors, 0), jnp.where(there, 0, -jnp.inf).astype(dtype)
    scale = jnp.asarray(scale_of(temperature), dtype)
    # A group's number stands where a positive's place would: the fold takes all of the group for positives, the row itself among them.
    query = Side(vectors, jnp.where(there, groups, NO_POSITIVE)[:, None], None, bias)
    item = Side(vectors, jnp.where(there, groups, NO_CANDIDATE)[:, None], None, bias)
    wanted = (LogSumExp(), Total("positives"), Count("positives"))
    (others, total, count), _ = fold(query, item, scale, of_query=wanted, block=block, mesh=mesh, axis=axis)
    own = scale * jnp.einsum("bd,bd->b", vectors, vectors, preferred_element_type=dtype)
    positive = (total - own) / jnp.maximum(count - 1, 1)
    return jnp.where(count > 1, jax.nn.softplus(others - jnp.where(count > 1, positive, 0)), 0)
