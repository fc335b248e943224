"""AdamW with warm-up and cosine; ID tables by the row, kernels by Muon if asked for; decay, freezing and factors by regex on names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from rec_jax.mesh import path_name
from rec_jax.train import muon, rows
from rec_jax.types import RecJaxError


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """`config.optimizer` with durations in steps."""

    learning_rate: float
    schedule: str  # "plateau" is constant here: its way down is in the state (state.cooldown), for nobody knows before when it begins
    warmup: int
    total: int
    final: float
    beta1: float
    beta2: float
    weight_decay: float
    no_decay: tuple[str, ...]
    freeze: tuple[str, ...]
    scale: tuple[tuple[str, float], ...]
    clip: float
    accumulate: int
    cooldown: float = 0.3
    rows: str = "dense"
    average: float = 0.0
    muon: tuple[str, ...] = ()

    @property
    def horizon(self) -> int:
        """Steps that the running mean of weights goes over; 0 where there is none. At least one where there is."""
        return max(1, round(self.average * self.total)) if self.average else 0


def schedule(spec: OptimizerSpec) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then cosine to `final` of the peak, or constant."""
    updates, warmup = max(1, spec.total // spec.accumulate), spec.warmup // spec.accumulate
    if spec.schedule in ("constant", "plateau"):
        return optax.warmup_constant_schedule(0.0 if warmup else spec.learning_rate, spec.learning_rate, warmup)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else spec.learning_rate, spec.learning_rate, warmup, max(updates, warmup + 1), spec.learning_rate * spec.final
    )


def _matches(tree: Any, patterns: Sequence[str]) -> Any:
    compiled = [re.compile(p) for p in patterns]
    return jax.tree_util.tree_map_with_path(lambda path, _: any(p.fullmatch(path_name(path)) for p in compiled), tree)


def check_patterns(params: Any, spec: OptimizerSpec) -> None:
    """Raises RecJaxError for a pattern of `freeze`, `scale` or `muon` that matches no parameter: most likely a spelling mistake."""
    muon.check(params, spec.muon)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for key, patterns in (("freeze", spec.freeze), ("scale", [p for p, _ in spec.scale])):
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise RecJaxError(f"config.optimizer.{key}: {pattern!r} matches no parameter; there are, e.g., {', '.join(names[:6])}")


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformation:
    """The optimizer; frozen parameters have no optimizer state and take no part in the clipped norm.

    With `rows`, it is given the touched rows of ID tables and of their state alone (`rows.taken`).
    """

    def scale(updates: Any, params: Any = None) -> Any:
        del params

        def factor(path: Any, update: jax.Array) -> jax.Array:
            for pattern, value in spec.scale:
                if re.fullmatch(pattern, path_name(path)):
                    return update * value
            return update

        return jax.tree_util.tree_map_with_path(factor, updates)

    parts = [optax.clip_by_global_norm(spec.clip)] if spec.clip else []
    adam = optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2)
    adam = muon.beside(adam, spec.muon) if spec.muon else adam
    parts += [
        adam if spec.rows == "dense" else rows.by_kind(spec.rows, adam, b1=spec.beta1, b2=spec.beta2),
        optax.add_decayed_weights(spec.weight_decay, mask=lambda p: jax.tree.map(lambda no: not no, _matches(p, spec.no_decay))),
        optax.stateless(scale),
        optax.scale_by_learning_rate(schedule(spec)),
    ]
    optimizer: optax.GradientTransformation = optax.chain(*parts)
    if spec.freeze:

        def labels(params: Any) -> Any:
            return jax.tree.map(lambda frozen: "freeze" if frozen else "train", _matches(params, spec.freeze))

        optimizer = optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
    if spec.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, spec.accumulate).gradient_transformation()
    return optimizer
