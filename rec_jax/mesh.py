"""The mesh from the config, parameter names -> PartitionSpecs, host-local <-> global arrays, start of several processes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rec_jax.types import RecJaxError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the shard axis G of a batch lies over both: fsdp devices hold parts of parameters, not copies of data
Rules = Sequence[tuple[str, Sequence[Any]]]


def start_processes() -> None:
    """Joins the processes of this run, where the environment says that there are several; else does nothing.

    Cloud TPU pods, SLURM and Kubernetes are recognised by jax; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise RecJaxError(f"only {', '.join(given)} set; several processes need all of {', '.join(names)}")
    if given:
        address, processes, process = (os.environ[name] for name in names)
        jax.distributed.initialize(address, int(processes), int(process))
        return
    several_tpu_hosts = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    several_slurm_tasks = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if several_tpu_hosts or several_slurm_tasks:
        jax.distributed.initialize()


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """{"data", "fsdp", "tensor"} -> mesh over all devices; one size may be -1, "what is left".

    Raises:
      RecJaxError: an unknown axis, sizes that do not make up the number of devices.
    """
    devices = list(devices or jax.devices())
    unknown = [a for a in sizes if a not in AXES]
    if unknown:
        raise RecJaxError(f"config.mesh has no axis {unknown[0]!r}; axes are {', '.join(AXES)}")
    shape = [sizes.get(a, 1) for a in AXES]
    known = int(np.prod([n for n in shape if n != -1]))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape) or len(devices) % known:
        raise RecJaxError(
            f"config.mesh={dict(zip(AXES, shape, strict=True))} does not divide {len(devices)} devices; at most one axis is -1"
        )
    shape = [len(devices) // known if n == -1 else n for n in shape]
    if int(np.prod(shape)) != len(devices):
        raise RecJaxError(f"config.mesh={dict(zip(AXES, shape, strict=True))} makes {np.prod(shape)} devices, there are {len(devices)}")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_shards(shards: int, mesh: Mesh) -> None:
    """Raises RecJaxError unless the batch's shards divide evenly over the mesh's batch axes."""
    parts = int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    if shards % parts:
        raise RecJaxError(
            f"batch.shards={shards} does not divide over {parts} devices (mesh axes {', '.join(BATCH_AXES)}); make it a multiple"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch: the leading axis G over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: Any) -> str:
    """A pytree path as "a/b/0/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A tree of arrays or shapes -> the same tree of NamedShardings, by the first rule whose regex matches the whole name.

    A spec shorter than an array's rank leaves the last axes whole; scalars are replicated whatever the rules say.

    Raises:
      RecJaxError: an array that no rule matches, a spec with an unknown axis, or one that does not divide the array.
    """
    compiled = [(re.compile(pattern), tuple(spec)) for pattern, spec in rules]

    def one(path: Any, leaf: Any) -> NamedSharding:
        name, shape = path_name(path), np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
        if not shape:
            return replicated(mesh)
        for pattern, spec in compiled:
            if pattern.fullmatch(name):
                _check_spec(name, shape, spec, mesh)
                return NamedSharding(mesh, PartitionSpec(*spec))
        raise RecJaxError(f"no rule of config.mesh.rules matches {name} {tuple(shape)}; add one, e.g. (r'{name}', ()) to replicate it")

    return jax.tree_util.tree_map_with_path(one, tree)


def _check_spec(name: str, shape: Sequence[int], spec: Sequence[Any], mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise RecJaxError(f"config.mesh.rules gives {name} {tuple(shape)} the spec {spec}, which has more axes than the array")
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        for axis in names:
            if axis not in mesh.shape:
                raise RecJaxError(f"config.mesh.rules: {name} names the axis {axis!r}; the mesh has {', '.join(mesh.shape)}")
        parts = int(np.prod([mesh.shape[a] for a in names]))
        if size % parts:
            raise RecJaxError(f"config.mesh.rules: {name} {tuple(shape)} does not divide into {parts} parts along {axes}")


def local_shards(shards: int, mesh: Mesh) -> range:
    """The global shards 0..G-1 whose devices belong to this process (they lie side by side).

    Raises:
      RecJaxError: this process's devices hold shards that do not lie side by side.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    numbers = sorted({n for index in held.values() if index is not None for n in range(shards)[index[0]]})
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise RecJaxError(f"this process holds shards {numbers}, which do not lie side by side; order the mesh's devices by process")
    return range(numbers[0], numbers[-1] + 1)


def to_global(batch: Any, mesh: Mesh) -> Any:
    """This process's shards [g, ...] (numpy) -> global arrays [G, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put(tree: Any, sharding: Any) -> Any:
    """Host arrays, the same in every process, -> global arrays with the given sharding (one, or a tree of them)."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, NamedSharding):
        one = sharding
        sharding = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda i: np.asarray(x)[i]), tree, sharding)


def gather_places(place: dict[str, Any]) -> dict[str, Any]:
    """The iterator's place of this process -> that of all processes: each has the shards that it makes."""
    if jax.process_count() == 1:
        return place
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(place).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.asarray(len(text))).max())
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    places = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
    return {"shards": {name: shard for p in places for name, shard in p["shards"].items()}}
