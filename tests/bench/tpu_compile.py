"""What runs on a TPU pod, without one: libtpu compiles for real topologies, and the compiled program says its memory and its collectives.

    pip install libtpu==0.0.42
    python tests/bench/tpu_compile.py [--case=step|info_nce|top_k] [--topology=v5e:16x16] [--preset=v5e_16x16_large] [--check]

`step`: the whole train step of every preset of configs/pod.py on its slice. `info_nce`, `top_k`: the loss and the search alone. Nothing is
executed: a roofline is an upper bound from data sheets, no measurement, and cycles are the compiler's own estimate. `--check` compares
memory and collectives with tests/goldens/tpu, `--update_goldens` writes them anew. Exit code 1 if a step, or InfoNCE of 1,048,576 pairs on
v5e 16x16, does not fit its chips, if the ring holds a collective that gathers, or if a golden differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # no TPU is asked for, nor the cloud's metadata server

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from step import dot_flops
from tpu_program import CHIPS, Collective, Program, roofline

from rec_jax import config as config_lib
from rec_jax import config_flags
from rec_jax import mesh as mesh_lib
from rec_jax.data.draft import BatchSpec, Draft
from rec_jax.data.packing import texts_per_row
from rec_jax.losses import weighted_info_nce
from rec_jax.topk import top_k
from rec_jax.towers import BertSpec, two_tower
from rec_jax.train import loop, plan, stages
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train.step import Constants, init_scalars, make_train_step
from rec_jax.types import Ragged

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "tpu"
CONFIG = ROOT / "configs" / "pod.py"
# (data, fsdp, tensor)
TOPOLOGIES = {"v5e:4x4": (4, 4, 1), "v5e:16x16": (16, 16, 1), "v5p:4x4x4": (4, 16, 1), "v6e:16x16": (16, 16, 1)}
ROWS = (1 << 20, 1 << 15)
DIMS = (256, 768)
MUST_FIT = ("v5e:16x16", 1 << 20)
N_ITEMS = 10_000_000  # catalogue of a step
# Published sizes: Devlin et al., "BERT" (2019), section 3. One scan over the layers: unrolled, a step compiles several times as long.
ENCODERS = {
    "google-bert/bert-base-uncased": BertSpec(width=768, layers=12, heads=12, mlp_width=3072, scan=True),
    "google-bert/bert-large-uncased": BertSpec(width=1024, layers=24, heads=16, mlp_width=4096, scan=True),
}
TOLERANCE = 0.02  # of memory and of a collective's bytes, against the golden


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of one topology.

    Attributes:
      name: in goldens and in what is printed.
      lowered: ready to be compiled.
      flops, useful: of one chip: those that it computes, and of them those that the model needs.
      hbm: bytes that one chip must move at least, by formula; None: what the compiled instructions move.
      rings_only: permutes, and sums, are all the collectives that it may have.
      must_fit: whether a program too large for the chip is a miss.
    """

    name: str
    lowered: Any
    flops: float
    useful: float
    hbm: float | None = None
    rings_only: bool = False
    must_fit: bool = True


