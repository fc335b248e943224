"""Features in the item tower: against numpy, at the start, dropped, over devices, and in what a stage starts from."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax import mesh as mesh_lib
from rec_jax.data.impressions import Impressions
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.eval import labelled, logged
from rec_jax.towers import batches, features, interactions, two_tower
from rec_jax.train import carry, stages
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import RecJaxError

SIZES = {"categorical": {"brand": 5}, "multi_hot": {"tags": 7}, "numeric": {"price": 4, "year": 0}, "vectors": {"image": 6}}
FUSIONS = ("sum", "concat", "gate")
ONE_QUICK = [pytest.param(fusion, marks=() if fusion == "gate" else pytest.mark.slow) for fusion in FUSIONS]
N = tiny.N_ITEMS


def rows(seed=0, n=N):
    """Features of n items, of which some lack each."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(n, 6)).astype(np.float32) * (random.random((n, 1)) < 0.8)
    tags = random.integers(0, 7, (n, 3)).astype(np.int32)
    tags[0] = 0
    year = random.normal(size=n).astype(np.float32)
    year[random.random(n) < 0.2] = np.nan
    return {
        "categorical": {"brand": random.integers(0, 5, n).astype(np.int32)},
        "multi_hot": {"tags": tags},
        "numeric": {"price": random.integers(0, 4, n).astype(np.int32), "year": year},
        "vectors": {"image": image},
    }


def config_of(fusion="sum", **changes):
    c = {"data.features.categorical": ("brand",), "towers.item.fusion": fusion, "towers.item.features.frequencies": 3, **changes}
    return tiny.config(**c)


def spec_of(c, source_texts=8):
    return two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=source_texts, n_items=N, features=SIZES)


def trained(params, seed=0):
    """Parameters of features as if they had been trained: none is zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)


def naive(params, spec, base, table, item):
    """One item's vector in float64, feature by feature."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    brand, tags = table["categorical"]["brand"][item], [t for t in table["multi_hot"]["tags"][item] if t > 0]
    none = np.zeros(spec.dim)
    parts = [p["categorical"]["brand"]["embedding"][brand] if brand else none]
    parts.append(np.mean([p["multi_hot"]["tags"]["embedding"][t] for t in tags], axis=0) if tags else none)
    parts.append(p["numeric"]["price"]["embedding"][table["numeric"]["price"][item]])
    year, wave = np.float64(table["numeric"]["year"][item]), p["numeric"]["year"]
    angle = 2 * np.pi * year * wave["frequency"]
    parts.append(wave["missing"] if np.isnan(year) else np.concatenate([np.sin(angle), np.cos(angle)]) @ wave["kernel"])
    parts.append(table["vectors"]["image"][item].astype(np.float64) @ p["vectors"]["image"]["kernel"])
    if spec.fusion == "concat":
        return np.concatenate([base, *parts]) @ p["fusion"]["kernel"]
    gates = 1 / (1 + np.exp(-(base @ p["fusion"]["kernel"] + p["fusion"]["bias"]))) if spec.fusion == "gate" else np.ones(len(parts))
    return base + sum(g * part for g, part in zip(gates, parts, strict=True))


