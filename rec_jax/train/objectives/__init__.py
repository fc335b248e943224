"""Objectives: what each needs, and its pure function (outputs, batch, context, spec) -> (loss, metrics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rec_jax.towers.two_tower import TwoTowerSpec
from rec_jax.train.objectives import base, consistency, cross, distill, forms, history_views, info_nce, pairs, pretrain, task, views
from rec_jax.train.objectives.base import Objective, ramp_up, target_ids, targets
from rec_jax.types import RecJaxError

__all__ = ["OBJECTIVES", "Objective", "check", "make_objectives", "ramp_up", "target_ids", "targets"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "info_nce": info_nce.make,
    "bce": pairs.make_bce,
    "sigmoid": pairs.make_sigmoid,
    "triplet": pairs.make_triplet,
    "simcse": views.make_simcse,
    "simclr": views.make_simclr,
    "history_views": history_views.make,
    "id_consistency": consistency.make,
    "mlm": pretrain.make_mlm,
    "denoise": pretrain.make_denoise,
    "cross": cross.make,
    "task": task.make_task,
    "policy": task.make_policy,
    "preference": task.make_preference,
    "distill_kl": distill.make_kl,
    "distill_margin": distill.make_margin,
    "distill_rank": distill.make_rank,
    "distill_vectors": distill.make_vectors,
    "distill_relations": distill.make_relations,
    "distill_layers": distill.make_layers,
}
OF_TEXTS = ("mlm", "denoise", "simcse", "simclr")  # what batches of texts can teach
OF_PAIRS = ("cross",)  # what batches of pairs can teach


def make_objectives(objectives: Mapping[str, Mapping[str, Any]], *, labels: int = 0) -> tuple[Objective, ...]:
    """`config.objectives` -> those with a weight above 0; `labels` is how many the data's impressions have, 0 for histories.

    Raises:
      RecJaxError: an unknown name, a bad value, or none with weight.
    """
    catalogue = objectives["info_nce"]["candidates"] == "catalogue" if "info_nce" in objectives else True
    known = {"task": {"labels": labels}, "distill_kl": {"catalogue": catalogue}}
    out = []
    for name, keys in objectives.items():
        if name not in OBJECTIVES:
            raise RecJaxError(f"config.objectives.{name}: no such objective; there are {', '.join(OBJECTIVES)}")
        if keys["weight"] > 0:
            own = {k: v for k, v in keys.items() if k != "weight"}
            out.append(OBJECTIVES[name](keys["weight"], own, **known.get(name, {})))
    if not out:
        raise RecJaxError(f"config.objectives gives none of {', '.join(objectives)} a weight above 0")
    return tuple(out)


def check(
    objectives: tuple[Objective, ...],
    towers: TwoTowerSpec,
    *,
    shards: int,
    queries: int,
    kind: str = "histories",
    teacher: TwoTowerSpec | None = None,
) -> None:
    """Finds out before anything is compiled whether towers, teacher and batches (G shards of Q queries) have what the objectives need.

    Raises:
      RecJaxError: names the config key, its value and what it must be.
    """
    for o in objectives:
        place, batch = f"config.objectives.{o.name}", shards * queries
        if kind == "texts" and o.name not in OF_TEXTS:
            raise RecJaxError(f"{place} needs users: batches of texts (config.batch.kind) teach {', '.join(OF_TEXTS)}; set its weight to 0")
        if kind == "pairs" and o.name not in OF_PAIRS:
            raise RecJaxError(f"{place}: batches of pairs (config.batch.kind) teach {', '.join(OF_PAIRS)} alone; set its weight to 0")
        if kind != "pairs" and o.name in OF_PAIRS:
            raise RecJaxError(f"{place} needs config.batch.kind='pairs'; it is {kind!r}")
        if (o.masked or o.denoised) and kind != "texts":
            raise RecJaxError(f"{place} needs config.batch.kind='texts'; it is {kind!r}")
        if o.name == "policy" and kind != "impressions":
            raise RecJaxError(f"{place} needs logged feedback: config.batch.kind='impressions'; it is {kind!r}")
        if o.teacher and teacher is None:
            raise RecJaxError(f"{place} needs a teacher: set config.teacher.path, or give the stage one before it")
        if o.name == "distill_kl" and not o.spec.scale and not any(name == base.TEMPERATURE for p in objectives for name, _ in p.scalars):
            raise RecJaxError(f"{place}.scale=0 takes the learned temperature of info_nce, which is not learned here: set {place}.scale")
        if o.plain and not (towers.item_text and towers.n_ids):
            raise RecJaxError(
                f"{place} compares items with and without their own vectors: set config.towers.item.ids=True and text=True, or its "
                "weight to 0"
            )
        if o.layers:
            _check_layers(place, towers, teacher)
        if o.queue and (o.queue < batch or o.queue % batch):
            fits = batch if o.queue < batch else o.queue // batch * batch
            what = "is shorter than a batch" if o.queue < batch else "is no whole number of batches"
            raise RecJaxError(
                f"{place}.queue={o.queue} {what} of {shards} shards x {queries} places; set it to {fits}, or another multiple"
            )
        for width in o.matryoshka:
            if not 0 < width < towers.dim:
                raise RecJaxError(
                    f"{place}.matryoshka has the width {width}; expected widths above 0 and below config.towers.dim={towers.dim}"
                )
        if o.positives > 1 and towers.history is None:
            raise RecJaxError(f"{place}.positives={o.positives} are next items of a packed history: set config.towers.user.kind='history'")
        if o.neighbours and (kind != "histories" or towers.history is None):
            raise RecJaxError(f"{place}.neighbour_share is of packed histories: set it to 0, or config.towers.user.kind='history'")
        if o.masks_history and (kind != "histories" or towers.history is None):
            raise RecJaxError(f"{place}.mask_history is of packed histories: set it to False, or config.towers.user.kind='history'")
        if o.history_views:
            history_views.check(place, o.spec, towers)
        if kind == "histories" and towers.history is not None:
            forms.check(o, towers.history, None if teacher is None else teacher.history)
        if o.uniform % shards:
            raise RecJaxError(f"{place}.uniform={o.uniform} does not divide over config.batch.shards={shards}; make it a multiple")
        if o.views and not towers.encode:
            raise RecJaxError(f"{place} encodes texts in the step: set config.towers.text.source='tokens', or {place}.weight=0")
        if o.views and not towers.text.dropout > 0:
            raise RecJaxError(f"{place} needs dropout, or its two views are the same: set config.towers.text.dropout, e.g. to 0.1")


def _check_layers(place: str, towers: TwoTowerSpec, teacher: TwoTowerSpec | None) -> None:
    if not towers.encode:
        raise RecJaxError(f"{place} needs the student's encoder in the step: set config.towers.text.source='tokens'")
    if teacher is None or not teacher.encode:
        raise RecJaxError(f"{place} needs the teacher's encoder in the step: set config.teacher.source='online'")
    if (teacher.text.width, teacher.text.heads) != (towers.text.width, towers.text.heads):
        raise RecJaxError(f"{place} compares layers of equal width and heads: leave config.towers.text.width={towers.text.width} at 0")
