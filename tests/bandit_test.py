"""On a bandit whose true values are known: intervals hold them as often as they say, and off-policy training raises them."""

from __future__ import annotations

from functools import partial

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from rec_jax.eval import policy_value
from rec_jax.eval.policy_value import Interval
from rec_jax.losses.policy import top_k_reinforce

WORLD = bandit.make(0)
POLICY = bandit.better(WORLD)
TRUE = WORLD.value(POLICY)
ROWS, REPEATS = 1000, 300


def estimate(name: str, logs: bandit.Logs, interval: Interval, predictions: np.ndarray) -> policy_value.Estimate:
    """One estimator on one draw of logs; predictions [X, A]."""
    pi, q = POLICY[logs.contexts], predictions[logs.contexts]
    target = policy_value.probability_of(pi, logs.actions)
    logged = (logs.rewards, target, logs.propensities)
    return {
        "ips": lambda: policy_value.ips(*logged, interval=interval),
        "clipped_ips": lambda: policy_value.clipped_ips(*logged, cap=50, interval=interval),
        "snips": lambda: policy_value.snips(*logged, interval=interval),
        "direct_method": lambda: policy_value.direct_method(q, pi, interval=interval),
        "doubly_robust": lambda: policy_value.doubly_robust(logs.rewards, logs.actions, logs.propensities, q, pi, interval=interval),
    }[name]()


def repeat(name: str, interval: Interval, predictions: np.ndarray, repeats: int = REPEATS) -> tuple[int, np.ndarray]:
    """Over draws of logs -> (how many intervals hold the true value, the estimates)."""
    all_of_them = [estimate(name, WORLD.draw(ROWS, seed=seed), interval, predictions) for seed in range(repeats)]
    return sum(e.low <= TRUE <= e.high for e in all_of_them), np.array([e.value for e in all_of_them])


def bounds(level: float, repeats: int) -> tuple[float, float]:
    """Counts that a binomial of this level leaves once in a thousand; two more points below for what a finite sample lacks."""
    return scipy.stats.binom.ppf(0.0005, repeats, level - 0.02), scipy.stats.binom.ppf(0.9995, repeats, level)


def test_the_bandit_draws_what_it_says():
    logs = WORLD.draw(200_000, seed=0)
    assert abs(logs.rewards.mean() - WORLD.value(WORLD.logging)) < 5 * logs.rewards.std() / np.sqrt(len(logs.rewards))
    joint = np.zeros(WORLD.reward.shape)
    np.add.at(joint, (logs.contexts, logs.actions), 1 / len(logs.actions))
    np.testing.assert_allclose(joint, WORLD.frequency[:, None] * WORLD.logging, atol=0.005)
    np.testing.assert_array_equal(logs.propensities, WORLD.logging[logs.contexts, logs.actions])
    assert WORLD.value(POLICY) > 1.3 * WORLD.value(WORLD.logging)
    certain = np.eye(WORLD.reward.shape[1])[WORLD.reward.argmax(1)]
    assert WORLD.value(certain) == pytest.approx((WORLD.frequency * WORLD.reward.max(1)).sum())
    assert WORLD.value(certain, k=3) == pytest.approx(WORLD.value(certain))  # three times the same action is one
    two = np.array([[0.5, 0.5] + [0] * 6] * 6)
    assert WORLD.value(two, k=2) == pytest.approx((WORLD.frequency[:, None] * 0.75 * WORLD.reward[:, :2]).sum())


@pytest.mark.parametrize("name", ["ips", "clipped_ips", "snips", "direct_method", "doubly_robust"])
@pytest.mark.parametrize(
    "interval", [Interval(), Interval(level=0.8), Interval("bootstrap", draws=200)], ids=["normal", "normal80", "bootstrap"]
)
def test_intervals_hold_the_true_value_at_their_level(name, interval):
    """The direct method is given the true reward probabilities, doubly robust only a poor guess of them; the cap is above every weight."""
    predictions = WORLD.reward if name == "direct_method" else np.random.default_rng(0).random(WORLD.reward.shape)
    repeats = REPEATS if interval.kind == "normal" else 150
    held, values = repeat(name, interval, predictions, repeats)
    low, high = bounds(interval.level, repeats)
    assert low <= held <= high
    assert abs(values.mean() - TRUE) < 4 * values.std() / np.sqrt(repeats)


def test_the_cap_that_is_above_every_weight_is():
    assert (POLICY / WORLD.logging).max() < 50


