"""The popularity prior of the catalogue's logits: the loss of a naive sum, on one device and eight, and what is refused."""

import jax
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.towers.batches import encode_batch
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import RecJaxError

ON = {"objectives.info_nce.popularity_prior": 0.5, "towers.user.dropout": 0.0}


def test_the_loss_is_that_of_a_naive_sum(tmp_path):
    task = tiny.task(tiny.config(**ON), tmp_path)
    batch = next(iter(task.batches))
    loss, _ = loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    out = encode_batch(task.params, task.spec.towers, batch, table=task.constants.table, catalogue=True, keys=None)
    prior = 0.5 * np.log(np.maximum(tiny.World().item_counts(), 1) / np.maximum(tiny.World().item_counts(), 1).sum())
    logits = np.float64(out.user).reshape(-1, 8) @ np.float64(out.catalogue).T / 0.07 + prior
    ids = np.take_along_axis(batch.item_ids, np.maximum(batch.targets, 0), 1).reshape(-1)
    there = batch.weights.reshape(-1) > 0
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), ids]
    assert float(loss) == pytest.approx(losses[there].mean(), rel=1e-5)
    plain = tiny.task(tiny.config(**{"towers.user.dropout": 0.0}), tmp_path)
    assert abs(float(loss_and_metrics(plain.params, plain.spec, batch, plain.constants, None)[0]) - float(loss)) > 1e-3


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_eight_devices_find_the_loss_of_one(sharded, smoothing, tmp_path):
    changes = {"objectives.info_nce.shard_catalogue": sharded, "objectives.info_nce.label_smoothing": smoothing}
    task = tiny.task(tiny.config(**ON, **changes), tmp_path)
    batch, found = next(iter(task.batches)), []
    for mesh in (tiny.one_device(), mesh_lib.make_mesh({"data": 8})):
        whole = mesh_lib.replicated(mesh)
        arguments = mesh_lib.put(task.params, whole), mesh_lib.to_global(batch, mesh), mesh_lib.put(task.constants, whole)
        with jax.set_mesh(mesh):
            found.append(float(jax.jit(lambda p, b, c, m=mesh: loss_and_metrics(p, task.spec, b, c, None, mesh=m)[0])(*arguments)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("other", [{"objectives.info_nce.candidates": "batch"}, {"objectives.info_nce.positives": 2}])
def test_it_goes_with_the_catalogue_and_one_positive(other, tmp_path):
    with pytest.raises(RecJaxError, match=r"info_nce\.popularity_prior=0\.5 goes with candidates='catalogue' and positives=1"):
        tiny.task(tiny.config(**ON, **other), tmp_path)