def shape(mesh: Mesh, dims: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def info_nce(mesh: Mesh, rows: int, dim: int, *, must_fit: bool = False) -> Case:
    """Value and gradients of in-batch InfoNCE over a ring of all devices, with a learned temperature."""
    axis = mesh_lib.BATCH_AXES

    def loss(query: Any, item: Any, temperature: Any, weights: Any) -> Any:
        return weighted_info_nce(query, item, temperature=temperature, weights=weights, mesh=mesh, axis=axis)

    vectors = shape(mesh, (rows, dim), jnp.bfloat16, axis)
    scalar, weights = shape(mesh, (), jnp.float32), shape(mesh, (rows,), jnp.float32, axis)
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(vectors, vectors, scalar, weights)
    # Forward, again in the backward pass, and two products with the gradients; each side read, its gradient written.
    product, chips = 2 * rows**2 * dim, mesh.devices.size
    hbm = 2 * 2 * 2 * rows * dim / chips
    return Case(f"info_nce_{rows}x{dim}", lowered, 4 * product / chips, 3 * product / chips, hbm, True, must_fit)


def catalogue_top_k(mesh: Mesh) -> Case:
    """The best 100 of a catalogue whose rows lie over all devices, for queries that every device holds."""
    axis = mesh_lib.BATCH_AXES
    queries, items, dim = 1024, 10_000_384, 128  # items: what 256 devices divide
    query, item = shape(mesh, (queries, dim), jnp.bfloat16), shape(mesh, (items, dim), jnp.bfloat16, axis)
    lowered = jax.jit(lambda query, item: top_k(query, item, k=100, mesh=mesh, axis=axis)).lower(query, item)
    flops, hbm = 2 * queries * items * dim / mesh.devices.size, 2 * items * dim / mesh.devices.size
    return Case(f"top_k_{queries}x{items}x{dim}", lowered, flops, flops, hbm)


def slice_of(preset: str) -> str:
    """A preset of configs/pod.py -> the topology that it is for: v5e_4x4_large -> v5e:4x4."""
    return ":".join(preset.split("_")[:2])


def task_of(config: Any) -> loop.Task:
    """What a pod would train, with shapes instead of parameters, and without data."""
    batch = BatchSpec.from_config(config)
    bert = ENCODERS[config.towers.text.path]
    towers = two_tower.make_spec(config.towers, bert, texts_per_row=texts_per_row(batch.row_tokens), n_items=N_ITEMS)
    spec = stages.make_step(config, towers, batch)
    params = jax.eval_shape(lambda key: two_tower.init(key, towers) | {"scalars": init_scalars(spec.objectives)}, jax.random.key(0))
    fields = {f.name for f in dataclasses.fields(optimizer_lib.OptimizerSpec)} - {"warmup", "total"}
    optimizer = optimizer_lib.OptimizerSpec(warmup=100, total=10_000, **{name: config.optimizer[name] for name in fields})
    cadence = loop.LoopSpec(10_000, 100, 1000, 1000, "", 0, 1, 0)
    constants = Constants(None, jax.ShapeDtypeStruct((N_ITEMS,), jnp.float32))
    rules = mesh_lib.rules_of(config.mesh.layout, config.mesh.rules)
    unused: Any = None
    return loop.Task("", epath.Path(tempfile.gettempdir()), spec, cadence, optimizer, params, unused, constants, rules, unused)


def train_step(config: Any, name: str, devices: Any) -> Case:
    """A config's whole train step on abstract arrays."""
    mesh = mesh_lib.make_mesh({a: config.mesh[a] for a in mesh_lib.AXES}, devices)
    mesh_lib.check_shards(config.batch.shards, mesh)
    task, sizes = task_of(config), BatchSpec.from_config(config)
    shapes, shardings = loop.state_shardings(task, mesh)
    step = make_train_step(task.spec, optimizer_lib.make_optimizer(task.optimizer), mesh, shardings)
    one_shard = Draft(sizes, Ragged.from_rows([[1]]), None, 0).batch()
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((sizes.shards, *x.shape), x.dtype), one_shard)
    with jax.set_mesh(mesh):
        traced = step.trace(shapes, batch, task.constants)
        lowered = traced.lower()
    flops, useful = dot_flops(traced.jaxpr.jaxpr), plan.step_flops(task.spec, sizes, n_items=N_ITEMS)
    return Case(name, lowered, flops / mesh.devices.size, useful / mesh.devices.size)


