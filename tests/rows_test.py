"""Row-wise optimizers: a naive loop, Adam where all rows are touched, rows that nobody looks up, devices, a resume, what is compiled."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from stage_objectives_test import labelled_task

from rec_jax import mesh as mesh_lib
from rec_jax.checkpoint import Checkpoints
from rec_jax.towers import ids as ids_lib
from rec_jax.towers import two_tower
from rec_jax.train import loop, rows, stages
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train import state as state_lib
from rec_jax.train.forwards import draws
from rec_jax.train.step import loss_and_metrics, make_train_step
from rec_jax.types import RecJaxError

ALONE = {"towers.item.text": False, "towers.item.ids": True, "towers.user.layers": 1, "batch.history_rows": 1}
BATCH = {**ALONE, "objectives.info_nce.candidates": "batch", "objectives.info_nce.uniform": 16}
STEPS = {"train.duration": "12 steps", "optimizer.warmup": "2 steps", "optimizer.weight_decay": 0.1, "optimizer.clip": 0.2}
ADAM = {**BATCH, **STEPS, "optimizer.rows": "adam"}
VARIANTS = {
    "adam": ADAM,
    "adagrad": {**ADAM, "optimizer.rows": "adagrad"},
    "hashed": {**ADAM, "towers.item.id_buckets": 40},
    # Items' vectors drawn for each query, and some items known by their text alone.
    "text": {**ADAM, "towers.item.text": True, "towers.item.id_dropout": 0.3, "objectives.info_nce.uniform": 0}
    | {"objectives.bce.weight": 1.0, "objectives.bce.draw": "catalogue", "objectives.bce.negatives": 2},
    "all": {**ADAM, "objectives.info_nce.uniform": 1024},
    "dense": {**ADAM, "objectives.info_nce.uniform": 1024, "optimizer.rows": "dense"},
}


class Run:
    """A task's step on a mesh, with the state that it begins with and its batches."""

    def __init__(self, task, mesh):
        self.task, self.mesh, tx = task, mesh, optimizer_lib.make_optimizer(task.optimizer)
        self.shapes, self.shardings = loop.state_shardings(task, mesh)
        create = jax.jit(lambda p: loop.create_state(task, jax.tree.map(jnp.copy, p), tx), out_shardings=self.shardings)
        self.new = lambda: create(mesh_lib.put(task.params, self.shardings.params))
        self.step = make_train_step(task.spec, tx, mesh, self.shardings)
        self.constants = mesh_lib.put(task.constants, mesh_lib.replicated(mesh))

    def batches(self, count):
        iterator = iter(self.task.batches)
        return [next(iterator) for _ in range(count)]

    def __call__(self, state, batch):
        with jax.set_mesh(self.mesh):
            return self.step(state, mesh_lib.to_global(batch, self.mesh), self.constants)


@functools.cache
def started(variant, shape=(1, 1, 1), layout="replicated"):
    task = tiny.task(tiny.config(**VARIANTS[variant], **{"mesh.layout": layout}), "unused")
    if not task.spec.towers.item_text:
        task.constants.table = None
    sizes = dict(zip(mesh_lib.AXES, shape, strict=True))
    return Run(task, mesh_lib.make_mesh(sizes, devices=jax.devices()[: int(np.prod(shape))]))


def kept_of(opt_state):
    """What the row-wise rule keeps, as numpy: name -> array of the items' table."""
    (state,) = (x for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, rows.RowState)) if isinstance(x, rows.RowState))
    return {name: np.asarray(tree["ids"]["embedding"]) for name, tree in state.kept.items()}


def looked_up(run, batch, key):
    """Rows of the table that a step looks up, by a set of Python's."""
    found = [batch.item_ids, *draws(run.task.spec, batch, key, n_items=tiny.N_ITEMS)]
    items = np.unique(np.concatenate([np.asarray(x).ravel() for x in found if x is not None]))
    at = ids_lib.places(items[items >= 0], **run.task.spec.towers.id_options)
    return sorted(set(np.asarray(at).ravel().tolist()))


