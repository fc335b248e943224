"""Softmax losses: ours against the full matrix by autodiff, forward and backward, with the machine's matmul as the ceiling.

    python tests/bench/info_nce.py [--case=in_batch --case=catalogue] [--blocks 256 512] [--rounds 7]

Times are medians of alternated rounds; on a shared machine only the ratios of one run count. GFLOP/s counts 6 B N D.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses import softmax_cross_entropy, weighted_softmax_cross_entropy

CASES = {"in_batch": (4096, 4096, 256), "catalogue": (1024, 12101, 64)}  # B, N, D
MATMUL = 2048  # rows and columns of the matmul that stands for the ceiling
SCALE = 20.0


def naive(query: Any, item: Any, target: Any, *, block: None = None) -> Any:
    """The [B, N] matrix and autodiff."""
    logits = SCALE * jnp.einsum("bd,nd->bn", query, item)
    return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, target[:, None], 1)[:, 0])


def weighted(query: Any, item: Any, target: Any, *, block: int | None = None) -> Any:
    weights = jnp.full(len(query), 1 / len(query))
    return weighted_softmax_cross_entropy(query, item, target, weights=weights, scale=SCALE, block=block)


def per_example(query: Any, item: Any, target: Any, *, block: int | None = None) -> Any:
    return jnp.mean(softmax_cross_entropy(query, item, target, scale=SCALE, block=block))


FORMS: dict[str, Callable[..., Any]] = {"naive": naive, "weighted": weighted, "per_example": per_example}


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Runs them in turn, `rounds` times -> (median, least) seconds of each."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: (float(np.median(t)), min(t)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="block sizes to try beside the chosen one")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.device_count()} {jax.devices()[0].device_kind}")
    for case in arguments.case or CASES:
        b, n, d = CASES[case]
        keys = jax.random.split(jax.random.key(0), 4)
        query, item = (jax.random.normal(k, (rows, d)) / np.sqrt(d) for k, rows in zip(keys, (b, n), strict=False))
        target = jax.random.randint(keys[2], (b,), 0, n)
        square = jax.random.normal(keys[3], (MATMUL, MATMUL))

        functions: dict[str, Callable[[], Any]] = {"matmul": functools.partial(jax.jit(jnp.matmul), square, square)}
        temp = {}
        for name, form in FORMS.items():
            for block in [None] if name == "naive" else [None, *arguments.blocks]:
                label = name if block is None else f"{name} block={block}"
                run = jax.jit(jax.value_and_grad(functools.partial(form, block=block), (0, 1))).lower(query, item, target).compile()
                temp[label] = run.memory_analysis().temp_size_in_bytes
                functions[label] = functools.partial(run, query, item, target)
        seconds = medians(functions, arguments.rounds)
        rate = {name: (2 * MATMUL**3 if name == "matmul" else 6 * b * n * d) / t / 1e9 for name, (t, _) in seconds.items()}
        print(f"\n{case}: {b:,} queries x {n:,} candidates x {d}, float32, value and gradients of both")
        print(f"{'form':24}{'median ms':>11}{'least ms':>10}{'/ naive':>9}{'GFLOP/s':>9}{'/ matmul':>10}{'temp MB':>9}")
        for name, (t, least) in seconds.items():
            ratios = (
                f"{'':9}{rate[name]:9.0f}{1:10.2f}"
                if name == "matmul"
                else f"{t / seconds['naive'][0]:9.2f}{rate[name]:9.0f}{rate[name] / rate['matmul']:10.2f}{temp[name] / 1e6:9.1f}"
            )
            print(f"{name:24}{t * 1e3:11.1f}{least * 1e3:10.1f}{ratios}")


if __name__ == "__main__":
    main()
