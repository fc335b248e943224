"""Any mesh trains as one device does; where each parameter lies; what the compiled step sends; resuming on other devices."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax import towers
from rec_jax.data.packing import texts_per_row
from rec_jax.towers import batches, two_tower
from rec_jax.towers.bert import init as init_text
from rec_jax.train import loop, stages
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train import state as state_lib
from rec_jax.train import step as step_lib
from rec_jax.types import RecJaxError

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).parent / "goldens" / "shardings"
MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
IDS = {"towers.item.ids": True, "towers.user.dropout": 0.2, "mesh.layout": "sharded"}
TOKENS = {**IDS, "towers.text.source": "tokens", "towers.text.dropout": 0.1}
BATCH = {"objectives.info_nce.candidates": "batch"}
# The encoder apart or in the step, catalogue or batch candidates, a history or a written-out user.
WORLDS = {
    "frozen_catalogue": IDS,
    "frozen_batch": {**IDS, **BATCH},
    "tokens_batch": {**TOKENS, **BATCH},
    "written_batch": {**TOKENS, **BATCH, "towers.user.kind": "text", "objectives.bce.weight": 0.5},
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def mesh_of(shape):
    sizes = dict(zip(mesh_lib.AXES, shape, strict=True))
    return mesh_lib.make_mesh(sizes, devices=jax.devices()[: int(np.prod(shape))])


def start(task, mesh):
    """The step on a mesh, its state and constants, as the loop makes them."""
    tx = optimizer_lib.make_optimizer(task.optimizer)
    _, shardings = loop.state_shardings(task, mesh)
    create = jax.jit(lambda p: state_lib.create(jax.tree.map(jnp.copy, p), tx, seed=0), out_shardings=shardings)
    state = create(mesh_lib.put(task.params, shardings.params))
    return step_lib.make_train_step(task.spec, tx, mesh, shardings), state, mesh_lib.put(task.constants, mesh_lib.replicated(mesh))


def first_gradients(task, mesh):
    """Loss and gradients of the first batch, as the step has them."""
    _, shardings = loop.state_shardings(task, mesh)
    batch = mesh_lib.to_global(next(iter(task.batches)), mesh)
    constants, key = mesh_lib.put(task.constants, mesh_lib.replicated(mesh)), jax.random.key(0)
    gradients = jax.value_and_grad(lambda p: step_lib.loss_and_metrics(p, task.spec, batch, constants, key)[0])
    with jax.set_mesh(mesh):
        loss, found = jax.jit(gradients, out_shardings=(None, shardings.params))(mesh_lib.put(task.params, shardings.params))
    return float(loss), jax.device_get(found)


def losses(task, mesh, steps):
    step, state, constants = start(task, mesh)
    iterator, out = iter(task.batches), []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = step(state, mesh_lib.to_global(next(iterator), mesh), constants)
            out.append(float(metrics["loss"]))
    return out


@functools.cache
def on_one_device(world, folder):
    task = tiny.task(tiny.config(**WORLDS[world]), folder)
    return first_gradients(task, tiny.one_device()), losses(task, tiny.one_device(), 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


QUICK = {("tokens_batch", "2x2x2")}  # step_test has the catalogue on eight devices
PAIRS = [pytest.param(w, m, marks=() if (w, m) in QUICK else pytest.mark.slow) for w in WORLDS for m in MESHES]


@pytest.mark.parametrize(("world", "shape"), PAIRS)
def test_a_mesh_trains_as_one_device_does(world, shape, folder):
    (loss, gradients), expected = on_one_device(world, folder)
    mesh = mesh_of(MESHES[shape])
    task = tiny.task(tiny.config(**WORLDS[world]), folder, mesh=mesh)
    loss_here, gradients_here = first_gradients(task, mesh)
    assert loss_here == pytest.approx(loss, rel=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_here), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(losses(task, mesh, 20), expected, rtol=1e-4)
    assert expected[-1] < expected[0]


def shapes_of(config, n_items):
    """A stage's task of shapes alone, with an encoder of the size of MiniLM-L6 or a student of it: no array is made."""
    t = config.towers.text
    layers = 6 if t.layers < 0 else t.layers
    text = towers.BertSpec(vocab_size=30522, width=384, layers=layers, heads=12, mlp_width=1536, max_positions=512)
    tasks, per_row = int(config.objectives.task.weight > 0), texts_per_row(config.batch.row_tokens)
    tower = two_tower.make_spec(config.towers, text, texts_per_row=per_row, n_items=n_items, tasks=tasks)
    step = stages.make_step(config, tower, stages.batch_spec(config), teacher=tower)
    o = config.optimizer
    optimizer = optimizer_lib.OptimizerSpec(
        learning_rate=o.learning_rate, schedule=o.schedule, warmup=1, total=10, final=o.final, beta1=o.beta1, beta2=o.beta2,
        weight_decay=o.weight_decay, no_decay=o.no_decay, freeze=o.freeze, scale=o.scale, clip=o.clip, accumulate=o.accumulate,
    )  # fmt: skip
    text_params = jax.eval_shape(lambda k: init_text(k, text), jax.random.key(0))
    params = jax.eval_shape(lambda t: stages.fresh(config, step, t, None), text_params)
    rules = mesh_lib.rules_of("sharded", config.mesh.rules)
    spec = loop.LoopSpec(total=10, log_every=1, eval_every=1, checkpoint_every=1, monitor="", patience=0, prefetch=1, seed=0)
    return loop.Task("", None, step, spec, optimizer, params, None, None, rules, None)


