"""What a train step costs as the catalogue grows: 100,000, 300,000 and 1,000,000 items with ten events each.

    python tests/bench/scale.py [--small] [--folder=DIR]

Synthetic events (Zipf items; half of the time the item that follows the last one in a fixed order) go through the real `prepare` and
batches. A SASRec without texts on 8 simulated CPU devices, each with an eighth of the table of items' own vectors and of its optimizer
state (`mesh.layout=sharded`), against the batch's targets and uniform draws, with `optimizer.rows` adam and dense. A process each, so that
its peak memory is its own. A time is the median of STEPS steps, as many of each rule, on batches that are made before. --small: 10,000
and 100,000 items, and dense only there.

With rows=adam a step of ten times the catalogue may take TIME times as long and as much temporary memory (MEMORY), and at the largest it
must be faster than dense. Exits 1 on a miss. Measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 8
SIZES = (100_000, 300_000, 1_000_000)
SMALL = (10_000, 100_000)
EVENTS_PER_ITEM, EVENTS_PER_USER = 10, 50
COVER = EVENTS_PER_USER // EVENTS_PER_ITEM  # first events of a user that are one after the other, so that no item is without an event
FOLLOWS = 0.5  # probability that an event is the successor of the one before
ZIPF = 0.9
TIME, MEMORY = 1.3, 1.05
STEPS = 9  # measured, after two; as many of each rule
RULES = ("adam", "dense")
CHUNK = 50_000  # users whose events are made at a time
FORMAT = "{:>10} {:>11} {:>6} {:>9} {:>9} {:>9} {:>11} {:>11} {:>11} {:>8} {:>15}"
SETTINGS = {
    "data.reader": "table", "data.on_bad.empty_text": "keep", "data.on_bad.duplicate_event": "keep",
    "towers.dim": 32, "towers.user.layers": 1, "towers.user.heads": 2, "towers.user.mlp": 64, "towers.item.text": False,
    "towers.item.ids": True, "batch.history_rows": 4, "batch.history_length": 50, "objectives.info_nce.candidates": "batch",
    "objectives.info_nce.uniform": 512, "mesh.fsdp": DEVICES, "mesh.layout": "sharded", "train.duration": "1 epochs",
    "optimizer.learning_rate": 1e-2, "optimizer.warmup": "0 steps", "optimizer.schedule": "constant",
}  # fmt: skip


def peak_gb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make(folder: Path, items: int, seed: int = 0) -> int:
    """Writes events/*.parquet in time order of each user -> events. The first ones of all users together see each item once."""
    import polars as pl

    rng, users = np.random.default_rng(seed), items * EVENTS_PER_ITEM // EVENTS_PER_USER
    order = rng.permutation(items).astype(np.int32)  # rank -> item: popular items lie anywhere in the table
    after = np.empty(items, np.int32)
    after[order] = np.roll(order, 1)  # the item that follows is about as popular
    (folder / "events").mkdir()
    for part, start in enumerate(range(0, users, CHUNK)):
        n = min(CHUNK, users - start)
        # The inverse of the continuous power law's distribution function.
        rank = ((items ** (1 - ZIPF) - 1) * rng.random((n, EVENTS_PER_USER)) + 1) ** (1 / (1 - ZIPF))
        event = order[np.minimum(rank.astype(np.int64) - 1, items - 1)]
        event[:, 0] = order[(np.arange(start + 1, start + n + 1) * COVER) % items]
        follows = rng.random((n, EVENTS_PER_USER)) < FOLLOWS
        follows[:, :COVER] = True
        for place in range(1, EVENTS_PER_USER):
            event[:, place] = np.where(follows[:, place], after[event[:, place - 1]], event[:, place])
        user = np.repeat(np.arange(start, start + n, dtype=np.int32), EVENTS_PER_USER)
        when = np.tile(np.arange(EVENTS_PER_USER, dtype=np.int32), n)
        pl.DataFrame({"user": user, "item": event.reshape(-1), "time": when}).write_parquet(folder / "events" / f"{part:04d}.parquet")
    return users * EVENTS_PER_USER


def config_of(folder: Path, rows: str) -> Any:
    """The config of a size."""
    from rec_jax import config as config_lib

    config = config_lib.defaults()
    config.data.columns.time = "time"
    places = {"data.path": str(folder / "events"), "data.cache": str(folder / "cache")}
    for key, value in {**SETTINGS, **places, "optimizer.rows": rows}.items():
        *parents, last = key.split(".")
        config_lib.get(config, ".".join(parents))[last] = value
    config_lib.check(config)
    return config.lock()


def prepare(folder: Path) -> dict[str, Any]:
    """Prepares a size's events -> {seconds, memory, items, events}."""
    from rec_jax.data import prepare as prepare_lib

    began = time.perf_counter()
    prepared = prepare_lib.prepare(config_of(folder, "adam"))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": peak_gb(), "items": prepared.n_items, "events": prepared.meta["events"]}


def train(folder: Path, rows: str) -> dict[str, Any]:
    """Some steps -> {compile, batch, step: seconds; state, temporary: bytes a device; memory, losses: first and last}."""
    import jax
    import jax.numpy as jnp
    from etils import epath

    from rec_jax import mesh as mesh_lib
    from rec_jax.data import prepare as prepare_lib
    from rec_jax.eval.model import towers_of
    from rec_jax.towers import BertSpec
    from rec_jax.train import loop, stages
    from rec_jax.train import optimizer as optimizer_lib
    from rec_jax.train.step import make_train_step
    from rec_jax.types import Ragged

    config = config_of(folder, rows)
    prepared = prepare_lib.prepare(config)
    mesh = mesh_lib.make_mesh({axis: config.mesh[axis] for axis in mesh_lib.AXES})
    inputs = stages.Inputs(prepared, Ragged.from_rows([]), towers_of(config, prepared, BertSpec()), {})
    batches = stages.make_batches(config, inputs, mesh)
    task = stages.make_task(config, "", epath.Path(folder), inputs, batches, mesh, lambda params, *, step: {})
    tx = optimizer_lib.make_optimizer(task.optimizer)
    shapes, shardings = loop.state_shardings(task, mesh)
    create = jax.jit(lambda p: loop.create_state(task, jax.tree.map(jnp.copy, p), tx), out_shardings=shardings)
    state, constants = create(mesh_lib.put(task.params, shardings.params)), mesh_lib.put(task.constants, mesh_lib.replicated(mesh))
    count, iterator = STEPS + 2, iter(batches)
    began = time.perf_counter()
    made = [next(iterator) for _ in range(count)]
    batch = (time.perf_counter() - began) / count
    arrays = [mesh_lib.to_global(b, mesh) for b in made]
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        step = make_train_step(task.spec, tx, mesh, shardings).lower(state, arrays[0], constants).compile()
    compiling, seconds, losses = time.perf_counter() - began, [], []
    for a in arrays:
        began = time.perf_counter()
        state, metrics = step(state, a, constants)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"]))
    return {
        "compile": compiling,
        "batch": batch,
        "step": float(np.median(seconds[2:])),
        "state": mesh_lib.bytes_per_device(shapes, shardings),
        "temporary": step.memory_analysis().temp_size_in_bytes,
        "memory": peak_gb(),
        "losses": [losses[0], losses[-1]],
    }


def child(order: dict[str, str]) -> dict[str, Any]:
    """Runs `prepare` or `train` in a process of its own -> what it returns."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, str(Path(__file__).resolve()), f"--child={json.dumps(order)}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"the process of {order} ended with code {done.returncode}; its words stand above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, items: int, chosen: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Makes, prepares and trains a size, and says it -> rows -> figures of `train`."""
    began = time.perf_counter()
    events = make(folder, items)
    making = time.perf_counter() - began
    data = child({"folder": str(folder), "what": "prepare"})
    assert (data["items"], data["events"]) == (items, events)
    said = f"made in {making:.0f} s, prepared in {data['seconds']:.0f} s within {data['memory']:.2f} GB"
    print(f"{items:,} items, {events:,} events: {said}", flush=True)
    out = {}
    for rows in chosen:
        f = out[rows] = child({"folder": str(folder), "what": rows})
        cells = [f"{items:,}", f"{events:,}", rows, *(f"{1e3 * f[k]:,.1f}" for k in ("step", "batch")), f"{f['compile']:.1f}"]
        table = items * SETTINGS["towers.dim"] * 4 / DEVICES
        cells += [*(f"{x / 1e6:,.2f}" for x in (table, f["state"], f["temporary"])), f"{f['memory']:.2f}"]
        print(FORMAT.format(*cells, "{:.3f} -> {:.3f}".format(*f["losses"])), flush=True)
    return out


def main() -> int:
    """Prints the table and the ratios -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="10,000 and 100,000 items alone")
    parser.add_argument("--folder", type=Path, help="where input and prepared data go; a temporary folder by default")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        order = json.loads(args.child)
        folder, what = Path(order["folder"]), order["what"]
        print(json.dumps(prepare(folder) if what == "prepare" else train(folder, what)))
        return 0
    names = ("items", "events", "rows", "step ms", "batch ms", "compile s", "MB: table", "state", "temporary", "peak GB", "loss")
    print(f"{DEVICES} simulated devices on {len(os.sched_getaffinity(0))} cores; MB are of a device, the peak of the process")
    print(FORMAT.format(*names))
    found, sizes = {}, SMALL if args.small else SIZES
    for items in sizes:
        chosen = ("adam",) if args.small and items == sizes[0] else RULES
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            found[items] = measure(Path(name), items, chosen)
    first, last = found[sizes[0]], found[sizes[-1]]
    checks = []
    for rows in [rows for rows in RULES if rows in first]:
        for key, name, most in (("step", "step time", TIME), ("temporary", "temporary memory", MEMORY)):
            ratio, limited = last[rows][key] / first[rows][key], rows == "adam"
            checks.append((f"{rows}: {name} at 10 x the items / at 1 x", ratio, f"<= {most}" * limited, not limited or ratio <= most))
    faster = last["dense"]["step"] / last["adam"]["step"]
    checks.append(("step time at 10 x, dense / adam", faster, "> 1", faster > 1))
    for name, value, limit, good in checks:
        print(f"{name:48}{value:8.2f}   {limit:8}{'' if not limit else 'ok' if good else 'MISSED'}")
    return int(not all(good for *_, good in checks))


if __name__ == "__main__":
    sys.exit(main())
