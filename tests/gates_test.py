"""Gates of an item's text, own vector and features (`towers.item.gates`), and texts that a step does not know (`text_dropout`)."""

import dataclasses
import functools

import feature_towers_test as of_features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.towers import batches, features, gates, heads, two_tower
from rec_jax.train import carry, stages
from rec_jax.types import RecJaxError

N, D = tiny.N_ITEMS, 8
GATED = {"towers.item.ids": True, "towers.item.gates": True}
DROPPED = {"towers.item.ids": True, "towers.item.text_dropout": 0.4}
rows, trained = of_features.rows, of_features.trained
encode_batch = jax.jit(batches.encode_batch, static_argnames=("spec", "catalogue", "plain"))


def made(with_features=True, **changes):
    """-> config, spec and parameters none of whose parts is zero; gates as they begin."""
    c = of_features.config_of(**changes) if with_features else tiny.config(**changes)
    sizes = of_features.SIZES if with_features else None
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=N, features=sizes)
    params = two_tower.init(jax.random.key(0), spec)
    names = [name for name in ("ids", "features") if name in params]
    return c, spec, {**params, **{name: trained(params[name], seed=n) for n, name in enumerate(names)}}


def parts_of(params, spec, ids=True):
    """The catalogue's texts, own vectors and features by themselves, each [N, D] in float64; without IDs as if these were not known."""
    said = heads.apply(params["item"], tiny.table(), dim=D, hidden=spec.hidden, kind=spec.head)
    parts = [said, params["ids"]["embedding"][:N] * ids]
    if spec.features is not None:
        parts += features.parts_of(params["features"], spec.features, rows())
    return [np.asarray(part, np.float64) for part in parts]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def naive(params, parts):
    """Each item by itself, gate by gate."""
    kernel, bias = (np.asarray(params["gates"][name], np.float64) for name in ("kernel", "bias"))
    out = np.zeros((N, D))
    for item in range(N):
        everything = np.concatenate([part[item] for part in parts])
        for number, part in enumerate(parts):
            out[item] += 2 / (1 + np.exp(-(everything @ kernel[:, number] + bias[number]))) * part[item]
    return out


@functools.cache
def batch():
    c, world = tiny.config(**{"batch.shards": 2}), tiny.World()
    return next(iter(Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=0)))


def keys(key):
    row = jax.vmap(jax.vmap(jax.random.key))(np.zeros((2, 4), np.uint32))
    return {"text": row, "user": row[:, : batch().history.shape[1]], "head": row[:, :1], "ids": key, "features": key, "texts": key}


@pytest.mark.parametrize("with_features", [True, False])
def test_open_gates_are_the_plain_sum_and_a_gradient_moves_them(with_features):
    _, spec, params = made(with_features, **GATED)
    assert spec.parts == (7 if with_features else 2)
    assert params["gates"]["kernel"].shape == (spec.parts * D, spec.parts)
    given = rows() if with_features else None
    off = dataclasses.replace(spec, gates=False)
    assert "gates" not in two_tower.init(jax.random.key(0), off)
    plain = two_tower.item_vectors(params, off, tiny.table(), given)
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, tiny.table(), given), plain, atol=1e-6)
    weights = np.random.default_rng(0).normal(size=(N, D))
    gradient = jax.grad(lambda p: jnp.sum(two_tower.item_vectors(p, spec, tiny.table(), given) * weights))(params)
    assert (np.abs(gradient["gates"]["bias"]) > 1e-3).all()
    assert (np.abs(gradient["gates"]["kernel"]).max(0) > 1e-3).all()
    assert all(np.isfinite(g).all() and np.any(g) for name in ("item", "ids", "gates") for g in jax.tree.leaves(gradient[name]))


