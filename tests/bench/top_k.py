"""Time of exact top-k beside its floor and its rival: `python tests/bench/top_k.py [--items 200000 --dim 128 --queries 256 --k 100]`.

Floor: the matmul of all scores, 2 Q N D FLOP, in one call (which holds all Q x N scores; the streaming top-k holds one block).
Rival: NumPy's matmul and argpartition, then a sort of the k. The three run in turn; medians. Exits 1 where a target is missed:
at most 1.3 x the matmul on an idle machine, at least 6 x faster than argpartition. CPU seconds stand beside the wall time, since
other work on the machine spoils the latter. NumPy's matmul has all threads, its argpartition has one.

Memory: temporary bytes of the compiled top-k over a million items, by `memory_analysis`, against MEMORY_BLOCKS blocks of scores.
Devices: on 8 simulated ones, in a process of its own, the result must be bitwise that of one, ties included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import topk

MATMUL_LIMIT, RIVAL_LIMIT = 1.3, 6.0
MILLION, MEMORY_BLOCKS = 1_000_000, 4  # the stated bound: that many blocks of float32 scores, Q x block x 4 bytes each
DEVICES = 8


def memory(queries: int, dim: int, k: int, block: int) -> bool:
    """Prints what a top-k over a million items takes beyond its inputs -> whether it is within the bound."""
    query, item = (jax.ShapeDtypeStruct((n, dim), jnp.float32) for n in (queries, MILLION))
    compiled = jax.jit(lambda q, i: topk.top_k(q, i, k=k, block=block)).lower(query, item).compile()
    temporary, bound = compiled.memory_analysis().temp_size_in_bytes, MEMORY_BLOCKS * queries * block * 4
    print(
        f"{MILLION:,} items x {dim}, {queries} queries: {temporary / 1e6:.0f} MB of temporaries, bound {bound / 1e6:.0f} MB "
        f"({MEMORY_BLOCKS} blocks of scores); all scores at once are {queries * MILLION * 4 / 1e6:,.0f} MB"
    )
    return temporary <= bound


def sharded_is_unsharded() -> bool:
    """Small whole numbers, so that ties are everywhere, and real ones with twins on other devices: bitwise equal on 1 and 8 devices."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng, same = np.random.default_rng(1), True
    for draw in (lambda shape: rng.integers(-2, 3, shape), lambda shape: rng.normal(size=shape)):
        query, item = draw((64, 32)).astype(np.float32), draw((50_003, 32)).astype(np.float32)
        item[30_000:] = item[:20_003]
        one, eight = topk.top_k(query, item, k=100), topk.top_k(query, item, k=100, block=2048, mesh=mesh, axis="data")
        ties = int((np.diff(np.asarray(one[0]), axis=1) == 0).sum())
        same &= all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, eight, strict=True)) and ties > 0
        print(f"{DEVICES} devices {'give' if same else 'do NOT give'} the bits of one: 50,003 items, {ties:,} ties in the top 100")
    return same


def main() -> int:
    """Prints the table, the two ratios, the memory and the comparison of devices -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"items": 200_000, "dim": 128, "queries": 256, "k": 100, "block": topk.BLOCK, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only_sharded", action="store_true", help="only compare 8 devices with one (needs 8)")
    args = parser.parse_args()
    if args.only_sharded:
        return int(not sharded_is_unsharded())
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
    fits = memory(args.queries, args.dim, args.k, args.block)
    sys.stdout.flush()  # before the other process speaks
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    sharded = subprocess.run([sys.executable, __file__, "--only_sharded"], env=environment, check=False).returncode == 0
    return int(slower > MATMUL_LIMIT or faster < RIVAL_LIMIT or not fits or not sharded)


if __name__ == "__main__":
    sys.exit(main())