def cases(args: argparse.Namespace, topology: str) -> Iterator[Case]:
    """What was asked for of one topology."""
    devices = topologies.get_topology_desc(topology, "tpu").devices
    if args.case in (None, "step"):
        for preset in runpy.run_path(str(CONFIG))["PRESETS"] if args.preset is None else (args.preset,):
            if slice_of(preset) == topology:
                config = config_lib.load(f"{CONFIG}:{preset}", args.overrides)
                pairs = config.batch.shards * BatchSpec.from_config(config).queries
                print(f"\nstep {preset}: {pairs:,} pairs, D = {config.towers.dim}", end="")
                yield train_step(config, f"step_{preset}", devices)
    mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, TOPOLOGIES[topology], strict=True)), devices)
    if args.case in (None, "info_nce"):
        for rows in (args.rows,) if args.rows else ROWS:
            for dim in (args.dim,) if args.dim else DIMS:
                yield info_nce(mesh, rows, dim, must_fit=(topology, rows) == MUST_FIT)
    if args.case in (None, "top_k"):
        yield catalogue_top_k(mesh)


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Kind -> how often it runs, bytes that all runs bring to a chip, and those of them that are waited for."""
    out: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"runs": 0, "bytes": 0, "waited_bytes": 0})
    for c in found:
        out[c.name]["runs"] += c.runs
        out[c.name]["bytes"] += c.runs * c.bytes
        out[c.name]["waited_bytes"] += c.runs * c.bytes * c.waits
    return dict(out)


Kept = dict[str, dict[str, Any]] | None  # what a golden keeps of a program: bytes a chip, collectives by kind; None: it does not fit


def differences(new: Kept, golden: Kept) -> list[str]:
    """What differs by more than TOLERANCE."""
    if new is None or golden is None:
        return [] if new == golden else [f"{'fits' if new else 'does not fit'}, and in the golden it is the other way"]
    numbers = {f"{part} [bytes]": (golden["memory"][part], new["memory"][part]) for part in new["memory"]}
    for kind in sorted(new["collectives"] | golden["collectives"]):
        for what in ("runs", "bytes", "waited_bytes"):
            old, now = (x["collectives"].get(kind, {}).get(what, 0) for x in (golden, new))
            numbers[f"{kind} [{what}]"] = (old, now)
    return [f"{name} {now:,}, the golden has {old:,}" for name, (old, now) in numbers.items() if abs(now - old) > TOLERANCE * max(old, 1)]


def report(case: Case, topology: str, *, sources: int) -> tuple[Kept, list[str]]:
    """Compiles and prints -> (what a golden keeps, misses)."""
    name, chip = f"{case.name} on {topology}", CHIPS[topology.split(":")[0]]
    begin = time.perf_counter()
    try:
        compiled = case.lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"\n{name}: DOES NOT FIT {chip.memory / 1e9:g} GB a chip\n  {str(e)[:400]}", flush=True)
        return None, [f"{name} does not fit"] if case.must_fit else []
    seconds = time.perf_counter() - begin
    m = compiled.memory_analysis()
    memory = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    }
    total = sum(memory.values())
    misses = [] if total <= chip.memory or not case.must_fit else [f"{name} does not fit"]
    program = Program(compiled.as_text())
    found = program.collectives()
    misses += [f"{name}: {c.name} from {c.source}" for c in found if case.rings_only and c.name not in ("collective-permute", "all-reduce")]

    print(f"\n{name}, compiled in {seconds:.0f} s")
    parts = " + ".join(f"{part} {size / 1e6:,.1f}" for part, size in memory.items())
    fits = "ok" if total <= chip.memory else "DOES NOT FIT"
    print(f"  MB a chip     {parts} = {total / 1e6:,.1f}: {total / chip.memory:.1%} of {chip.memory / 1e9:g} GB {fits}")
    for kind in dict.fromkeys(c.name for c in found):
        for waits in (False, True):
            some = [c for c in found if c.name == kind and c.waits == waits]
            if some:
                how = "waited for" if waits else "asynchronous"
                brought = sum(c.runs * c.bytes for c in some)
                print(f"  {kind:<20}{sum(c.runs for c in some):>7} runs, {brought / 1e6:>12,.2f} MB a chip, {how}")
    for c in sorted(found, key=lambda c: -c.runs * c.bytes)[:sources]:
        print(f"    {c.runs:>5} x {c.bytes:>13,} bytes, {c.name} among {c.group}: {c.source}")
    moved = program.traffic()
    torus = tuple(map(int, topology.split(":")[1].split("x")))
    line = roofline(chip, torus, flops=case.flops, useful=case.useful, hbm=case.hbm or moved, found=found)
    least = f" ({case.hbm / 1e6:,.1f} at least)" if case.hbm else ""
    flops = f"{case.flops / 1e12:.4g} TFLOP, {case.useful / 1e12:.4g} of them useful"
    print(f"  a chip        {flops}; {moved / 1e6:,.1f} MB to and from memory{least}")
    times = ", ".join(f"{part} {1e3 * getattr(line, part):.4g} ms" for part in ("matmul", "memory", "links"))
    print(f"  roofline      {times}, of links waited for {1e3 * line.waited:.4g}; a step {1e3 * line.step:.4g} ms, bound by {line.bound}")
    print(f"  MFU at most   {line.mfu:.1%} as scheduled, {line.useful / getattr(line, line.bound):.1%} if all overlaps")
    print(
        f"  the compiler  thinks {1e3 * program.cycles() / chip.clock:.4g} ms of computing by its cycles, without collectives", flush=True
    )
    return {"memory": memory, "collectives": by_kind(found)}, misses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("step", "info_nce", "top_k"), help="one case; default: all")
    parser.add_argument("--topology", choices=tuple(TOPOLOGIES), help="one topology; default: all")
    parser.add_argument("--preset", help="of configs/pod.py; default: all")
    parser.add_argument("--rows", type=int, help=f"global batch of info_nce; default: {ROWS}")
    parser.add_argument("--dim", type=int, help=f"width of info_nce; default: {DIMS}")
    parser.add_argument("--sources", type=int, default=8, help="collectives to name with the operation that they come from")
    parser.add_argument("--check", action="store_true", help="compare with the goldens")
    parser.add_argument("--update_goldens", action="store_true", help="write the goldens of these cases anew")
    args, args.overrides = config_flags.parse_args(parser, sys.argv[1:])
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed; it compiles for TPUs on any Linux machine: pip install libtpu==0.0.42", file=sys.stderr)
        return 2
    if args.overrides and (args.check or args.update_goldens):
        parser.error("goldens are of the presets as they are: leave --config.* off")
    print(f"jax {jax.__version__}; collectives in loops are counted as often as the loop runs (a ring: once a device)")
    misses = []
    for topology in (args.topology,) if args.topology else tuple(TOPOLOGIES):
        file = GOLDENS / f"{topology.replace(':', '_')}.json"
        goldens = json.loads(file.read_text()) if file.is_file() else {}
        for case in cases(args, topology):
            new, more = report(case, topology, sources=args.sources)
            misses += more
            if args.update_goldens:
                file.parent.mkdir(parents=True, exist_ok=True)
                goldens = (json.loads(file.read_text()) if file.is_file() else {}) | {case.name: new}  # another process may write it too
                file.write_text(json.dumps(dict(sorted(goldens.items())), indent=1) + "\n")
            elif args.check and case.name not in goldens:
                misses.append(f"{file.name} has no {case.name}: --update_goldens writes it")
            elif args.check:
                misses += [f"{case.name} on {topology}: {line}" for line in differences(new, goldens[case.name])]
    for miss in misses:
        print(f"MISSED: {miss}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
