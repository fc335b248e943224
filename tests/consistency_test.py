"""Items with and without their own vectors: the loss by hand, its gradient, what a training makes of it, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax.towers import two_tower
from rec_jax.train import loop
from rec_jax.train.forwards import Constants
from rec_jax.train.objectives import consistency
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Batch, Outputs, RecJaxError

ON = {"towers.item.ids": True, "objectives.id_consistency.weight": 1.0, "towers.user.dropout": 0.0}
SPEC = consistency.ConsistencySpec()


def batch_of(ids):
    return Batch(item_ids=np.asarray(ids, np.int32), targets=None, weights=None, examples=None)


def test_by_hand():
    plain = jnp.asarray([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    item = jnp.asarray([[[2.0, 0.0], [5.0, 0.0], [4.0, 3.0], [1.0, 7.0]]])
    loss, metrics = consistency.id_consistency(Outputs(plain=plain, item=item), batch_of([[4, 7, 2, -1]]), None, SPEC)
    np.testing.assert_allclose(loss, (0 + 1 + (1 - 24 / 25)) / 3, rtol=1e-6)
    assert metrics == {"id_consistency": loss}


def test_the_gradient_is_that_of_differences_and_none_goes_to_the_item_as_it_is_known():
    random = np.random.default_rng(0)
    plain, item = (jnp.asarray(random.normal(size=(2, 5, 4))) for _ in range(2))
    batch = batch_of([[0, 1, 2, -1, -1], [3, 4, 5, 6, 7]])
    value = lambda p, i: consistency.id_consistency(Outputs(plain=p, item=i), batch, None, SPEC)[0]
    of_plain, of_item = jax.grad(value, (0, 1))(plain, item)
    assert not np.asarray(of_item).any()
    assert not np.asarray(of_plain[0, 3:]).any(), "empty places"
    for place in ((0, 0, 1), (1, 4, 3)):
        up, down = (value(plain.at[place].add(step), item) for step in (1e-2, -1e-2))
        np.testing.assert_allclose(of_plain[place], (up - down) / 2e-2, atol=1e-3)
    nothing = jax.grad(value)(jnp.zeros_like(plain), item)
    assert np.isfinite(np.asarray(nothing)).all(), "a vector of no length has no direction, and no NaN"


def test_in_a_step_it_moves_the_text_head_and_no_own_vector(tmp_path):
    c = tiny.config(**ON, **{"objectives.info_nce.weight": 0.0})
    task = tiny.task(c, tmp_path)
    params = task.params | {"ids": {"embedding": jax.random.normal(jax.random.key(1), task.params["ids"]["embedding"].shape)}}
    batch, constants = next(iter(task.batches)), jax.tree.map(jnp.asarray, task.constants)
    assert isinstance(constants, Constants)
    value = lambda p: loss_and_metrics(p, task.spec, batch, constants, None)[0]
    loss, grads = jax.value_and_grad(value)(params)
    there = batch.item_ids >= 0
    vectors = two_tower.item_vectors(params, task.spec.towers, constants.table)
    without = two_tower.text_item_vectors(params, task.spec.towers, constants.table)
    expected = 1 - np.einsum("nd,nd->n", vectors, without)[batch.item_ids[there]]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    assert not np.asarray(grads["ids"]["embedding"]).any()
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["item"])) > 1e-4


def test_training_brings_items_without_their_own_vectors_near(tmp_path):
    seen = []
    evaluate = lambda params, *, step: seen.append(params) or {"valid/ndcg@10": 0.0}
    task = tiny.task(tiny.config(**ON, **{"objectives.info_nce.weight": 0.0, "train.duration": "60 steps"}), tmp_path, evaluate=evaluate)
    own = jax.random.normal(jax.random.key(1), task.params["ids"]["embedding"].shape)
    task = dataclasses.replace(task, params=task.params | {"ids": {"embedding": own}})

    def alike(params):
        whole = two_tower.item_vectors(params, task.spec.towers, task.constants.table)
        return float(np.einsum("nd,nd->n", whole, two_tower.text_item_vectors(params, task.spec.towers, task.constants.table)).mean())

    loop.train(task, tiny.one_device())
    assert alike(seen[-1]) > alike(task.params) + 0.05


@pytest.mark.parametrize("key", ["towers.item.ids", "towers.item.text"])
def test_it_needs_texts_and_own_vectors(key, tmp_path):
    with pytest.raises(RecJaxError, match=r"config\.objectives\.id_consistency compares items with and without"):
        tiny.task(tiny.config(**{**ON, key: False, "towers.item.ids": key != "towers.item.ids"}), tmp_path)
