"""The sigmoid loss: every pair of a query and a candidate is a question of its own, on the streaming fold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rec_jax.losses import softmax
from rec_jax.losses.blockwise import fold
from rec_jax.losses.checks import check_block, check_shape
from rec_jax.losses.tiles import SoftplusSum
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError


def sigmoid_loss(
    query: Array,
    item: Array,
    *,
    scale: Any,
    bias: Any,
    target: Array | None = None,
    weights: Array | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """query [B, D], item [N, D] -> loss [B]: -log sigmoid of the positive's logit, plus the sum of -log sigmoid(-logit) of all others.

    Logit = scale * query . item + bias. Differentiable in query, item, scale and bias.

    Args:
      query: [B, D] float.
      item: [N, D] float, the candidates.
      scale: scalar > 0; may be traced and learned. The source starts at 10.
      bias: scalar; may be traced and learned. The source starts at -10, which answers the many negatives before anything is learned.
      target: [B] int32, row of the positive in `item`; None: row i for query i. Negative = none: the loss is 0.
      weights: [B] float that multiply the losses; a query of weight 0 is padding.
      query_ids: [B] int32, id of each query's positive; None: item_ids[target].
      item_ids: [N] int32; a candidate with the id of the query's positive is no negative of it.
      item_mask: [N] bool, False for padding.
      block: candidates per block; None chooses.
      mesh: with `axis`, the candidates go round a ring over that mesh axis (or axes).
      axis: a name or several.

    Raises:
      RecJaxError: shapes that do not fit, a scale <= 0 (where its value is known), an axis that is not in the mesh, rows that its devices
        do not divide.

    Reference: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2 (there divided by B: use weights 1 / B).
    """
    check_block(block)
    check_shape("scale", scale, (), "a scalar")
    check_shape("bias", bias, (), "a scalar")
    if not isinstance(scale, jax.core.Tracer) and not float(scale) > 0:
        raise RecJaxError(f"scale is {scale!r}; expected a number > 0, e.g. 10")
    problem = softmax.make_problem(
        query,
        item,
        scale=scale,
        target=target,
        bias=jnp.broadcast_to(jnp.asarray(bias, jnp.float32), item.shape[:1]),
        query_ids=softmax.ids_of_positives(query_ids, item_ids, target, query.shape[0]),
        item_ids=item_ids,
        item_mask=item_mask,
        weights=weights,
        mesh=mesh,
        axis=axis,
    )
    if problem.positives is None:
        raise RecJaxError("the sigmoid loss on a mesh takes row i of item for query i: pass no target")
    (others,), _ = fold(
        problem.query, problem.sets[0], problem.scale, of_query=(SoftplusSum(),), block=block, mesh=problem.mesh, axis=problem.axis
    )
    loss = jnp.where(problem.valid, jax.nn.softplus(-problem.positives.logits[:, 0]) + others, 0)
    return loss if weights is None else jnp.where(jnp.asarray(weights) != 0, weights * loss, 0)
