"""Sizes and kinds of a history tower."""

from __future__ import annotations

import dataclasses

from rec_jax.config_places import INPUTS, USERS, columns_read
from rec_jax.towers.features import FeatureSpec
from rec_jax.types import RecJaxError

LAYERS = ("attention", "hstu")  # `history_layers`
POSITIONS = ("learned", "rotary", "relative", "none")
READOUTS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class HistorySpec:
    """Sizes and kinds of a history tower.

    Attributes:
      dim: D.
      layers, heads: how many.
      mlp: inner width of attention layers' MLPs.
      dropout: rate.
      max_positions: the longest history with learned positions; with relative ones, the distance from which on all are alike.
      mask: a learned vector for hidden items.
      layer: of LAYERS.
      positions: of POSITIONS.
      inputs: what a place knows beside its item, of `config_places.INPUTS` and `events`.
      ratings: lower ends of the ranges that ratings are told apart by, with the input "rating".
      events: (name, rows of its table) of each input that is a feature of events; row 0 is for none or unknown.
      time_bias: scores have a bias by the time between two places.
      session_gap: seconds from which on a pause begins a session, which is all that the first half of the layers sees; 0 = off.
      causal: a place sees its past alone, and its vector is for the next item; False: all of its history, and the vector of a hidden place
        is for the item that is hidden there.
      interests: K, user vectors of a place.
      readout: "last", a place's user vector is what the layers make of its item | "mean", the mean of that over the history up to there.
      features: of users, whose vectors are added at each place; None = none are read.
      near_items: the tower begins close to the identity: a user vector as that of the newest item, or as the mean of the history's
        (with readout "mean"), or, in attention with relative positions, as the first and a part of a mean of what is recent.
    """

    dim: int
    layers: int
    heads: int
    mlp: int
    dropout: float
    max_positions: int
    mask: bool = False
    layer: str = "attention"
    positions: str = "learned"
    inputs: tuple[str, ...] = ()
    ratings: tuple[float, ...] = ()
    events: tuple[tuple[str, int], ...] = ()
    time_bias: bool = False
    session_gap: int = 0
    causal: bool = True
    interests: int = 1
    readout: str = "last"
    near_items: bool = False
    features: FeatureSpec | None = None

    def __post_init__(self) -> None:
        for key, names, known in (
            ("layer", (self.layer,), LAYERS),
            ("positions", (self.positions,), POSITIONS),
            ("inputs", self.inputs, (*INPUTS, *dict(self.events))),
            ("readout", (self.readout,), READOUTS),
        ):
            if not set(names) <= set(known):
                raise RecJaxError(f"HistorySpec.{key}={vars(self)[key]!r} (config.towers.user.{key}): expected of {', '.join(known)}")

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of events: some of "times", "ratings", "event_NAME" of features of events, and "users"."""
        return (*columns_read(self.inputs, self.time_bias, self.session_gap), *((USERS,) if self.features is not None else ()))
