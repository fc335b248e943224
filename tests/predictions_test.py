"""Single predictions: which are right and wrong, and what is said of them."""

from __future__ import annotations

import types

import numpy as np
import pytest

from rec_jax.eval import predictions, rankings
from rec_jax.types import EvalSet, Ragged, RecJaxError

U, N = 30, 25


@pytest.fixture
def world():
    """An evaluation set, and vectors by which the target of every third user comes first."""
    random = np.random.default_rng(0)
    items = np.eye(N, dtype=np.float32)
    users = random.random((U, N)).astype(np.float32)
    history = Ragged.from_rows([random.permutation(12)[: 1 + n % 7] for n in range(U)])
    targets = Ragged.from_rows([[12 + n % 13] for n in range(U)])
    for n in range(U):
        users[n, int(targets[n][0])] = 2 if n % 3 == 0 else -1
    return EvalSet(np.arange(U) + 100, history, targets, N), users, items


def test_right_are_first_and_wrong_are_not_among_ten(world):
    eval_set, users, items = world
    ranked = rankings.evaluate_vectors(users, items, eval_set, ks=(10,))
    right, wrong = predictions.chosen(ranked, 6, seed=0)
    assert len(right) == len(wrong) == 6
    assert (right % 3 == 0).all()
    assert (wrong % 3 > 0).all()
    assert len(set(right.tolist())) == len(set(wrong.tolist())) == 6
    assert [len(rows) for rows in predictions.chosen(ranked, 100, seed=0)] == [10, 20], "there are no more"
    np.testing.assert_array_equal(predictions.chosen(ranked, 6, seed=0), (right, wrong))


def test_what_is_said_names_history_target_rank_and_the_first(world, monkeypatch):
    eval_set, users, items = world
    prepared = types.SimpleNamespace(
        eval_set=lambda split: eval_set, names=lambda: [f"item {n}" for n in range(N)], item_counts=lambda: np.arange(N)
    )
    config = types.SimpleNamespace(seed=0, batch=types.SimpleNamespace(kind="histories"))
    rank = lambda params, eval_set, *, name, items, ks: rankings.evaluate_vectors(users, items, eval_set, ks=ks, name=name)
    model = types.SimpleNamespace(config=config, prepared=prepared, rank=rank)
    monkeypatch.setattr(predictions, "load", lambda workdir, say: types.SimpleNamespace(model=model, params=None, items=items))
    said: list[str] = []
    predictions.say_some("W", "test", 2, say=said.append)
    assert [line for line in said if line.startswith("\n")] == [
        "\ntest: targets that are ranked first",
        "\ntest: targets that are not among ten",
    ]
    assert len(said) == 2 + 2 * 2 * 3
    ranked = rankings.evaluate_vectors(users, items, eval_set, ks=(10,))
    row = int(predictions.chosen(ranked, 2, seed=0)[1][0])
    names = [f"item {n}" for n in eval_set.history[row][-5:]]
    older = f" and {len(eval_set.history[row]) - 5} before" if len(eval_set.history[row]) > 5 else ""
    target = int(eval_set.targets[row][0])
    at = said.index(f"  user {100 + row}: after {', '.join(names)}{older}")
    assert said[at + 1] == f"    came item {target} (rank {ranked.ranks[row, 0]}, trained on {target} times)"
    assert said[at + 2] == "    first in the ranking: " + ", ".join(f"item {n}" for n in ranked.ids[row, :3])

    config.batch.kind = "texts"
    with pytest.raises(RecJaxError, match=r"--show=2 reads rankings for histories; config.batch.kind is 'texts'"):
        predictions.say_some("W", "test", 2, say=said.append)
    with pytest.raises(RecJaxError, match=r"--show=0: expected how many"):
        predictions.say_some("W", "test", 0)
