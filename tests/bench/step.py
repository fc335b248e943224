"""The train step: compiles once, never waits for the host, works in place, shards its optimizer, and multiplies no more than it must.

    python tests/bench/step.py

MiniLM in the step, a history user tower, 8 simulated CPU devices. FLOP are counted from the step's jaxpr: matrix products, the body of a
scan as often as it runs, that of a shard_map once a device. Exit code 1 on a miss.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax.data.packing import texts_per_row
from rec_jax.data.pipeline import BatchSpec
from rec_jax.towers import BertSpec, two_tower
from rec_jax.train import loop, plan, stages
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train.step import Constants, init_scalars, log_frequencies, make_train_step
from rec_jax.types import Batch

DEVICES = 8
N_ITEMS = 2000
MINILM = BertSpec()
RUNS = 3  # measured steps


def config(**changes: Any) -> Any:
    """MiniLM in the step, with a small batch."""
    c = config_lib.defaults()
    c.batch.update({"shards": 8, "history_rows": 2, "history_length": 16, "max_items": 32, "text_rows": 4, "row_tokens": 64})
    c.towers.text.source, c.towers.text.dropout, c.objectives.info_nce.candidates = "tokens", 0.1, "batch"
    for key, value in changes.items():
        *parents, last = key.split(".")
        config_lib.get(c, ".".join(parents))[last] = value
    config_lib.check(c)
    return c.lock()


def batch_of(spec: BatchSpec, seed: int) -> Batch:
    """A batch full of random texts and histories."""
    random = np.random.default_rng(seed)
    g, places = spec.shards, (spec.shards, spec.history_rows, spec.history_length)
    rows = (g, spec.text_rows, spec.row_tokens)
    per_row = spec.items // spec.text_rows
    segments = np.broadcast_to(np.arange(spec.row_tokens) * per_row // spec.row_tokens + 1, rows).astype(np.int32)
    slots = np.arange(spec.items)
    at = slots // per_row * texts_per_row(spec.row_tokens) + slots % per_row
    return Batch(
        item_ids=random.integers(0, N_ITEMS, (g, spec.items), dtype=np.int32),
        item_tokens=random.integers(0, 30000, rows, dtype=np.int32),
        item_segments=segments,
        item_places=np.broadcast_to(at, (g, spec.items)).astype(np.int32),
        history=random.integers(0, spec.items, places, dtype=np.int32),
        history_segments=np.ones(places, np.int32),
        targets=random.integers(0, spec.items, (g, spec.queries), dtype=np.int32),
        weights=np.ones((g, spec.queries), np.float32),
        examples=np.zeros((g, spec.queries), np.int32),
    )


def task_of(c: Any, *, layout: str = "replicated", encoder: BertSpec = MINILM) -> tuple[loop.Task, BatchSpec]:
    """A training task without data, and the sizes of its batches."""
    batch = BatchSpec.from_config(c)
    towers = two_tower.make_spec(c.towers, encoder, texts_per_row=texts_per_row(batch.row_tokens), n_items=N_ITEMS)
    spec = stages.make_step(c, towers, batch)
    params = jax.jit(lambda key: two_tower.init(key, towers))(jax.random.key(0)) | {"scalars": init_scalars(spec.objectives)}
    o = c.optimizer
    fields = {f.name for f in dataclasses.fields(optimizer_lib.OptimizerSpec)} - {"warmup", "total"}
    optimizer = optimizer_lib.OptimizerSpec(warmup=1, total=100, **{name: o[name] for name in fields})
    loop_spec = loop.LoopSpec(100, 1, 100, 100, "", 0, 1, 0)
    constants = Constants(None, np.asarray(log_frequencies(np.ones(N_ITEMS))))
    rules = mesh_lib.rules_of(layout, ())
    folder = epath.Path(tempfile.gettempdir())
    unused: Any = None
    return loop.Task("", folder, spec, loop_spec, optimizer, params, unused, constants, rules, unused), batch


@dataclasses.dataclass
class Built:
    """A step on a mesh, with a state to begin with."""

    task: loop.Task
    sizes: BatchSpec
    mesh: Any
    shapes: Any
    shardings: Any
    step: Any
    state: Any
    constants: Any

    def batch(self, seed: int) -> Batch:
        return mesh_lib.to_global(batch_of(self.sizes, seed), self.mesh)


def build(mesh: Any, *, layout: str = "replicated", encoder: BertSpec = MINILM, **changes: Any) -> Built:
    task, sizes = task_of(config(**changes), layout=layout, encoder=encoder)
    tx = optimizer_lib.make_optimizer(task.optimizer)
    shapes, shardings = loop.state_shardings(task, mesh)
    create = jax.jit(lambda p: loop.create_state(task, jax.tree.map(jnp.copy, p), tx), out_shardings=shardings)
    state = create(mesh_lib.put(task.params, shardings.params))
    constants = mesh_lib.put(task.constants, mesh_lib.replicated(mesh))
    return Built(task, sizes, mesh, shapes, shardings, make_train_step(task.spec, tx, mesh, shardings), state, constants)


def run(built: Built) -> tuple[int, int]:
    """-> (compilations, transfers that the guard refused) of some steps after two to warm up."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **kwargs: compiled.append(name))
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    assert any("backend_compile" in name for name in compiled), "the listener does not hear of compilations"
    batches = [built.batch(seed) for seed in range(2 + RUNS)]
    state, refused, before = built.state, 0, 0
    for number, batch in enumerate(batches):
        if number == 2:
            jax.block_until_ready(state)
            before = sum("backend_compile" in name for name in compiled)
        try:
            with jax.transfer_guard("disallow"), jax.set_mesh(built.mesh):
                state, _ = built.step(state, batch, built.constants)
        except jax.errors.JaxRuntimeError as e:
            print(f"refused: {e}")
            refused += 1
    jax.block_until_ready(state)
    return sum("backend_compile" in name for name in compiled) - before, refused


