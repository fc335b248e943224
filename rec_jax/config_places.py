"""Keys of `config.towers.user` about the places of a history: their checks, and which columns of the events they make the tower read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rec_jax.types import RecJaxError

# What a place may know beside its item -> the column of the events that it is made of; and it may know features of events, by their names
INPUTS = {"gap": "times", "rating": "ratings"}
EVENT = "event_"  # before the name of a feature of events: columns, and tables of the tower
USERS = "users"  # the column that says whose an event is, where a tower reads features of users
# The keys at values at which the tower is what it was before there were these keys, and so is a stage's fingerprint.
OFF = {
    "layer": "attention", "positions": "learned", "near_items": False, "inputs": (), "rating_edges": (), "time_bias": False,
    "session_gap": 0, "attended": (), "ids": False,
}  # fmt: skip


def columns_read(inputs: Sequence[str], time_bias: bool, session_gap: int) -> tuple[str, ...]:
    """Which columns, "times", "ratings" and those of features of events, a history tower reads that has these inputs, bias and sessions."""
    read = {INPUTS.get(name, EVENT + name) for name in inputs} | ({"times"} if time_bias or session_gap else set())
    return tuple(sorted(read))


def said(columns: Sequence[str]) -> str:
    """Names of columns in a sentence."""
    return " and ".join(column.removeprefix(EVENT) for column in columns)


def columns_of(config: Any) -> tuple[str, ...]:
    """The columns of the events that any stage of a config reads: those of places, and ratings where they are weights."""
    weighs = any(over.get("batch", {}).get("event_weight", config.batch.event_weight) for over in _stages(config))
    return tuple(sorted({*place_columns(config), *(("ratings",) if weighs else ())}))


def place_columns(config: Any) -> tuple[str, ...]:
    """The columns of the events that the places of histories have, for the towers of any stage of a config."""
    out: set[str] = set()
    for over in _stages(config):
        user = {**config.towers.user.to_dict(), **over.get("towers", {}).get("user", {})}
        if user["kind"] == "history":
            out.update(columns_read(user["inputs"], user["time_bias"], user["session_gap"]))
            out.update((USERS,) if any(config.data.user_features.values()) else ())
    return tuple(sorted(out))


def _stages(config: Any) -> list[dict[str, Any]]:
    """What the stages of a config lay over it, and first nothing: the config itself."""
    return [{}, *(config.stage[name].to_dict() for name in config.stages)]


def check_places(config: Any) -> None:
    """Raises RecJaxError for keys of the history tower's places that have a bad value or do not go together."""
    user, place = config.towers.user, "config.towers.user"
    if taken := [name for name in config.data.event_features if name in INPUTS]:
        raise RecJaxError(
            f"config.data.event_features names {taken[0]!r}, which means something else in {place}.inputs: give the column another name"
        )
    if user.kind != "history":
        return  # as for the tower's sizes: a stage of another kind leaves them alone
    if user.ids and not config.towers.item.ids:
        raise RecJaxError(f"{place}.ids=True is beside items' own vectors: set config.towers.item.ids=True, or it to False")
    inputs, edges, events = user.inputs, user.rating_edges, config.data.event_features
    if not isinstance(inputs, tuple) or not set(inputs) <= {*INPUTS, *events} or len(set(inputs)) < len(inputs):
        raise RecJaxError(
            f"{place}.inputs={inputs!r}: expected some of {', '.join((*INPUTS, *events))}, each once, like ('gap',); columns of events are "
            f"named in config.data.event_features={events!r} too"
        )
    if user.positions == "rotary" and config.towers.dim // user.heads % 2:
        raise RecJaxError(
            f"{place}.positions='rotary' turns pairs of numbers, and a head has config.towers.dim={config.towers.dim} / "
            f"{place}.heads={user.heads} of them: make that even"
        )
    if any(not isinstance(edge, (int, float)) for edge in edges) or list(edges) != sorted(set(edges)):
        raise RecJaxError(f"{place}.rating_edges={edges!r}: expected numbers, each above the one before, like (1.0, 2.5, 4.0)")
    if edges and "rating" not in inputs:
        raise RecJaxError(f"{place}.rating_edges={edges!r} is about ratings, which {place}.inputs={inputs!r} does not name")
    if user.session_gap < 0:
        raise RecJaxError(f"{place}.session_gap={user.session_gap}: must be at least 0 seconds; 0 = no sessions")
    if user.session_gap and user.layers < 2:
        raise RecJaxError(
            f"{place}.session_gap={user.session_gap} gives the first half of the layers to sessions, and {place}.layers={user.layers} has "
            "no half: set it to 2 or more"
        )
    read = columns_read(inputs, user.time_bias, user.session_gap)
    if read and config.objectives.history_views.weight > 0:
        raise RecJaxError(
            f"config.objectives.history_views.weight={config.objectives.history_views.weight} makes views of histories without "
            f"{said(read)}, which the tower reads ({place}.inputs, time_bias, session_gap): turn one of both off"
        )
