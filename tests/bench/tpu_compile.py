"""What runs on a TPU pod, without one: libtpu compiles for real topologies, and the compiled program says its memory and its collectives.

    pip install libtpu==0.0.42
    python tests/bench/tpu_compile.py [--case=info_nce|top_k] [--topology=v5e:16x16] [--rows=1048576] [--dim=256]

Nothing is executed: a roofline is an upper bound from data sheets, no measurement. Exit code 1 if InfoNCE of 1,048,576 pairs does not fit
a v5e 16x16, if a program needs more than its chip has, or if the ring holds a collective that gathers.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # no TPU is asked for, nor the cloud's metadata server

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rec_jax import mesh as mesh_lib
from rec_jax.losses import weighted_info_nce
from rec_jax.topk import top_k


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet of a chip: dense bf16 FLOP/s, bytes/s and bytes of its memory, bytes/s of one link in one direction."""

    flops: float
    hbm: float
    memory: float
    link: float


# Google Cloud's pages on the chips; links: Austin et al., "How to Scale Your Model" (2025), part 2.
CHIPS = {
    "v5e": Chip(197e12, 0.81e12, 16e9, 45e9),
    "v5p": Chip(459e12, 2.8e12, 96e9, 90e9),
    "v6e": Chip(920e12, 1.6e12, 32e9, 90e9),
}
# (data, fsdp, tensor)
TOPOLOGIES = {"v5e:4x4": (4, 4, 1), "v5e:16x16": (16, 16, 1), "v5p:4x4x4": (4, 16, 1), "v6e:16x16": (16, 16, 1)}
ROWS = (1 << 20, 1 << 18, 1 << 15)
DIMS = (256, 768)
MUST_FIT = ("v5e:16x16", 1 << 20)