def test_biased_estimators_miss_the_true_value_and_doubly_robust_mends_the_predictions():
    wrong = np.clip(WORLD.reward + 0.1, 0, 1)
    held, values = repeat("direct_method", Interval(), wrong)
    assert held == 0
    assert values.mean() > TRUE + 0.05
    assert repeat("doubly_robust", Interval(), wrong)[0] >= bounds(0.95, REPEATS)[0]
    capped = []
    for seed in range(REPEATS):
        logs = WORLD.draw(ROWS, seed=seed)
        target = policy_value.probability_of(POLICY[logs.contexts], logs.actions)
        capped.append(policy_value.clipped_ips(logs.rewards, target, logs.propensities, cap=1.5).value)
    assert np.mean(capped) < TRUE - 0.02


def test_good_predictions_make_doubly_robust_sharper_and_self_normalising_sharpens_too():
    spread = {name: repeat(name, Interval(), WORLD.reward)[1].std() for name in ("ips", "snips", "doubly_robust")}
    assert spread["doubly_robust"] < 0.85 * spread["ips"]
    assert spread["snips"] < spread["ips"]


def test_wrong_propensities_show_in_the_mean_weight():
    logs = WORLD.draw(20_000, seed=1)
    target = policy_value.probability_of(POLICY[logs.contexts], logs.actions)
    assert abs(policy_value.ips(logs.rewards, target, logs.propensities).mean_weight - 1) < 0.03
    uniform = np.full(len(target), 1 / WORLD.reward.shape[1])
    assert abs(policy_value.ips(logs.rewards, target, uniform).mean_weight - 1) > 0.1


@partial(jax.jit, static_argnames=("top_k", "cap", "steps"))
def train(contexts, actions, rewards, propensities, *, top_k: int, cap: float | None, steps: int = 600) -> jax.Array:
    """Logits [X, A] of a softmax policy, uniform at first, after `steps` of off-policy top-K REINFORCE on batches of the logs."""
    optimizer = optax.adam(0.03)
    logits = jnp.zeros(WORLD.reward.shape)

    def loss(logits, rows):
        log_prob = jax.nn.log_softmax(logits)[contexts[rows], actions[rows]]
        return top_k_reinforce(
            log_prob, propensities[rows], rewards[rows], top_k=top_k, cap=cap, baseline=rewards.mean() if top_k == 1 else 0.0
        ).mean()

    def step(carry, key):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits, jax.random.choice(key, len(contexts), (512,))), state)
        return (optax.apply_updates(logits, updates), state), None

    return jax.lax.scan(step, (logits, optimizer.init(logits)), jax.random.split(jax.random.key(0), steps))[0][0]


def trained(*, top_k: int, cap: float | None, seed: int = 0) -> np.ndarray:
    """Policy [X, A] trained on 20,000 rows of logs."""
    logs = WORLD.draw(20_000, seed=seed)
    return bandit.softmax(np.asarray(train(logs.contexts, logs.actions, logs.rewards, logs.propensities, top_k=top_k, cap=cap), np.float64))


@pytest.mark.parametrize("cap", [None, 5.0])
def test_off_policy_training_raises_the_true_value_and_the_estimators_see_it(cap):
    policy = trained(top_k=1, cap=cap)
    value, logging = WORLD.value(policy), WORLD.value(WORLD.logging)
    best = float((WORLD.frequency * WORLD.reward.max(1)).sum())
    assert value > logging + 0.8 * (best - logging)
    logs = WORLD.draw(20_000, seed=99)  # not those that it was trained on
    pi = policy[logs.contexts]
    target = policy_value.probability_of(pi, logs.actions)
    wide = Interval(level=0.999)
    guess = np.full(WORLD.reward.shape, logs.rewards.mean())[logs.contexts]
    for got in (
        policy_value.ips(logs.rewards, target, logs.propensities, interval=wide),
        policy_value.snips(logs.rewards, target, logs.propensities, interval=wide),
        policy_value.doubly_robust(logs.rewards, logs.actions, logs.propensities, guess, pi, interval=wide),
    ):
        assert got.low <= value <= got.high
        assert got.low > logging  # the gain is seen from the logs alone


def test_top_k_training_spreads_over_the_k_best_and_earns_more_as_a_list():
    one, three = trained(top_k=1, cap=None), trained(top_k=3, cap=None)
    assert WORLD.value(three, k=3) > WORLD.value(one, k=3) + 0.02
    assert WORLD.value(three, k=3) > WORLD.value(WORLD.logging, k=3) + 0.02
    assert WORLD.value(one) > WORLD.value(three)
    entropy = lambda policy: -(policy * np.log(np.maximum(policy, 1e-30))).sum(1).mean()
    assert entropy(three) > entropy(one) + 0.2
