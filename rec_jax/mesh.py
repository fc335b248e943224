"""The mesh from the config, parameter names -> PartitionSpecs, host-local <-> global arrays.

Several processes of one run, and what they tell each other, are in `processes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rec_jax.types import RecJaxError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the shard axis G of a batch lies over both: fsdp devices hold parts of parameters, not copies of data
# Ordered (regex of the whole name, spec, further specs ...): the first rule that matches decides, by its first spec that divides the array.
Rules = Sequence[tuple[Any, ...]]
Axis = str | tuple[str, ...]  # one mesh axis, or several taken as one

_BOTH = ("fsdp", "tensor")
# Kernels lie over fsdp along one axis and over tensor along the other, so that the two matmuls of a block meet in one sum over tensor;
# embedding tables lie by rows. The specs behind the first are for sizes that the mesh does not divide; () is whole on every device.
# Reference: Shoeybi et al., "Megatron-LM" (2019), section 3.
SHARDED: Rules = (
    (r"(user/)?features/.*/embedding", (_BOTH,), ("fsdp",), (None, _BOTH), ()),
    (r"(user/)?features/.*/(frequency|missing)", ()),
    (r"(ids|history_ids|users)/embedding", (_BOTH,), ("fsdp",), (None, _BOTH), ()),
    (r"text/embeddings/word/embedding", (_BOTH,), ("fsdp", "tensor"), (None, _BOTH), ("fsdp",), (None, "fsdp"), ()),
    (r".*/(position|token_type|gap|rating|event_[^/]*)/embedding", ("fsdp",), (None, "fsdp"), ()),
    (r"(task|lora)/.*", ()),  # small
    (r"user/mask", ()),
    (r"user/layer_\d+/out/kernel", ("tensor", None, "fsdp"), (None, None, "fsdp"), ()),  # [heads, width, D]
    (r".*/(out|down|mlp_out)/kernel", ("tensor", "fsdp"), (None, "fsdp"), ()),
    (r".*/kernel", ("fsdp", "tensor"), ("fsdp",), ()),
    (r".*/(bias|scale)", ()),
    (r"scalars/.*", ()),
)
LAYOUTS: dict[str, Rules] = {"replicated": ((r".*", ()),), "sharded": SHARDED, "none": ()}


def on_cpu() -> bool:
    """Whether steps run on CPUs, which want some sums in another form than accelerators, for the same values."""
    return jax.default_backend() == "cpu"


def rules_of(layout: str, rules: Rules) -> Rules:
    """`config.mesh.layout` and `config.mesh.rules` -> all rules, the config's own first.

    Raises:
      RecJaxError: an unknown layout, a rule that is none, a regex that is none, an axis that no mesh has.
    """
    if layout not in LAYOUTS:
        raise RecJaxError(f"config.mesh.layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    for number, rule in enumerate(rules):
        place = f"config.mesh.rules[{number}]={rule!r}"
        if not isinstance(rule, (tuple, list)) or len(rule) < 2 or not isinstance(rule[0], str):
            raise RecJaxError(f"{place}: expected (regex, spec), e.g. ('ids/embedding', ('fsdp', None))")
        try:
            re.compile(rule[0])
        except re.error as e:
            raise RecJaxError(f"{place}: {rule[0]!r} is no regular expression: {e}") from None
        for spec in rule[1:]:
            if not isinstance(spec, (tuple, list)):
                raise RecJaxError(f"{place}: {spec!r} is no spec: for each axis of the array a mesh axis, a tuple of them or None")
            for axis in _axes(spec):
                if axis not in AXES:
                    raise RecJaxError(f"{place} names the axis {axis!r}; the mesh has {', '.join(AXES)}")
    return (*rules, *LAYOUTS[layout])


def _axes(spec: Sequence[Any]) -> list[Any]:
    """The mesh axes that a spec names."""
    return [axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else tuple(axes or ()))]


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


def axis_names(axis: Axis | None) -> tuple[str, ...]:
    """An axis or several -> a tuple of names."""
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def devices_along(mesh: Mesh | None, axis: Axis | None) -> int:
    """Number of devices along an axis or several; 1 where there is no mesh.

    Raises:
      RecJaxError: one of both without the other, an axis that is not in the mesh.
    """
    if (mesh is None) != (axis is None):
        raise RecJaxError(f"mesh={mesh}, axis={axis!r}: give both or neither")
    if mesh is None:
        return 1
    for name in axis_names(axis):
        if name not in mesh.shape:
            raise RecJaxError(f"axis {name!r} is not in the mesh; it has {', '.join(mesh.shape)}")
    return int(np.prod([mesh.shape[a] for a in axis_names(axis)]))


def ring_of(mesh: Mesh, axis: Axis) -> list[int]:
    """The devices along an axis or several, by their numbers, in the order of a ring.

    Where they are a rectangle of chips each sends to a neighbour: along the rows, forward and backward by turns, in all columns but the
    first, which leads back. On TPUs whose links route no further (v5e beyond 4 x 4), XLA would else compute nothing while it sends
    (tests/bench/tpu_compile.py). Elsewhere the order is the mesh's own.
    """
    names = axis_names(axis)
    order = [mesh.axis_names.index(a) for a in (*names, *(a for a in mesh.axis_names if a not in names))]
    devices = mesh.devices.transpose(order).reshape(devices_along(mesh, axis), -1)[:, 0]
    plain = list(range(len(devices)))
    at = {tuple(getattr(device, "coords", None) or ()): number for number, device in enumerate(devices)}
    if len(at) < len(devices):  # no coordinates, or several cores a chip
        return plain
    sides = [(k, sorted({place[k] for place in at})) for k in range(len(next(iter(at))))]
    sides = [(k, side) for k, side in sides if len(side) > 1]
    if len(sides) != 2 or len(sides[0][1]) * len(sides[1][1]) != len(devices) or len(devices) % 2:
        return plain
    sides.sort(key=lambda side: len(side[1]) % 2)  # an even number of rows, so that the last one ends beside the first column
    (by_row, rows), (by_column, (first, *others)) = sides
    path = [(row, column) for n, row in enumerate(rows) for column in (others[::-1] if n % 2 else others)]
    path += [(row, first) for row in reversed(rows)]
    numbers = {(place[by_row], place[by_column]): number for place, number in at.items()}
    return [numbers[place] for place in path]


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

    A spec shorter than an array's rank leaves the last axes whole; scalars are replicated whatever the rules say. A rule may go on with
    further specs: the first one that divides the array is taken.

    Raises:
      RecJaxError: an array that no rule matches, a spec with an unknown axis, or a rule none of whose specs divides the array.
    """
    compiled = [(re.compile(pattern), specs) for pattern, *specs in rules]

    def one(path: Any, leaf: Any) -> NamedSharding:
        name, shape = path_name(path), np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
        if not shape:
            return replicated(mesh)
        for pattern, specs in compiled:
            if pattern.fullmatch(name):
                return NamedSharding(mesh, PartitionSpec(*_fitting(name, shape, specs, mesh)))
        raise RecJaxError(f"no rule of config.mesh.rules matches {name} {tuple(shape)}; add one, e.g. (r'{name}', ()) to replicate it")

    return jax.tree_util.tree_map_with_path(one, tree)