# Golden -> config file, stage, items, overrides.
STAGES = {
    **{f"movielens_{stage}": ("movielens", stage, 9724, ()) for stage in ("pretrain", "contrastive", "task", "distill")},
    "sequences": ("sequences", "", 12101, ()),
    "sequences_moco": (
        "sequences",
        "",
        12101,
        (
            ("objectives.info_nce.candidates", "batch"),
            ("objectives.info_nce.neighbour_share", "0"),
            ("objectives.info_nce.mask_history", "False"),
            ("objectives.info_nce.queue", "8192"),
            ("objectives.info_nce.momentum", "0.999"),
            ("towers.text.source", "tokens"),
        ),
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_where_each_array_lies_is_the_golden_text(name, update_goldens):
    file, stage, n_items, overrides = STAGES[name]
    config = config_lib.load(f"{ROOT}/configs/{file}.py", overrides)
    config = config_lib.for_stage(config, stage) if stage else config
    mesh = mesh_of((2, 2, 2))
    shapes, placed = loop.state_shardings(shapes_of(config, n_items), mesh)
    lines = [f"mesh {', '.join(f'{a}={n}' for a, n in mesh.shape.items())}; layout sharded; name, shape, spec, shape on each device"]
    for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True):
        lines.append(f"{mesh_lib.path_name(path)} {x.shape} {tuple(s.spec)} {s.shard_shape(x.shape)}")
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    lines.append(f"bytes {whole:,}, on each device {mesh_lib.bytes_per_device(shapes, placed):,}")
    text, golden = "\n".join(lines) + "\n", GOLDENS / f"{name}.txt"
    if update_goldens:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.is_file(), f"{golden} is missing: run pytest tests/meshes_test.py --update_goldens, and read the diff"
    assert text == golden.read_text(), "where parameters lie changed: if meant, run this test with --update_goldens, and read the diff"


def test_optimizer_state_is_an_eighth_on_eight_devices():
    config = config_lib.for_stage(config_lib.load(f"{ROOT}/configs/movielens.py"), "pretrain")
    shapes, placed = loop.state_shardings(shapes_of(config, 9724), mesh_of((1, 8, 1)))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.opt_state))
    assert mesh_lib.bytes_per_device(shapes.opt_state, placed.opt_state) <= whole / 7


def collectives(text):
    return [line.strip() for line in text.splitlines() if re.search(rf"= .* ({'|'.join(COLLECTIVES)})(-start)?\(", line)]


