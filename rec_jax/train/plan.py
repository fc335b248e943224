"""How long each part of a run will take: its floating-point operations over this machine's speed, measured in a second."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from rec_jax.data.pipeline import BatchSpec
from rec_jax.towers.bert import BertSpec
from rec_jax.towers.two_tower import TwoTowerSpec

# Shares of a large matmul's speed that the parts reach: measured with the main job on 2 CPU cores. Estimates for a person, no promise.
TEXT_SHARE = 0.6  # encoding texts
STEP_SHARE = 0.36  # a train step


def machine_speed() -> float:
    """FLOP/s of a 1,024^3 fp32 matmul on all local devices of this process together, best of three."""
    n = 1024
    x = jnp.ones((n, n), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    devices = jax.local_device_count() if jax.default_backend() != "cpu" else 1
    return 2 * n**3 / best * devices


def text_flops(spec: BertSpec, tokens: int, *, train: bool) -> float:
    """FLOP of encoding packed tokens: 24 L d^2 a token forward (for an MLP of 4 d), three times that with the backward pass."""
    per_layer = 8 * spec.width**2 + 4 * spec.width * spec.mlp_width
    return (3.0 if train else 1.0) * tokens * spec.layers * per_layer


def step_flops(towers: TwoTowerSpec, batch: BatchSpec, *, n_items: int, catalogue: bool) -> float:
    """FLOP of one train step over all shards: encoder, heads, history tower, and logits against the catalogue or the batch."""
    queries = batch.shards * batch.queries
    total = 0.0
    if towers.encode:
        total += text_flops(towers.text, batch.shards * batch.text_rows * batch.row_tokens, train=True)
    if towers.history is None:
        total += text_flops(towers.text, batch.shards * batch.user_rows * batch.row_tokens, train=True)
    else:
        h = towers.history
        total += 6.0 * queries * h.layers * (4 * h.dim**2 + 2 * h.dim * h.mlp)
    candidates = n_items if catalogue else queries
    total += 6.0 * queries * candidates * towers.dim
    total += 6.0 * (n_items if catalogue else batch.shards * batch.items) * towers.text.width * towers.dim
    return total


def test_flops(n_items: int, *, ease: bool) -> float:
    """FLOP of the final test that grow faster than the catalogue: EASE's inverse, N^3 multiply-adds; 0 without it."""
    return 2.0 * n_items**3 if ease else 0.0
