"""LoRA: a kernel W stays as it is and a product of two thin matrices is learned beside it, W + alpha / rank * a b.

The adapters are a tree of the same names as the parameters, with {"a" [in, rank], "b" [rank, out]} in the place of each adapted kernel.
`merge` puts both together before the towers run, so that no tower knows of it, and once more at export.

Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.mesh import path_name
from rec_jax.towers.dropout import fold
from rec_jax.types import Params, RecJaxError


def init(key: jax.Array, params: Params, *, rank: int, pattern: str) -> dict[str, Any]:
    """A typed key, parameters -> adapters of the kernels [in, out] whose whole name `pattern` matches.

    A name is written as in sharding rules: "text/layer_0/attention/query/kernel". `b` is zero, so that the merged parameters are at first
    the given ones.

    Args:
      key: each adapter depends on it and its kernel's name alone.
      params: any tower's; shapes are enough (`jax.eval_shape`).
      rank: columns of a.
      pattern: a regex, e.g. r"text/.*/(query|value)/kernel".

    Raises:
      RecJaxError: a pattern that is no regex or matches no kernel of two axes, a rank that is not below both sides of a kernel.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as e:
        raise RecJaxError(f"LoRA pattern {pattern!r} is no regular expression: {e}") from e
    adapters: dict[str, Any] = {}
    kernels = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if len(leaf.shape) != 2 or not name.endswith("kernel"):
            continue
        kernels.append(name)
        if not wanted.fullmatch(name):
            continue
        if not 1 <= rank < min(leaf.shape):
            raise RecJaxError(f"LoRA rank {rank}: {name} is {tuple(leaf.shape)}, so it must be between 1 and {min(leaf.shape) - 1}")
        node = adapters
        for part in name.split("/"):
            node = node.setdefault(part, {})
        node["a"] = jax.random.normal(fold(key, name), (leaf.shape[0], rank)) * leaf.shape[0] ** -0.5
        node["b"] = jnp.zeros((rank, leaf.shape[1]))
    if not adapters:
        raise RecJaxError(f"LoRA pattern {pattern!r} matches no kernel of two axes; there are, e.g., {', '.join(kernels[:6]) or 'none'}")
    return adapters


def merge(params: Params, adapters: Params, *, alpha: float) -> dict[str, Any]:
    """Parameters, adapters -> parameters whose adapted kernels are W + alpha / rank * a b; the others are passed on as they are.

    Args:
      params: those that `init` was given.
      adapters: of `init`, trained or not.
      alpha: how much the adapters count; with alpha = rank the product is added as it is.

    Raises:
      RecJaxError: an adapter for a kernel that is not there.
    """
    return _merge(params, adapters, alpha, "")


def _merge(params: Params, adapters: Params, alpha: float, prefix: str) -> dict[str, Any]:
    merged = dict(params)
    for name, adapter in adapters.items():
        if name not in params:
            raise RecJaxError(f"a LoRA adapter is for {prefix}{name}, which is not among the parameters: {', '.join(params)}")
        if isinstance(params[name], Mapping):
            merged[name] = _merge(params[name], adapter, alpha, f"{prefix}{name}/")
        else:
            a, b = adapter["a"], adapter["b"]
            # Highest precision: an accelerator's default would round the product, and merged weights are kept and exported.
            merged[name] = params[name] + alpha / a.shape[1] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return merged