def donated(built: Built) -> float:
    """Bytes that outputs share with inputs, over the state's, per device."""
    with jax.set_mesh(built.mesh):
        compiled = built.step.lower(built.state, built.batch(0), built.constants).compile()
    return compiled.memory_analysis().alias_size_in_bytes / mesh_lib.bytes_per_device(built.shapes, built.shardings)


def inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def dot_flops(jaxpr: Any) -> float:
    """FLOP of the matrix products of a jaxpr, on all devices together."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        below = [dot_flops(part) for part in inner(eqn)]
        if name == "while" and any(below):
            raise ValueError("a while loop with matrix products: how often it runs is not known")
        times = eqn.params["length"] if name == "scan" else 1
        if name == "shard_map":
            times = math.prod(eqn.params["mesh"].shape[a] for a in eqn.params["newly_manual_axes"])
        total += times * (max(below, default=0.0) if name == "cond" else sum(below))
    return total


def flops(built: Built) -> tuple[float, float]:
    """-> (FLOP counted, FLOP of the formula, with what is meant to be computed again)."""
    with jax.set_mesh(built.mesh):
        counted = dot_flops(jax.make_jaxpr(built.step)(built.state, built.batch(0), built.constants).jaxpr)
    spec, sizes = built.task.spec, built.sizes
    tokens = sizes.shards * sizes.text_rows * sizes.row_tokens
    again = plan.text_flops(spec.towers.text, tokens, row_tokens=sizes.row_tokens, train=False)
    repeats = (spec.chunk_rows > 0) + (spec.towers.text.remat == "full")
    return counted, plan.step_flops(spec, sizes, n_items=N_ITEMS) + repeats * again


def main() -> int:
    # Before jax looks for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    one = mesh_lib.make_mesh({"data": 1}, devices=jax.devices()[:1])
    eight = mesh_lib.make_mesh({"data": 1, "fsdp": DEVICES})
    plain = build(one)
    sharded = build(eight, layout="sharded", **{"objectives.info_nce.queue": 512, "objectives.info_nce.momentum": 0.99})
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sharded.shapes.opt_state))
    rows: list[tuple[str, float, str, bool]] = []

    def row(name: str, value: float, target: str, good: bool) -> None:
        rows.append((name, value, target, good))
        print(f"{name:64}{value:10.4g}   {target:8}{'ok' if good else 'MISSED'}", flush=True)

    print(f"jax {jax.__version__} on {jax.device_count()} {jax.devices()[0].device_kind}")
    for name, built in (("one device", plain), ("8-way fsdp, queue, momentum", sharded)):
        share = donated(built)
        row(f"share of the state donated, {name}", share, ">= 0.99", share >= 0.99)
    per_device = mesh_lib.bytes_per_device(sharded.shapes.opt_state, sharded.shardings.opt_state) / whole
    row("optimizer bytes on a device / all, 8-way fsdp", per_device, "<= 1/7", per_device <= 1 / 7)
    full = {"towers.text.remat": "full"}
    variants = {"": {}, ", chunks of 1 row (encoded again)": {"batch.chunk_rows": 1}, ", remat full (encoded again)": full}
    for name, changes in variants.items():
        counted, formula = flops(plain if not changes else build(one, **changes))
        tokens = plain.sizes.shards * plain.sizes.text_rows * plain.sizes.row_tokens
        label = f"FLOP / formula{name}; {counted / tokens / 1e6:.1f} MFLOP a packed token"
        row(label, counted / formula, "<= 1.05", counted / formula <= 1.05)
    counted, formula = flops(sharded)
    row("FLOP / formula, 8-way fsdp, queue, momentum", counted / formula, "<= 1.05", counted / formula <= 1.05)
    for name, built in (("one device", plain), ("8-way fsdp, queue, momentum", sharded)):
        compilations, refused = run(built)
        row(f"compilations after warm-up, {name}", compilations, "0", compilations == 0)
        row(f"host transfers in the step, {name}", refused, "0", refused == 0)
    return int(not all(good for *_, good in rows))


if __name__ == "__main__":
    sys.exit(main())
