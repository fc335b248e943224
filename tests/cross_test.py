"""The cross-encoder's objective, and what it is measured by: pairs that are drawn, and rankings that it ranks anew."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from stage_objectives_test import overfit

from rec_jax import config as config_lib
from rec_jax.data.packing import texts_per_row
from rec_jax.data.pair_batches import pair_text, written_out
from rec_jax.eval import cross, rankings
from rec_jax.eval import model as model_lib
from rec_jax.towers import two_tower
from rec_jax.towers.batches import encode_pairs
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.interactions import cross_scores
from rec_jax.train import loop, stages
from rec_jax.train.objectives import cross as objective
from rec_jax.types import Batch, Context, EvalSet, Outputs, Ragged, RecJaxError

PAIRS = {
    "batch.kind": "pairs",
    "batch.row_tokens": 32,
    "batch.text_rows": 8,
    "batch.max_items": 16,
    "batch.pair_negatives": 3,
    "batch.user_history": 2,
    "data.text.max_tokens": 16,
    "towers.text.source": "tokens",
    "objectives.info_nce.weight": 0.0,
    "objectives.cross.weight": 1.0,
    "train.monitor": "valid/pair_mrr",
}


class World(tiny.World):
    """With the sets that evaluation asks for."""

    def eval_set(self, split):
        last = {"valid": -2, "test": -1}[split]
        history = [r["items"][:last] for r in self._records]
        targets = [r["items"][last : len(r["items"]) + last + 1] for r in self._records]
        return EvalSet(np.arange(self.n_users), Ragged.from_rows(history), Ragged.from_rows(targets), self.n_items)

    def train_histories(self):
        return Ragged.from_rows([r["items"][r["splits"] == 0] for r in self._records])


def towers_of(c, dropout=0.0):
    bert = tiny.bert_spec(layers=1, dropout=dropout)
    return two_tower.make_spec(c.towers, bert, texts_per_row=texts_per_row(c.batch.row_tokens), n_items=tiny.N_ITEMS)


def pair_task(folder, mesh=None, dropout=0.0, **changes):
    c = tiny.config(**{**PAIRS, "towers.text.dropout": dropout, **changes})
    spec, mesh = towers_of(c, dropout), mesh or tiny.one_device()
    inputs = stages.Inputs(World(), tiny.tokens(), spec, init_text(jax.random.key(1), spec.text))
    batches = stages.make_batches(c, inputs, mesh)
    measured = cross.CrossEncoder(c, World(), tiny.tokens(), spec)
    return stages.make_task(c, "", epath.Path(folder), inputs, batches, mesh, measured.validate), measured


# -- the objective --


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_loss_against_numpy(loss, smoothing):
    random = np.random.default_rng(0)
    logits, weights = random.normal(size=(2, 3, 4)) * 3, np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    want, right = [], []
    for row in logits[weights > 0]:
        goal = np.where(np.arange(4) == 0, 1 - smoothing, 0) + (smoothing / 4 if loss == "softmax" else 0)
        if loss == "softmax":
            want.append(-(goal * (row - np.logaddexp.reduce(row))).sum())
        else:
            label = (np.arange(4) == 0) * (1 - smoothing) + smoothing / 2
            want.append((label * np.logaddexp(0, -row) + (1 - label) * np.logaddexp(0, row)).mean())
        right.append(row[0] > row[1:].max())
    batch = Batch(None, None, weights, None)
    out = Outputs(pairs=jnp.asarray(logits, jnp.float32))
    context = Context(scalars={}, log_q=None, rng=None)
    made, metrics = objective.cross(out, batch, context, objective.CrossSpec(loss, smoothing))
    assert float(made) == pytest.approx(np.mean(want), rel=1e-5)
    assert float(metrics["pair_accuracy"]) == pytest.approx(np.mean(right))


def test_logits_of_a_batch_are_those_of_its_pairs_alone(tmp_path):
    task, measured = pair_task(tmp_path)
    batch, spec = next(iter(task.batches)), task.spec.towers
    out = jax.jit(functools.partial(encode_pairs, spec=spec, keys=None))(task.params, batch=batch)
    assert out.pairs.shape == (8, 4, 4)
    records, room = tiny.records(), task.batches.room
    examples = np.argwhere(batch.examples >= 0)[::7]
    for g, n in examples:
        ids = batch.item_ids[g, 4 * n : 4 * n + 4]
        row, segment = divmod(int(batch.item_places[g, 4 * n]), 4)
        mine = (batch.item_segments[g, row] == segment + 1) & (batch.item_types[g, row] == 0)
        user = batch.item_tokens[g, row][mine]
        items = records[batch.examples[g, n]]["items"]
        text = lambda cut, items=items: written_out(tiny.tokens(), items[:cut], 2, room)
        cuts = [cut for cut in range(1, len(items) - 2) if items[cut] == ids[0] and np.array_equal(text(cut), user)]
        alone = measured.scores(task.params, [items[: cuts[0]]], ids[None])
        np.testing.assert_allclose(out.pairs[g, n], alone[0], atol=1e-5)


def test_token_types_reach_the_encoder_where_it_has_them(tmp_path):
    task, _ = pair_task(tmp_path)
    tokens, types = pair_text(np.array([1, 5, 2]), np.array([1, 7, 2]))
    inputs = tokens[None], np.ones((1, 5), np.int32)

    def score(spec, types, text=task.params["text"]):
        return float(cross_scores(task.params["cross"], text, spec, *inputs, types=types, texts_per_row=1)[0, 0])

    two = task.spec.towers.text
    assert score(two, types[None]) != score(two, None)
    assert score(two, np.zeros((1, 5), np.int32)) == score(two, None)
    text = task.params["text"]
    one = {**text, "embeddings": {**text["embeddings"], "token_type": {"embedding": text["embeddings"]["token_type"]["embedding"][:1]}}}
    assert score(dataclasses.replace(two, type_vocab=1), types[None], one) == score(two, None)


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_64_pairs_are_learned_by_heart(tmp_path, loss):
    task, _ = pair_task(tmp_path, **{"batch.shards": 1, "batch.max_items": 64, "batch.text_rows": 64, "objectives.cross.loss": loss})
    assert (next(iter(task.batches)).item_ids >= 0).sum() == 64
    before, after = overfit(task, steps=150, rate=1e-2)
    assert before == pytest.approx(np.log(4) if loss == "softmax" else np.log(2), rel=0.1)
    assert after < 0.02


def test_eight_devices_have_the_loss_and_gradient_of_one(tmp_path):
    task, _ = pair_task(tmp_path, dropout=0.1)
    assert np.abs(tiny.gradient_of_one_device_and_eight(task)["cross"]["out"]["kernel"]).max() > 0


def test_a_stage_trains_and_measures_drawn_pairs(tmp_path):
    task, measured = pair_task(tmp_path, **{"eval.max_users": 10, "batch.shards": 2})
    loop.train(task, tiny.one_device())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if "valid/pair_mrr" in row]
    assert [row["step"] for row in valid] == [10, 20]
    assert all(0 <= row["valid/pair_accuracy"] <= row["valid/pair_mrr"] <= 1 for row in valid)
    assert any("train/cross" in row for row in rows)
    assert measured.measure(task.params, "test") == measured.measure(task.params, "test")


# -- ranking anew --


def test_new_ranks_by_hand():
    ids, scores = np.array([7, 3, 9, 4, -1]), np.array([0.5, 2.0, 0.5, 1.0, -np.inf], np.float32)
    ranks = lambda targets, old: cross.new_ranks(ids, scores, np.array(targets), np.array(old, np.int32)).tolist()
    assert ranks([3], [2]) == [1]
    assert ranks([7], [1]) == [4]  # as high as item 9, which counts against it
    assert ranks([8], [17]) == [17]  # not among the best
    assert ranks([9, 7, 9], [3, 1, 0]) == [3, 4, 0]  # of two equal targets the first goes first; one that stands twice counts once


@pytest.mark.parametrize("first", ["popularity", "model"])
def test_the_best_are_ranked_anew_and_the_others_stay_behind(tmp_path, first, monkeypatch):
    n, ks = 8, (5, 10)
    _, measured = pair_task(tmp_path, **{"eval.rerank": n, "eval.k": ks})
    world, c = World(), measured.config
    table = np.random.default_rng(0).normal(size=(tiny.N_USERS, tiny.N_ITEMS)).astype(np.float32)
    if first == "model":

        class Stage:
            prepared = world

            def rank(self, params, eval_set, *, name, items, ks, exclude):
                scorer = lambda histories: np.stack([table[int(h[0]) % tiny.N_USERS] for h in histories])
                return rankings.evaluate_scores(scorer, eval_set, ks=ks, name=name, exclude=exclude)

        monkeypatch.setattr(cross, "load", lambda *_, **__: model_lib.Trained(Stage(), {}, 0, None))
    before = None if first == "popularity" else "contrastive"
    best = cross.first_rankings(c, world, tmp_path, before, "test", lambda _: None)
    scores = lambda params, histories, candidates: np.where(candidates >= 0, (candidates * 7919) % 101, -np.inf).astype(np.float32)
    monkeypatch.setattr(measured, "scores", scores)
    found, eval_set = measured.rerank({}, best, "test"), world.eval_set("test")
    counts = world.item_counts()
    for user in range(tiny.N_USERS):
        history, target = eval_set.history[user], int(eval_set.targets[user][0])
        old = counts if first == "popularity" else table[int(history[0]) % tiny.N_USERS]
        for ranks, left_out in ((found.ranks, set(history.tolist()) - {target}), (found.ranks_all, set())):
            order = [i for i in np.argsort(-old, kind="stable").tolist() if i not in left_out]
            anew = sorted(order[:n], key=lambda i: -((i * 7919) % 101)) + order[n:]
            if target in order[:n]:
                assert ranks[user, 0] == anew.index(target) + 1
            else:
                assert ranks[user, 0] == 1 + sum(old[i] >= old[target] for i in order if i != target)
            if left_out or ranks is found.ranks:
                assert found.ids[user].tolist() == anew[:10]
    assert found.metrics["test/hr@10"] == pytest.approx(np.mean(found.ranks[:, 0] <= 10))
    assert set(found.metrics) >= {"test/ndcg@5", "test_all/ndcg@10", "test/coverage@10"}


# -- bad input --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.text.source": "frozen"}, "batch.kind='pairs' trains the encoder: set config.towers.text.source='tokens'"),
        ({"batch.chunk_rows": 2}, "knows neither chunks nor adapters: set config.batch.chunk_rows=2 to 0"),
        ({"towers.text.lora.rank": 2}, "set config.towers.text.lora.rank=2 to 0"),
        ({"train.monitor": "valid/ndcg@10"}, "config.train.monitor='valid/ndcg@10' is neither"),
        ({"eval.rerank": -1}, "config.eval.rerank=-1: must be at least 0"),
        ({"batch.pair_negatives": 0}, "config.batch.pair_negatives=0: must be above 0"),
        ({"objectives.info_nce.weight": 1.0}, "objectives.info_nce: batches of pairs .* teach cross alone; set its weight to 0"),
        ({"objectives.cross.loss": "hinge"}, "config.objectives.cross.loss='hinge': expected one of softmax, bce"),
        ({"objectives.cross.label_smoothing": 1.0}, "cross.label_smoothing=1.0: must be at least 0 and below 1"),
        ({"batch.row_tokens": 128}, "pairs of config.batch.row_tokens=128 tokens need an encoder of as many positions; it has 64"),
    ],
)
def test_bad_values_are_said_before_anything_is_compiled(tmp_path, changes, message):
    with pytest.raises(RecJaxError, match=message):
        pair_task(tmp_path, **changes)


def test_the_objective_needs_pairs(tmp_path):
    with pytest.raises(RecJaxError, match="config.objectives.cross needs config.batch.kind='pairs'; it is 'histories'"):
        tiny.task(tiny.config(**{"objectives.cross.weight": 1.0}), tmp_path)


def test_a_cross_encoder_has_no_vectors(tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny.config(**PAIRS)))
    with pytest.raises(RecJaxError, match="trained a cross-encoder on pairs, and no towers: name another stage"):
        model_lib.load(tmp_path)
