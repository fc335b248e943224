"""Checks of the keys that are about histories: what is left out or hidden of them, and the tower that reads them."""

from __future__ import annotations

from ml_collections import ConfigDict

from rec_jax.config_places import columns_read, said
from rec_jax.types import RecJaxError


def check_histories(config: ConfigDict) -> None:
    """Raises RecJaxError for shares that are none, histories that no position holds, and keys that do not go together."""
    batch, user = config.batch, config.towers.user
    if not 0 <= batch.drop_events < 1:
        raise RecJaxError(f"config.batch.drop_events={batch.drop_events!r}: must be at least 0 and below 1; 0 leaves none out")
    if batch.event_weight and batch.kind != "histories":
        raise RecJaxError(
            f"config.batch.event_weight={batch.event_weight!r} weighs the events of histories, and config.batch.kind is {batch.kind!r}: "
            "set it to '' there"
        )
    timed = user.positions != "none" or "gap" in user.inputs or user.time_bias or user.session_gap
    if batch.shuffle_events and user.kind == "history" and timed:
        raise RecJaxError(
            "config.batch.shuffle_events=True makes places and times say nothing: set config.towers.user.positions='none' (it is "
            f"{user.positions!r}), and leave the input gap, time_bias and session_gap off"
        )
    longest = max(config.eval.history_length, batch.history_length)
    if user.kind == "history" and user.positions == "learned" and longest > user.max_positions:
        raise RecJaxError(f"histories of {longest} places need config.towers.user.max_positions={user.max_positions} to be as large")
    if not 0 <= batch.cloze < 1:
        raise RecJaxError(f"config.batch.cloze={batch.cloze!r}: must be at least 0 and below 1; 0 hides nothing")
    if not 0 <= batch.cloze_last <= 1:
        raise RecJaxError(f"config.batch.cloze_last={batch.cloze_last!r}: must be between 0 and 1")
    if batch.cloze:
        _check_cloze(config)
    if user.interests < 1:
        raise RecJaxError(f"config.towers.user.interests={user.interests!r}: must be at least 1")
    if user.interests > 1:
        _check_interests(config)


def _check_cloze(config: ConfigDict) -> None:
    place, user = f"config.batch.cloze={config.batch.cloze}", config.towers.user
    if user.kind != "history":
        raise RecJaxError(f"{place} hides places of a packed history: set it to 0, or config.towers.user.kind='history'")
    if user.positions in ("relative", "none"):
        raise RecJaxError(
            f"{place} sees both sides of a place, which config.towers.user.positions={user.positions!r} does not tell apart: set that to "
            "'learned' or 'rotary'"
        )
    if read := columns_read(user.inputs, user.time_bias, user.session_gap):
        raise RecJaxError(
            f"{place}: nobody knows the {said(read)} of a hidden event, which the tower reads (config.towers.user.inputs, "
            "time_bias, session_gap): turn one of both off"
        )
    for key, length in (("batch", config.batch.history_length), ("eval", config.eval.history_length)):
        if length == 1:
            raise RecJaxError(f"{place} hides one of config.{key}.history_length=1 places: set that to 2 at least, or nothing is seen")


def _check_interests(config: ConfigDict) -> None:
    place = f"config.towers.user.interests={config.towers.user.interests}"
    if config.towers.user.kind != "history":
        raise RecJaxError(f"{place} are of the history tower: set it to 1, or config.towers.user.kind='history'")
    if config.eval.rank_by == "task":
        raise RecJaxError(f"{place}: the task head scores a single vector; set it to 1, or config.eval.rank_by='vectors'")