COLLECTIVE = re.compile(r" = (.*?) (collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all)(-start)?\(")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
BOUND = re.compile(r"condition=%?([\w.\-]+)")
CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective of a program on one chip: how often it runs, bytes that each run brings."""

    name: str
    runs: int
    bytes: int
    waits: bool  # no start and done apart in the compiled schedule: nothing is computed meanwhile


def sizes_of(shapes: str) -> list[int]:
    """The shapes in a piece of compiled text -> bytes of each; without the u32 scalars, contexts of asynchronous forms."""
    found = []
    for kind, dims in SHAPE.findall(shapes):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        if dims or kind != "u32":
            found.append(math.prod(int(n) for n in dims.split(",") if n) * bits // 8)
    return found


def collectives(text: str) -> list[Collective]:
    """Compiled text -> its collectives, those in loops as often as the loops run."""
    current, lines = "", collections.defaultdict(list)
    entry = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = head[1]
            entry = current if line.startswith("ENTRY") else entry
        else:
            lines[current].append(line)
    moving = {name for name in list(lines) if any(COLLECTIVE.search(x) for x in reachable(lines, name))}
    runs: collections.Counter[str] = collections.Counter()
    stack = [(entry, 1)]
    while stack:
        name, times = stack.pop()
        runs[name] += times
        for line in lines[name]:
            for role, called in CALLED.findall(line):
                inside = times
                if role == "body":
                    inside *= trips(lines, line) if called.lstrip("%") in moving else 1
                stack += [(part.strip().lstrip("%"), inside) for part in called.strip("{}").split(",")]
    found: collections.Counter[tuple[str, int, bool]] = collections.Counter()
    for name, times in runs.items():
        for line in lines[name]:
            if match := COLLECTIVE.search(line):
                sizes = sizes_of(match[1])
                total = sum(sizes)
                if match[3] and match[2] in ("collective-permute", "all-to-all"):
                    total //= 2  # an asynchronous start yields its operands beside its results
                elif match[3] and match[2] == "all-gather":
                    total = max(sizes)
                found[match[2], total, not match[3]] += times
    return [Collective(name, times, size, waits) for (name, size, waits), times in sorted(found.items())]


def trips(lines: dict[str, list[str]], loop: str) -> int:
    """The line of a loop -> how often it runs: the one constant that its condition compares the counter with."""
    condition = BOUND.search(loop)
    found = CONSTANT.findall("\n".join(lines[condition[1]])) if condition else []
    if len(found) != 1:
        raise ValueError(f"a loop with collectives whose condition has the constants {found}, expected one: {loop.strip()[:200]}")
    return int(found[0])


def reachable(lines: dict[str, list[str]], name: str) -> list[str]:
    """All lines of a computation and of those that it calls."""
    seen, stack, out = set(), [name], []
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        for line in lines.get(here, []):
            out.append(line)
            for _, called in CALLED.findall(line):
                stack += [part.strip().lstrip("%") for part in called.strip("{}").split(",")]
    return out


def shape(mesh: Mesh, dims: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def info_nce(mesh: Mesh, rows: int, dim: int) -> Any:
    """Value and gradients of in-batch InfoNCE over a ring of all devices, with a learned temperature."""
    axis = mesh_lib.BATCH_AXES

    def loss(query: Any, item: Any, temperature: Any, weights: Any) -> Any:
        return weighted_info_nce(query, item, temperature=temperature, weights=weights, mesh=mesh, axis=axis)

    vectors = shape(mesh, (rows, dim), jnp.bfloat16, axis)
    scalar, weights = shape(mesh, (), jnp.float32), shape(mesh, (rows,), jnp.float32, axis)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(vectors, vectors, scalar, weights)


def catalogue_top_k(mesh: Mesh, queries: int, items: int, dim: int) -> Any:
    """The best 100 of a catalogue whose rows lie over all devices, for queries that every device holds."""
    axis = mesh_lib.BATCH_AXES
    query, item = shape(mesh, (queries, dim), jnp.bfloat16), shape(mesh, (items, dim), jnp.bfloat16, axis)
    return jax.jit(lambda query, item: top_k(query, item, k=100, mesh=mesh, axis=axis)).lower(query, item)


def report(name: str, topology: str, lowered: Any, flops: float, hbm: float) -> tuple[bool, list[Collective]]:
    """Compiles, prints -> (fits its chip, collectives). flops and hbm: what one chip must do, by formula."""
    chip = CHIPS[topology.split(":")[0]]
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"\n{name} on {topology}: DOES NOT FIT {chip.memory / 1e9:g} GB a chip\n  {str(e)[:400]}", flush=True)
        return False, []
    seconds = time.perf_counter() - begin
    m = compiled.memory_analysis()
    parts = (m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes)
    fits = sum(parts) <= chip.memory
    found = collectives(compiled.as_text())
    # A sum goes twice round, scattered and gathered; of the rest each byte that arrives has crossed one link.
    crossed = lambda kept: sum(c.runs * c.bytes * (2 if c.name == "all-reduce" else 1) for c in kept)
    link, waited = crossed(found), crossed(c for c in found if c.waits)
    times = {"matmul": flops / chip.flops, "memory": hbm / chip.hbm, "links": link / chip.link}
    bound = max(times, key=lambda k: times[k])
    print(f"\n{name} on {topology}, compiled in {seconds:.0f} s")
    arguments, temp, output = (f"{x / 1e6:,.1f}" for x in parts)
    share = f"{sum(parts) / chip.memory:.2%} of {chip.memory / 1e9:g} GB {'ok' if fits else 'DOES NOT FIT'}"
    print(f"  MB a chip     arguments {arguments} + temporaries {temp} + outputs {output} = {share}")
    for c in found:
        how = "waited for" if c.waits else "asynchronous"
        print(f"  {c.name:<20}{c.runs:>5} x {c.bytes:>14,} bytes = {c.runs * c.bytes / 1e6:,.2f} MB a chip, {how}")
    print(f"  a chip        {flops / 1e12:.4g} TFLOP, {hbm / 1e6:,.1f} MB of memory at least, {link / 1e6:,.1f} MB over a link")
    print("  roofline      " + ", ".join(f"{k} {1e3 * t:.4g} ms" for k, t in times.items()), end="; ")
    print(f"bound by {bound}: {times['matmul'] / times[bound]:.1%} of peak if all overlaps, ", end="")
    step = max(times[bound], max(times["matmul"], times["memory"]) + waited / chip.link)
    print(f"{times['matmul'] / step:.1%} at most as scheduled", flush=True)
    return fits, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("info_nce", "top_k"), help="one case; default: all")
    parser.add_argument("--topology", choices=tuple(TOPOLOGIES), help="one topology; default: all")
    parser.add_argument("--rows", type=int, help=f"global batch; default: {ROWS}")
    parser.add_argument("--dim", type=int, help=f"width; default: {DIMS}")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed; it compiles for TPUs on any Linux machine: pip install libtpu==0.0.42", file=sys.stderr)
        return 2
    meshes = {}
    for topology in (args.topology,) if args.topology else tuple(TOPOLOGIES):
        devices = topologies.get_topology_desc(topology, "tpu").devices
        meshes[topology] = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, TOPOLOGIES[topology], strict=True)), devices)
    print(f"jax {jax.__version__}; collectives in loops are counted as often as the loop runs (a ring: once a device)")
    misses = []
    for topology, mesh in meshes.items() if args.case != "top_k" else ():
        chips = mesh.devices.size
        for rows in (args.rows,) if args.rows else ROWS:
            for dim in (args.dim,) if args.dim else DIMS:
                name = f"info_nce B={rows:,} D={dim}"
                # Forward, again in the backward pass, and two products with the gradients; each side read, its gradient written.
                flops, hbm = 8 * rows**2 * dim / chips, 2 * 2 * 2 * rows * dim / chips
                fits, found = report(name, topology, info_nce(mesh, rows, dim), flops, hbm)
                if not fits:
                    misses.append(f"{name} on {topology} does not fit" + " (the promise)" * ((topology, rows) == MUST_FIT))
                misses += [f"{name} on {topology}: {c.name}" for c in found if c.name not in ("collective-permute", "all-reduce")]
    for topology, mesh in meshes.items() if args.case != "info_nce" else ():
        queries, items, dim = 1024, 10_000_384, 128  # items: what 256 devices divide
        flops, hbm = 2 * queries * items * dim / mesh.devices.size, 2 * items * dim / mesh.devices.size
        name = f"top_k Q={queries:,} N={items:,} D={dim} k=100"
        fits, _ = report(name, topology, catalogue_top_k(mesh, queries, items, dim), flops, hbm)
        misses += [] if fits else [f"{name} on {topology} does not fit"]
    for miss in misses:
        print(f"MISSED: {miss}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
