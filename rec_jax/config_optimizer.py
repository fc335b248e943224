"""Checks of `config.optimizer`: what does not go together."""

from __future__ import annotations

from typing import Any

from rec_jax.types import RecJaxError


def check_optimizer(config: Any) -> None:
    """Raises RecJaxError for what row-wise tables cannot do, and for a mean over no share of a run."""
    optimizer = config.optimizer
    if optimizer.rows != "dense" and optimizer.accumulate > 1:
        raise RecJaxError(
            f"config.optimizer.rows={optimizer.rows!r} updates each step's own rows: set config.optimizer.accumulate=1, and larger "
            "batches in place of it, or config.optimizer.rows='dense'"
        )
    if not 0 <= optimizer.average <= 1:
        raise RecJaxError(f"config.optimizer.average={optimizer.average!r}: must be between 0 (no mean) and 1 (a mean over the whole run)")
    if optimizer.rows != "dense" and optimizer.average:
        raise RecJaxError(
            f"config.optimizer.average={optimizer.average!r} moves the mean of every row in each step, and config.optimizer.rows="
            f"{optimizer.rows!r} is for steps whose cost does not grow with the catalogue: set average=0, or rows='dense'"
        )
