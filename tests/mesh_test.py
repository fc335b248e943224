import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rec_jax import mesh, processes
from rec_jax.types import RecJaxError


def test_sizes():
    assert dict(mesh.make_mesh({"data": -1}).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh.make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one axis is -1"),
        ({"data": 0}, "does not divide"),
        ({"data": 4}, "makes 4 devices, there are 8"),
        ({"model": 2}, "no axis 'model'; axes are data, fsdp, tensor"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(RecJaxError, match=message):
        mesh.make_mesh(sizes)


def test_first_rule_wins_and_scalars_are_whole():
    m = mesh.make_mesh({"data": 2, "fsdp": 4})
    tree = {"a": {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}, "t": jnp.zeros(())}
    out = mesh.shardings(tree, [("a/kernel", ("fsdp",)), ("a/.*", ()), ("never", ("tensor",))], m)
    assert out["a"]["kernel"].spec == P("fsdp")
    assert out["a"]["bias"].spec == out["t"].spec == P()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("b.*", ())], r"no rule of config.mesh.rules matches a/kernel \(6, 3\)"),
        ([(".*", ("model",))], "names the axis 'model'; the mesh has data, fsdp, tensor"),
        ([(".*", (None, None, "data"))], "more axes than the array"),
        ([(".*", ("fsdp",))], "does not divide into 4 parts"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(RecJaxError, match=message):
        mesh.shardings({"a": {"kernel": jnp.zeros((6, 3))}}, rules, mesh.make_mesh({"data": 2, "fsdp": 4}))


def test_batches_lie_over_data_and_fsdp():
    m = mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    x = mesh.to_global({"x": np.arange(16).reshape(8, 2)}, m)["x"]
    assert x.sharding.spec == P(("data", "fsdp"))
    assert {s.data.shape for s in x.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(x, np.arange(16).reshape(8, 2))
    assert mesh.local_shards(8, m) == range(8)


def test_shards_must_divide():
    with pytest.raises(RecJaxError, match="batch.shards=6 does not divide over 8 devices"):
        mesh.check_shards(6, mesh.make_mesh({"data": 8}))


def test_processes_need_all_three_variables(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(RecJaxError, match="only JAX_NUM_PROCESSES set"):
        processes.start()


def test_one_process_alone(monkeypatch):
    assert processes.gather({"shards": {"0": 1}}) == [{"shards": {"0": 1}}]
    assert jax.process_count() == 1


def chips(shape, sides):
    """What `ring_of` asks of a mesh of that shape over a box of chips, in the order of a TPU's devices."""
    places = [tuple(int(i) for i in place) for place in np.ndindex(*sides)]
    devices = np.array([types.SimpleNamespace(coords=place) for place in places], object).reshape(shape)
    return types.SimpleNamespace(devices=devices, axis_names=mesh.AXES, shape=dict(zip(mesh.AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("shape", "sides"), [((16, 16, 1), (16, 16, 1)), ((1, 64, 1), (8, 8, 1)), ((3, 4, 1), (3, 4, 1)), ((4, 4, 2), (4, 4, 2))]
)
def test_a_ring_over_a_rectangle_of_chips_goes_from_neighbour_to_neighbour(shape, sides):
    m = chips(shape, sides)
    ring, devices = mesh.ring_of(m, mesh.BATCH_AXES), m.devices[:, :, 0].reshape(-1)
    assert sorted(ring) == list(range(devices.size))
    for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
        assert sum(abs(a - b) for a, b in zip(devices[here].coords, devices[there].coords, strict=True)) == 1


def test_elsewhere_a_ring_goes_in_the_order_of_the_mesh():
    for shape, sides in (((4, 16, 1), (4, 4, 4)), ((3, 3, 1), (3, 3, 1)), ((1, 8, 1), (8, 1, 1))):
        m = chips(shape, sides)
        size = shape[0] * shape[1]
        assert mesh.ring_of(m, mesh.BATCH_AXES) == list(range(size))
    assert mesh.ring_of(mesh.make_mesh({"data": 2, "fsdp": -1}), ("fsdp", "data")) == list(range(8))
