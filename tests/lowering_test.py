"""Everything that runs on a pod lowers for TPUs on a machine that has none, nor libtpu: abstract arrays, no compilation."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rec_jax import mesh as mesh_lib
from rec_jax import topk
from rec_jax.losses import info_nce, weighted_info_nce
from rec_jax.train import loop
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train.step import make_train_step

STEPS = {
    "frozen_catalogue": {"towers.item.ids": True},
    "sharded_catalogue": {"towers.item.ids": True, "objectives.info_nce.shard_catalogue": True, "mesh.layout": "sharded"},
    "tokens_batch": {
        "towers.text.source": "tokens",
        "towers.text.dropout": 0.1,
        "batch.chunk_rows": 2,
        "objectives.info_nce.candidates": "batch",
        "objectives.info_nce.queue": 512,
        "objectives.info_nce.momentum": 0.99,
        "mesh.layout": "sharded",
    },
}


def lowered(function, *arguments, **jit):
    return jax.jit(function, **jit).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def ring_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ring_lowers_with_permutes_alone(dtype):
    mesh = ring_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    vectors = jax.ShapeDtypeStruct((4096, 256), dtype, sharding=rows)

    def loss(query, item):
        return weighted_info_nce(query, item, temperature=0.05, weights=jnp.full(4096, 1 / 4096), symmetric=True, mesh=mesh, axis="data")

    text = lowered(jax.value_and_grad(loss, (0, 1)), vectors, vectors)
    assert "collective_permute" in text
    assert "all_gather" not in text


def test_one_device_lowers():
    vectors = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    assert "stablehlo.dot_general" in lowered(jax.grad(lambda q, i: info_nce(q, i, temperature=0.05).sum()), vectors, vectors)


def test_top_k_lowers():
    mesh = ring_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    query, item = jax.ShapeDtypeStruct((128, 64), jnp.bfloat16), jax.ShapeDtypeStruct((65536, 64), jnp.bfloat16, sharding=rows)
    assert "stablehlo.dot_general" in lowered(lambda q, i: topk.top_k(q, i, k=10, mesh=mesh, axis="data"), query, item)


@pytest.mark.parametrize("name", STEPS)
def test_a_train_step_lowers(name, tmp_path):
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    task = tiny.task(tiny.config(**STEPS[name]), tmp_path, mesh=mesh)
    optimizer = optimizer_lib.make_optimizer(task.optimizer)
    shapes, shardings = loop.state_shardings(task, mesh)
    step = make_train_step(task.spec, optimizer, mesh, shardings)
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    with jax.set_mesh(mesh):
        traced = step.trace(abstract(shapes), abstract(next(iter(task.batches))), abstract(task.constants))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text
    ring = task.spec.objectives[0].spec.candidates == "batch" or task.spec.objectives[0].spec.shard_catalogue
    assert ("collective_permute" in text) == ring
