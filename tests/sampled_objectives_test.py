"""Objectives on items drawn from the catalogue for each place of a packed history: against naive sums, on several devices, by heart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.towers.batches import encode_batch
from rec_jax.towers.dropout import fold
from rec_jax.train.draws import unseen_items
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import RecJaxError

KEY = jax.random.key(3, impl=RNG)
ALONE = {"objectives.info_nce.weight": 0.0, "towers.item.ids": True, "towers.user.dropout": 0.0}
BCE = {**ALONE, "objectives.bce.weight": 1.0, "objectives.bce.draw": "catalogue"}
SASREC = {**BCE, "objectives.bce.negatives": 1, "objectives.bce.scale": 1.0, "objectives.bce.learn_scale": False, "towers.normalize": False}
GBCE = {**BCE, "objectives.bce.negatives": 3, "objectives.bce.calibration": 0.75}
VARIANTS = {"sasrec": SASREC, "gbce": GBCE}


@functools.partial(jax.jit, static_argnums=1)
def loss_of(params, spec, batch, constants):
    return loss_and_metrics(params, spec, batch, constants, KEY)[0]


def with_ids(task):
    """The task's parameters with items' own vectors that are not zero."""
    return {**task.params, "ids": {"embedding": jax.random.normal(jax.random.key(1), task.params["ids"]["embedding"].shape)}}


def vectors_of(task, params, batch):
    """Queries [Q, D] with weight, their targets [Q] and the catalogue [N, D], in float64, and where the queries stand in the batch."""
    encode = jax.jit(encode_batch, static_argnames=("spec", "catalogue"))
    out = encode(params, task.spec.towers, batch, table=task.constants.table, catalogue=True, keys=None)
    there = batch.weights.reshape(-1) > 0
    targets = np.concatenate([batch.item_ids[g][np.maximum(batch.targets[g], 0)] for g in range(len(batch.targets))])
    dim = out.user.shape[-1]
    return np.float64(out.user).reshape(-1, dim)[there], targets[there], np.float64(out.catalogue), there


@pytest.mark.parametrize("variant", VARIANTS)
def test_bce_against_drawn_items_equals_a_naive_sum(variant, tmp_path):
    task = tiny.task(tiny.config(**VARIANTS[variant]), tmp_path)
    batch, params, spec = next(iter(task.batches)), with_ids(task), task.spec.objectives[0].spec
    users, targets, items, there = vectors_of(task, params, batch)
    drawn = np.asarray(unseen_items(fold(KEY, "queries"), batch, n_items=tiny.N_ITEMS, draws=spec.negatives))
    drawn = drawn.reshape(-1, spec.negatives)[there]
    assert (drawn != targets[:, None]).all()
    alpha = spec.negatives / (tiny.N_ITEMS - 1)
    beta = alpha * (spec.calibration * (1 - 1 / alpha) + 1 / alpha)
    log_sigmoid = lambda x: -np.logaddexp(0, -x)
    losses = []
    for user, target, others in zip(users, targets, drawn, strict=True):
        terms = [beta * log_sigmoid(spec.scale * user @ items[target])]
        terms += [log_sigmoid(-spec.scale * user @ items[other]) for other in others]
        losses.append(-np.mean(terms))
    assert float(loss_of(params, task.spec, batch, task.constants)) == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(task.params["scalars"]) == (set() if variant == "sasrec" else {"bce_scale", "bce_bias"})
    if spec.calibration:
        assert beta < 0.5


def test_many_draws_take_the_vectors_of_the_whole_catalogue_once(tmp_path):
    """Whether each drawn item's vector is made where it is drawn, or looked up among all, is not seen in the vectors."""
    task = tiny.task(tiny.config(**BCE), tmp_path)
    batch, params = next(iter(task.batches)), with_ids(task)
    ids = np.random.default_rng(0).integers(-1, tiny.N_ITEMS, (8, 32, 2)).astype(np.int32)
    run = lambda b, ids: encode_batch(params, task.spec.towers, b, table=tiny.table(), catalogue=True, keys=None, query_drawn_ids=ids)
    many, few = run(batch, ids), run(batch, ids[:, :3, :1])
    assert ids.size > tiny.N_ITEMS > ids[:, :3, :1].size
    np.testing.assert_allclose(many.query_drawn, np.asarray(many.catalogue)[np.maximum(ids, 0)], atol=1e-6)
    np.testing.assert_allclose(few.query_drawn, many.query_drawn[:, :3, :1], atol=1e-6)


