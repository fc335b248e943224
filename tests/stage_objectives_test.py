"""Objectives of pre-training, of the task and of distillation in a real step: each learns, and each says what it needs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath

from rec_jax import mesh as mesh_lib
from rec_jax.data.augment import Corruption, Deletion, Masking, Words
from rec_jax.data.impression_batches import ImpressionBatches
from rec_jax.data.impressions import Impressions
from rec_jax.data.packing import texts_per_row
from rec_jax.data.text_batches import held_out_batches
from rec_jax.towers import two_tower
from rec_jax.towers.bert import init as init_text
from rec_jax.train import held_out, loop, stages
from rec_jax.train.forwards import StepSpec
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import RecJaxError

OFF = {"objectives.info_nce.weight": 0.0}
WORDS = Words(tiny.VOCAB, mask_id=3, special_ids=(0, 1, 2, 3), continues=np.zeros(tiny.VOCAB, bool))


@functools.partial(jax.jit, static_argnums=1)
def loss_of(params, spec, batch, constants):
    """-> (loss, metrics) without dropout."""
    return loss_and_metrics(params, spec, batch, constants, None)


def spec_of(c, *, encode=None, tasks=0, context=(), n_users=0):
    spec = two_tower.make_spec(
        c.towers,
        tiny.bert_spec(dropout=c.towers.text.dropout),
        texts_per_row=texts_per_row(c.batch.row_tokens),
        n_items=tiny.N_ITEMS,
        n_users=n_users,
        tasks=tasks,
        context=context,
    )
    return spec if encode is None else two_tower.with_encoder(spec, encode)


def overfit(task, steps=150, rate=3e-2, key=None):
    """Adam on one batch -> losses before and after."""
    batch = next(iter(task.batches))
    tx = optax.adam(rate)

    @jax.jit
    def step(params, state):
        (loss, _), grads = jax.value_and_grad(lambda p: loss_and_metrics(p, task.spec, batch, task.constants, key), has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = task.params, tx.init(task.params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses[0], losses[-1]


# -- texts alone --


def text_task(tmp_path, **changes):
    c = tiny.config(**{"batch.kind": "texts", "batch.shards": 1, "batch.text_rows": 4, "towers.text.source": "tokens", **OFF, **changes})
    text = init_text(jax.random.key(1), tiny.bert_spec())
    rows = np.arange(tiny.N_ITEMS)
    o = c.objectives
    masking = Masking(o.mlm.rate) if o.mlm.weight else None
    corruption = Corruption(WORDS, masking, Deletion(o.denoise.rate) if o.denoise.weight else None)
    inputs = stages.Inputs(tiny.World(), tiny.tokens(), spec_of(c), text, corpus=(tiny.tokens(), rows[8:], rows[:8]), corruption=corruption)
    batches = stages.make_batches(c, inputs, tiny.one_device())
    make = lambda: held_out_batches(tiny.tokens(), rows[:8], stages.batch_spec(c), seed=0, corruption=corruption)
    measure = held_out.HeldOut(stages.step_of(c, inputs), stages.no_constants(), make)
    return stages.make_task(c, "pretrain", epath.Path(tmp_path), inputs, batches, tiny.one_device(), measure)


@pytest.mark.parametrize("name", ["mlm", "denoise"])
def test_hidden_and_deleted_words_of_a_batch_can_be_learned_by_heart(tmp_path, name):
    before, after = overfit(text_task(tmp_path, **{f"objectives.{name}.weight": 1.0}), steps=200, rate=1e-2)
    assert before == pytest.approx(np.log(tiny.VOCAB), rel=0.1)  # at random every word is as likely
    assert after < 0.1


def test_masked_loss_is_the_mean_over_hidden_words(tmp_path):
    task = text_task(tmp_path, **{"objectives.mlm.weight": 1.0})
    batch = next(iter(task.batches))
    loss, _ = loss_of(task.params, task.spec, batch, task.constants)
    params, losses = task.params, []
    from rec_jax.towers import bert, pretraining

    hidden = bert(params["text"], task.spec.towers.text, batch.masked_tokens[0], batch.item_segments[0])
    made = pretraining.masked_hidden(params["mlm"], task.spec.towers.text, hidden[None], batch.masked_places)[0]
    table = np.asarray(pretraining.word_table(params["text"]), np.float64)
    for vector, place in zip(np.asarray(made, np.float64), batch.masked_places[0], strict=True):
        if place >= 0:
            logits = table @ vector + np.asarray(params["mlm"]["bias"])
            losses.append(np.log(np.exp(logits).sum()) - logits[batch.item_tokens[0].reshape(-1)[place]])
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_stage_on_texts_trains_and_measures_held_out_texts(tmp_path):
    changes = {"objectives.mlm.weight": 1.0, "objectives.simcse.weight": 0.5, "towers.text.dropout": 0.1}
    task = text_task(tmp_path, **changes, **{"train.monitor": "valid/mlm", "train.monitor_goal": "min"})
    progress = loop.train(task, tiny.one_device())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in lines if "valid/mlm" in row]
    assert [row["step"] for row in valid] == [10, 20]
    assert valid[1]["valid/perplexity"] == pytest.approx(np.exp(valid[1]["valid/mlm"]))
    assert progress.best == min(row["valid/mlm"] for row in valid)
    assert 0 <= valid[0]["valid/masked_accuracy"] <= 1
    assert task.evaluate(task.params, step=0) == task.evaluate(task.params, step=0)


# -- the task --


@pytest.mark.parametrize("loss", ["bce", "bpr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("margin", "softmax"))])
def test_the_next_item_is_ranked_above_drawn_ones(tmp_path, loss):
    c = tiny.config(**{"batch.shards": 1, "objectives.task.weight": 1.0, "objectives.task.loss": loss, "towers.item.ids": True, **OFF})
    spec = spec_of(c, tasks=1)
    world = tiny.World()
    inputs = stages.Inputs(world, tiny.tokens(), spec, {}, tiny.table())
    task = stages.make_task(c, "", epath.Path(tmp_path), inputs, stages.make_batches(c, inputs, tiny.one_device()), tiny.one_device(), None)
    before, after = overfit(task, steps=200)
    assert after < 0.2 * before


def impressions(labels=1, rows=64):
    """64 impressions of 8 users and 8 items each, whose labels depend on user, item and context alone."""
    random = np.random.default_rng(0)
    user, item = np.divmod(np.arange(rows, dtype=np.int32), 8)
    context = random.integers(0, 3, (rows, 1), dtype=np.int32)
    observed = random.integers(0, 2, (rows, labels)).astype(np.float32)
    if labels > 1:
        observed[::5, 1] = np.nan
    return Impressions(
        user, item, context, observed, np.full(rows, 0.5, np.float32), np.arange(rows), {"day": ("a", "b", "c")},
        tuple(f"task{n}" for n in range(labels)),
    )  # fmt: skip


class LabelledWorld(tiny.World):
    def __init__(self, labels):
        super().__init__()
        self._shown = impressions(labels)

    def impressions(self, split):
        return self._shown


def labelled_task(tmp_path, labels, **changes):
    base = {"batch.kind": "impressions", "batch.shards": 1, "batch.impressions": 64, "towers.user.kind": "id", "towers.item.ids": True}
    c = tiny.config(**{**base, **OFF, **changes})
    inputs = stages.Inputs(LabelledWorld(labels), tiny.tokens(), spec_of(c, tasks=labels, context=(3,), n_users=40), {}, tiny.table())
    batches = stages.make_batches(c, inputs, tiny.one_device())
    assert isinstance(batches, ImpressionBatches)
    return stages.make_task(c, "", epath.Path(tmp_path), inputs, batches, tiny.one_device(), None)


@pytest.mark.parametrize(
    ("kind", "sharing", "labels", "changes"),
    [
        ("mlp", "bottom", 1, {}),
        pytest.param("dcn", "bottom", 1, {}, marks=pytest.mark.slow),
        pytest.param("mlp", "bottom", 2, {}, marks=pytest.mark.slow),
        ("mlp", "mmoe", 2, {}),
        ("dcn", "ple", 2, {}),
        ("mlp", "bottom", 1, {"objectives.task.loss": "regression"}),
    ],
)
def test_every_head_and_task_mix_learns_64_impressions_by_heart(tmp_path, kind, sharing, labels, changes):
    heads = {"towers.task.kind": kind, "towers.task.sharing": sharing, "towers.task.hidden": (32,), "towers.task.tower": (16,)}
    task = labelled_task(tmp_path, labels, **{"objectives.task.weight": 1.0, **heads, **changes})
    _, after = overfit(task, steps=300, rate=1e-2)
    assert after < 0.02 * labels


def test_learned_task_weights_follow_the_losses(tmp_path):
    task = labelled_task(tmp_path, 2, **{"objectives.task.weight": 1.0, "objectives.task.uncertainty": True})
    assert {"task_log_variance_0", "task_log_variance_1"} <= set(task.params["scalars"])
    batch = next(iter(task.batches))
    loss, metrics = loss_of(task.params, task.spec, batch, task.constants)
    assert float(loss) == pytest.approx(float(metrics["task_0"] + metrics["task_1"]), rel=1e-5)  # log variances begin at 0


def test_policy_gradient_raises_the_rewarded_and_lowers_no_other_more(tmp_path):
    task = labelled_task(tmp_path, 1, **{"objectives.policy.weight": 1.0, "objectives.policy.cap": 0.0})
    batch = next(iter(task.batches))
    gradient = jax.grad(lambda p: loss_of(p, task.spec, batch, task.constants)[0])(task.params)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, task.params, gradient)

    def value(p):
        users = np.asarray(p["users"]["embedding"])[:8]
        users = users / np.linalg.norm(users, axis=1, keepdims=True)
        items = np.asarray(two_tower.item_vectors(p, task.spec.towers, tiny.table()))
        logits = users @ items.T / 0.1
        policy = np.exp(logits - logits.max(1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        reward = impressions().labels[:, 0].reshape(8, 8)
        return float((policy[:, :8] * reward).sum(1).mean())

    assert value(params) > value(task.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.mlm.weight": 1.0}, "config.objectives.mlm needs config.batch.kind='texts'; it is 'histories'"),
        ({"objectives.policy.weight": 1.0}, "config.objectives.policy needs logged feedback: config.batch.kind='impressions'"),
        ({"objectives.distill_kl.weight": 1.0}, "config.objectives.distill_kl needs a teacher: set config.teacher.path"),
        ({"objectives.task.weight": 1.0, "objectives.task.loss": "hinge"}, "config.objectives.task.loss='hinge': expected one of"),
        ({"objectives.task.weight": 1.0, "objectives.task.loss": "regression"}, "are for labels: set config.batch.kind='impressions'"),
        ({"objectives.task.weight": 1.0, "objectives.task.negative_rate": 0.0}, "negative_rate=0.0: must be above 0"),
        ({"optimizer.layer_decay": 1.5}, "config.optimizer.layer_decay=1.5: must be above 0 and at most 1"),
    ],
)
def test_what_an_objective_needs_is_said(tmp_path, changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.task(tiny.config(**changes), tmp_path)


def test_texts_alone_refuse_what_needs_users():
    c = tiny.config(**{"batch.kind": "texts", "towers.text.source": "tokens", "objectives.mlm.weight": 1.0})
    with pytest.raises(RecJaxError, match="config.objectives.info_nce needs users"):
        stages.make_step(c, spec_of(c), stages.batch_spec(c))


def test_layers_of_the_encoder_slow_down_towards_the_embeddings():
    assert stages.layer_scales(1.0, 6) == ()
    assert stages.layer_scales(0.5, 2) == ((r"text/layer_0/.*", 0.5), (r"text/layer_1/.*", 1.0), ("text/embeddings/.*", 0.25))


# -- distillation --


def distilled(tmp_path, *, student=None, source="stored", **changes):
    """A student's task whose teacher is another model of the same sizes; `student`: its parameters."""
    c = tiny.config(**{"batch.shards": 2, "towers.text.source": "tokens", "objectives.info_nce.candidates": "batch", **changes})
    text = init_text(jax.random.key(1), tiny.bert_spec())
    taught = spec_of(c, encode=source == "online")
    params = two_tower.init(jax.random.key(7), spec_of(c, encode=True), text_params=text)
    params["scalars"] = {"info_nce_log_temperature": jnp.log(0.07)}
    vectors = np.asarray(text_table(text))
    arrays = {"params": params if source == "online" else {k: v for k, v in params.items() if k != "text"}, "table": vectors}
    inputs = stages.Inputs(
        tiny.World(), tiny.tokens(), spec_of(c), text, vectors, student and student(params), teacher=taught, teacher_arrays=arrays
    )
    batches = stages.make_batches(c, inputs, tiny.one_device())
    return stages.make_task(c, "", epath.Path(tmp_path), inputs, batches, tiny.one_device(), None)