@pytest.mark.parametrize("normalize", [True, False])
def test_gated_vectors_are_those_of_a_loop_on_both_sides_of_the_loss(normalize):
    _, spec, params = made(**GATED, **{"towers.normalize": normalize})
    params["gates"] = jax.tree.map(lambda x: 0.3 * x, trained(params["gates"], seed=5))
    length = unit if normalize else lambda x: x
    expected = length(naive(params, parts_of(params, spec)))
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, tiny.table(), rows()), expected, atol=1e-5)
    off = two_tower.item_vectors(params, dataclasses.replace(spec, gates=False), tiny.table(), rows())
    assert np.abs(expected - off).max() > 0.1
    if normalize:
        out = encode_batch(params, spec, batch(), table=tiny.table(), features=rows(), catalogue=False, plain=True, keys=None)
        ids, there = batch().item_ids, batch().item_ids >= 0
        np.testing.assert_allclose(out.item[there], expected[ids[there]], atol=1e-5)
        unknown = unit(naive(params, parts_of(params, spec, ids=False)))
        np.testing.assert_allclose(out.plain[there], unknown[ids[there]], atol=1e-5)
        # A text that belongs to no item, such as a history that is written out, is known by itself.
        alone = [parts_of(params, spec)[0], *[np.zeros((N, D))] * 6]
        np.testing.assert_allclose(two_tower.text_item_vectors(params, spec, tiny.table()), unit(naive(params, alone)), atol=1e-5)


def test_gates_without_text():
    _, spec, params = made(**GATED, **{"towers.item.text": False})
    params["gates"] = trained(params["gates"], seed=5)
    _, own, *others = parts_of({**made(**GATED)[2], **params}, spec)
    expected = unit(naive(params, [own, *others]))
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, None, rows()), expected, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_dropped_texts_leave_what_else_is_known(gated):
    _, spec, params = made(**DROPPED, **({"towers.item.gates": True} if gated else {}))
    if gated:
        params["gates"] = jax.tree.map(lambda x: 0.3 * x, trained(params["gates"], seed=5))
    key = jax.random.key(5)
    out = encode_batch(params, spec, batch(), table=tiny.table(), features=rows(), catalogue=True, keys=keys(key))
    kept = np.asarray(two_tower.ids_lib.kept(key, 0.4, np.arange(N)))
    assert 0.4 < kept.mean() < 0.8
    said, *others = parts_of(params, spec)
    join = functools.partial(naive, params) if gated else sum
    np.testing.assert_allclose(out.catalogue, unit(join([said * kept[:, None], *others])), atol=1e-5)
    ids, there = batch().item_ids, batch().item_ids >= 0
    np.testing.assert_allclose(out.item[there], out.catalogue[ids[there]], atol=1e-5)
    some = encode_batch(params, spec, batch(), table=tiny.table(), features=rows(), catalogue=False, keys=keys(key))
    np.testing.assert_allclose(some.item[there], out.item[there], atol=1e-5)
    whole = encode_batch(params, spec, batch(), table=tiny.table(), features=rows(), catalogue=True, keys=None)
    np.testing.assert_allclose(whole.catalogue, unit(join([said, *others])), atol=1e-5, err_msg="evaluation knows all texts")


def test_an_item_that_has_nothing_else_keeps_its_text():
    """Own vectors begin at zero: without texts there would be no direction, and gradients of 1e12."""
    _, spec, params = made(False, **DROPPED)
    half = np.arange(256)[:, None] < N // 2
    params["ids"] = {"embedding": jnp.where(half, params["ids"]["embedding"], 0.0)}

    def vectors(params):
        dropped = two_tower.without_some_texts(params, spec, jax.random.key(5))
        return two_tower.item_vectors(dropped, spec, tiny.table())

    whole, found = two_tower.item_vectors(params, spec, tiny.table()), vectors(params)
    same = np.abs(found - whole).max(1) < 1e-6
    assert same[N // 2 :].all()
    assert 0.2 < same[: N // 2].mean() < 0.9
    weights = np.random.default_rng(0).normal(size=(N, D))
    gradient = jax.grad(lambda p: jnp.sum(vectors(p) * weights))(params)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) < 1e3


# -- devices --


def test_every_layout_has_a_rule_for_gates():
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = mesh_lib.shardings({"gates": made(**GATED)[2]["gates"]}, mesh_lib.rules_of("sharded", ()), mesh)["gates"]
    assert tuple(placed["kernel"].spec) == ("fsdp",), "seven gates do not divide, what they see does"
    assert tuple(placed["bias"].spec) == ()


@pytest.mark.slow
def test_eight_devices_find_the_gradient_of_one():
    task = of_features.task_of(of_features.config_of(**{**GATED, **DROPPED}))
    task.params["gates"] = jax.tree.map(lambda x: 0.3 * x, trained(task.params["gates"], seed=5))
    found = tiny.gradient_of_one_device_and_eight(task)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(found["gates"]))