@pytest.mark.parametrize("variant", [pytest.param("sasrec", marks=pytest.mark.slow), "gbce"])
def test_any_number_of_devices_has_the_loss_and_gradient_of_one(variant, tmp_path):
    task = tiny.task(tiny.config(**{**VARIANTS[variant], "towers.user.dropout": 0.2}), tmp_path)
    params, batch, found = with_ids(task), next(iter(task.batches)), []
    for devices in (1, 2, 4, 8):
        mesh = mesh_lib.make_mesh({"data": devices}, devices=jax.devices()[:devices])
        whole = mesh_lib.replicated(mesh)
        function = jax.jit(jax.value_and_grad(lambda p, b, c, m=mesh: loss_and_metrics(p, task.spec, b, c, KEY, mesh=m)[0]))
        with jax.set_mesh(mesh):
            arguments = mesh_lib.put(params, whole), mesh_lib.to_global(batch, mesh), mesh_lib.put(task.constants, whole)
            loss, gradient = jax.device_get(function(*arguments))
        found.append((float(loss), np.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        np.testing.assert_allclose(gradient, found[0][1], atol=1e-5 * np.abs(found[0][1]).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_64_examples_are_learned_by_heart(variant, tmp_path):
    """Adam on one batch, negatives drawn anew in each step: the target comes before nearly all items that are not in its window."""
    rows = {"batch.shards": 1, "batch.history_rows": 6}
    task = tiny.task(tiny.config(**{**VARIANTS[variant], **rows, "towers.dim": 16}), tmp_path)
    batch, tx = next(iter(task.batches)), optax.adam(2e-2)
    assert (batch.weights > 0).sum() >= 64

    @jax.jit
    def many(params, state):
        def step(carried, n):
            params, state = carried
            loss, grads = jax.value_and_grad(
                lambda p: loss_and_metrics(p, task.spec, batch, task.constants, jax.random.fold_in(KEY, n))[0]
            )(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), jnp.arange(300))

    (params, _), losses = many(task.params, tx.init(task.params))
    users, targets, items, there = vectors_of(task, params, batch)
    scores = users @ items.T
    others = np.asarray(unseen_items(KEY, batch, n_items=tiny.N_ITEMS, draws=1000)).reshape(len(there), -1)[there]
    before = [(scores[n, np.unique(others[n])] >= scores[n, target]).mean() for n, target in enumerate(targets)]
    assert np.mean(losses[-20:]) < 0.3 * float(losses[0])
    assert np.mean(before) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.bce.draw": "items"}, r"bce.draw='items': expected one of batch, catalogue"),
        ({"objectives.bce.calibration": 1.5}, r"bce.calibration=1.5: must be between 0 \(none\) and 1"),
        ({"objectives.bce.draw": "batch", "objectives.bce.calibration": 0.5}, r"calibration=0.5 is for negatives drawn uniformly from all"),
    ],
)
def test_bad_values_are_said_before_anything_is_compiled(changes, message, tmp_path):
    with pytest.raises(RecJaxError, match=message):
        tiny.task(tiny.config(**{**BCE, **changes}), tmp_path)


def test_drawn_items_need_a_table_of_text_vectors(tmp_path):
    tokens = {"towers.text.source": "tokens", "objectives.info_nce.candidates": "batch"}
    task = tiny.task(tiny.config(**{**BCE, **tokens}), tmp_path)
    with pytest.raises(RecJaxError, match=r"need a table of text vectors: towers.text.source='frozen'"):
        loss_and_metrics(task.params, task.spec, next(iter(task.batches)), task.constants, None)