def text_table(text, layers=2):
    from rec_jax.towers import encode_texts

    tokens = tiny.tokens()
    rows = np.zeros((tiny.N_ITEMS, int(tokens.lengths().max())), np.int32)
    for n in range(tiny.N_ITEMS):
        rows[n, : len(tokens[n])] = tokens[n]
    return encode_texts(text, tiny.bert_spec(layers=layers), rows, np.arange(rows.shape[1]) < tokens.lengths()[:, None])


DISTILL = {
    "distill_kl": {},
    "distill_margin": {"objectives.distill_margin.uniform": 16},
    "distill_vectors": {},
    "distill_relations": {},
    "distill_layers": {},
}
SLOW = ("distill_margin", "distill_vectors", "distill_rank", "distill_layers")  # by hand: what they test is like the others


def each(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("name", each(DISTILL))
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path, name):
    source = "online" if name == "distill_layers" else "stored"
    changes = {**OFF, f"objectives.{name}.weight": 1.0, **DISTILL[name]}
    scale = {"objectives.distill_kl.scale": float(1 / 0.07)}
    same = distilled(tmp_path, student=lambda params: params, source=source, **changes, **scale)
    other = distilled(tmp_path, source=source, **changes, **scale)
    batch = next(iter(same.batches))
    losses = [float(loss_of(t.params, t.spec, batch, t.constants)[0]) for t in (same, other)]
    # Items that are in both shards differ by rounding alone, and so the angles at them are any.
    assert losses[0] == pytest.approx(0.0, abs=2e-3 if name == "distill_relations" else 2e-5)
    if name != "distill_layers":  # there the encoder is the teacher's from the start
        assert losses[1] > 1e-3