def _fitting(name: str, shape: Sequence[int], specs: Sequence[Any], mesh: Mesh) -> tuple[Any, ...]:
    """The first spec that divides the shape."""
    refusals = []
    for spec in specs:
        for axis in _axes(spec):
            if axis not in mesh.shape:
                raise RecJaxError(f"config.mesh.rules: {name} names the axis {axis!r}; the mesh has {', '.join(mesh.shape)}")
        if len(spec) > len(shape):
            raise RecJaxError(f"config.mesh.rules gives {name} {tuple(shape)} the spec {spec}, which has more axes than the array")
        parts = [int(np.prod([mesh.shape[a] for a in _axes((axes,))])) for axes in spec]
        uneven = [(axes, n) for size, axes, n in zip(shape, spec, parts, strict=False) if size % n]
        if not uneven:
            return tuple(tuple(axes) if isinstance(axes, list) else axes for axes in spec)
        refusals.append(f"into {uneven[0][1]} parts along {uneven[0][0]}")
    raise RecJaxError(
        f"config.mesh.rules: {name} {tuple(shape)} does not divide {', nor '.join(refusals)}; add a spec that does behind it in the rule, "
        "e.g. () to replicate it"
    )


def bytes_per_device(shapes: Any, placed: Any) -> int:
    """A tree of shapes and the same tree of shardings -> bytes of it on each device."""
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, shapes, placed)
    return sum(jax.tree.leaves(sizes))


def over_batch(x: jax.Array) -> jax.Array:
    """States, inside `jit`, that the leading axis of x [G or G * n, ...] lies over the batch axes.

    Does nothing where no mesh is set, or in a shard_map.

    XLA would else be free to split activations along a parameter's axes, and to move them at each layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in BATCH_AXES if a in mesh.shape)
    manual = any(kind != AxisType.Auto for kind in mesh.axis_types)
    if mesh.empty or manual or x.shape[0] % int(np.prod([mesh.shape[a] for a in axes])):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


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


def on_one_device(tree: Any) -> Any:
    """Global arrays -> the same arrays, whole, on this process's first device; every process must call it."""
    device = jax.local_devices()[0]

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
            return x
        if not x.is_fully_replicated:
            assert isinstance(x.sharding, NamedSharding)
            whole = NamedSharding(x.sharding.mesh, PartitionSpec())
            x = jax.jit(lambda y: y, out_shardings=whole)(x)
        return next(s.data for s in x.addressable_shards if s.device == device)

    return jax.tree.map(one, tree)
