"""Policy gradients against an enumerable bandit's true gradient; preference losses by hand and against naive float64 forms."""

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax import losses
from rec_jax.types import RecJaxError

X, A = 3, 5  # contexts and actions of the bandit


def bandit(seed=0):
    rng = np.random.default_rng(seed)
    logits = np.float32(rng.normal(size=(X, A)))
    logging = np.float32(rng.dirichlet(np.ones(A), X))
    reward = np.float32(rng.random((X, A)))
    return logits, logging, reward


def expected_loss(logits, logging, reward, **options):
    """Mean of the loss over contexts and over actions of the logging policy: every (context, action) by its probability."""
    flat = lambda x: jnp.reshape(x, -1)
    loss = losses.top_k_reinforce(flat(jax.nn.log_softmax(logits)), flat(logging), flat(reward), **options)
    return jnp.sum(flat(logging) * loss) / X


def value(logits, reward, top_k=1, entropy=0.0):
    """True value: expected reward of the distinct actions among K draws, and the entropy's share."""
    policy = jax.nn.softmax(logits)
    shown = 1 - (1 - policy) ** top_k
    return jnp.sum(shown * reward) / X - entropy * jnp.sum(policy * jnp.log(policy)) / X


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 8}, {"entropy": 0.3}])
def test_the_mean_gradient_is_the_true_policy_gradient(options):
    logits, logging, reward = bandit()
    got = jax.jit(jax.grad(lambda x: expected_loss(x, logging, reward, **options)))(logits)
    with jax.enable_x64(True):
        want = jax.grad(lambda x: -value(x, jnp.float64(reward), **options))(jnp.float64(logits))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_a_baseline_moves_no_mean_and_lowers_the_variance():
    logits, logging, reward = bandit()
    reward = reward + 5
    mean_gradient = jax.jit(jax.grad(lambda x, b: expected_loss(x, logging, reward, baseline=b)))
    based = mean_gradient(logits, np.repeat(reward.mean(1), A))
    np.testing.assert_allclose(based, mean_gradient(logits, np.zeros(X * A)), rtol=1e-3, atol=1e-5)

    @jax.jit
    def spread(baseline):
        loss = lambda x: losses.top_k_reinforce(jax.nn.log_softmax(x), logging[0], reward[0], baseline=baseline)
        per_action = jax.jacobian(loss)(logits[0])
        return logging[0] @ jnp.square(per_action - logging[0] @ per_action).sum(1)

    assert spread(reward[0].mean()) < spread(0.0) / 2


def test_ascent_on_logged_feedback_raises_the_true_value():
    logits, logging, reward = bandit()
    step = jax.jit(jax.grad(lambda x: expected_loss(x, logging, reward)))
    before = value(logits, reward)
    for _ in range(200):
        logits = logits - 2.0 * step(logits)
    assert value(logits, reward) > before + 0.1
    assert value(logits, reward) > 0.9 * reward.max(1).mean()


