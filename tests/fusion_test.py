"""Neighbours beside the model: against a slow float64 form, the weight found where it is known, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from rec_jax import config as config_lib
from rec_jax.eval import baselines, fusion, rankings
from rec_jax.eval import model as model_lib
from rec_jax.towers import two_tower
from rec_jax.types import EvalSet, Ragged, RecJaxError

U, N = 33, 40


@pytest.fixture
def world():
    """(eval set, model's scores [U, N], neighbours' scores [U, N], scorers of both); user 3 has no neighbours, user 4 equal scores."""
    random = np.random.default_rng(0)
    history = Ragged.from_rows([np.append(random.permutation(N - U)[: random.integers(0, 5)], N - U + n) for n in range(U)])
    target = Ragged.from_rows([[random.integers(0, N)] for _ in range(U)])
    model, neighbours = random.normal(size=(2, U, N)).astype(np.float32)
    neighbours = np.where(random.random((U, N)) < 0.2, np.abs(neighbours), 0).astype(np.float32)
    model *= random.uniform(0.1, 10, (U, 1)).astype(np.float32)
    neighbours[3], model[4] = 0, 0.1
    return EvalSet(np.arange(U), history, target, N), model, neighbours, *(scorer(x) for x in (model, neighbours))


def scorer(scores):
    """Knows a user by the newest item of the history."""
    return lambda histories: np.stack([scores[histories[n][-1] - (N - U)] for n in range(len(histories))])


def naive(scores):
    """Row by row over the standard deviation, in float64."""
    out = np.zeros(scores.shape)
    for n, row in enumerate(scores.astype(np.float64)):
        spread = np.sqrt(np.mean((row - row.mean()) ** 2))
        out[n] = row / spread if len(set(row)) > 1 else 0
    return out


def test_the_mixture_is_its_formula(world):
    eval_set, model, neighbours, *scorers = world
    found = fusion.together(*scorers, 0.7)(eval_set.history)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, naive(model) + 0.7 * naive(neighbours), rtol=1e-4, atol=1e-5)
    order = np.argsort(-found, axis=1)
    np.testing.assert_array_equal(order[3], np.argsort(-model[3]), "without neighbours the model ranks alone")
    scaled = fusion.together(scorer(model * np.float32(8)), scorer(neighbours * np.float32(0.5)), 0.7)(eval_set.history)
    np.testing.assert_array_equal(scaled, found, "the scale of the scores has no part")


def test_ndcg_of_each_weight_is_that_of_a_plain_loop(world):
    eval_set, model, neighbours, *scorers = world
    weights = (0.0, 0.3, 2.0)
    found = fusion.ndcg_of_weights(*scorers, eval_set, weights, k=5, users_per_block=7)
    a, b = naive(model), naive(neighbours)
    for weight in weights:
        total = 0.0
        for u in range(U):
            scores, target = a[u] + weight * b[u], eval_set.targets[u][0]
            rivals = set(range(N)) - set(eval_set.history[u].tolist()) - {target}
            rank = 1 + sum(bool(scores[i] >= scores[target]) for i in rivals)
            total += 1 / np.log2(1 + rank) if rank <= 5 else 0
        assert found[weight] == pytest.approx(total / U, abs=1e-12)
    alone = rankings.evaluate_scores(scorers[0], eval_set, ks=(5,), name="valid").metrics["valid/ndcg@5"]
    assert found[0.0] == pytest.approx(alone, abs=1e-12)


def test_a_nan_is_refused(world):
    eval_set, model, _, scores, others = world
    model[7, 3] = np.nan
    with pytest.raises(RecJaxError, match="user 7 has a NaN score"):
        fusion.ndcg_of_weights(scores, others, eval_set, users_per_block=7)


class World(tiny.World):
    """The tiny world as prepared data: each user's last item is test, the one before it validation."""

    meta = {"fingerprint": "tiny"}  # noqa: RUF012

    def train_histories(self):
        return Ragged.from_rows([r["items"][:-2] for r in self.source()])

    def eval_set(self, split):
        end = {"valid": -2, "test": -1}[split]
        rows = [r["items"] for r in self.source()]
        return EvalSet(
            np.arange(len(rows)), Ragged.from_rows([r[:end] for r in rows]), Ragged.from_rows([[r[end]] for r in rows]), self.n_items
        )


def random_scorer(seed):
    """Scores that depend on the histories' newest items."""
    table = np.random.default_rng(seed).normal(size=(tiny.N_ITEMS, tiny.N_ITEMS)).astype(np.float32)
    return lambda histories: table[[int(histories[n][-1]) for n in range(len(histories))]]


