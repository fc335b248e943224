"""Both protocols from vectors and from scores, against each other and against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from rec_jax.eval import metrics, rankings
from rec_jax.types import EvalSet, Ragged, RecJaxError

U, N, D = 41, 150, 8


def make(n_targets=4):
    rng = np.random.default_rng(0)
    history = [rng.permutation(N)[: rng.integers(0, 40)] for _ in range(U)]
    targets = [rng.permutation(N)[: rng.integers(1, n_targets + 1)] for _ in range(U)]
    history[5] = np.array([targets[5][0], 3, 3])  # a target that is in the history, and an item twice
    users, items = (rng.integers(-2, 3, (n, D)).astype(np.float32) for n in (U, N))  # exact scores with many ties
    return users, items, EvalSet(np.arange(U), Ragged.from_rows(history), Ragged.from_rows(targets), N)


def as_scorer(users, items, eval_set):
    """A scorer of histories that knows whose they are by their content."""
    whose = {eval_set.history[n].tobytes(): n for n in range(U)}
    rows = [eval_set.history[n].tobytes() for n in range(U)]
    assert len(whose) >= U - rows.count(b"") + (b"" in rows)
    return lambda histories: np.stack([users[whose[histories[n].tobytes()]] @ items.T for n in range(len(histories))])


def test_vectors_and_scores_give_the_same_rankings_and_those_of_a_plain_loop():
    users, items, eval_set = make()
    empty = [n for n in range(U) if not len(eval_set.history[n])]
    users[empty] = users[empty[0]] if empty else 0
    a = rankings.evaluate_vectors(users, items, eval_set, ks=(3, 10), users_per_block=16, items_per_block=128)
    b = rankings.evaluate_scores(as_scorer(users, items, eval_set), eval_set, ks=(3, 10), users_per_block=7)
    assert a.metrics == b.metrics
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.ranks, b.ranks)
    np.testing.assert_array_equal(a.ranks_all, b.ranks_all)
    scores = users @ items.T
    for u in range(U):
        targets, gone = eval_set.targets[u], set(eval_set.history[u].tolist())
        for place, t in enumerate(targets):
            ahead = [o for p, o in enumerate(targets) if scores[u, o] > scores[u, t] or (scores[u, o] == scores[u, t] and p < place)]
            rivals = [i for i in range(N) if i not in targets and scores[u, i] >= scores[u, t]]
            assert a.ranks_all[u, place] == 1 + len(ahead) + len(rivals)
            assert a.ranks[u, place] == 1 + len(ahead) + len([i for i in rivals if i not in gone])
        open_ = [i for i in range(N) if i in targets or i not in gone]
        assert a.ids[u].tolist() == sorted(open_, key=lambda i: (-scores[u, i], i))[:10]
    assert a.metrics["test/ndcg@10"] == metrics.ndcg(a.ranks, k=10).mean() == a.per_user["test/ndcg@10"].mean()
    assert a.metrics["test_all/hr@3"] == metrics.hr(a.ranks_all, k=3).mean()
    assert a.metrics["test/coverage@3"] == len(np.unique(a.ids[:, :3])) / N
    assert not any(name.startswith("test_all/coverage") for name in a.metrics)
    assert (a.ranks <= a.ranks_all).all()  # removing rivals can only help
    assert a.metrics["test/ndcg@10"] > a.metrics["test_all/ndcg@10"]


def test_names_follow_the_split():
    users, items, eval_set = make()
    out = rankings.evaluate_vectors(users, items, eval_set, ks=(10,), name="valid")
    assert {"valid/ndcg@10", "valid_all/ndcg@10", "valid/mrr@10", "valid/map@10", "valid/recall@10", "valid/coverage@10"} <= set(
        out.metrics
    )
    assert out.per_user["valid/hr@10"].shape == (U,)
    assert out.ids.shape == (U, 10)


def test_a_target_twice_is_ranked_once():
    users, items, eval_set = make()
    once = EvalSet(eval_set.users, eval_set.history, Ragged.from_rows([t[:1] for t in (eval_set.targets[n] for n in range(U))]), N)
    twice = EvalSet(eval_set.users, eval_set.history, Ragged.from_rows([[t, t] for t in once.targets.flat]), N)
    assert rankings.evaluate_vectors(users, items, once, ks=(5,)).metrics == rankings.evaluate_vectors(users, items, twice, ks=(5,)).metrics


def test_bad_input_is_refused():
    users, items, eval_set = make()
    with pytest.raises(RecJaxError, match="40 users, 150 items"):
        rankings.evaluate_vectors(users[:40], items, eval_set, ks=(5,))
    with pytest.raises(RecJaxError, match="the scorer gave scores of shape"):
        rankings.evaluate_scores(lambda h: np.zeros((len(h), 3), np.float32), eval_set, ks=(5,))
    with pytest.raises(RecJaxError, match=r"config\.eval\.k"):
        rankings.evaluate_vectors(users, items, eval_set, ks=())
    none = EvalSet(eval_set.users, eval_set.history, Ragged.from_rows([[1]] * 40 + [[]]), N)
    with pytest.raises(RecJaxError, match="row 40 of 41 has no target"):
        rankings.evaluate_vectors(users, items, none, ks=(5,))
    users[3, 0] = np.nan
    with pytest.raises(RecJaxError, match="NaN score"):
        rankings.evaluate_vectors(users, items, eval_set, ks=(5,))


def test_some_users_are_drawn_by_seed_with_all_that_is_theirs():
    random = np.random.default_rng(0)
    rows = lambda: Ragged.from_rows([random.integers(0, 9, random.integers(1, 4)) for _ in range(30)])
    whole = EvalSet(np.arange(100, 130), rows(), rows(), 9, rows())
    assert rankings.some_users(whole, 0, seed=0) is rankings.some_users(whole, 30, seed=0) is whole
    some = rankings.some_users(whole, 10, seed=1)
    assert len(set(some.users.tolist())) == 10
    for n, user in enumerate(some.users - 100):
        for part in ("history", "targets", "removed"):
            np.testing.assert_array_equal(getattr(some, part)[n], getattr(whole, part)[int(user)])
    np.testing.assert_array_equal(some.users, rankings.some_users(whole, 10, seed=1).users)
    assert set(some.users) != set(rankings.some_users(whole, 10, seed=2).users)