@pytest.mark.parametrize("name", each(["distill_kl", "distill_rank", "distill_margin"]))
def test_a_student_comes_nearer_to_its_teacher(tmp_path, name):
    scale = {"objectives.distill_kl.scale": 14.0}
    task = distilled(tmp_path, **{**OFF, f"objectives.{name}.weight": 1.0, **scale})
    before, after = overfit(task, steps=60, rate=1e-2)
    assert after < before * (0.75 if name == "distill_rank" else 0.7)  # the order of equally good items has a cost that stays


def test_a_teacher_online_and_one_on_disk_teach_the_same(tmp_path):
    changes = {**OFF, "objectives.distill_kl.weight": 1.0, "objectives.distill_vectors.weight": 1.0, "objectives.distill_kl.scale": 14.0}
    tasks = [distilled(tmp_path, source=source, **changes) for source in ("online", "stored")]
    batch = next(iter(tasks[0].batches))
    values = [jax.jit(jax.value_and_grad(lambda p, t=t: loss_of(p, t.spec, batch, t.constants)[0]))(tasks[0].params) for t in tasks]
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(g) for _, g in values), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(jnp.abs(b).max()))


def test_every_item_encoded_in_the_step_gives_what_a_fresh_table_gives(tmp_path):
    changes = {"objectives.info_nce.candidates": "catalogue"}
    anew = distilled(tmp_path, **changes, **{"towers.text.catalogue": "step"})
    found = distilled(tmp_path, **changes)
    batch = next(iter(anew.batches))
    losses = [float(loss_of(anew.params, anew.spec, batch, t.constants)[0]) for t in (anew, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradient = jax.grad(lambda p: loss_of(p, anew.spec, batch, anew.constants)[0])(anew.params)
    assert float(jnp.abs(gradient["text"]["layer_0"]["mlp"]["up"]["kernel"]).max()) > 0


def test_adapters_alone_move_and_are_part_of_every_forward(tmp_path):
    lora = {"towers.text.lora.rank": 2, "optimizer.freeze": ("text/.*",)}
    task = distilled(tmp_path, **lora)
    progress = loop.train(dataclasses.replace(task, evaluate=lambda params, *, step: {"valid/ndcg@10": float(step)}), tiny.one_device())
    assert progress.best_step == task.loop.total
    from rec_jax.eval.workdir import best_params

    params, _ = best_params(epath.Path(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params["text"], jax.device_get(task.params["text"]))
    assert any(
        np.abs(leaf).max() > 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["lora"])
        if mesh_lib.path_name(path).endswith("/b")
    )
    merged = two_tower.merged(params, task.spec.towers)
    batch = next(iter(task.batches))
    plain = dataclasses.replace(task.spec, towers=two_tower.with_encoder(task.spec.towers, True))
    assert isinstance(plain, StepSpec)
    losses = [float(loss_of(p, s, batch, task.constants)[0]) for p, s in ((params, task.spec), (merged, plain))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_student_begins_with_its_teachers_vectors_of_known_items(tmp_path):
    """Its encoder is another one: half as many layers. The head takes what it can from it, the items' own vectors the rest."""
    distil = {"objectives.distill_kl.weight": 1.0, "objectives.distill_kl.scale": 14.0}
    c = tiny.config(**{"batch.shards": 2, "towers.text.layers": 1, "towers.item.ids": True, **OFF, **distil})
    text, student = (init_text(jax.random.key(1), tiny.bert_spec(layers=n)) for n in (2, 1))
    spec = spec_of(c)
    taught = two_tower.init(jax.random.key(7), spec)
    taught["ids"] = {"embedding": jax.random.normal(jax.random.key(8), taught["ids"]["embedding"].shape)}
    vectors, others = np.asarray(text_table(text)), np.asarray(text_table(student, layers=1))
    arrays = {"params": taught, "table": vectors}
    inputs = stages.Inputs(tiny.World(), tiny.tokens(), spec, student, others, taught, teacher=spec, teacher_arrays=arrays)
    params = stages.make_params(c, stages.step_of(c, inputs), inputs)
    here, there = two_tower.item_vectors(params, spec, others), two_tower.item_vectors(taught, spec, vectors)
    np.testing.assert_allclose(here, there, atol=1e-4)
    assert np.abs(np.asarray(params["ids"]["embedding"] - taught["ids"]["embedding"])).max() > 1e-4
    jax.tree.map(np.testing.assert_array_equal, params["user"], taught["user"])


def test_preferences_begin_at_the_teachers_and_need_mined_negatives(tmp_path):
    # A weight next to nothing: the temperature that scores are divided by is info_nce's, and begins as the teacher's.
    changes = {"objectives.info_nce.weight": 1e-9, "objectives.preference.weight": 1.0, "objectives.preference.beta": 0.5}
    task = distilled(tmp_path, student=lambda params: params, **changes)
    batch = next(iter(task.batches))
    with pytest.raises(RecJaxError, match="batches have no mined negatives: set config.data.negatives"):
        loss_of(task.params, task.spec, batch, task.constants)
    batch.negatives = np.random.default_rng(0).integers(0, 5, (*batch.targets.shape, 3), dtype=np.int32)
    loss, _ = loss_of(task.params, task.spec, batch, task.constants)
    assert float(loss) == pytest.approx(np.log(4), rel=1e-4)  # as likely as each of three others, at the reference
    other = distilled(tmp_path, **changes)
    assert float(loss_of(other.params, other.spec, batch, other.constants)[0]) != pytest.approx(np.log(4), rel=1e-3)
