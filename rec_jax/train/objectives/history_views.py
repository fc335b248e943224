"""Two random views of each history of the batch: cropped, with hidden items, reordered, or under two draws of dropout."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.data.augment import HistoryViews
from rec_jax.losses import group_info_nce, weighted_info_nce
from rec_jax.towers.two_tower import TwoTowerSpec
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs, RecJaxError

NAME = "history_views"


@dataclasses.dataclass(frozen=True)
class HistoryViewsSpec:
    """Keys of `config.objectives.history_views`; the data makes the views as `kinds`, `crop`, `mask` and `reorder` say."""

    temperature: float
    kinds: tuple[str, ...]
    crop: float
    mask: float
    reorder: float
    same_target: bool
    ramp: int

    def __post_init__(self) -> None:
        base.check_range(f"{NAME}.temperature", self.temperature, above=0)
        base.check_range(f"{NAME}.ramp", self.ramp, least=0)
        HistoryViews(self.kinds, self.crop, self.mask, self.reorder)  # its checks are those of these keys


def check(place: str, spec: HistoryViewsSpec, towers: TwoTowerSpec) -> None:
    """Raises RecJaxError unless the user tower reads packed histories and can make two views of them.

    Args:
      place: the objective's config key, for messages.
      spec: of the objective.
      towers: of the step.
    """
    if towers.history is None:
        raise RecJaxError(f"{place} needs packed histories: set config.towers.user.kind='history'; it is {towers.user!r}")
    if not spec.kinds and not towers.history.dropout > 0:
        raise RecJaxError(f"{place}.kinds=() leaves dropout to make two views: set config.towers.user.dropout, e.g. to 0.2, or name kinds")
    if "mask" in spec.kinds and not towers.history.mask:
        raise RecJaxError(f"{place}.kinds has 'mask', but the history tower has no vector for hidden items: set TwoTowerSpec.history.mask")


def history_views(outputs: Outputs, batch: Batch, context: Context, spec: HistoryViewsSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Each view of each window seeks its other view among the views of all windows of the global batch -> (loss, metrics).

    With `same_target` it seeks the views of all windows that the same item follows, and none of these is a negative of it.

    Reference: Xie et al., "Contrastive Learning for Sequential Recommendation" (2022), sections 3.2 and 3.3; Qiu et al., "Contrastive
    Learning for Representation Degeneration Problem in Sequential Recommendation" (2022), section 4 (dropout alone; same targets).
    """
    _, shards, examples, _ = outputs.history_views.shape
    both = jnp.moveaxis(outputs.history_views, 0, 1).reshape(shards * 2 * examples, -1)  # per shard the first views, then the second
    there = jnp.asarray(batch.view_targets) >= 0
    twice = lambda x: jnp.tile(x, (1, 2)).reshape(-1)
    weights = twice(there / jnp.maximum(2 * there.sum(), 1))
    ring: dict[str, Any] = {"mesh": context.mesh, "axis": context.axes}
    if spec.same_target:
        groups = twice(jnp.where(there, base.lookup(batch.item_ids, batch.view_targets), -1))
        loss = jnp.sum(weights * group_info_nce(both, groups, temperature=spec.temperature, **ring))
        return loss, {NAME: loss}
    ids = twice(jnp.arange(shards * examples, dtype=jnp.int32).reshape(shards, examples))
    place = jnp.arange(shards * 2 * examples, dtype=jnp.int32).reshape(shards, 2, examples)
    loss = weighted_info_nce(
        both,
        both,
        temperature=spec.temperature,
        weights=weights,
        target=place[:, ::-1].reshape(-1),
        query_ids=ids,
        item_ids=ids,
        item_mask=twice(there),
        **ring,
    )
    return loss, {NAME: loss}


def make(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.history_views` -> Objective."""
    spec = HistoryViewsSpec(**{**keys, "kinds": tuple(keys["kinds"])})
    return base.Objective(NAME, weight, spec, history_views, history_views=True, ramp=spec.ramp)
