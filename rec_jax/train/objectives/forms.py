"""Which objectives go with the forms of the history tower: hidden places (`config.batch.cloze`), and several vectors of a user."""

from __future__ import annotations

from rec_jax.towers.history import HistorySpec
from rec_jax.train.objectives.base import Objective
from rec_jax.types import RecJaxError

CLOZE, INTERESTS = "config.batch.cloze", "config.towers.user.interests"


def check(objective: Objective, tower: HistorySpec, teacher: HistorySpec | None) -> None:
    """Raises RecJaxError where an objective on batches of histories cannot do with the tower's form, or not with the teacher's beside it.

    Args:
      objective: with weight.
      tower: that reads the histories.
      teacher: the teacher's, where it reads some too.
    """
    if not tower.causal:
        _check_cloze(objective)
    if tower.interests > 1:
        _check_interests(objective, tower.interests)
    if objective.teacher and teacher is not None and _uses_users(objective):
        _check_teacher(objective, tower, teacher)


def _uses_users(objective: Objective) -> bool:
    """Whether an objective with a teacher compares users, and not items or layers alone."""
    return not objective.layers and getattr(objective.spec, "of", "user") == "user"


def _check_cloze(objective: Objective) -> None:
    place = f"config.objectives.{objective.name}"
    keys = (
        ("positives", objective.positives, 1),
        ("neighbour_share", bool(objective.neighbours), 0),
        ("mask_history", objective.masks_history, False),
    )
    for key, value, off in keys:
        if value != off:
            raise RecJaxError(
                f"{place}.{key} goes by a place's past and its next items, and {CLOZE} hides items anywhere: set {place}.{key}={off}, "
                f"or {CLOZE}=0"
            )
    if objective.history_views:
        raise RecJaxError(
            f"{place} reads a view at its last item, and with {CLOZE} a tower is read at hidden places: set {place}.weight=0, or {CLOZE}=0"
        )


def _check_interests(objective: Objective, interests: int) -> None:
    place, several = f"config.objectives.{objective.name}", f"{INTERESTS}={interests}"
    if objective.positives > 1:
        raise RecJaxError(f"{place}.positives={objective.positives}: {several} takes the vector nearest to one target; set either to 1")
    if objective.momentum:
        raise RecJaxError(f"{place}.momentum={objective.momentum} makes single keys, and {several}: set momentum=0, or {INTERESTS}=1")
    what = {
        "two views of a history have no target to choose a vector by": objective.history_views,
        "the task head scores a single vector": objective.scores,
        "a teacher's users are compared one vector each": objective.teacher and _uses_users(objective),
    }
    for reason, wrong in what.items():
        if wrong:
            raise RecJaxError(f"{place}: {reason}, and {several}: set {place}.weight=0, or {INTERESTS}=1")


def _check_teacher(objective: Objective, tower: HistorySpec, teacher: HistorySpec) -> None:
    place = f"config.objectives.{objective.name}"
    if teacher.interests > 1:
        raise RecJaxError(f"{place}: the teacher has {INTERESTS}={teacher.interests}, and users are compared one vector each: name another")
    if teacher.causal != tower.causal:
        forms = {True: "seeks next items", False: "seeks hidden ones"}
        raise RecJaxError(
            f"{place}: the teacher {forms[teacher.causal]}, and this stage {forms[tower.causal]} ({CLOZE}): both must read the same places"
        )
