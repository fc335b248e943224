"""Policies of towers valued by logs of a bandit whose true values are known."""

from __future__ import annotations

import dataclasses

import bandit
import jax
import numpy as np
import pytest
import scipy.stats
import tiny

from rec_jax import config as config_lib
from rec_jax.data.impressions import Impressions
from rec_jax.eval import logged
from rec_jax.towers import two_tower
from rec_jax.types import RecJaxError

X, A = 6, 8
NEVER = A - 1  # an action that the logging policy never takes
TEMPERATURE = 0.5
CAP = 2.0


def make_world() -> bandit.Bandit:
    """`bandit.make`, but one action is never taken."""
    world = bandit.make(0, contexts=X, actions=A)
    logging = world.logging * (np.arange(A) != NEVER)
    return bandit.Bandit(world.frequency, world.reward, logging / logging.sum(1, keepdims=True))


WORLD = make_world()
WANTED = bandit.better(WORLD)  # what the parameters below state, over all actions
POLICY = WANTED * (np.arange(A) != NEVER) / (1 - WANTED[:, [NEVER]])  # over those that the log knows
TRUE = WORLD.value(POLICY)


def impressions_of(rows: int, seed: int) -> Impressions:
    """Contexts of the bandit as users, its actions as items; a context field that says nothing, and one that tells of the item."""
    logs = WORLD.draw(rows, seed=seed)
    day = np.random.default_rng(seed).integers(0, 3, rows)
    return Impressions(
        user=logs.contexts,
        item=logs.actions,
        context=np.stack([day, logs.actions % 4], axis=1).astype(np.int32),
        labels=logs.rewards[:, None].astype(np.float32),
        propensity=logs.propensities.astype(np.float32),
        time=np.arange(rows),
        categories={"day": "abc", "affinity": "0123"},
        tasks=("click",),
    )


class Prepared:
    """Stands for the prepared data: a log in three parts."""

    n_users, n_items = X, A

    def __init__(self, test_rows: int = 1000, seed: int = 0, train_rows: int = 4000):
        sizes = {"train": train_rows, "valid": 500, "test": test_rows}
        self.parts = {name: impressions_of(rows, 10 * seed + n) for n, (name, rows) in enumerate(sizes.items())}

    def impressions(self, split: str) -> Impressions:
        return self.parts[split]


def towers() -> tuple[two_tower.TwoTowerSpec, dict, np.ndarray]:
    """-> spec, parameters, table: user . item / TEMPERATURE is the logarithm of WANTED, for the item vectors are unit vectors."""
    c = tiny.config(**{"towers.user.kind": "id", "towers.item.ids": True, "towers.normalize": False, "batch.kind": "impressions"})
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=A, n_users=X)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), two_tower.init(jax.random.key(0), spec))
    params["users"]["embedding"][:X], params["ids"]["embedding"][:A] = TEMPERATURE * np.log(WANTED), np.eye(A)
    return spec, params, tiny.table()[:A]  # texts count for nothing: the head's kernel is 0


def make(prepared: Prepared) -> tuple[logged.Logged, dict, np.ndarray]:
    """-> the policy's valuer, its parameters, the table of text vectors."""
    spec, params, table = towers()
    return logged.Logged(spec, prepared, temperature=TEMPERATURE, cap=CAP), params, table


def test_probabilities_are_those_that_the_parameters_state_over_the_items_that_the_log_knows():
    valued, params, table = make(Prepared())
    shown = impressions_of(logged.BLOCK + 10, seed=5)  # two blocks
    policy = valued.probabilities(params, table, shown)
    assert valued.allowed.tolist() == [True] * NEVER + [False]
    np.testing.assert_allclose(policy.sum(1), 1, rtol=1e-12)
    assert (policy[:, NEVER] == 0).all()
    np.testing.assert_allclose(policy, POLICY[shown.user], rtol=1e-5)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    """Of 100 logs. The direct method is left out: its predictions know nothing of users' own tastes."""
    held, draws = dict.fromkeys(("ips", "snips", "dr", "logged", "uniform"), 0), 100
    uniform = WORLD.value(np.tile(np.arange(A) != NEVER, (X, 1)) / (A - 1))
    truths = {"logged": WORLD.value(WORLD.logging), "uniform": uniform}
    valued, params, table = make(Prepared())
    predict = logged.predictor(Prepared())
    for seed in range(draws):
        shown = impressions_of(1000, seed=100 + seed)
        found = logged.estimates(shown, valued.probabilities(params, table, shown), predict(shown), valued.allowed)
        for name in held:
            held[name] += found[name].low <= truths.get(name, TRUE) <= found[name].high
    low, high = scipy.stats.binom.ppf(0.0005, draws, 0.93), scipy.stats.binom.ppf(0.9995, draws, 0.95)
    assert {name: n for name, n in held.items() if not low <= n <= high} == {}


