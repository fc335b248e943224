"""One accelerator: its bf16 matmul, InfoNCE of large batches, and the share of the matmul's speed that a BERT's train step reaches.

    python tests/bench/accelerator.py [--case=matmul --case=info_nce --case=million --case=step] [--rounds 5]

Times are medians of rounds after a first one; FLOP are those of the formulas (6 B^2 D of a loss with its gradients, `rec_jax.train.plan`
for a step), with nothing that is computed again. Weights and data are random.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
from step import build

from rec_jax import mesh as mesh_lib
from rec_jax.losses import info_nce, weighted_softmax_cross_entropy
from rec_jax.towers import BertSpec
from rec_jax.train import plan

SCALE = 20.0
ENCODERS = {
    "MiniLM-L6": BertSpec(),
    "BERT-base": BertSpec(width=768, layers=12, heads=12, mlp_width=3072),
    "BERT-large": BertSpec(width=1024, layers=24, heads=16, mlp_width=4096),
}
# Encoder, tokens of a packed row, rows of a batch, what the backward pass computes again.
STEPS = (("BERT-base", 128, 512, "none"), ("MiniLM-L6", 64, 2048, "none"), ("BERT-base", 512, 96, "none"), ("BERT-large", 128, 256, "none"))


def seconds_of(function: Callable[[], Any], rounds: int) -> float:
    """Median seconds of `rounds` calls after one that does not count; a single round is that of the first call."""
    if rounds > 1:
        jax.block_until_ready(function())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def matmul(rounds: int, *, n: int = 8192) -> float:
    """-> FLOP/s of a product of two random [n, n] matrices in bf16."""
    x, y = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    return 2 * n**3 / seconds_of(functools.partial(jax.jit(jnp.matmul), x, y), rounds)


def matrix(query: Any, item: Any) -> Any:
    """Mean InfoNCE by the [B, B] matrix and autodiff."""
    logits = SCALE * jnp.einsum("bd,nd->bn", query, item, preferred_element_type=jnp.float32)
    return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits))


def streamed(query: Any, item: Any) -> Any:
    """The same, of each example, by the fold that recomputes its tiles."""
    return info_nce(query, item, temperature=1 / SCALE).mean()


def forward(query: Any, item: Any) -> Any:
    """The same with the gradients made in the forward pass."""
    b = len(query)
    return weighted_softmax_cross_entropy(query, item, jnp.arange(b), weights=jnp.full(b, 1 / b), scale=SCALE)


def loss(name: str, function: Callable[..., Any], b: int, d: int, rounds: int, speed: float) -> float:
    """Prints time and memory of a loss and its gradients -> the loss."""
    query, item = (
        (x / jnp.linalg.norm(x, axis=1, keepdims=True)).astype(jnp.bfloat16)
        for x in (jax.random.normal(key, (b, d)) for key in jax.random.split(jax.random.key(1)))
    )
    item = (0.5 * query.astype(jnp.float32) + 0.5 * item.astype(jnp.float32)).astype(jnp.bfloat16)
    program = jax.jit(jax.value_and_grad(function, (0, 1))).lower(query, item).compile()
    temp = program.memory_analysis().temp_size_in_bytes
    values: list[float] = []
    seconds = seconds_of(lambda: values.append(float(program(query, item)[0])), rounds)
    rate, value = 6 * b * b * d / seconds, values[0]
    print(
        f"{name:26} B {b:9,} D {d:4}  {seconds * 1e3:9.1f} ms  {temp / 1e6:9.1f} MB temporary  {rate / 1e12:6.1f} TFLOP/s"
        f"  {rate / speed:5.2f} of the matmul  loss {value:.4f}",
        flush=True,
    )
    return value


def train_step(encoder: str, row_tokens: int, rows: int, remat: str, rounds: int, speed: float) -> None:
    """Prints speed of a whole train step with the encoder in it: dropout, InfoNCE over the batch, AdamW in float32."""
    queries = rows * row_tokens // 64 // 4
    changes = {
        "batch.shards": 1,
        "batch.text_rows": rows,
        "batch.row_tokens": row_tokens,
        "batch.max_items": rows * max(1, row_tokens // 64),
        "batch.history_rows": max(1, queries // 64),
        "batch.history_length": 64,
        "towers.text.dtype": "bfloat16",
        "towers.text.remat": remat,
    }
    one = mesh_lib.make_mesh({"data": 1}, devices=jax.devices()[:1])
    built = build(one, encoder=ENCODERS[encoder], **changes)
    flops = plan.step_flops(built.task.spec, built.sizes, n_items=0)
    batch, state = built.batch(0), built.state
    times = []
    with jax.set_mesh(one):
        for _ in range(rounds + 2):
            began = time.perf_counter()
            for _ in range(4):
                state, metrics = built.step(state, batch, built.constants)
            jax.block_until_ready(metrics)
            times.append((time.perf_counter() - began) / 4)
    seconds, tokens = float(np.median(times[2:])), rows * row_tokens
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(
        f"{encoder:11} rows of {row_tokens:3}, {rows:5,} a step, {remat:5} {seconds * 1e3:8.1f} ms  {tokens / seconds:12,.0f} tokens/s"
        f"  {flops / seconds / 1e12:6.1f} TFLOP/s  {flops / seconds / speed:5.2f} of the matmul  peak memory {peak / 1e9:.1f} GB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=("matmul", "info_nce", "million", "step"), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    cases = arguments.case or ("matmul", "info_nce", "million", "step")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, bfloat16")
    speed = matmul(arguments.rounds, n=256 if arguments.small else 8192)
    print(f"matmul of 8,192: {speed / 1e12:.0f} TFLOP/s", flush=True)
    share = 64 if arguments.small else 1
    if "info_nce" in cases:
        for d in (256, 768):
            values = [loss(f.__name__, f, 65536 // share, d, arguments.rounds, speed) for f in (streamed, forward, matrix)]
            print(f"{'':26} losses apart by {max(values) - min(values):.1e}")
    if "million" in cases:
        loss("forward", forward, 2**20 // share**2, 768 // share, 1, speed)
        loss("streamed", streamed, 2**20 // share**2, 768 // share, 1, speed)
    if "step" in cases:
        for encoder, row_tokens, rows, remat in STEPS:
            train_step(encoder, row_tokens, rows // (rows if arguments.small else 1) * (4 if arguments.small else 1), remat, 3, speed)


if __name__ == "__main__":
    main()
