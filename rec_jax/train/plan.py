"""How long each part of a run will take: its floating-point operations over this machine's speed, measured in a second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rec_jax.data.pipeline import BatchSpec
from rec_jax.towers.bert import BertSpec
from rec_jax.towers.interactions import InteractionSpec
from rec_jax.towers.interests import WIDER
from rec_jax.train.forwards import StepSpec
from rec_jax.types import Ragged

# Shares of a large matmul's speed that the parts reach: measured with the main job on 2 CPU cores. Estimates for a person, no promise.
TEXT_SHARE = 0.6  # encoding texts
STEP_SHARE = 0.36  # a train step
STAGE_SECONDS = 10.0  # ranking by a stage, in the test


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


def text_flops(spec: BertSpec, tokens: int, *, row_tokens: int = 0, train: bool) -> float:
    """FLOP of encoding packed tokens: 24 d^2 (for an MLP of 4 d) + 4 T d a token and layer, three times that with the backward pass.

    Attention costs as much as its row is long (T): a packed row's texts do not see each other, but their products are made.
    """
    per_layer = 8 * spec.width**2 + 4 * spec.width * spec.mlp_width + 4 * row_tokens * spec.width
    return (3.0 if train else 1.0) * tokens * spec.layers * per_layer


def step_flops(spec: StepSpec, batch: BatchSpec, *, n_items: int) -> float:
    """FLOP of one train step over all shards: encoder, heads, history tower, and logits against the candidates; nothing counted twice.

    What is computed again to save memory (`chunk_rows`, `towers.text.remat`) comes on top: a third of the encoder's share.
    """
    towers, shards = spec.towers, batch.shards
    queries = shards * batch.queries
    catalogue, views = any(o.catalogue for o in spec.objectives), any(o.views for o in spec.objectives)
    passes = 3.0 * (2 if views else 1) + (1.0 if spec.momentum else 0.0)  # a backward pass costs two forward ones
    head = 2.0 * (towers.text.width * towers.dim if towers.head == "linear" else towers.hidden * (towers.text.width + towers.dim))
    head = head if towers.item_text else 0.0
    if towers.features is not None:
        head += 2.0 * sum(width for _, width in towers.features.vectors) * towers.features.dim
    if towers.gates:
        head += 2.0 * towers.parts**2 * towers.dim
    total = 0.0
    if towers.encode:
        tokens = shards * batch.text_rows * batch.row_tokens
        total += passes * text_flops(towers.text, tokens, row_tokens=batch.row_tokens, train=False)
    if towers.user == "text":
        tokens = shards * batch.user_rows * batch.row_tokens
        total += 3.0 * text_flops(towers.text, tokens, row_tokens=batch.row_tokens, train=False) + 3.0 * queries * head
    elif towers.history is not None:
        h = towers.history
        products = 10 * h.dim**2 if h.layer == "hstu" else 8 * h.dim**2 + 4 * h.dim * h.mlp
        once = h.layers * (products + 4 * batch.history_length * h.dim) + 4 * h.dim**2
        if h.interests > 1:
            once += 2 * WIDER * h.dim**2 + 2 * h.interests * h.dim * (batch.history_length + h.dim + 1)
        total += 3.0 * queries * once
        if any(o.history_views for o in spec.objectives):
            total += 6.0 * queries * (once + 4 * queries * towers.dim)
    total += passes * shards * batch.items * head + (3.0 * n_items * head if catalogue else 0.0)
    candidates = n_items if catalogue else queries + max(o.queue + o.uniform for o in spec.objectives)
    candidates += max(o.per_query for o in spec.objectives)
    return total + 6.0 * queries * candidates * towers.dim


def text_step_flops(spec: StepSpec, batch: BatchSpec) -> float:
    """FLOP of one train step on texts alone: a pass for each view, and the vocabulary's softmax at the hidden words or at all of them."""
    text, tokens = spec.towers.text, batch.shards * batch.text_rows * batch.row_tokens
    total = 0.0
    for o in spec.objectives:
        total += (2 if o.views else 1) * text_flops(text, tokens, row_tokens=batch.row_tokens, train=True)
        words = tokens * (o.spec.rate if o.masked else 1.0) if o.masked or o.denoised else 0.0
        total += 6.0 * words * text.vocab_size * text.width
    return total


def encoding_seconds(spec: BertSpec, tokens: Ragged, *, row_tokens: int, speed: float) -> float:
    """Seconds of encoding the catalogue's texts once at `speed` FLOP/s."""
    return text_flops(spec, int(tokens.lengths().sum()), row_tokens=row_tokens, train=False) / speed / TEXT_SHARE


def top_n_flops(spec: InteractionSpec, dim: int, pairs: int) -> float:
    """FLOP of a head's logits of so many pairs of a case and an item, where what is of the case is worked out once (`score_all`).

    Of a head whose tasks share otherwise than by one network it is what one would take.
    """
    if spec.kind == "dot":
        return 2.0 * dim * pairs
    pair, layers = 2 * dim, spec.cross_layers if spec.kind == "dcn" else 0
    crosses = sum(n * pair * pair for n in range(1, layers + 1))
    dense = sum(a * b for a, b in itertools.pairwise((pair * (layers + 1), *spec.hidden, *spec.tower)))
    return 2.0 * (crosses + dense) * pairs


def test_seconds(kinds: Sequence[str], n_items: int, *, ease: bool, encoding: float, speed: float, top_n: float = 0.0) -> float:
    """Seconds of the final test: each stage, the texts as they were before a stage on texts, EASE's inverse, N^3 multiply-adds, and top-n.

    Args:
      kinds: of the stages' batches.
      n_items: N, or the users where they are fewer.
      ease: whether EASE is measured.
      encoding: seconds of encoding the catalogue's texts by the run's own encoder.
      speed: FLOP/s.
      top_n: FLOP of what `top_n_flops` counts, in all stages.
    """
    flops = top_n + (2.0 * n_items**3 if ease else 0.0)
    return STAGE_SECONDS * len(kinds) + encoding * ("texts" in kinds) + flops / speed / STEP_SHARE