def test_figures_of_a_split_and_their_table():
    prepared, said = Prepared(20_000), []
    prepared.parts["test"].labels[::2] = np.nan
    valued, params, table = make(prepared)
    found = valued.measure(params, table, "test", said.append)
    rewards = prepared.parts["test"].labels[1::2, 0]
    assert said == [f"  policies: 10,000 impressions, {int(rewards.sum()):,} of them with a reward"]
    ends = ("", "_low", "_high", "_rows", "_mean_weight", "_rewards")
    assert set(found) == {f"test/policy_value_{n}{end}" for n in logged.ROWS for end in ends} - {"test/policy_value_dm_rewards"}
    assert found["test/policy_value_logged_rewards"] == pytest.approx(rewards.sum())
    assert 10 < found["test/policy_value_ips_rewards"] < found["test/policy_value_clipped_ips_rewards"] < rewards.sum()
    assert found["test/policy_value_logged"] == pytest.approx(rewards.mean(dtype=np.float64))
    assert found["test/policy_value_logged_rows"] == pytest.approx(10_000)
    assert found["test/policy_value_snips"] == pytest.approx(TRUE, rel=0.05)
    assert found["test/policy_value_dr"] == pytest.approx(TRUE, rel=0.05)
    assert found["test/policy_value_dr_low"] > found["test/policy_value_logged"], "better by the log alone"
    assert found["test/policy_value_clipped_ips"] < found["test/policy_value_ips"]
    assert 1000 < found["test/policy_value_ips_rows"] < 9000
    assert found["test/policy_value_ips_mean_weight"] == pytest.approx(1, abs=0.05)
    rows = logged.table_rows(found, "test")
    assert list(rows) == list(logged.ROWS.values())
    assert rows[logged.ROWS["ips"]]["reward"] == pytest.approx(1000 * found["test/policy_value_ips"])
    assert logged.table_rows({"test/auc": 0.5}, "test") == {}


def test_predictions_do_not_depend_on_what_was_shown():
    prepared = Prepared(200)
    shown, predict = prepared.parts["test"], logged.predictor(prepared)
    got = predict(shown)
    item = impressions_of(200, seed=77).item
    other = dataclasses.replace(shown, item=item, context=np.stack([shown.context[:, 0], item % 4], axis=1))
    assert (other.item != shown.item).any()
    np.testing.assert_array_equal(predict(other), got)
    assert got.shape == (200, A)
    np.testing.assert_allclose(got.mean(0)[:NEVER], WORLD.frequency @ WORLD.reward[:, :NEVER], atol=0.1)


def test_a_long_part_is_valued_by_rows_drawn_from_it(monkeypatch):
    monkeypatch.setattr(logged, "MOST_CELLS", A * 400)
    valued, params, table = make(Prepared(1000))
    said = []
    found = valued.measure(params, table, "test", said.append)
    assert said[0] == "policies are valued by 400 of 1,000 impressions, drawn by seed 0"
    assert found["test/policy_value_logged_rows"] == pytest.approx(400)
    assert found == valued.measure(params, table, "test", said.append)


def test_no_rewards():
    prepared = Prepared(10)
    prepared.parts["test"].labels[1:] = np.nan
    valued, params, table = make(prepared)
    with pytest.raises(RecJaxError, match="1 rewards were observed in the test part"):
        valued.measure(params, table, "test", print)


def test_asked_where_a_policy_was_trained_and_the_log_has_propensities():
    prepared, config = Prepared(10), config_lib.defaults()
    assert not logged.asked(config, prepared, "test")
    config.objectives.policy.weight = 1.0
    assert logged.asked(config, prepared, "test")
    prepared.parts["test"] = dataclasses.replace(prepared.parts["test"], propensity=None)
    assert not logged.asked(config, prepared, "test")
