"""Muon for kernels: their momentum's nearest orthogonal matrix is the step, so that all directions of a linear map move alike.

Which kernels is said by regexes (`config.optimizer.muon`); all other parameters keep their rule. A step's root mean square is SCALE
for any shape of a kernel, about what Adam's is, so that both go by one learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from rec_jax.mesh import path_name
from rec_jax.types import RecJaxError

SCALE = 0.2  # root mean square of a step's numbers at a learning rate of 1
ITERATIONS = 4
HEADS_IN = ("query", "key", "value")  # kernels [D, heads, width] of attention
HEADS_OUT = "out"  # [heads, width, D]


def moved(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of that name, such as "user/layer_0/query/kernel", is a kernel that Muon moves."""
    return name.endswith("/kernel") and any(re.fullmatch(pattern, name) for pattern in patterns)


def axes_of(name: str, shape: Sequence[int]) -> MuonDimensionNumbers:
    """A kernel's name and shape -> by which axis a vector goes in, and by which it comes out; each head has a matrix of its own.

    Raises:
      RecJaxError: neither [in, out] nor a kernel of attention with its heads apart.
    """
    part = name.split("/")[-2]
    if len(shape) == 2:
        return MuonDimensionNumbers((0,), (1,))
    if len(shape) == 3 and part in HEADS_IN:
        return MuonDimensionNumbers((0,), (2,))
    if len(shape) == 3 and part == HEADS_OUT:
        return MuonDimensionNumbers((1,), (2,))
    raise RecJaxError(f"config.optimizer.muon: {name} {tuple(shape)} is no matrix; give regexes of kernels [in, out] and of attention")


def check(params: Any, patterns: Sequence[str]) -> None:
    """Raises RecJaxError for a kernel that is no matrix, and for a pattern that matches no kernel."""
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for pattern in patterns:
        found = [name for name in shapes if moved(name, (pattern,))]
        if not found:
            kernels = [name for name in shapes if name.endswith("/kernel")]
            raise RecJaxError(f"config.optimizer.muon: {pattern!r} matches no kernel; there are, e.g., {', '.join(kernels[:6])}")
        for name in found:
            axes_of(name, shapes[name])


def beside(rest: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """Muon, with Nesterov's momentum, for kernels whose name matches, `rest` for all other parameters; neither with a learning rate.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of a step after Liu et al., "Muon
    is Scalable for LLM Training" (2025), section 2.2; four iterations behind a preconditioner in place of five after Boissin et al.,
    "Turbo-Muon" (2025).
    """
    axes = lambda tree: jax.tree_util.tree_map_with_path(lambda path, x: axes_of(path_name(path), x.shape), tree)

    def scaled(updates: Any, params: Any = None) -> Any:
        del params

        def one(path: Any, x: jax.Array) -> jax.Array:
            form = axes_of(path_name(path), x.shape)
            return x * (SCALE * max(x.shape[form.reduction_axis[0]], x.shape[form.output_axis[0]]) ** 0.5)

        return jax.tree_util.tree_map_with_path(one, updates)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if moved(path_name(path), patterns) else "rest", params)

    muon = scale_by_muon(weight_dimension_numbers=axes, ns_steps=ITERATIONS, preconditioning="aol")
    return optax.multi_transform({"muon": optax.chain(muon, optax.stateless(scaled)), "rest": rest}, labels)