def test_reinforce_by_hand():
    log_prob = np.log(np.float32([0.5, 0.2]))
    propensity, reward = np.float32([0.25, 0.4]), np.float32([1, 3])
    np.testing.assert_allclose(losses.importance_weights(log_prob, propensity), [2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(losses.importance_weights(log_prob, propensity, cap=1.5), [1.5, 0.5], rtol=1e-6)
    # K = 3: 3 (1 - 0.5)^2 = 0.75, 3 * 0.8^2 = 1.92
    np.testing.assert_allclose(losses.top_k_correction(log_prob, top_k=3), [0.75, 1.92], rtol=1e-6)
    np.testing.assert_array_equal(losses.top_k_correction(np.float32([0, -np.inf]), top_k=1), [1, 1])
    # d loss / d log pi = -w lambda (reward - baseline): -1.5 * 0.75 * 0.5 and -0.5 * 1.92 * 2.5
    loss = lambda x: losses.top_k_reinforce(x, propensity, reward, top_k=3, cap=1.5, baseline=0.5)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(log_prob), [-0.5625, -2.4], rtol=1e-6)
    np.testing.assert_allclose(loss(log_prob), [-0.5625 * np.log(0.5), -2.4 * np.log(0.2)], rtol=1e-6)


def test_reinforce_equals_naive_float64():
    rng = np.random.default_rng(1)
    log_prob, propensity, reward = np.log(rng.random(9)), rng.random(9), rng.normal(size=9)
    fixed = np.float32(log_prob).astype(np.float64)  # what is no gradient's business is a constant

    def naive(log_prob):
        weight = np.minimum(np.exp(fixed) / propensity, 2) * 4 * (1 - np.exp(fixed)) ** 3
        return -weight * (reward - 0.2 - 0.1 * fixed) * log_prob

    float64.assert_equal(
        lambda log_prob: losses.top_k_reinforce(log_prob, propensity, reward, top_k=4, cap=2.0, baseline=0.2, entropy=0.1),
        naive,
        {"log_prob": np.float32(log_prob)},
    )


def test_what_was_not_logged_or_not_observed_adds_nothing():
    log_prob = np.float32([-1, np.nan, -1, -1, -np.inf])
    propensity, reward = np.float32([0.5, 0, np.nan, 0.5, 0.5]), np.float32([1, 1, 1, np.nan, 1])
    loss = lambda x: losses.top_k_reinforce(x, propensity, reward, top_k=2, entropy=0.1)
    np.testing.assert_array_equal(loss(log_prob)[1:], 0)
    gradient = jax.grad(lambda x: loss(x).sum())(log_prob)
    np.testing.assert_array_equal(gradient[1:], 0)
    assert gradient[0] < 0
    # probabilities too small for float32 have a ratio that is not
    tiny = losses.importance_weights(np.float32([-60]), np.float32([2e-26]))
    np.testing.assert_allclose(tiny, np.exp(-60) / 2e-26, rtol=1e-5)


def test_entropy():
    # even over 4: log 4; 3/4 and 1/4: log 4 - 3/4 log 3
    np.testing.assert_allclose(losses.entropy_of(np.zeros((1, 4))), [np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(losses.entropy_of(np.log([[3.0, 1.0]])), [np.log(4) - 0.75 * np.log(3)], rtol=1e-6)
    rng = np.random.default_rng(0)
    scores, mask = np.float32(rng.normal(size=(3, 6))), np.ones((3, 6), bool)
    mask[0, 2:], mask[1] = False, False

    def naive(scores):
        out = []
        for i in range(3):
            p = np.exp(scores[i][mask[i]]) / np.exp(scores[i][mask[i]]).sum()
            out.append(-np.sum(p * np.log(p)))
        return np.stack(out)

    float64.assert_equal(lambda scores: losses.entropy_of(scores, mask=mask), naive, {"scores": scores})
    entropy = jax.jit(lambda x: losses.entropy_of(x, mask=mask))
    np.testing.assert_array_equal(entropy(np.where(mask, scores, np.nan)), entropy(scores))


def preferences(seed=0):
    rng = np.random.default_rng(seed)
    b, k = 4, 3
    mask = np.ones((b, k), bool)
    mask[0, 1], mask[2] = False, False
    f32 = lambda *shape: np.float32(rng.normal(size=shape))
    return {"chosen": f32(b), "rejected": f32(b, k), "reference_chosen": f32(b), "reference_rejected": f32(b, k)}, mask


def test_preferences_by_hand():
    # beta 1, gains log 3 and 0: sigmoid(log 3) = 3/4; smoothed by 0.1: 0.9 log 4/3 + 0.1 log 4
    pair = {"chosen": np.log(np.float32([6])), "rejected": np.log(np.float32([[5]]))}
    reference = {"reference_chosen": np.log(np.float32([2])), "reference_rejected": np.log(np.float32([[5]]))}
    np.testing.assert_allclose(losses.preference_loss(**pair, **reference, beta=1.0), [np.log(4 / 3)], rtol=1e-5)
    smooth = losses.preference_loss(**pair, **reference, beta=1.0, label_smoothing=0.1)
    np.testing.assert_allclose(smooth, [0.9 * np.log(4 / 3) + 0.1 * np.log(4)], rtol=1e-5)
    # at the reference itself a pair has log 2, K rejected log(1 + K), a ranking of 3 log 3!
    same = np.float32([[0.3, 1, -2]])
    at_reference = losses.preference_loss(same[:, 0], same, reference_chosen=same[:, 0], reference_rejected=same)
    np.testing.assert_allclose(at_reference, [np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(losses.ranking_preference_loss(same, same), [np.log(6)], rtol=1e-6)
    # gains log 3, 0 twice over: a ranking of two is a pair
    two = losses.ranking_preference_loss(np.log(np.float32([[6, 5]])), np.log(np.float32([[2, 5]])), beta=1.0)
    np.testing.assert_allclose(two, [np.log(4 / 3)], rtol=1e-5)


def test_preferences_equal_naive_float64():
    floats, mask = preferences()
    reference = {k: np.float64(v) for k, v in floats.items() if k.startswith("reference")}

    def naive(chosen, rejected):
        out = []
        for i in range(len(mask)):
            gain = 0.5 * (chosen[i] - reference["reference_chosen"][i])
            others = [0.5 * (rejected[i, j] - reference["reference_rejected"][i, j]) for j in np.flatnonzero(mask[i])]
            out.append(np.log(1 + sum(np.exp(o - gain) for o in others)))
        return np.stack(out)

    trained = {k: floats[k] for k in ("chosen", "rejected")}
    float64.assert_equal(lambda **f: losses.preference_loss(**(floats | f), beta=0.5, mask=mask), naive, trained)

    def ranking(scores):
        out = []
        for i in range(len(mask)):
            u = 0.5 * (scores[i] - reference["reference_rejected"][i])[mask[i]]
            out.append(sum(np.log(np.sum(np.exp(u[k:]))) - u[k] for k in range(len(u))))
        return np.stack(out)

    loss = lambda scores: losses.ranking_preference_loss(scores, floats["reference_rejected"], beta=0.5, mask=mask)
    float64.assert_equal(loss, ranking, {"scores": floats["rejected"]})


def test_smoothed_preferences_equal_naive_float64():
    floats, _ = preferences()
    one = {k: v[:, :1] if v.ndim == 2 else v for k, v in floats.items()}

    def naive(chosen, rejected):
        gain = (chosen - np.float64(one["reference_chosen"])) - (rejected - np.float64(one["reference_rejected"]))[:, 0]
        p = 1 / (1 + np.exp(-0.1 * gain))
        return -0.8 * np.log(p) - 0.2 * np.log(1 - p)

    trained = {k: one[k] for k in ("chosen", "rejected")}
    float64.assert_equal(lambda **f: losses.preference_loss(**(one | f), label_smoothing=0.2), naive, trained)


def test_masked_preferences_reach_nothing_and_the_reference_gets_no_gradient():
    floats, mask = preferences()
    garbage = {k: np.where(mask, v, np.nan) if v.ndim == 2 else np.where(mask.any(1), v, np.nan) for k, v in floats.items()}
    run = lambda f: losses.preference_loss(**f, mask=mask).sum()
    grad = jax.jit(jax.value_and_grad(run))
    value, gradients = grad(garbage)
    jax.tree.map(np.testing.assert_array_equal, (value, gradients), grad(floats))
    np.testing.assert_array_equal(gradients["reference_chosen"], 0)
    np.testing.assert_array_equal(gradients["reference_rejected"], 0)
    d_reference = jax.grad(lambda r: losses.ranking_preference_loss(floats["rejected"], r).sum())(floats["reference_rejected"])
    np.testing.assert_array_equal(d_reference, 0)
    # a normaliser of the context cancels: plain scores do as well as log-probabilities
    shifted = {k: v + 7 for k, v in floats.items()}
    np.testing.assert_allclose(losses.preference_loss(**shifted), losses.preference_loss(**floats), rtol=1e-5)


P, ONES = np.full(2, -1.0, np.float32), np.ones((2, 3), np.float32)
PAIRS = {"chosen": ONES[:, 0], "rejected": ONES, "reference_chosen": ONES[:, 0], "reference_rejected": ONES}
BAD = {
    "top_k": (lambda: losses.top_k_reinforce(P, P, P, top_k=0), "top_k is 0; expected an integer >= 1"),
    "cap": (lambda: losses.top_k_reinforce(P, P, P, cap=0), "cap is 0; expected a number > 0"),
    "entropy": (lambda: losses.top_k_reinforce(P, P, P, entropy=-1), "entropy is -1; expected a number >= 0"),
    "propensity": (lambda: losses.top_k_reinforce(P, P[:1], P), r"propensity has shape \(1,\); expected \(2,\), that of log_prob"),
    "reward": (lambda: losses.top_k_reinforce(P, P, P[:1]), r"reward has shape \(1,\)"),
    "baseline": (lambda: losses.top_k_reinforce(P, P, P, baseline=np.ones(3)), r"baseline has shape \(3,\)"),
    "beta": (lambda: losses.preference_loss(**PAIRS, beta=0), "beta is 0; expected a number > 0"),
    "ranking beta": (lambda: losses.ranking_preference_loss(ONES, ONES, beta=-1), "beta is -1"),
    "smoothing": (lambda: losses.preference_loss(**PAIRS, label_smoothing=0.1), "label_smoothing is 0.1 with 3 rejected"),
    "chosen": (lambda: losses.preference_loss(**(PAIRS | {"chosen": ONES})), r"chosen has shape \(2, 3\); expected \(2,\)"),
    "reference": (lambda: losses.preference_loss(**(PAIRS | {"reference_rejected": ONES[:, :1]})), "reference_rejected has shape"),
    "ranking": (lambda: losses.ranking_preference_loss(ONES, ONES[0]), "reference has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        call()
