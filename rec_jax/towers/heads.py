"""Text vector -> item vector: a linear map or a small MLP, started as PCA whitening of the catalogue or fitted to a teacher's."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers.products import dot_general
from rec_jax.types import Array, Params, RecJaxError

HEADS = ("linear", "mlp")


class _Head(nn.Module):
    dim: int
    hidden: int
    kind: str

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        out = nn.Dense(self.dim, name="project", dot_general=dot_general)(text)
        if self.kind == "mlp":
            # A residual beside the linear map, zero at the start: the MLP begins as the (whitened) linear head.
            inner = nn.gelu(nn.Dense(self.hidden, name="hidden", dot_general=dot_general)(text))
            out = out + nn.Dense(self.dim, name="residual", dot_general=dot_general, kernel_init=nn.initializers.zeros)(inner)
        return out


def init(key: jax.Array, *, text_width: int, dim: int, hidden: int, kind: str) -> dict[str, Any]:
    """Parameters of a head [text_width] -> [dim].

    Raises:
      RecJaxError: an unknown kind.
    """
    if kind not in HEADS:
        raise RecJaxError(f"config.towers.item.head={kind!r}: expected one of {', '.join(HEADS)}")
    return dict(_Head(dim, hidden, kind).init(key, jnp.zeros((1, text_width)))["params"])


def apply(params: Params, text: Array, *, dim: int, hidden: int, kind: str) -> jax.Array:
    """text [..., D_text] -> vectors [..., D]."""
    return jnp.asarray(_Head(dim, hidden, kind).apply({"params": params}, text))


def whitened(params: dict[str, Any], table: np.ndarray, *, power: float = 0.5, length: float = 0.0) -> dict[str, Any]:
    """Head parameters whose linear map is PCA of table [N, D_text] to D components, each divided by its variance ** power.

    An item's own vector, which starts at zero, is added to what the head makes of its text, and Adam moves each number by about the
    learning rate a step: the longer the text's vectors, the later own ones count.

    Args:
      params: of `init`; not changed.
      table: text vectors of the catalogue.
      power: 0 keeps the proportions of the components (PCA), 0.5 makes them all equal (whitening).
      length: root mean square length of the vectors that come out; 0 = that of components of variance 1, sqrt(D).

    Raises:
      RecJaxError: fewer text dimensions than D.
    """
    kernel = params["project"]["kernel"]
    if kernel.shape[1] > kernel.shape[0]:
        raise RecJaxError(
            f"whitening takes at most {kernel.shape[0]} dimensions, but towers.dim={kernel.shape[1]}; set config.towers.item.whiten=False"
        )
    mean = table.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.cov(table.astype(np.float64).T))
    top = np.argsort(-values)[: kernel.shape[1]]
    # eigh leaves the sign of a vector open; the largest entry is made positive, so that every machine starts alike.
    vectors = vectors[:, top] * np.sign(vectors[np.abs(vectors[:, top]).argmax(0), top])
    scale = np.maximum(values[top], 1e-12) ** -power
    scale *= (length or kernel.shape[1] ** 0.5) / np.sqrt((np.maximum(values[top], 1e-12) * scale**2).sum())
    project = {"kernel": jnp.asarray(vectors * scale, jnp.float32), "bias": jnp.asarray(-(mean @ vectors) * scale, jnp.float32)}
    return {**params, "project": project}


def fitted(params: dict[str, Any], table: np.ndarray, wanted: np.ndarray, *, ridge: float = 1e-3) -> dict[str, Any]:
    """Head parameters whose linear map takes table [N, D_text] nearest to wanted [N, D], by ridge regression.

    Args:
      params: of `init`; not changed.
      table: text vectors of the catalogue.
      wanted: what the head should make of them.
      ridge: weight of the kernel's squared size, as a share of the mean variance of the text vectors.
    """
    x, y = table.astype(np.float64), np.asarray(wanted, np.float64)
    mean, target = x.mean(0), y.mean(0)
    x = x - mean
    gram = x.T @ x
    kernel = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ (y - target))
    project = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(target - mean @ kernel, jnp.float32)}
    return {**params, "project": project}