def naive(rule, table, kept, gradient, touched, rate, o):
    """One row after the other, as the rule is written down -> the table."""
    table = table.astype(np.float64)
    for row in touched:
        g = gradient[row].astype(np.float64)
        if rule == "adam":
            kept["count"][row] += 1
            kept["mu"][row] = o.beta1 * kept["mu"][row] + (1 - o.beta1) * g
            kept["nu"][row] = o.beta2 * kept["nu"][row] + (1 - o.beta2) * g**2
            m, v = (kept[k][row] / (1 - b ** kept["count"][row]) for k, b in (("mu", o.beta1), ("nu", o.beta2)))
            move = m / (np.sqrt(v) + 1e-8)
        else:
            kept["square"][row] += np.mean(g**2)
            move = g / (np.sqrt(kept["square"][row]) + 1e-8)
        table[row] -= rate * (move + o.weight_decay * table[row])
    return table


@pytest.mark.parametrize("variant", ["adam", "adagrad", "hashed"])
def test_a_naive_loop_finds_the_same(variant):
    """Duplicates and all: the gradient of the whole table, clipped by the norm of all gradients, is applied by the row."""
    run = started(variant)
    task, o = run.task, run.task.optimizer
    grads_of = jax.jit(jax.grad(lambda p, b, k: loss_and_metrics(p, task.spec, b, task.constants, k)[0]))
    state, schedule = run.new(), optimizer_lib.schedule(o)
    expected, seen = {name: x.astype(np.float64) for name, x in kept_of(state.opt_state).items()}, set()
    for number, batch in enumerate(run.batches(4)):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=state_lib.RNG), number)
        grads = jax.device_get(grads_of(state.params, batch, key))
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
        assert norm > o.clip, "the test shows nothing of clipping"
        before, touched = np.array(state.params["ids"]["embedding"]), looked_up(run, batch, key)
        seen |= set(touched)
        gradient = grads["ids"]["embedding"] * min(1, o.clip / norm)
        table = naive(o.rows, before, expected, gradient, touched, float(schedule(number)), o)
        state, metrics = run(state, batch)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        after, found = np.asarray(state.params["ids"]["embedding"]), kept_of(state.opt_state)
        np.testing.assert_allclose(after, table, rtol=1e-5, atol=2e-7)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-9)
        others = np.setdiff1d(np.arange(len(table)), touched)
        assert variant == "hashed" or len(np.setdiff1d(np.arange(tiny.N_ITEMS), touched)), "every item is touched: the test is too easy"
        np.testing.assert_array_equal(after[others], before[others])
    never = np.setdiff1d(np.arange(256), list(seen))
    np.testing.assert_array_equal(np.asarray(state.params["ids"]["embedding"])[never], np.asarray(task.params["ids"]["embedding"])[never])
    assert not any(x[never].any() for x in kept_of(state.opt_state).values())
    assert int(state.step) == 4


def test_where_every_row_is_touched_it_is_adam():
    found = []
    for variant in ("all", "dense"):
        run = started(variant)
        state, losses = run.new(), []
        for number, batch in enumerate(run.batches(6)):
            key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=state_lib.RNG), number)
            assert looked_up(run, batch, key) == list(range(tiny.N_ITEMS))
            state, metrics = run(state, batch)
            losses.append(float(metrics["loss"]))
        found.append((losses, jax.device_get(state.params)))
    (losses, params), (expected, dense) = found
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for group in (params, dense):
        group["ids"]["embedding"] = group["ids"]["embedding"][: tiny.N_ITEMS]  # those behind decay in the one and stay in the other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, dense)


