"""Two views of histories: made in the data, encoded by the history tower, and each other's positives in the loss."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from float64 import assert_equal
from stage_objectives_test import overfit

from rec_jax import mesh as mesh_lib
from rec_jax.data.augment import HistoryViews
from rec_jax.losses import group_info_nce
from rec_jax.mesh import make_mesh
from rec_jax.towers import history
from rec_jax.towers.batches import encode_batch
from rec_jax.train import loop
from rec_jax.train.objectives import history_views
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Batch, Context, Outputs, RecJaxError

ON = {"objectives.history_views.weight": 1.0, "objectives.info_nce.weight": 0.0, "towers.user.dropout": 0.0}
FIELDS = ("view_history", "view_segments", "view_places", "view_targets")


def task_of(tmp_path, mesh=None, **changes):
    return tiny.task(tiny.config(**{**ON, **changes}), tmp_path, mesh=mesh)


def windows(batch, g):
    """(history, target, both views), local indices, of each example of a shard."""
    length = batch.history.shape[-1]
    for n in range(int((batch.examples[g] >= 0).sum())):
        whole, views = None, []
        for view in range(2):
            row, last = divmod(int(batch.view_places[g, view, n]), length)
            segment = int(batch.view_segments[g, view, row, last])
            at = np.flatnonzero(batch.view_segments[g, view, row] == segment)
            assert at[-1] == last
            assert (np.diff(at) == 1).all()
            here = np.flatnonzero(batch.history_segments[g, row] == segment)
            assert at[0] == here[0], "a view begins where its window's history does"
            whole = batch.history[g, row, here]
            views.append(batch.view_history[g, view, row, at])
            assert batch.targets[g, row * length + here[-1]] == batch.view_targets[g, n]
        yield whole, int(batch.view_targets[g, n]), views


# -- in the data --


@pytest.mark.parametrize("kind", ["crop", "mask", "reorder", None])
def test_views_are_of_the_window(tmp_path, kind):
    task = task_of(tmp_path, **{"objectives.history_views.kinds": (kind,) if kind else (), "towers.user.dropout": 0.1})
    batch = next(iter(task.batches))
    seen = 0
    for g in range(8):
        for whole, _, views in windows(batch, g):
            n, seen = len(whole), seen + 1
            for view in views:
                if kind == "crop":
                    assert len(view) == max(1, int(0.6 * n))
                    assert any((whole[i : i + len(view)] == view).all() for i in range(n - len(view) + 1))
                elif kind == "mask":
                    assert ((view == whole) | (view == -1)).all()
                    assert (view == -1).sum() == int(0.3 * n)
                elif kind == "reorder":
                    assert sorted(view) == sorted(whole)
                    at = np.flatnonzero(view != whole)
                    assert not len(at) or at[-1] - at[0] < int(0.6 * n)
                else:
                    np.testing.assert_array_equal(view, whole)
        free = int((batch.examples[g] < 0).sum())
        assert (batch.view_targets[g] == -1).sum() == free
        assert (batch.view_places[g] == -1).sum() == 2 * free
    assert seen > 8


def test_of_several_kinds_each_is_drawn():
    views, items = HistoryViews(), np.arange(10)
    found = set()
    for seed in range(50):
        for view in views.draw(items, np.random.default_rng(seed)):
            found.add("mask" if (view < 0).any() else "crop" if len(view) < 10 else "reorder")
    assert found == {"crop", "mask", "reorder"}


def test_a_resume_draws_the_same_and_an_epoch_others(tmp_path):
    batches = task_of(tmp_path).batches
    iterator = iter(batches)
    first = next(iterator)
    place = iterator.get_state()
    expected = [next(iterator) for _ in range(6)]
    other = iter(batches)
    other.set_state(place)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(other), batch)
    of_user = [
        {int(u): [v.tolist() for v in views] for g in range(8) for u, (_, _, views) in zip(b.examples[g], windows(b, g), strict=False)}
        for b in (first, expected[-1])
    ]
    both = set(of_user[0]) & set(of_user[1])
    assert any(of_user[0][user] != of_user[1][user] for user in both)


def test_off_there_is_nothing_more(tmp_path):
    off = {"objectives.history_views.weight": 0.0, "objectives.info_nce.weight": 1.0}
    with_views, without = task_of(tmp_path), task_of(tmp_path, **off)
    a, b = next(iter(with_views.batches)), next(iter(without.batches))
    assert all(getattr(b, name) is None for name in FIELDS)
    bare = dataclasses.replace(a, **dict.fromkeys(FIELDS))
    jax.tree.map(np.testing.assert_array_equal, bare, b)
    assert set(with_views.params["user"]) - set(without.params["user"]) == {"mask"}
    del with_views.params["user"]["mask"]
    jax.tree.map(np.testing.assert_array_equal, with_views.params["user"], without.params["user"])
    assert "mask" not in task_of(tmp_path, **{"objectives.history_views.kinds": ("crop",)}).params["user"]


def test_the_sharded_layout_knows_the_vector_of_hidden_items(tmp_path):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = mesh_lib.shardings(task_of(tmp_path).params, mesh_lib.rules_of("sharded", ()), mesh)
    assert placed["user"]["mask"].spec == jax.sharding.PartitionSpec()


# -- the tower --


def test_vectors_are_those_of_the_views_alone(tmp_path):
    task = task_of(tmp_path)
    batch, spec = next(iter(task.batches)), task.spec.towers
    encode = jax.jit(lambda p, b: encode_batch(p, spec, b, table=task.constants.table, catalogue=False, keys=None, history_views=True))
    out = encode(task.params, batch)
    params, item = task.params["user"], np.asarray(out.item)
    alone = jax.jit(lambda v: history.encode(params, spec.history, v[None], jnp.ones((1, v.shape[0]), jnp.int32))[0, -1])
    checked = 0
    for g in range(2):
        for n, (_, _, views) in enumerate(windows(batch, g)):
            for k, view in enumerate(views):
                vectors = np.where((view < 0)[:, None], np.asarray(params["mask"]), item[g][view])
                want = np.asarray(alone(vectors))
                np.testing.assert_allclose(out.history_views[k, g, n], want / np.linalg.norm(want), atol=1e-5)
                checked += (view < 0).any()
    assert checked > 0, "some view has hidden items"


def test_dropout_alone_makes_two_views(tmp_path):
    task = task_of(tmp_path, **{"objectives.history_views.kinds": (), "towers.user.dropout": 0.5})
    batch, key = next(iter(task.batches)), jax.random.key(0, impl=RNG)
    loss = lambda key: float(jax.jit(lambda p, b: loss_and_metrics(p, task.spec, b, task.constants, key)[0])(task.params, batch))
    assert loss(key) > loss(None) + 0.1  # without dropout the views are equal, and each finds the other


def test_look_ups_need_no_other_device(tmp_path):
    mesh = make_mesh({"data": 4, "fsdp": 2})
    task = task_of(tmp_path, mesh)
    spec, over, whole = task.spec.towers, mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    shape = lambda place: lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place)

    def forward(params, batch, table):
        return encode_batch(params, spec, batch, table=table, catalogue=False, keys=None, history_views=True).history_views

    with jax.set_mesh(mesh):
        arguments = (jax.tree.map(shape(whole), task.params), jax.tree.map(shape(over), next(iter(task.batches))))
        text = jax.jit(forward).lower(*arguments, shape(whole)(task.constants.table)).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


# -- the loss --


def softplus(x):
    return np.logaddexp(0, x)


def naive_groups(vectors, temperature, groups):
    """By definition, row by row."""
    logits, out = vectors @ vectors.T / temperature, np.zeros(len(vectors))
    for i, own in enumerate(groups):
        others = np.flatnonzero((groups >= 0) & (groups != own))
        positives = [j for j in range(len(groups)) if groups[j] == own and j != i]
        if own >= 0 and positives:
            out[i] = softplus(np.logaddexp.reduce(logits[i, others]) - logits[i, positives].mean()) if len(others) else 0.0
    return out


GROUPS = np.array([3, 0, 3, -1, 5, 0, 3, 7, 5, -1, 0, 3, 9, 9, 5, 5], np.int32)  # 7 is alone


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_groups_against_whole_matrices(temperature):
    vectors = np.random.default_rng(0).normal(size=(16, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ours = lambda vectors, temperature: group_info_nce(vectors, GROUPS, temperature=temperature)
    naive = lambda vectors, temperature: naive_groups(vectors, temperature, GROUPS)
    assert_equal(ours, naive, {"vectors": vectors, "temperature": np.asarray(temperature)}, tolerance=3e-5)


def test_groups_by_hand_and_where_there_is_nobody_else():
    eye = jnp.eye(3)[jnp.array([0, 0, 1])]
    loss = group_info_nce(eye, jnp.array([4, 4, 2]), temperature=0.5)  # logit 2 with the positive, 0 with the negative
    np.testing.assert_allclose(loss, [np.log(1 + np.exp(-2.0))] * 2 + [0.0], rtol=1e-6)
    np.testing.assert_array_equal(group_info_nce(eye, jnp.array([4, 4, 4]), temperature=0.5), 0.0)
    poisoned = eye.at[2].set(jnp.nan)
    value, gradient = jax.value_and_grad(lambda v: group_info_nce(v, jnp.array([4, 4, -1]), temperature=0.5).sum())(poisoned)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("devices", [2, 8])
def test_groups_on_a_ring_are_those_of_one_device(devices):
    vectors = np.float32(np.random.default_rng(0).normal(size=(16, 6)))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    weighted = lambda v, **ring: jnp.sum(jnp.arange(16) * group_info_nce(v, GROUPS, temperature=0.3, **ring))
    one = jax.jit(jax.value_and_grad(weighted))(vectors)
    several = jax.jit(jax.value_and_grad(lambda v: weighted(v, mesh=mesh, axis="data")))(vectors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), one, several)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": GROUPS[:3]}, r"groups has shape \(3,\); expected \(16,\)"),
        ({"groups": GROUPS.astype(np.float32)}, "groups has dtype float32; expected integers"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number > 0"),
        ({"block": 0}, "block is 0; expected at least 1"),
    ],
)
def test_bad_groups(changes, message):
    with pytest.raises(RecJaxError, match=message):
        group_info_nce(**{"vectors": jnp.ones((16, 2)), "groups": GROUPS, "temperature": 0.1, **changes})


def naive_loss(views, there, targets, temperature, same_target):
    """views [2, W, D] of the windows that are there -> mean over both views of all windows."""
    windows = views.shape[1]
    both, group = views.reshape(2 * windows, -1), np.tile(targets if same_target else np.arange(windows), 2)
    logits, losses = both @ both.T / temperature, []
    for i in range(2 * windows):
        positives = [j for j in range(2 * windows) if group[j] == group[i] and j != i]
        others = np.flatnonzero(group != group[i])
        losses.append(softplus(np.logaddexp.reduce(logits[i, others]) - logits[i, positives].mean()))
    return np.mean(losses)


@pytest.mark.parametrize("same_target", [False, True])
def test_loss_against_a_naive_sum(same_target):
    """Two shards of four places, one of them empty; the same catalogue item has another local index in each shard."""
    random = np.random.default_rng(0)
    views = random.normal(size=(2, 2, 4, 5))
    views /= np.linalg.norm(views, axis=-1, keepdims=True)
    item_ids, local = np.array([[10, 11, 12], [12, 13, 10]], np.int32), np.array([[0, 1, 0, 2], [2, 1, 0, -1]], np.int32)
    spec = history_views.HistoryViewsSpec(0.2, ("crop",), 0.6, 0.3, 0.6, same_target, 0)
    batch = Batch(item_ids, None, None, None, view_targets=local)
    context = Context(scalars={}, log_q=None, rng=None)
    loss, metrics = history_views.history_views(Outputs(history_views=jnp.asarray(views, jnp.float32)), batch, context, spec)
    there = (local >= 0).reshape(-1)
    ids = np.array([10, 11, 10, 12, 10, 13, 12])
    want = naive_loss(views.reshape(2, 8, 5)[:, there], there, ids, 0.2, same_target)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert metrics == {"history_views": loss}


@pytest.mark.parametrize("same_target", [False, True])
def test_the_views_of_a_batch_find_each_other(tmp_path, same_target):
    changes = {"objectives.history_views.same_target": same_target, "towers.item.ids": True, "batch.shards": 2}
    before, after = overfit(task_of(tmp_path, **changes), steps=300, rate=1e-2)
    assert before > 1.0
    assert after < 0.02


@pytest.mark.parametrize("same_target", [pytest.param(False, marks=pytest.mark.slow), True])
def test_eight_devices_have_the_loss_and_gradient_of_one(tmp_path, same_target):
    task = task_of(tmp_path, **{"objectives.history_views.same_target": same_target, "towers.user.dropout": 0.2})
    gradient = tiny.gradient_of_one_device_and_eight(task)
    assert np.abs(gradient["user"]["mask"]).max() > 0


def test_a_run_trains_beside_another_objective(tmp_path):
    changes = {"objectives.info_nce.weight": 1.0, "objectives.history_views.ramp": 3, "train.duration": "40 steps"}
    loop.train(task_of(tmp_path, **changes), tiny.one_device())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/history_views"] for row in rows if "train/history_views" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.history_views.kinds": ("crop", "swap")}, r"history_views.kinds=\('crop', 'swap'\): expected some of crop, mask"),
        ({"objectives.history_views.mask": 1.0}, "history_views.mask=1.0: must lie between 0 and 1"),
        ({"objectives.history_views.temperature": 0.0}, "history_views.temperature=0.0: must be above 0"),
        ({"objectives.history_views.ramp": -1}, "history_views.ramp=-1: must be at least 0"),
        ({"objectives.history_views.kinds": ()}, r"kinds=\(\) leaves dropout to make two views: set config.towers.user.dropout"),
        ({"towers.user.kind": "text", "towers.text.source": "tokens"}, "history_views needs packed histories: .* it is 'text'"),
    ],
)
def test_bad_values_are_said_before_anything_is_compiled(changes, message, tmp_path):
    with pytest.raises(RecJaxError, match=message):
        task_of(tmp_path, **changes)


def test_towers_and_batches_that_lack_a_part(tmp_path):
    task = task_of(tmp_path)
    tower = dataclasses.replace(task.spec.towers.history, mask=False)
    bare = dataclasses.replace(task.spec.towers, history=tower)
    with pytest.raises(RecJaxError, match="has 'mask', but the history tower has no vector"):
        history_views.check("config.objectives.history_views", task.spec.objectives[0].spec, bare)
    with pytest.raises(RecJaxError, match="no vector for them: set HistorySpec.mask"):
        history.encode(task.params["user"], tower, jnp.ones((1, 2, 8)), jnp.ones((1, 2), jnp.int32), hidden=jnp.ones((1, 2), bool))
    batch = dataclasses.replace(next(iter(task.batches)), **dict.fromkeys(FIELDS))
    with pytest.raises(RecJaxError, match="views of histories are asked for, but not in the batch"):
        loss_and_metrics(task.params, task.spec, batch, task.constants, None)