@pytest.mark.parametrize(("fusion", "dim"), [("sum", 0), ("concat", 0), ("concat", 5), ("gate", 0)])
def test_fused_vectors_are_those_of_numpy(fusion, dim):
    c = config_of(fusion, **{"towers.item.features.dim": dim})
    spec = features.make_spec(c.towers.item, SIZES, c.towers.dim)
    assert [name for _, name, _ in spec.names] == ["brand", "tags", "price", "year", "image"]
    params, table = trained(features.init(jax.random.key(0), spec, 8)), rows()
    base = np.random.default_rng(1).normal(size=(N, 8)).astype(np.float32)
    out = jax.jit(features.fuse, static_argnums=1)(params, spec, base, table)
    expected = np.stack([naive(params, spec, base[i].astype(np.float64), table, i) for i in range(N)])
    np.testing.assert_allclose(out, expected, atol=2e-5)
    some = np.array([[3, 0], [7, -1]])
    found = features.fuse(params, spec, jnp.asarray(base)[np.maximum(some, 0)], features.rows_of(table, some))
    np.testing.assert_allclose(found, expected[np.maximum(some, 0)], atol=2e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_item_begins_as_what_its_text_says_and_every_feature_learns(fusion):
    c = config_of(fusion)
    spec = spec_of(c)
    params, table = two_tower.init(jax.random.key(0), spec), tiny.table()
    alone = two_tower.text_item_vectors(params, spec, table)
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, table, rows()), alone, atol=1e-6)
    weights = np.random.default_rng(0).normal(size=(N, 8))
    loss = lambda f: jnp.sum(two_tower.item_vectors({**params, "features": f}, spec, table, rows()) * weights)
    first = jax.grad(loss)(params["features"])
    moved = jax.tree.map(lambda p, g: p + 0.1 * g, params["features"], first)
    for path, g in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(moved)):
        assert np.abs(g).max() > 0, f"no gradient reaches {mesh_lib.path_name(path)}"
    none = first["categorical"]["brand"]["embedding"][0], first["multi_hot"]["tags"]["embedding"][0]
    assert not np.any(none), "what an item lacks is not learned"


def test_an_item_without_any_feature_is_its_text():
    spec = spec_of(config_of())
    params, table = two_tower.init(jax.random.key(0), spec), rows()
    params["features"] = trained(params["features"])
    params["features"]["numeric"] = jax.tree.map(jnp.zeros_like, params["features"]["numeric"])  # "no number" is learned
    empty = jax.tree.map(np.zeros_like, table)
    alone = two_tower.text_item_vectors(params, spec, tiny.table())
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, tiny.table(), empty), alone, atol=1e-6)
    with pytest.raises(RecJaxError, match="the item tower reads features of items .* and none are given"):
        two_tower.item_vectors(params, spec, tiny.table())


def batch_of(c):
    world = tiny.World()
    return next(iter(Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=0, texts=tiny.tokens())))


encode_batch = jax.jit(batches.encode_batch, static_argnames=("spec", "catalogue"))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_same_items_on_both_sides_of_the_loss(fusion):
    c = config_of(fusion, **{"towers.item.ids": True})
    spec, batch, table = spec_of(c), batch_of(c), tiny.table()
    params = two_tower.init(jax.random.key(0), spec)
    params["features"], params["ids"] = trained(params["features"]), trained(params["ids"])
    out = encode_batch(params, spec, batch, table=table, features=rows(), catalogue=True, drawn_ids=np.array([5, 2]), keys=None)
    np.testing.assert_allclose(out.catalogue, two_tower.item_vectors(params, spec, table, rows()), atol=1e-6)
    there = batch.item_ids >= 0
    np.testing.assert_allclose(out.item[there], out.catalogue[batch.item_ids[there]], atol=1e-5)
    np.testing.assert_allclose(out.drawn, out.catalogue[np.array([5, 2])], atol=1e-5)
    alone = two_tower.item_vectors({**params, "features": jax.tree.map(jnp.zeros_like, params["features"])}, spec, table, rows())
    assert np.abs(out.catalogue - alone).max() > 0.1


def test_dropped_features_add_nothing_and_each_is_drawn_for_itself():
    c = config_of(**{"towers.item.modality_dropout": 0.25})
    spec, batch, table = spec_of(c), batch_of(c), rows()
    params = two_tower.init(jax.random.key(0), spec)
    params["features"] = trained(params["features"])
    key = jax.random.key(5)
    row = jax.vmap(jax.vmap(jax.random.key))(np.zeros((8, 4), np.uint32))
    keys = {"text": row, "user": row[:, : batch.history.shape[1]], "head": row[:, :1], "ids": key, "features": key}
    out = encode_batch(params, spec, batch, table=tiny.table(), features=table, catalogue=True, keys=keys)
    kept = np.asarray(features.without_some(key, spec.features, table)["kept"])
    assert kept.shape == (N, 5)
    assert 0.65 < kept.mean() < 0.85
    assert len({tuple(column) for column in kept.T}) == 5
    base = np.asarray(two_tower.text_item_vectors(params, dataclasses.replace(spec, normalize=False), tiny.table()), np.float64)
    parts = [features._PARTS[k](params["features"][k][n], jnp.asarray(table[k][n])) for k, n, _ in spec.features.names]
    vectors = base + np.sum([np.asarray(part) * kept[:, n, None] for n, part in enumerate(parts)], axis=0)
    np.testing.assert_allclose(out.catalogue, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-5)
    there = batch.item_ids >= 0
    np.testing.assert_allclose(out.item[there], out.catalogue[batch.item_ids[there]], atol=1e-5)
    whole = encode_batch(params, spec, batch, table=tiny.table(), features=table, catalogue=True, keys=None)
    np.testing.assert_allclose(whole.catalogue, two_tower.item_vectors(params, spec, tiny.table(), table), atol=1e-6)


