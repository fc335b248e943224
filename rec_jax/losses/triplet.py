"""Triplet losses with negatives chosen among all candidates, on the streaming fold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rec_jax.losses import softmax
from rec_jax.losses.blockwise import fold
from rec_jax.losses.checks import check_block
from rec_jax.losses.tiles import Accumulator, ActiveCount, HingeSum, Maximum
from rec_jax.mesh import Axis
from rec_jax.types import Array, RecJaxError

MINING = ("hard", "semi_hard", "all")


def triplet_loss(
    query: Array,
    item: Array,
    *,
    margin: float,
    mining: str = "hard",
    target: Array | None = None,
    weights: Array | None = None,
    query_ids: Array | None = None,
    item_ids: Array | None = None,
    item_mask: Array | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """query [B, D], item [N, D] -> loss [B]: max(0, margin + s_negative - s_positive), s the dot product.

    For unit vectors it is half the triplet loss of squared distances with twice the margin.

    Args:
      query: [B, D] float.
      item: [N, D] float, the candidates.
      margin: by how much the positive's product should be above the negative's, > 0.
      mining: which negatives count. "hard": the one of highest product. "semi_hard": the highest of those below the positive; where there
        is none, the hard one. "all": the mean over the candidates that violate the margin.
      target: [B] int32, row of the positive in `item`; None: row i for query i. Negative = none: the loss is 0.
      weights: [B] float that multiply the losses; a query of weight 0 is padding.
      query_ids: [B] int32, id of each query's positive; None: item_ids[target].
      item_ids: [N] int32; a candidate with the id of the query's positive is no negative of it.
      item_mask: [N] bool, False for padding.
      block: candidates per block; None chooses.
      mesh: with `axis`, the candidates go round a ring over that mesh axis (or axes).
      axis: a name or several.

    A query without negatives has loss 0. Equally high negatives share the gradient.

    Raises:
      RecJaxError: a margin <= 0, an unknown mining, shapes that do not fit, an axis that is not in the mesh, rows that its devices do not
        divide.

    Reference: Schroff et al. 2015, "FaceNet", section 3.2 (semi-hard); Hermans et al. 2017, "In Defense of the Triplet Loss", eq. 5 (hard)
    and section 2 (all that violate).
    """
    check_block(block)
    if not margin > 0:
        raise RecJaxError(f"margin is {margin!r}; expected a number > 0, e.g. 0.2")
    if mining not in MINING:
        raise RecJaxError(f"mining is {mining!r}; expected one of {', '.join(MINING)}")
    problem = softmax.make_problem(
        query,
        item,
        scale=1.0,
        target=target,
        query_ids=softmax.ids_of_positives(query_ids, item_ids, target, query.shape[0]),
        item_ids=item_ids,
        item_mask=item_mask,
        weights=weights,
        mesh=mesh,
        axis=axis,
    )
    if problem.positives is None:
        raise RecJaxError("the triplet loss on a mesh takes row i of item for query i: pass no target")
    positive = problem.positives.logits[:, 0]

    def over_others(shift: Any, *accumulators: Accumulator) -> tuple[Any, ...]:
        side = problem.query._replace(shift=jnp.where(problem.valid, shift, 0))
        return fold(side, problem.sets[0], problem.scale, of_query=accumulators, block=block, mesh=mesh, axis=axis)[0]

    # Logits are shifted by the positive's, so that 0 is where a negative is as near as the positive.
    if mining == "all":
        total, active = over_others(margin - positive, HingeSum(), ActiveCount())
        loss = total / jnp.maximum(active, 1)
    elif mining == "hard":
        ((highest, _),) = over_others(-positive, Maximum())
        loss = _hinge(margin, highest)
    else:
        (highest, _), (below, _) = over_others(-positive, Maximum(), Maximum(below_zero=True))
        loss = _hinge(margin, jnp.where(below > -jnp.inf, below, highest))
    loss = jnp.where(problem.valid, loss, 0)
    return loss if weights is None else jnp.where(jnp.asarray(weights) != 0, weights * loss, 0)


def _hinge(margin: float, difference: Any) -> Any:
    """max(0, margin + difference), and 0 with no gradient where there is no negative (-inf)."""
    some = difference > -jnp.inf
    return jnp.where(some, jax.nn.relu(margin + jnp.where(some, difference, 0)), 0)
