"""Catalogue indices mean nothing: with the items in another order, rankings, metrics and coverage stay the same."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from rec_jax.eval import baselines, rankings
from rec_jax.eval import model as model_lib
from rec_jax.towers import two_tower
from rec_jax.types import EvalSet, Ragged

U, N, D = 50, 30, 6
ORDER = np.random.default_rng(7).permutation(N)  # item i of the old catalogue is item ORDER[i] of the new one
KS = (1, 3, 10)


def renamed(rows: Ragged, order=ORDER) -> Ragged:
    return dataclasses.replace(rows, flat=order[rows.flat].astype(np.int32))


def moved(table: np.ndarray, order=ORDER) -> np.ndarray:
    """Rows [N, ...] of items, and others behind them that stay -> those of the new catalogue."""
    out = np.array(table)
    out[order] = np.asarray(table)[: len(order)]
    return out


def in_new_order(eval_set: EvalSet, order=ORDER) -> EvalSet:
    removed = None if eval_set.removed is None else renamed(eval_set.removed, order)
    return dataclasses.replace(
        eval_set, history=renamed(eval_set.history, order), targets=renamed(eval_set.targets, order), removed=removed
    )


def data():
    """Histories in which item i stands 6 + i times, never twice in one, and an evaluation of them with targets that are not in them."""
    random, rows = np.random.default_rng(0), [[] for _ in range(U)]
    for item in range(N):
        for user in random.permutation(U)[: 6 + item]:
            rows[user].append(item)
    rows = [random.permutation(row) for row in rows]
    targets = [random.permutation(np.setdiff1d(np.arange(N), row))[: 1 + n % 3] for n, row in enumerate(rows)]
    return Ragged.from_rows(rows), EvalSet(np.arange(U), Ragged.from_rows(rows), Ragged.from_rows(targets), N)


def require_same(old: rankings.Rankings, new: rankings.Rankings, order=ORDER) -> None:
    np.testing.assert_array_equal(old.ranks, new.ranks)
    np.testing.assert_array_equal(old.ranks_all, new.ranks_all)
    np.testing.assert_array_equal(np.where(old.ids < 0, -1, order[old.ids]), new.ids)
    assert old.metrics == new.metrics
    assert min(value for name, value in old.metrics.items() if "coverage" in name) > 0


def require_no_ties(scores: np.ndarray) -> None:
    """Else the order of the catalogue decides between them, or rounding does."""
    gap = np.diff(np.sort(np.asarray(scores, np.float64), axis=1), axis=1).min()
    assert gap > 1e-6 * np.abs(scores).max(), f"the example has scores {gap} from each other; draw another"


@pytest.mark.parametrize("removed", [False, True])
def test_vectors_and_scores(removed):
    random, (_, eval_set) = np.random.default_rng(1), data()
    users, items = (random.normal(size=(n, D)).astype(np.float32) for n in (U, N))
    bias = random.normal(size=N).astype(np.float32)
    scores = users @ items.T + bias
    require_no_ties(scores)
    if removed:
        eval_set = dataclasses.replace(eval_set, removed=Ragged.from_rows([random.permutation(N)[: n % 12] for n in range(U)]))
    new = in_new_order(eval_set)
    sizes = {"ks": KS, "users_per_block": 16}
    by_vectors = lambda s, v, b: rankings.evaluate_vectors(users, v, s, bias=b, items_per_block=8, **sizes)
    old = by_vectors(eval_set, items, bias)
    require_same(old, by_vectors(new, moved(items), moved(bias)))

    def by_scores(s, table):
        whose = {s.history[n].tobytes(): n for n in range(U)}
        assert len(whose) == U
        scorer = lambda histories: np.stack([table[whose[histories[n].tobytes()]] for n in range(len(histories))])
        return rankings.evaluate_scores(scorer, s, **sizes)

    require_same(old, by_scores(new, moved(scores.T).T))
    assert by_scores(eval_set, scores[:, ORDER]).metrics != old.metrics, "scores in another order than the targets are found out"


class Draws:
    """A generator whose draws go with items and events, whatever the order of the catalogue.

    Args:
      order: new index of each old item; None = the old catalogue.
      train: histories in old indices.
    """

    def __init__(self, seed: int, order: np.ndarray | None, train: Ragged):
        self._random, self._order = np.random.Generator(np.random.PCG64(seed)), order
        user = np.repeat(np.arange(len(train)), train.lengths())
        old = np.lexsort((train.flat, user))  # events as a sparse matrix has them: by user and item
        new = old if order is None else np.lexsort((order[train.flat], user))
        self._event = np.argsort(new)[old]

    def normal(self, *, size, scale=1.0):
        drawn = self._random.normal(scale=scale, size=size)
        return drawn if self._order is None or size[0] != N else moved(drawn)

    def integers(self, low, high, size):
        drawn = self._random.integers(low, high, size)
        assert (low, high) == (0, N)
        return drawn if self._order is None else self._order[drawn]

    def permutation(self, n):
        return self._event[self._random.permutation(n)]


OPTIONS = {"ease": {"regularisation": 20.0}, "ials": {"dim": 8}, "bpr": {"dim": 8}}


@pytest.mark.parametrize("name", ["popularity", "item_knn", "sequence_knn", "ease", "ials", "bpr", "text_knn"])
def test_baselines(name, monkeypatch):
    """Those that draw get the same draws for the same items and events."""
    train, eval_set = data()
    table = np.random.default_rng(4).normal(size=(N, D)).astype(np.float32)

    def ranked(order):
        monkeypatch.setattr(np.random, "default_rng", lambda seed: Draws(seed, order, train))
        rows, vectors, s = (train, table, eval_set) if order is None else (renamed(train), moved(table), in_new_order(eval_set))
        scorer = baselines.text_knn(vectors) if name == "text_knn" else baselines.fit(name, rows, N, **OPTIONS.get(name, {}))
        require_no_ties(scorer(s.history))
        return rankings.evaluate_scores(scorer, s, ks=KS, users_per_block=16)

    require_same(ranked(None), ranked(ORDER))


def test_ties_never_count_for_a_target_in_any_order():
    """Which of two tied items a list shows is a matter of order; a target's rank is not."""
    train, eval_set = data()
    fit = lambda rows: baselines.fit("recent_popularity", rows, N, places=2)
    scores = fit(train)(eval_set.history)
    assert len(np.unique(scores[0])) < N / 2
    one = dataclasses.replace(eval_set, targets=Ragged.from_rows([eval_set.targets[n][:1] for n in range(U)]))
    old = rankings.evaluate_scores(fit(train), one, ks=KS)
    new = rankings.evaluate_scores(fit(renamed(train)), in_new_order(one), ks=KS)
    without = lambda r: {name: value for name, value in r.metrics.items() if "coverage" not in name}
    assert without(old) == without(new)
    np.testing.assert_array_equal(old.ranks, new.ranks)


