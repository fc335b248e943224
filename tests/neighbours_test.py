"""Neighbours as targets: which they are, against slow Python, and the loss and gradients against a softmax with soft labels in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.neighbours import co_occurrence, nearest
from rec_jax.losses import forward_gradients
from rec_jax.train.objectives import base, info_nce, make_objectives
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Batch, Context, Outputs, Ragged, RecJaxError


def slow_co_occurrence(histories, n, window, decay, backward):
    c = np.zeros((n, n))
    for h in histories:
        for i, first in enumerate(h):
            for d, second in enumerate(h[i + 1 : i + 1 + window]):
                c[first, second] += decay**d
    c = c + backward * c.T
    np.fill_diagonal(c, 0)
    return c


def test_co_occurrence_is_that_of_slow_python():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 12, n) for n in (0, 1, 2, 7, 15, 4)]
    found = co_occurrence(Ragged.from_rows(histories), 12, window=3, decay=0.5, backward=0.25)
    np.testing.assert_allclose(found.toarray(), slow_co_occurrence(histories, 12, 3, 0.5, 0.25), rtol=1e-12)


def test_nearest_by_hand():
    # 0 is followed by 1 twice and by 2 at distance two, once: C[0] = [-, 2, .8]; 3 stands alone.
    found = nearest(Ragged.from_rows([[0, 1, 2], [0, 1], [3]]), 4, count=2, window=5, decay=0.8, backward=0.0, target_power=0.0)
    np.testing.assert_array_equal(found.ids, [[1, 2], [2, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(found.weights, [[2 / 2.8, 0.8 / 2.8], [1, 0], [0, 0], [0, 0]], rtol=1e-6)


def test_nearest_is_that_of_slow_python():
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 30, n) for n in rng.integers(0, 20, 40)]
    train = Ragged.from_rows(histories)
    found = nearest(train, 30, count=5)
    c = slow_co_occurrence(histories, 30, 10, 0.8, 0.25) * np.maximum(np.bincount(train.flat, minlength=30), 1) ** -0.25
    for item in range(30):
        best = sorted(range(30), key=lambda j: (-c[item, j], j))[:5]
        best = [j for j in best if c[item, j] > 0]
        np.testing.assert_array_equal(found.ids[item, : len(best)], best)
        np.testing.assert_allclose(found.weights[item, : len(best)], c[item, best] / c[item, best].sum(), rtol=1e-6)
        assert (found.weights[item, len(best) :] == 0).all()


SPEC = {"candidates": "catalogue", "temperature": 0.2, "learn_temperature": False, "log_q": 0.0, "mask_equal": False, "symmetric": False}


def world():
    """Two shards of two rows: histories [5 places], some of one place only, padding at the end, and items without neighbours."""
    rng = np.random.default_rng(2)
    g, rows, length, n, d, m = 2, 2, 6, 11, 4, 3
    item_ids = np.stack([rng.permutation(n)[:8] for _ in range(g)]).astype(np.int32)
    segments = np.asarray([[[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]], [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]], np.int32)
    history = np.where(segments > 0, rng.integers(0, 8, (g, rows, length)), -1).astype(np.int32)
    targets = np.where(segments > 0, rng.integers(0, 8, (g, rows, length)), -1).reshape(g, -1).astype(np.int32)
    weights = (segments.reshape(g, -1) > 0).astype(np.float32)
    batch = Batch(item_ids, targets, weights, np.zeros_like(targets), history=history, history_segments=segments)
    user, catalogue = rng.normal(size=(g, rows * length, d)), rng.normal(size=(n, d))
    ids = np.stack([rng.permutation(n)[:m] for _ in range(n)]).astype(np.int32)
    shares = rng.random((n, m)) * (rng.random((n, m)) < 0.7)
    shares[3] = 0
    shares = (shares / np.maximum(shares.sum(1, keepdims=True), 1e-9)).astype(np.float32)
    return batch, user.astype(np.float32), catalogue.astype(np.float32), (ids, shares)


def soft_labels(batch, neighbours, n, share, items, decay):
    """Labels [Q, N] of all places in slow Python."""
    (ids, shares), out = neighbours, []
    g, rows, length = batch.history.shape
    for shard in range(g):
        for row in range(rows):
            for place in range(length):
                label = np.zeros(n)
                segment = batch.history_segments[shard, row, place]
                if segment:
                    soft = np.zeros(n)
                    for age in range(items):
                        if place - age >= 0 and batch.history_segments[shard, row, place - age] == segment:
                            item = batch.item_ids[shard][batch.history[shard, row, place - age]]
                            np.add.at(soft, ids[item], decay**age * shares[item])
                    target = batch.item_ids[shard][batch.targets[shard, row * length + place]]
                    label[target] = 1.0
                    if soft.sum() > 0:
                        label = (1 - share) * label + share * soft / soft.sum()
                out.append(label)
    return np.asarray(out)


@pytest.mark.parametrize("cpu", [True, False])  # the forms of CPUs and of accelerators
@pytest.mark.parametrize(("items", "decay"), [(1, 0.5), (3, 0.7)])
def test_loss_and_gradients_are_those_of_soft_labels(items, decay, cpu, monkeypatch):
    for module in (info_nce, forward_gradients):
        monkeypatch.setattr(module, "on_cpu", lambda: cpu)
    batch, user, catalogue, neighbours = world()
    spec = info_nce.InfoNCESpec(
        **SPEC, label_smoothing=0.0, neighbour_share=0.4, neighbours=3, neighbour_items=items, neighbour_decay=decay
    )
    context = Context(scalars={}, log_q=None, rng=jax.random.key(0), neighbours=tuple(map(jnp.asarray, neighbours)))

    def ours(user, catalogue):
        return info_nce.info_nce(Outputs(user=user, catalogue=catalogue), batch, context, spec)[0]

    labels = soft_labels(batch, neighbours, len(catalogue), 0.4, items, decay)
    weights = batch.weights.reshape(-1) / batch.weights.sum()

    def naive(user, catalogue):
        logits = user.reshape(-1, user.shape[-1]) @ catalogue.T / 0.2
        return -(weights[:, None] * labels * jax.nn.log_softmax(logits)).sum()

    loss, gradients = jax.value_and_grad(ours, (0, 1))(user, catalogue)
    with jax.enable_x64(True):
        wanted, exact = jax.value_and_grad(naive, (0, 1))(user.astype(np.float64), catalogue.astype(np.float64))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for found, right in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_places_without_neighbours_and_padding_are_as_without():
    batch, user, catalogue, (ids, shares) = world()
    user = np.where(batch.weights[..., None] > 0, user, np.nan)
    run = lambda spec, shares: info_nce.info_nce(
        Outputs(user=jnp.asarray(user), catalogue=jnp.asarray(catalogue)),
        batch,
        Context(scalars={}, log_q=None, rng=jax.random.key(0), neighbours=(jnp.asarray(ids), jnp.asarray(shares))),
        spec,
    )[0]
    plain = info_nce.InfoNCESpec(**SPEC, label_smoothing=0.0)
    with_neighbours = info_nce.InfoNCESpec(**SPEC, label_smoothing=0.0, neighbour_share=0.4, neighbours=3)
    np.testing.assert_allclose(run(with_neighbours, 0 * shares), run(plain, shares), rtol=1e-6)
    assert np.isfinite(run(with_neighbours, shares))
    assert abs(run(with_neighbours, shares) - run(plain, shares)) > 1e-3


def test_a_task_brings_its_neighbours_and_devices_agree(tmp_path):
    mesh = mesh_lib.make_mesh({"data": 8})
    task = tiny.task(tiny.config(**{"objectives.info_nce.neighbour_share": 0.3, "objectives.info_nce.neighbours": 4}), tmp_path, mesh=mesh)
    assert [x.shape for x in task.constants.neighbours] == [(tiny.N_ITEMS, 4)] * 2
    tiny.gradient_of_one_device_and_eight(task)
    without = tiny.task(tiny.config(), tmp_path)
    assert without.constants.neighbours is None
    batch = next(iter(task.batches))
    losses = [float(loss_and_metrics(t.params, t.spec, batch, t.constants, None)[0]) for t in (task, without)]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"candidates": "batch"},
            r"info_nce.neighbour_share=0.3 makes items of the whole catalogue targets: set it to 0, or candidates='catalogue'",
        ),
        ({"shard_catalogue": True}, r"without shard_catalogue"),
        ({"positives": 2}, r"neighbour_share=0.3 goes with positives=1 and form='standard' only"),
        ({"form": "decoupled"}, r"goes with positives=1 and form='standard' only"),
        ({"label_smoothing": 0.7}, r"leave the target itself no weight"),
        ({"neighbour_share": 1.0}, r"neighbour_share=1.0: must be at least 0 and below 1"),
        ({"neighbours": 0}, r"neighbours=0: must be at least 1"),
        ({"neighbour_items": 0}, r"neighbour_items=0: must be at least 1"),
        ({"neighbour_decay": 0.0}, r"neighbour_decay=0.0: must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    keys = {**tiny.config().objectives.info_nce.to_dict(), "neighbour_share": 0.3, **changes}
    with pytest.raises(RecJaxError, match=message):
        make_objectives({"info_nce": keys})


def test_only_packed_histories_have_neighbours(tmp_path):
    config = tiny.config(**{"objectives.info_nce.neighbour_share": 0.3, "towers.user.kind": "text", "towers.text.source": "tokens"})
    with pytest.raises(
        RecJaxError, match=r"info_nce.neighbour_share is of packed histories: set it to 0, or config.towers.user.kind='history'"
    ):
        tiny.task(config, tmp_path)


def test_objectives_say_what_they_need():
    (objective,) = make_objectives({"info_nce": {**tiny.config().objectives.info_nce.to_dict(), "neighbour_share": 0.3, "neighbours": 7}})
    assert isinstance(objective, base.Objective)
    assert objective.neighbours == 7