@pytest.mark.parametrize("model_knows", [False, True])
def test_the_weight_is_validations_best(model_knows):
    config, prepared, lines = tiny.config(**{"eval.fuse": "sequence_knn", "eval.k": (5, 10)}), World(), []
    neighbours = baselines.fit("sequence_knn", prepared.train_histories(), prepared.n_items)
    model = neighbours if model_knows else random_scorer(0)
    ranked, weights = fusion.fused(config, prepared, model, "model", "test", lines.append, table=tiny.table)
    (weight,) = weights.values()
    found = fusion.ndcg_of_weights(model, neighbours, prepared.eval_set("valid"), users_per_block=256)
    assert found[weight] == max(found.values())
    alone = rankings.evaluate_scores(model, prepared.eval_set("test"), ks=(5, 10)).metrics["test/ndcg@10"]
    if model_knows:
        assert weight == 0, "of equal ones the least weight is taken"
        assert ranked.metrics["test/ndcg@10"] == pytest.approx(alone, abs=1e-12)
    else:
        assert weight > 0
        assert ranked.metrics["test/ndcg@10"] > alone + 0.1
    assert f"model + sequence_knn: weight {weight:g} by validation's ndcg@10 (0: " in lines[0]


def test_several_kinds_of_neighbours_join_one_after_the_other():
    config, prepared, lines = tiny.config(**{"eval.fuse": "sequence_knn+text_knn", "eval.k": (10,)}), World(), []
    prepared.texts, prepared.item_ids = lambda: ["a text"] * tiny.N_ITEMS, lambda: list(map(str, range(tiny.N_ITEMS)))
    model, valid = random_scorer(0), prepared.eval_set("valid")
    ranked, weights = fusion.fused(config, prepared, model, "model", "test", lines.append, table=tiny.table)
    knn, texts = baselines.fit("sequence_knn", prepared.train_histories(), tiny.N_ITEMS), baselines.text_knn(tiny.table())
    found = fusion.ndcg_of_weights(fusion.together(model, knn, weights["sequence_knn"]), texts, valid, users_per_block=256)
    assert found[weights["text_knn"]] == max(found.values())
    both = fusion.together(fusion.together(model, knn, weights["sequence_knn"]), texts, weights["text_knn"])
    again = rankings.evaluate_scores(both, prepared.eval_set("test"), ks=(10,))
    assert ranked.metrics["test/ndcg@10"] == pytest.approx(again.metrics["test/ndcg@10"], abs=1e-12)
    assert f"model + sequence_knn + text_knn: weight {weights['text_knn']:g} by" in lines[1]
    prepared.texts = prepared.item_ids
    _, weights = fusion.fused(config, prepared, model, "model", "test", lines.append, table=tiny.table)
    assert list(weights) == ["sequence_knn"]
    assert lines[-1] == "  text_knn is left out: no item has a text"


@pytest.mark.parametrize("rank_by", ["vectors", "task"])
def test_a_models_scorer_ranks_as_the_model_does(rank_by):
    config = tiny.config(**{"eval.rank_by": rank_by, "eval.k": (10,), "eval.users_per_block": 16, "towers.item.ids": True})
    prepared = World()
    spec = model_lib.towers_of(config, prepared, tiny.bert_spec())
    model = model_lib.Model(config, prepared, tiny.tokens(), spec, tiny.table())
    params = two_tower.init(jax.random.key(0), spec)
    items, eval_set = model.item_vectors(params), prepared.eval_set("test")
    ranked = model.rank(params, eval_set, name="test", items=items)
    again = rankings.evaluate_scores(model.scorer(params, items), eval_set, ks=(10,), users_per_block=16)
    assert again.metrics == pytest.approx(ranked.metrics, abs=0.02)
    assert (again.ids == ranked.ids).mean() > 0.98, "scores are the same up to the order of summation"


def test_what_cannot_be_fused_is_said_before_training():
    fusion.check(tiny.config(**{"eval.fuse": "ease"}))
    with pytest.raises(RecJaxError, match=r"config\.eval\.fuse='ease\+knn': expected names of popularity"):
        tiny.config(**{"eval.fuse": "ease+knn"})
    with pytest.raises(RecJaxError, match=r"config\.eval\.fuse='ease\+ease' names a baseline twice"):
        tiny.config(**{"eval.fuse": "ease+ease"})
    with pytest.raises(RecJaxError, match=r"config\.eval\.baselines names 'knn': expected some of popularity"):
        tiny.config(**{"eval.baselines": ("popularity", "knn")})
    texts = tiny.config(**{"eval.fuse": "ease", "batch.kind": "texts", "towers.text.source": "tokens"})
    with pytest.raises(RecJaxError, match=r"config\.batch\.kind='texts': set config\.eval\.fuse=''"):
        fusion.check(texts)
    c = ConfigDict(tiny.config(**{"eval.fuse": "ease"}).to_dict())
    c.stages, c.stage = ("fused",), ConfigDict({"fused": ConfigDict()})
    with pytest.raises(RecJaxError, match="rename the stage"):
        fusion.check(c)


def test_every_baseline_is_in_the_configs_list():
    assert (*baselines.BASELINES, baselines.TEXT_KNN) == config_lib.BASELINES