# -- what a stage starts from --


def test_gates_begin_open_where_a_run_goes_on_and_are_not_lost():
    *_, params = made(**GATED)
    without = {name: value for name, value in jax.device_get(params).items() if name != "gates"}
    place = {"items": np.arange(N), "users": np.arange(3)}
    assert "gates" not in carry.laid_out(carry.Carried(without, place, "runs/old"), params)
    params["gates"] = trained(params["gates"])
    old = carry.Carried(jax.device_get(params), place, "runs/old")
    np.testing.assert_array_equal(carry.laid_out(old, params)["gates"]["kernel"], params["gates"]["kernel"])
    with pytest.raises(RecJaxError, match=r"gates/bias is \(7,\) in runs/old .* and absent in this run; set config.towers as"):
        carry.check(old, without)


@pytest.mark.parametrize("student_gates", [True, False])
def test_a_student_begins_with_the_vectors_of_a_teacher_with_gates(student_gates):
    c, spec, taught = made(**GATED, **{"towers.text.layers": 0})
    taught["gates"] = jax.tree.map(lambda x: 0.3 * x, trained(taught["gates"], seed=5))
    student, others = dataclasses.replace(spec, gates=student_gates), tiny.table(7)
    teacher = {"params": taught, "table": others, "features": rows()}
    last = {**taught, "scalars": {}}
    inputs = stages.Inputs(
        tiny.World(), tiny.tokens(), student, {}, tiny.table(), last, teacher=spec, teacher_arrays=teacher, features=rows()
    )
    if not student_gates:
        c = of_features.config_of(**{"towers.item.ids": True, "towers.text.layers": 0})
    params = stages.make_params(c, stages.step_of(c, inputs), inputs)
    assert ("gates" in params) == student_gates
    assert not student_gates or not any(np.any(x) for x in jax.tree.leaves(params["gates"]))
    expected = two_tower.item_vectors(taught, spec, others, rows())
    np.testing.assert_allclose(two_tower.item_vectors(params, student, tiny.table(), rows()), expected, atol=1e-4)


# -- configs --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_dropout": 1.0, "ids": True}, r"config.towers.item.text_dropout=1.0: must be at least 0 and below 1"),
        (
            {"text_dropout": 0.1},
            r"text_dropout=0.1 leaves out texts of items that have something else too: set config.towers",
        ),
        ({"text_dropout": 0.1, "ids": True, "text": False}, r"with config.towers.item.text=True; or set it to 0"),
        ({"gates": True}, r"config.towers.item.gates=True weighs text, own vector and features .* it has but one of them"),
        ({"gates": True, "ids": True, "text": False}, r"it has but one of them"),
    ],
)
def test_keys_that_do_not_go_together(changes, message):
    with pytest.raises(RecJaxError, match=message):
        made(False, **{f"towers.item.{key}": value for key, value in changes.items()})


def test_gates_weigh_a_sum():
    with pytest.raises(RecJaxError, match=r"gates=True weighs a sum, and config.towers.item.fusion='gate': set it to 'sum'"):
        made(fusion="gate", **{"towers.item.gates": True})


def test_a_part_is_weighed_by_all_parts():
    random = np.random.default_rng(0)
    parts, kernel, bias = random.normal(size=(3, 5, 4)), random.normal(size=(12, 3)), random.normal(size=3)
    found = gates.weighed({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, [jnp.asarray(part) for part in parts])
    open_ = 2 / (1 + np.exp(-(np.einsum("pnd,pdq->nq", parts, kernel.reshape(3, 4, 3)) + bias)))
    np.testing.assert_allclose(found, np.einsum("np,pnd->nd", open_, parts), atol=1e-5)
