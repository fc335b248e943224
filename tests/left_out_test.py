"""Candidates that queries leave out: the losses against a naive float64 form, and histories (`objectives.info_nce.mask_history`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.losses import info_nce, weighted_info_nce
from rec_jax.losses.softmax import Candidates
from rec_jax.towers.batches import encode_batch
from rec_jax.train import objectives
from rec_jax.train.objectives import info_nce as objective
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import RecJaxError

B, N, D, LEFT = 16, 40, 8, 5
ON = {"objectives.info_nce.mask_history": True, "towers.user.dropout": 0.0}


def data():
    rng = np.random.default_rng(0)
    query, item, further = (rng.normal(size=(n, D)) / D**0.5 for n in (B, N, 6))
    target = rng.permutation(N)[:B].astype(np.int32)
    left_out = rng.integers(-1, N, (B, LEFT)).astype(np.int32)
    left_out[:, 0] = target  # a target is a candidate all the same
    left_out[3], left_out[4] = -1, 0
    weights = rng.random(B).astype(np.float32)
    weights[5] = 0
    return tuple(np.float32(x) for x in (query, item, further)), target, left_out, weights


def naive(query, item, further, temperature, *, target, left_out, weights, smoothing):
    own = np.arange(N) == target[:, None]
    kept = own | ~(np.arange(N) == left_out[:, :, None]).any(1)
    kept = np.concatenate([kept, np.ones((B, len(further)), bool)], axis=1)
    own = np.pad(own, ((0, 0), (0, len(further))))
    logits = jnp.where(kept, query @ jnp.concatenate([item, further]).T / temperature, -jnp.inf)
    log_p = jnp.where(kept, jax.nn.log_softmax(logits, axis=1), 0)
    goal = (1 - smoothing) * own + smoothing * kept / kept.sum(1, keepdims=True)
    return -jnp.sum(weights[:, None] * goal * log_p)


def wanted(vectors, temperature, **options):
    with jax.enable_x64(True):
        run = jax.value_and_grad(functools.partial(naive, **options), (0, 1, 2, 3))
        return jax.tree.map(np.asarray, run(*(jnp.float64(x) for x in (*vectors, temperature))))


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("form", ["weighted", "per_example"])
def test_values_and_gradients_equal_naive_float64(form, smoothing, further):
    (query, item, others), target, left_out, weights = data()
    others = others if further else others[:0]
    options = {"target": target, "left_out": left_out, "weights": weights, "label_smoothing": smoothing}

    def loss(query, item, others, temperature, block):
        sets = [Candidates(others)] if further else []
        function = weighted_info_nce if form == "weighted" else info_nce
        return jnp.sum(function(query, item, temperature=temperature, negatives=sets, block=block, **options))

    want = wanted((query, item, others), 0.2, target=target, left_out=left_out, weights=weights, smoothing=smoothing)
    for block in (None, 16):
        got = jax.jit(jax.value_and_grad(functools.partial(loss, block=block), (0, 1, 2, 3)))(query, item, others, 0.2)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def test_a_ring_of_devices_finds_the_same():
    (query, item, _), target, left_out, weights = data()
    options = {"target": target, "left_out": left_out, "weights": weights, "label_smoothing": 0.2}
    mesh = mesh_lib.make_mesh({"data": 8})
    run = lambda **more: jax.jit(jax.value_and_grad(lambda q, v: info_nce(q, v, temperature=0.2, **options, **more).sum(), (0, 1)))
    for x, y in zip(jax.tree.leaves(run(mesh=mesh, axis="data")(query, item)), jax.tree.leaves(run()(query, item)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    (query, item, _), target, left_out, weights = data()
    with pytest.raises(RecJaxError, match=r"left_out has shape \(15, 5\)"):
        info_nce(query, item, temperature=0.2, target=target, left_out=left_out[1:])
    with pytest.raises(RecJaxError, match=r"symmetric=True with left_out"):
        weighted_info_nce(query, item, temperature=0.2, target=target, left_out=left_out, weights=weights, symmetric=True)


def pasts(batch):
    """What each place has seen, by definition: a list of sets of items."""
    out = []
    items = np.take_along_axis(batch.item_ids, np.maximum(batch.history, 0).reshape(len(batch.item_ids), -1), 1).reshape(
        batch.history.shape
    )
    for shard, row in np.ndindex(batch.history.shape[:2]):
        segments = batch.history_segments[shard, row]
        for place, segment in enumerate(segments):
            same = segment > 0, segments[: place + 1] == segment
            out.append(set(items[shard, row, : place + 1][same[1]].tolist()) if same[0] else set())
    return out


def test_histories_are_what_a_place_has_seen(tmp_path):
    batch = next(iter(tiny.task(tiny.config(**ON), tmp_path).batches))
    found = np.asarray(objective.histories(batch)).reshape(-1, batch.history.shape[-1])
    assert [set(row[row >= 0].tolist()) for row in found] == pasts(batch)
    assert max(map(len, pasts(batch))) > 5


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_loss_is_that_of_a_naive_sum(share, tmp_path):
    """Neither candidates nor, with neighbours as targets, neighbours are in the history; a target may be."""
    more = {"objectives.info_nce.neighbour_share": share, "objectives.info_nce.neighbours": 4}
    task = tiny.task(tiny.config(**ON, **more), tmp_path)
    batch = next(iter(task.batches))
    loss, _ = loss_and_metrics(task.params, task.spec, batch, task.constants, None)
    out = encode_batch(task.params, task.spec.towers, batch, table=task.constants.table, catalogue=True, keys=None)
    logits = np.float64(out.user).reshape(-1, 8) @ np.float64(out.catalogue).T / 0.07
    targets = np.take_along_axis(batch.item_ids, np.maximum(batch.targets, 0), 1).reshape(-1)
    here = np.take_along_axis(batch.item_ids, np.maximum(batch.history, 0).reshape(len(batch.item_ids), -1), 1).reshape(-1)
    losses, moved = [], 0
    for place in np.flatnonzero(batch.weights.reshape(-1) > 0):
        target, seen = targets[place], pasts(batch)[place]
        kept = np.array([n == target or n not in seen for n in range(tiny.N_ITEMS)])
        row = logits[place] - np.logaddexp.reduce(logits[place][kept])
        goal = np.zeros(tiny.N_ITEMS)
        if share:
            ids, shares = task.constants.neighbours
            segments = batch.history_segments.reshape(-1)
            before = here[place - 1] if place % 16 and segments[place - 1] == segments[place] else None
            for decay, item in ((1.0, here[place]), (0.5, before)):
                if item is not None:
                    for n, w in zip(ids[item], shares[item], strict=True):
                        goal[n] += 0 if n in seen else decay * w
        moved += goal.sum() > 0
        goal = share * goal / goal.sum() if goal.sum() else goal
        goal[target] += 1 - goal.sum()
        losses.append(-(goal * row).sum())
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert bool(moved) == bool(share)


@pytest.mark.parametrize("changes", [{}, {"objectives.info_nce.positives": 2}, {"objectives.info_nce.places": 8}])
def test_eight_devices_find_the_gradient_of_one(changes, tmp_path):
    gradient = tiny.gradient_of_one_device_and_eight(tiny.task(tiny.config(**ON, **changes), tmp_path))
    assert np.abs(gradient["user"]["project"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.info_nce.candidates": "batch"}, r"info_nce.mask_history=True goes with candidates='catalogue'"),
        ({"objectives.info_nce.shard_catalogue": True}, r"info_nce.mask_history=True goes with candidates='catalogue'"),
        ({"towers.user.kind": "text", "towers.text.source": "tokens"}, r"info_nce.mask_history is of packed histories"),
        ({"batch.cloze": 0.3}, r"info_nce.mask_history goes by a place's past .* set config.objectives.info_nce.mask_history=False"),
    ],
)
def test_keys_that_do_not_go_together_are_named(changes, message, tmp_path):
    with pytest.raises(RecJaxError, match=message):
        tiny.task(tiny.config(**{**ON, **changes}), tmp_path)


def test_objectives_without_it_do_not_mask():
    made = objectives.make_objectives({"info_nce": tiny.config().objectives.info_nce.to_dict()})
    assert not made[0].masks_history
