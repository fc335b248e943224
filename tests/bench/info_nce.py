"""Softmax losses: ours against the full matrix by autodiff, forward and backward, with the machine's matmul as the ceiling.

    python tests/bench/info_nce.py [--case=in_batch --case=catalogue] [--blocks 256 512] [--rounds 7]
    python tests/bench/info_nce.py --ring [--devices 8]        InfoNCE over simulated CPU devices: memory by batch size, then time

Times are medians of alternated rounds; on a shared machine only the ratios of one run count. GFLOP/s counts 6 B N D. Limits of the ring,
exit code 1 beyond them: temporary memory a device grows with the batch by an exponent of at most 1.05, holds at most 6 x its share of the
vectors, at 16,384 at least 50 x less than the full matrix, no [b, B] array and no all-gather; time at 8,192 at most .80 x the matrix's.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if "--ring" in sys.argv:
    wanted = sys.argv[sys.argv.index("--devices") + 1] if "--devices" in sys.argv else "8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={wanted}".strip()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rec_jax.losses import info_nce, softmax_cross_entropy, weighted_softmax_cross_entropy

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


def ring(devices: int, rounds: int) -> int:
    """Memory and time of in-batch InfoNCE sharded over devices, by our ring and by the full matrix -> exit code."""
    width, sizes, timed = 256, (4096, 8192, 16384, 32768, 65536), 8192
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def ours(query: Any, item: Any) -> Any:
        return info_nce(query, item, temperature=1 / SCALE, mesh=mesh, axis="data").mean()

    def matrix(query: Any, item: Any) -> Any:
        logits = SCALE * query @ item.T
        return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits))

    def compiled(loss: Callable[..., Any], b: int) -> Any:
        shapes = [jax.ShapeDtypeStruct((b, width), jnp.float32)] * 2
        return jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(rows, rows)).lower(*shapes).compile()

    print(f"{devices} devices, D = {width}, float32: temporary memory a device")
    print(f"{'B':>8}{'ring MB':>10}{'/ (b D 4 bytes)':>17}{'matrix MB':>11}{'matrix / ring':>15}")
    temp, good = {}, True
    for b in sizes:
        program = compiled(ours, b)
        text, temp[b] = program.as_text(), program.memory_analysis().temp_size_in_bytes
        share = temp[b] / (b // devices * width * 4)
        good &= share <= 6 and "all-gather" not in text and f"[{b // devices},{b}]" not in text
        full = compiled(matrix, b).memory_analysis().temp_size_in_bytes if b <= 16384 else None
        beside = "" if full is None else f"{full / 1e6:11.1f}{full / temp[b]:15.1f}"
        good &= b != 16384 or full is None or full / temp[b] >= 50
        print(f"{b:8,}{temp[b] / 1e6:10.2f}{share:17.2f}{beside}")
    exponent = float(np.polyfit(np.log(sizes), np.log([temp[b] for b in sizes]), 1)[0])
    keys = jax.random.split(jax.random.key(0))
    vectors = [jax.device_put(jax.random.normal(k, (timed, width)) / np.sqrt(width), rows) for k in keys]
    programs = {name: compiled(loss, timed) for name, loss in (("ring", ours), ("matrix", matrix))}
    (ring_value, ring_gradients), (value, gradients) = (programs[name](*vectors) for name in ("ring", "matrix"))
    apart = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(ring_gradients, gradients, strict=True))
    seconds = medians({name: functools.partial(p, *vectors) for name, p in programs.items()}, rounds)
    ratio = seconds["ring"][0] / seconds["matrix"][0]
    print(f"exponent of memory in B {exponent:.3f} (limit 1.05)")
    print(f"B = {timed:,}: ring {seconds['ring'][0]:.2f} s, matrix {seconds['matrix'][0]:.2f} s, ratio {ratio:.2f} (limit .80)")
    print(f"losses {float(ring_value):.6f} and {float(value):.6f}; gradients apart by {apart:.1e} of the largest")
    return int(not good or exponent > 1.05 or ratio > 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="block sizes to try beside the chosen one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ring", action="store_true", help="the ring over simulated devices instead")
    parser.add_argument("--devices", type=int, default=8, help="of the ring")
    arguments = parser.parse_args()
    if arguments.ring:
        sys.exit(ring(arguments.devices, arguments.rounds))
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
