"""Items without text (`towers.item.text = False`): their own vectors alone, in training, rankings, on devices, and when going on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax.data.pipeline import BatchSpec
from rec_jax.eval import encoder, model, teacher
from rec_jax.towers import batches, two_tower
from rec_jax.train import __main__ as command
from rec_jax.train import carry, stages
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import RecJaxError

ALONE = {"towers.item.text": False, "towers.item.ids": True}
VARIANTS = {
    "catalogue": ALONE,
    "unnormalised": {**ALONE, "towers.normalize": False, "objectives.info_nce.temperature": 1.0},
    "uniform": {**ALONE, "objectives.info_nce.candidates": "batch", "objectives.info_nce.uniform": 32},
    "sharded": {**ALONE, "objectives.info_nce.shard_catalogue": True, "mesh.layout": "sharded"},
}


def task_of(folder, **changes):
    """A training task without any table of text vectors, and with texts that nobody could encode."""
    task = tiny.task(tiny.config(**changes), folder)
    task.constants.table = None
    return task


def test_an_item_is_its_own_vector(tmp_path):
    for normalize in (True, False):
        task = task_of(tmp_path, **{**ALONE, "towers.normalize": normalize})
        assert set(task.params) == {"ids", "user", "scalars"}
        table = np.asarray(task.params["ids"]["embedding"])
        assert np.std(table[: tiny.N_ITEMS]) == pytest.approx(0.02, rel=0.1)
        batch = next(iter(task.batches))
        ids = np.random.default_rng(0).integers(0, tiny.N_ITEMS, (8, 32, 3)).astype(np.int32)
        options = {"table": None, "catalogue": True, "keys": None, "drawn_ids": jnp.arange(5), "query_drawn_ids": jnp.asarray(ids)}
        out = batches.encode_batch(task.params, task.spec.towers, batch, **options)
        vectors = table / np.linalg.norm(table, axis=1, keepdims=True) if normalize else table
        there = batch.item_ids >= 0
        np.testing.assert_allclose(out.catalogue, vectors[: tiny.N_ITEMS], atol=1e-6)
        np.testing.assert_allclose(np.asarray(out.item)[there], vectors[batch.item_ids[there]], atol=1e-6)
        np.testing.assert_allclose(out.drawn, vectors[:5], atol=1e-6)
        np.testing.assert_allclose(out.query_drawn, vectors[ids], atol=1e-6)
        assert out.text is None


SLOW = ("unnormalised", "uniform", "sharded")


@pytest.mark.parametrize("variant", ["catalogue", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_learns_a_batch_and_devices_agree(variant, tmp_path):
    task = task_of(tmp_path, **VARIANTS[variant])
    gradient = tiny.gradient_of_one_device_and_eight(task)
    assert np.abs(gradient["ids"]["embedding"][: tiny.N_ITEMS]).max() > 0
    batch, tx, key = next(iter(task.batches)), optax.adam(2e-2), jax.random.key(1, impl=RNG)

    @jax.jit
    def many(params, state):
        def step(carried, _):
            params, state = carried
            loss, grads = jax.value_and_grad(lambda p: loss_and_metrics(p, task.spec, batch, task.constants, key)[0])(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), None, 60)[1]

    losses = many(task.params, tx.init(task.params))
    assert float(losses[-1]) < 0.6 * float(losses[0])


def test_with_text_nothing_has_changed(tmp_path):
    """Its own vectors still begin at zero, and the item head is there."""
    task = tiny.task(tiny.config(**{"towers.item.ids": True}), tmp_path)
    assert {"item", "ids"} <= set(task.params)
    assert not np.asarray(task.params["ids"]["embedding"]).any()
    with pytest.raises(RecJaxError, match=r"need a table of text vectors"):
        loss_and_metrics(task.params, task.spec, next(iter(task.batches)), stages.no_constants(), None)


def test_new_items_begin_as_fresh_ones_when_going_on():
    towers = lambda n: two_tower.make_spec(tiny.config(**ALONE).towers, tiny.bert_spec(), texts_per_row=8, n_items=n)
    old, fresh = (two_tower.init(jax.random.key(seed), towers(n)) for seed, n in ((0, 60), (1, 300)))
    rows = np.concatenate([np.arange(59, -1, -1), np.full(240, -1)])
    out = carry.laid_out(carry.Carried(jax.device_get(old), {"items": rows, "users": np.zeros(0, int)}, "runs/old"), fresh)
    found, new = np.asarray(out["ids"]["embedding"]), np.asarray(fresh["ids"]["embedding"])
    np.testing.assert_array_equal(found[:60], np.asarray(old["ids"]["embedding"])[59::-1])
    np.testing.assert_array_equal(found[60:], new[60:])
    assert new[60:300].any()
    with_text = two_tower.make_spec(tiny.config(**{"towers.item.ids": True}).towers, tiny.bert_spec(), texts_per_row=8, n_items=300)
    whole = two_tower.init(jax.random.key(1), with_text)
    carried = carry.Carried(jax.device_get(old), {"items": rows, "users": np.zeros(0, int)}, "runs/old")
    with pytest.raises(RecJaxError, match=r"item/project/bias is absent in runs/old .* set config.towers as they are"):
        carry.laid_out(carried, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.item.ids": False}, r"item.text=False leaves an item its own vector alone: set config.towers.item.ids=True"),
        ({"towers.text.source": "tokens"}, r"no use for a trained encoder: set config.towers.text.source='frozen'"),
        ({"towers.text.layers": 0}, r"no use for a student's encoder"),
        ({"objectives.distill_vectors.weight": 1.0, "objectives.distill_vectors.of": "text"}, r"no text vectors: set .*distill_vectors.of"),
    ],
)
def test_keys_that_need_texts_are_named(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**{**ALONE, **changes})


def test_an_item_cannot_lose_its_only_vector(tmp_path):
    with pytest.raises(RecJaxError, match=r"id_dropout=0.1 leaves nothing of an item without text: set it to 0"):
        tiny.task(tiny.config(**{**ALONE, "towers.item.id_dropout": 0.1}), tmp_path)


def test_an_encoder_that_teaches_such_items_has_texts():
    assert teacher.towers_of_encoder(tiny.config(**ALONE), tiny.bert_spec()).item_text


def test_a_model_of_such_items_has_no_text_vectors():
    made = model.make_model(tiny.config(**ALONE), tiny.World(), tiny.tokens(), ({}, tiny.bert_spec()), print, candidates=True)
    assert made.table is None
    params = two_tower.init(jax.random.key(0), made.spec)
    found, own = made.item_vectors(params), np.asarray(params["ids"]["embedding"])[: tiny.N_ITEMS]
    np.testing.assert_allclose(found, own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(("preset", "objective"), [("sasrec", "bce"), ("sasrec_ce", "info_nce")])
def test_the_presets_are_sasrec(preset, objective):
    c = config_lib.load(f"configs/sequences.py:{preset}")
    towers = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS)
    spec = stages.make_step(c, towers, BatchSpec.from_config(c))
    (only,) = spec.objectives
    assert (only.name, only.weight, only.scalars) == (objective, 1.0, ())  # dot products as they are: nothing scales them
    assert only.per_query == (objective == "bce")
    assert only.catalogue == (objective == "info_nce")
    assert (towers.normalize, towers.item_text, towers.n_ids, towers.history.dim) == (False, False, tiny.N_ITEMS, 50)


@pytest.mark.slow
def test_a_whole_run_never_encodes_a_text(tmp_path, monkeypatch, capsys):
    """Train, test, load and recommend; then going on with a new item: no text is ever encoded."""

    def never(*args, **kwargs):
        raise AssertionError("a text is encoded")

    for module in (encoder, model):
        monkeypatch.setattr(module, "text_vectors", never)
    random, lines = np.random.default_rng(0), []
    for user in range(40):
        items = (random.integers(24) + np.cumsum(random.choice([1, 1, 5], random.integers(6, 14)))) % 24
        lines.append(" ".join(map(str, [user, *(items + 1)])))
    flags = {
        "data.on_bad.duplicate_event": "keep",
        "data.cache": str(tmp_path / "cache"),
        "batch.history_length": "16",
        "train.duration": "6 steps",
        "train.eval_every": "3 steps",
        "eval.baselines": "('popularity',)",
    }

    def train(name, preset, **more):
        words = [f"--config.{k}={v}" for k, v in {**flags, **more}.items()]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
        words += [f"--config.data.path={tmp_path / name}.txt", f"--workdir={tmp_path / name}"]
        assert command.main([f"--config=configs/sequences.py:{preset}", *words]) == 0
        return capsys.readouterr().out

    assert "text vectors" not in train("old", "sasrec")
    trained = model.load(tmp_path / "old")
    np.testing.assert_allclose(trained.items, np.asarray(trained.params["ids"]["embedding"])[:24], atol=1e-6)
    lines[0] += " 25 26"
    train("new", "sasrec_ce", **{"start.path": str(tmp_path / "old")})
    assert model.load(tmp_path / "new").items.shape == (26, 50)
    assert json.loads((tmp_path / "new" / "eval" / "test.json").read_text())["test/ndcg@10"] >= 0


def test_sharded_items_lie_on_their_devices(tmp_path):
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8})
    task = task_of(tmp_path, **VARIANTS["sharded"])
    found = mesh_lib.shardings(jax.eval_shape(lambda: task.params), task.rules, mesh)
    assert found["ids"]["embedding"].shard_shape((256, 8)) == (32, 8)