@pytest.mark.parametrize("shape", MESHES)
def test_looking_up_vectors_sends_nothing(shape):
    mesh = mesh_of(MESHES[shape])
    here = mesh_lib.batch_sharding(mesh)
    vectors, places = jax.ShapeDtypeStruct((8, 32, 16), jnp.float32), jax.ShapeDtypeStruct((8, 4, 10), jnp.int32)

    def loss(vectors, places):
        return batches._lookup(vectors, places)

    def gradient(vectors, places):
        return jax.vjp(lambda v: batches._lookup(v, places), vectors)[1](jnp.ones((8, 4, 10, 16)))[0]

    for function in (loss, gradient):
        compiled = jax.jit(function, in_shardings=(here, here), out_shardings=here).lower(vectors, places).compile()
        assert collectives(compiled.as_text()) == []
    flat = jax.jit(lambda v, i: jnp.take(v.reshape(-1, 16), i, axis=0), in_shardings=(here, here), out_shardings=here)
    assert collectives(flat.lower(vectors, places).compile().as_text()), "the test sees no collective where there must be one"


def compiled_step(world, shape, folder):
    mesh = mesh_of(MESHES[shape])
    task = tiny.task(tiny.config(**WORLDS[world]), folder, mesh=mesh)
    step, state, constants = start(task, mesh)
    with jax.set_mesh(mesh):
        return task, step.lower(state, mesh_lib.to_global(next(iter(task.batches)), mesh), constants).compile().as_text()


def test_with_whole_parameters_only_sums_are_sent(folder):
    """Data parallelism of a frozen encoder against the catalogue: gradients and metrics are summed, nothing else moves."""
    _, text = compiled_step("frozen_catalogue", "8x1x1", folder)
    assert {re.search(rf"({'|'.join(COLLECTIVES)})", line).group() for line in collectives(text)} == {"all-reduce"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.layout": "none"}, r"no rule of config.mesh.rules matches ids/embedding \(256, 8\)"),
        ({"mesh.layout": "none", "mesh.rules": ((".*", ("fsdp",)),)}, r"does not divide into 4 parts along fsdp; add a spec"),
        ({"mesh.layout": "pretty"}, r"config.mesh.layout='pretty': expected one of replicated, sharded, none"),
        ({"mesh.rules": ((".*", ("model",)),)}, r"config.mesh.rules\[0\]=.* names the axis 'model'; the mesh has data, fsdp, tensor"),
        ({"mesh.rules": (("(", ()),)}, r"is no regular expression"),
        ({"mesh.rules": (("ids.*",),)}, r"expected \(regex, spec\)"),
        ({"batch.shards": 6}, r"batch.shards=6 does not divide over 8 devices"),
    ],
)
def test_bad_meshes_are_refused_before_anything_is_compiled(changes, message):
    c = tiny.config(**{"towers.item.ids": True, **changes})
    tower = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=4, n_items=tiny.N_ITEMS)
    with pytest.raises(RecJaxError, match=message):
        stages.check(c, tower, None, mesh_of((2, 4, 1)))


def test_sizes_that_nothing_divides_fall_back_by_the_rule():
    mesh = mesh_of((1, 8, 1))
    shapes = {"text": {"embeddings": {"word": {"embedding": jax.ShapeDtypeStruct((30522, 384), jnp.float32)}}}}
    (placed,) = jax.tree.leaves(mesh_lib.shardings(shapes, mesh_lib.SHARDED, mesh))
    assert placed.spec == PartitionSpec(None, ("fsdp", "tensor")), "30,522 rows do not divide by 8, 384 columns do"


class Killed(Exception):
    pass


def train(folder, mesh, upto=None, **changes):
    """Trains 8 steps with a checkpoint every 2; `upto`: killed at the validation of that step -> losses by step."""

    def evaluate(params, *, step):
        if step == upto:
            raise Killed
        return {"valid/ndcg@10": 0.1 * step}

    cadence = {
        "train.duration": "8 steps",
        "train.log_every": "1 steps",
        "train.eval_every": "2 steps",
        "train.checkpoint_every": "2 steps",
    }
    task = tiny.task(tiny.config(**IDS, **cadence, **changes), folder, mesh=mesh, evaluate=evaluate)
    if upto is None:
        loop.train(task, mesh)
        return [row["train/loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row]
    with pytest.raises(Killed):
        loop.train(task, mesh)
    return []


@pytest.mark.slow
def test_a_run_goes_on_on_eight_four_one_and_two_devices(tmp_path):
    expected = train(tmp_path / "whole", tiny.one_device())
    for upto, shape in ((4, (2, 2, 2)), (6, (1, 4, 1)), (8, (1, 1, 1)), (None, (1, 2, 1))):
        found = train(tmp_path / "parts", mesh_of(shape), upto)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