def test_a_model():
    """Towers with all that goes by a catalogue's index: texts, both tables of own vectors, shrinkage, features."""
    n, changes = tiny.N_ITEMS, {"towers.item.ids": True, "towers.user.ids": True, "towers.item.id_shrinkage": 3.0}
    c = tiny.config(**changes, **{"data.features.categorical": ("brand",), "eval.k": KS, "eval.users_per_block": 16})
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=n, features={"categorical": {"brand": 5}})
    random, world = np.random.default_rng(3), tiny.World()
    fresh = jax.jit(lambda key: two_tower.init(key, spec))(jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3 * random.normal(size=x.shape).astype(np.float32), fresh)
    features = {"categorical": {"brand": random.integers(0, 5, n).astype(np.int32)}}
    histories = world.train_histories()
    targets = Ragged.from_rows([r["items"][r["splits"] > 0] for r in world.source()])
    eval_set = EvalSet(np.arange(tiny.N_USERS), histories, targets, n)
    order = np.random.default_rng(8).permutation(n)

    class Renamed(tiny.World):
        def item_counts(self):
            return moved(super().item_counts(), order)

    model = model_lib.Model(c, world, tiny.tokens(), spec, tiny.table(), features=features)
    items = model.item_vectors(params)
    require_no_ties(model.scorer(params, items)(histories.take(np.arange(16))))
    old = model.rank(params, eval_set, name="test")
    features = {"categorical": {"brand": moved(features["categorical"]["brand"], order)}}
    other = model_lib.Model(c, Renamed(), tiny.tokens(), spec, moved(tiny.table(), order), features=features)
    params |= {name: {"embedding": moved(params[name]["embedding"], order)} for name in ("ids", "history_ids")}
    np.testing.assert_allclose(other.item_vectors(params), moved(items, order), atol=1e-6)
    require_same(old, other.rank(params, in_new_order(eval_set, order), name="test"), order)
