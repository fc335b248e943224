"""The cloze form of a history: some places of a window are hidden, and what stands there is to be found from both sides."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

STREAM = 1  # sets what is hidden apart from what else is drawn by an example's position


@dataclasses.dataclass(frozen=True)
class Cloze:
    """What of a window is hidden, by the keys of `config.batch`.

    Attributes:
      share: of the window's places, at least one of them and never all.
      last: probability that the last place alone is hidden instead, as it is when histories are ranked.

    Reference: Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer" (2019),
    section 3.6.
    """

    share: float
    last: float

    @classmethod
    def from_config(cls, config: Any) -> Cloze | None:
        """As `config.batch.cloze` and `cloze_last` say; None where nothing is hidden."""
        return cls(config.batch.cloze, config.batch.cloze_last) if config.batch.cloze else None

    def count(self, places: np.ndarray | int) -> np.ndarray:
        """Places of windows [...], at least two each -> how many of them are hidden [...] int64, where it is not the last one alone."""
        return np.clip(np.rint(self.share * np.asarray(places)), 1, np.asarray(places) - 1).astype(np.int64)

    def draw(self, places: int, seed: int, position: int) -> np.ndarray:
        """-> [places] bool, which of a window's places are hidden; by the example's position alone, so that a resume draws the same."""
        random, hidden = np.random.default_rng((seed, position, STREAM)), np.zeros(places, bool)
        if random.random() < self.last:
            hidden[-1] = True
        else:
            hidden[random.permutation(places)[: int(self.count(places))]] = True
        return hidden

    def times(self, places: np.ndarray) -> np.ndarray:
        """Places of windows [W] -> how often one epoch hides any place of each, on average [W] float64; its last place `last` more."""
        return (1 - self.last) * self.count(places) / places