def test_devices_with_parts_of_the_table_train_as_one_does():
    found = []
    for shape, layout in (((1, 1, 1), "replicated"), ((2, 2, 2), "sharded")):
        run = started("adam", shape, layout)
        state, losses = run.new(), []
        for batch in run.batches(4):
            state, metrics = run(state, batch)
            losses.append(float(metrics["loss"]))
        found.append((losses, np.asarray(state.params["ids"]["embedding"])))
    assert state.params["ids"]["embedding"].sharding.shard_shape((256, 8)) == (64, 8)
    places = {mesh_lib.path_name(path): s.shard_shape(x.shape) for (path, x), s in _placed(run)}
    of_table = {name.rpartition("/kept/")[2]: shape for name, shape in places.items() if "/kept/" in name}
    assert of_table == {"mu/ids/embedding": (64, 8), "nu/ids/embedding": (64, 8), "count/ids/embedding": (64,)}
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5)


def _placed(run):
    return zip(jax.tree_util.tree_leaves_with_path(run.shapes), jax.tree.leaves(run.shardings), strict=True)


def test_a_state_that_was_saved_goes_on_bit_for_bit(tmp_path):
    run = started("adam")
    state, batches, checkpoints = run.new(), run.batches(4), Checkpoints(tmp_path)
    for batch in batches[:2]:
        state, _ = run(state, batch)
    checkpoints.save(2, loop.as_tree(state), {}, best=None)
    checkpoints.wait()
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), run.shapes, run.shardings)
    again = state_lib.TrainState(**checkpoints.restore(2, loop.as_tree(like)))
    checkpoints.close()
    for batch in batches[2:]:
        (state, _), (again, _) = run(state, batch), run(again, batch)
    jax.tree.map(np.testing.assert_array_equal, state, again)


@pytest.mark.slow
def test_it_learns_with_texts_and_items_drawn_for_each_query():
    run = started("text")
    state, batch, losses = run.new(), run.batches(1)[0], []
    for _ in range(12):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert np.asarray(state.params["ids"]["embedding"]).any()


