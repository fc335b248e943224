"""A cross-encoder's logits of an example's pairs: the next item's above those of drawn items."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import bce
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs, RecJaxError

LOSSES = ("softmax", "bce")


@dataclasses.dataclass(frozen=True)
class CrossSpec:
    """Keys of `config.objectives.cross`."""

    loss: str
    label_smoothing: float

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise RecJaxError(f"config.objectives.cross.loss={self.loss!r}: expected one of {', '.join(LOSSES)}")
        base.check_range("cross.label_smoothing", self.label_smoothing, least=0, below=1)


def cross(outputs: Outputs, batch: Batch, context: Context, spec: CrossSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Softmax over the 1 + K pairs of each example at the positive, or the mean of their binary cross-entropies -> (loss, metrics).

    `pair_accuracy` is the share of the examples whose positive is above all others.

    Reference: Nogueira & Cho, "Passage Re-ranking with BERT" (2019), section 3 (bce); Gao, Dai & Callan, "Rethink Training of BERT
    Rerankers in Multi-Stage Retrieval Pipeline" (2021), section 3 (softmax).
    """
    logits, weights = base.flat(outputs.pairs).astype(jnp.float32), base.mean_weights(batch)
    first = jnp.arange(logits.shape[1]) == 0
    if spec.loss == "softmax":
        goal = (1 - spec.label_smoothing) * first + spec.label_smoothing / len(first)
        losses = -jnp.sum(goal * jax.nn.log_softmax(logits), axis=1)
    else:
        losses = bce(logits, first.astype(jnp.float32), label_smoothing=spec.label_smoothing).mean(1)
    above = jnp.all((logits[:, :1] > logits) | first, axis=1)
    loss = jnp.sum(weights * losses)
    return loss, {"cross": loss, "pair_accuracy": jnp.sum(weights * above)}


def make(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.cross` -> Objective."""
    return base.Objective("cross", weight, CrossSpec(**keys), cross)
