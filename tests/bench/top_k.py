"""Time of exact top-k beside its floor and its rival: `python tests/bench/top_k.py [--items 200000 --dim 128 --queries 256 --k 100]`.

Floor: the matmul of all scores, 2 Q N D FLOP, in one call (which holds all Q x N scores; the streaming top-k holds one block).
Rival: NumPy's matmul and argpartition, then a sort of the k. The three run in turn; medians. Exits 1 where a target is missed:
at most 1.3 x the matmul on an idle machine, at least 6 x faster than argpartition. CPU seconds stand beside the wall time, since
other work on the machine spoils the latter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import topk

MATMUL_LIMIT, RIVAL_LIMIT = 1.3, 6.0


def main() -> int:
    """Prints the table and the two ratios -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"items": 200_000, "dim": 128, "queries": 256, "k": 100, "block": topk.BLOCK, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    query, item = (rng.normal(size=(n, args.dim)).astype(np.float32) for n in (args.queries, args.items))
    target = rng.integers(0, args.items, (args.queries, 1)).astype(np.int32)
    query_jax, item_jax = jnp.asarray(query), jnp.asarray(item)
    matmul = jax.jit(lambda q, i: jax.lax.dot_general(q, i, (((1,), (1,)), ((), ())), precision="highest"))

    def rival() -> Any:
        scores = query @ item.T
        best = np.argpartition(-scores, args.k, axis=1)[:, : args.k]
        return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1), axis=1)

    runs: dict[str, Callable[[], Any]] = {
        "matmul": lambda: matmul(query_jax, item_jax),
        "top_k": lambda: topk.top_k(query_jax, item_jax, k=args.k, block=args.block),
        "argpartition": rival,
        "target_ranks": lambda: topk.target_ranks(query_jax, item_jax, target, block=args.block),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, call in runs.items():
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            if number:  # the first round compiles
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, cpu = ({name: float(np.median([pair[n] for pair in times[name]])) for name in runs} for n in (0, 1))
    gflop = 2 * args.queries * args.items * args.dim / 1e9
    print(f"{args.queries} queries, {args.items:,} items x {args.dim}, k = {args.k}, on {jax.devices()[0].device_kind}")
    for name in runs:
        print(f"  {name:13s} {1e3 * wall[name]:7.0f} ms wall {1e3 * cpu[name]:7.0f} ms CPU {gflop / wall[name]:7.0f} GFLOP/s")
    slower, faster = wall["top_k"] / wall["matmul"], wall["argpartition"] / wall["top_k"]
    print(
        f"top_k takes {slower:.2f} x its matmul (limit {MATMUL_LIMIT}) and is {faster:.1f} x faster than argpartition (limit {RIVAL_LIMIT})"
    )
    return int(slower > MATMUL_LIMIT or faster < RIVAL_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