def compiled(n_items, **changes):
    """The step of a table of N rows on eight devices that hold parts of it, compiled for shapes alone -> (compiled, bytes of the state)."""
    c = tiny.config(**ADAM, **{"mesh.layout": "sharded", **changes})
    task = tiny.task(c, "unused")
    towers = dataclasses.replace(task.spec.towers, n_ids=n_items)
    params = jax.eval_shape(lambda: two_tower.init(jax.random.key(0), towers) | {"scalars": task.params["scalars"]})
    constants = dataclasses.replace(task.constants, table=None, log_q=np.zeros(n_items, np.float32))
    task = dataclasses.replace(task, spec=dataclasses.replace(task.spec, towers=towers), params=params, constants=constants)
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    shapes, shardings = loop.state_shardings(task, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    step = make_train_step(task.spec, optimizer_lib.make_optimizer(task.optimizer), mesh, shardings)
    with jax.set_mesh(mesh):
        built = step.lower(state, mesh_lib.to_global(next(iter(task.batches)), mesh), task.constants).compile()
    return built, mesh_lib.bytes_per_device(shapes, shardings)


def longest_sent(built):
    """Numbers of the longest array that goes from device to device."""
    sent = re.findall(r"= \(?(.*?)\)? (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", built.as_text())
    return max(np.prod([int(d) for d in shape.split(",")]) for line in sent for shape in re.findall(r"\w+\[([\d,]+)\]", line))


def test_nothing_of_the_tables_size_is_made_or_sent():
    temporary = []
    for n in (1 << 14, 1 << 18):
        built, state = compiled(n)
        memory = built.memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        assert memory.alias_size_in_bytes >= 0.99 * state, "the state is not updated in place"
        assert longest_sent(built) < n // 8 * 8 / 4, "something of the size of a device's part of the table goes from device to device"
    assert temporary[1] <= temporary[0] + 4096, temporary


@pytest.mark.slow
def test_nor_of_a_table_that_lies_by_columns():
    n = 1 << 14
    built, state = compiled(n, **{"mesh.rules": (("ids/embedding", (None, ("fsdp", "tensor"))),)})
    assert built.memory_analysis().alias_size_in_bytes >= 0.99 * state
    assert longest_sent(built) < n // 8 * 8 / 4


def test_rows_are_found_once_and_empty_places_are_none():
    found = np.asarray(rows.once(jnp.asarray([5, -1, 2, 5, 0, -1, 2]), rows=8))
    assert found.tolist()[:3] == [0, 2, 5]
    assert len(found) == 7
    assert (found[3:] >= 8).all()
    assert len(set(found.tolist())) == 7
    assert rows.once(jnp.asarray([1, 0, 1, 1, -1]), rows=2).tolist() == [0, 1]


def test_factors_and_freezing_hold_for_tables():
    params = {"ids": {"embedding": jnp.ones((3, 2))}, "user": {"kernel": jnp.ones(3)}}
    o = started("adam").task.optimizer
    o = dataclasses.replace(o, warmup=0, schedule="constant", learning_rate=0.1, weight_decay=0.0, clip=0.0)

    def moved(**changes):
        tx = optimizer_lib.make_optimizer(dataclasses.replace(o, **changes))
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        return float(updates["ids"]["embedding"][0, 0]), float(updates["user"]["kernel"][0]), state

    assert moved()[:2] == pytest.approx((-0.1, -0.1))
    assert moved(scale=(("ids/.*", 0.5),))[:2] == pytest.approx((-0.05, -0.1))
    assert moved(rows="adagrad", scale=(("ids/.*", 0.5),))[:2] == pytest.approx((-0.05, -0.1))
    frozen = moved(freeze=("ids/.*",))
    assert frozen[:2] == pytest.approx((0.0, -0.1))
    at = jnp.asarray([[1]])
    touched = {"ids": rows.Rows(at[0], at, mesh_lib.replicated(tiny.one_device()))}
    again = rows.put_back(frozen[2], rows.taken(frozen[2], touched), touched)
    jax.tree.map(np.testing.assert_array_equal, again, frozen[2])
    assert not any(x.shape[:1] == (3,) and x.ndim == 2 for x in jax.tree.leaves(frozen[2])), "a frozen table has moments"


def test_tables_of_users_move_by_the_row_too(tmp_path):
    task = labelled_task(tmp_path, 1, **{"objectives.task.weight": 1.0, "optimizer.rows": "adam"})
    assert task.spec.row_tables == ("ids", "users")
    run = Run(task, tiny.one_device())
    before, (batch,) = np.array(task.params["users"]["embedding"]), run.batches(1)
    state = run.new()
    for _ in range(3):  # the first is of the warm-up
        state, _ = run(state, batch)
    moved = np.flatnonzero((np.asarray(state.params["users"]["embedding"]) != before).any(1))
    assert moved.tolist() == np.unique(batch.user_ids[batch.user_ids >= 0]).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ALONE}, r"config.objectives.info_nce scores the whole catalogue: set config.objectives.info_nce.candidates='batch'"),
        ({**BATCH, "objectives.info_nce.momentum": 0.99}, r"info_nce.momentum=0.99 moves every row .* set it to 0"),
        ({**BATCH, "optimizer.accumulate": 2}, r"set config.optimizer.accumulate=1"),
        ({"objectives.info_nce.candidates": "batch"}, r"there is none: set config.towers.item.ids=True"),
        ({**BATCH, "optimizer.rows": "sgd"}, r"config.optimizer.rows='sgd': expected one of dense, adam, adagrad"),
    ],
)
def test_what_does_not_go_with_rows_is_refused(changes, message):
    def check():
        c = tiny.config(**{"optimizer.rows": "adam", **changes})
        towers = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS)
        stages.check(c, towers, None, tiny.one_device())

    with pytest.raises(RecJaxError, match=message):
        check()


def test_a_stage_of_texts_has_no_tables():
    c = tiny.config(**{"optimizer.rows": "adam", "batch.kind": "texts", "towers.text.source": "tokens", "objectives.info_nce.weight": 0.0}
                    | {"objectives.mlm.weight": 1.0})  # fmt: skip
    towers = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS)
    assert stages.make_step(c, towers, stages.batch_spec(c)).row_tables == ()