def test_impressions_are_scored_with_features():
    """Labels are predicted, and policies valued, by the same item vectors as rankings."""
    c = config_of(**{"towers.user.kind": "id", "batch.kind": "impressions"})
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=N, n_users=tiny.N_USERS, tasks=1, features=SIZES)
    params, random = two_tower.init(jax.random.key(0), spec), np.random.default_rng(0)
    params["features"] = trained(params["features"])
    user, item = random.integers(tiny.N_USERS, size=20), random.integers(N, size=20)
    shown = Impressions(user, item, np.zeros((20, 0), np.int32), np.ones((20, 1), np.float32), None, np.zeros(20, np.int64), {}, ("used",))
    found = labelled.Labelled(spec, tiny.World(), rows()).logits(params, tiny.table(), shown)
    users = np.asarray(params["users"]["embedding"])[user]
    users /= np.linalg.norm(users, axis=1, keepdims=True)
    items = two_tower.item_vectors(params, spec, tiny.table(), rows())
    np.testing.assert_allclose(found, interactions.apply(params["task"], spec.task, users, items[item], None), atol=1e-5)
    world = SimpleNamespace(impressions=lambda split: shown, n_items=N)
    policy = logged.Logged(spec, world, temperature=0.5, features=rows()).probabilities(params, tiny.table(), shown)
    scores = np.where(np.isin(np.arange(N), item), np.exp(users @ np.asarray(items).T / 0.5), 0)
    np.testing.assert_allclose(policy, scores / scores.sum(1, keepdims=True), atol=1e-5)
    with pytest.raises(RecJaxError, match="and none are given"):
        labelled.Labelled(spec, tiny.World()).logits(params, tiny.table(), shown)


# -- steps and meshes --


def task_of(c):
    spec, world = spec_of(c), tiny.World()
    inputs = stages.Inputs(world, tiny.tokens(), spec, None, tiny.table(), features=rows())
    made = Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=c.seed, texts=tiny.tokens())
    task = stages.make_task(c, "", None, inputs, made, tiny.one_device(), lambda params, *, step: {})
    task.params["features"] = trained(task.params["features"])
    return task


@pytest.mark.parametrize("fusion", ONE_QUICK)
def test_eight_devices_find_the_gradient_of_one(fusion):
    task = task_of(config_of(fusion, **{"towers.item.modality_dropout": 0.3}))
    found = tiny.gradient_of_one_device_and_eight(task)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(found["features"]))


def test_momentum_keys_and_drawn_items_read_features_too():
    changes = {"candidates": "batch", "momentum": 0.9, "uniform": 8}
    c = config_of(**{f"objectives.info_nce.{k}": v for k, v in changes.items()})
    task = task_of(c)
    batch, momentum = next(iter(task.batches)), {k: v for k, v in task.params.items() if k != "scalars"}
    loss = lambda params, m: loss_and_metrics(params, task.spec, batch, task.constants, jax.random.key(0, impl=RNG), momentum=m)[0]
    other = {**momentum, "features": trained(momentum["features"], seed=9)}
    assert abs(float(jax.jit(loss)(task.params, momentum) - jax.jit(loss)(task.params, other))) > 1e-3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_layout_has_a_rule_for_each_parameter(fusion):
    spec = spec_of(config_of(fusion))
    shapes = jax.eval_shape(lambda: two_tower.init(jax.random.key(0), spec))["features"]
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for layout in ("replicated", "sharded"):
        placed = mesh_lib.shardings({"features": shapes}, mesh_lib.rules_of(layout, ()), mesh)
        assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(shapes))
    names = {mesh_lib.path_name(p): tuple(s.spec) for p, s in jax.tree_util.tree_leaves_with_path(placed)}
    assert names["features/categorical/brand/embedding"] == (None, ("fsdp", "tensor")), "five rows do not divide, eight columns do"
    assert names["features/vectors/image/kernel"] == ("fsdp", "tensor")
    assert names["features/numeric/year/missing"] == ()


# -- what a stage starts from --


def carried(c, sizes):
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=N, features=sizes)
    params = jax.device_get(trained(two_tower.init(jax.random.key(3), spec)))
    return carry.Carried(params, {"items": np.arange(N), "users": np.arange(3)}, "runs/old")


def test_tables_go_on_with_rows_for_new_categories():
    small = {**SIZES, "categorical": {"brand": 3}, "vectors": {}}
    old, c = carried(config_of(), small), config_of()
    fresh = two_tower.init(jax.random.key(0), spec_of(c))
    out = carry.laid_out(old, fresh)["features"]
    before = old.params["features"]
    np.testing.assert_array_equal(out["categorical"]["brand"]["embedding"][:3], before["categorical"]["brand"]["embedding"])
    assert not np.any(out["categorical"]["brand"]["embedding"][3:])
    np.testing.assert_array_equal(out["numeric"]["year"]["frequency"], before["numeric"]["year"]["frequency"])
    assert not np.any(out["vectors"]["image"]["kernel"]), "a new feature begins as a fresh one"
    without = carry.Carried({k: v for k, v in old.params.items() if k != "features"}, old.rows, old.place)
    carry.check(without, fresh)
    assert "features" not in carry.laid_out(without, fresh)


@pytest.mark.parametrize(
    ("fusion", "sizes", "message"),
    [
        (
            "sum",
            {"multi_hot": {"tags": 9}},
            r"features/multi_hot/tags/embedding is \(9, 8\) in runs/old .* and \(7, 8\) in this run; set config.data",
        ),
        ("sum", {"numeric": {"price": 3, "year": 0}}, r"features/numeric/price/embedding is \(3, 8\) in runs/old"),
        ("sum", {"categorical": {"maker": 3}}, r"features/categorical/maker/embedding is \(3, 8\) in runs/old .* and absent in this run"),
        ("gate", {}, r"features/fusion/bias is \(5,\) in runs/old .* and absent"),
    ],
)
def test_features_that_do_not_fit_are_named(fusion, sizes, message):
    with pytest.raises(RecJaxError, match=message):
        carry.check(carried(config_of(fusion), {**SIZES, **sizes}), two_tower.init(jax.random.key(0), spec_of(config_of())))


@pytest.mark.parametrize("fusion", ONE_QUICK)
def test_a_student_begins_with_its_teachers_vectors(fusion):
    c = config_of(fusion, **{"towers.item.ids": True, "towers.text.layers": 0})
    spec = spec_of(c)
    taught = two_tower.init(jax.random.key(3), spec)
    taught |= {name: trained(taught[name], seed=n) for n, name in enumerate(("features", "ids"))}
    others = tiny.table(7)
    teacher = {"params": taught, "table": others, "features": rows()}
    inputs = stages.Inputs(tiny.World(), tiny.tokens(), spec, None, tiny.table(), teacher=spec, teacher_arrays=teacher, features=rows())
    params = two_tower.init(jax.random.key(0), spec)
    params |= stages._nearest_to_teacher(params, spec, spec, teacher, inputs)
    expected = two_tower.item_vectors(taught, spec, others, rows())
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, tiny.table(), rows()), expected, atol=1e-4)
    # A student that reads none has what they add in its items' own vectors.
    plain = dataclasses.replace(spec, features=None)
    params = two_tower.init(jax.random.key(0), plain)
    params |= stages._nearest_to_teacher(params, plain, spec, teacher, dataclasses.replace(inputs, towers=plain, features=None))
    np.testing.assert_allclose(two_tower.item_vectors(params, plain, tiny.table()), expected, atol=1e-4)
