"""Learning from logged feedback: off-policy REINFORCE, and preferences against a reference policy.

They take log-probabilities and scores, [B], not vectors: over a large catalogue log pi(a | x) is minus `softmax_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.losses.ranking import check_positive, check_same_shape, log_softmax, log_sum_exp, masked_scores, plackett_luce_loss
from rec_jax.types import Array, RecJaxError


def importance_weights(log_prob: Array, propensity: Array, *, cap: float | None = None) -> jax.Array:
    """log_prob [B], propensity [B] -> weight [B]: min(pi / propensity, cap), without gradient.

    Args:
      log_prob: [B] log-probability of the logged action under the policy that is trained.
      propensity: [B] probability with which the logging policy took it; 0 or NaN: nothing was logged there, and the weight is 0.
      cap: highest weight, > 0; bounds the variance at the price of a bias. None: none.

    Raises:
      RecJaxError: cap <= 0, shapes that do not fit.

    Reference: Ionides 2008, "Truncated Importance Sampling".
    """
    if cap is not None:
        check_positive("cap", cap)
    check_same_shape("propensity", propensity, "log_prob", np.shape(log_prob))
    log_prob = _wide(log_prob)
    propensity = jnp.asarray(propensity, log_prob.dtype)
    logged = propensity > 0
    # In logs: pi and propensity may both be too small for their ratio.
    log_ratio = jnp.where(logged, log_prob - jnp.log(jnp.where(logged, propensity, 1)), -jnp.inf)
    if cap is not None:
        log_ratio = jnp.minimum(log_ratio, jnp.log(jnp.asarray(cap, log_prob.dtype)))
    return jax.lax.stop_gradient(jnp.exp(log_ratio))


def top_k_correction(log_prob: Array, *, top_k: int) -> jax.Array:
    """log_prob [B] -> lambda_K [B] = K (1 - pi)^(K - 1), without gradient: d/d pi of the chance that one of K draws is the action.

    Raises:
      RecJaxError: top_k < 1.

    Reference: Chen et al. 2019, "Top-K Off-Policy Correction for a REINFORCE Recommender System", section 4.3.
    """
    if top_k < 1:
        raise RecJaxError(f"top_k is {top_k!r}; expected an integer >= 1, the length of the recommended list: 1 corrects nothing")
    other = jnp.maximum(-jnp.expm1(_wide(log_prob)), 0)  # 1 - pi
    return jax.lax.stop_gradient(top_k * other ** (top_k - 1))


def top_k_reinforce(
    log_prob: Array,
    propensity: Array,
    reward: Array,
    *,
    top_k: int = 1,
    cap: float | None = None,
    baseline: Any = 0.0,
    entropy: float = 0.0,
) -> jax.Array:
    """log_prob [B], propensity [B], reward [B] -> loss [B] whose gradient is minus that of the policy's value, from logged actions.

    loss = -w lambda_K (reward - baseline) log pi(a | x), with w = min(pi / propensity, cap); all but log pi are constants. Its mean
    gradient over actions of the logging policy is, without cap and baseline, exactly minus that of the expected reward of the distinct
    actions among K draws. The value itself means little: watch an estimate of the policy's value instead.

    Args:
      log_prob: [B] log-probability of the logged action under the policy, given its context: a negative `softmax_cross_entropy`.
      propensity: [B] probability with which the logging policy took the action; 0 or NaN: nothing was logged there, and the loss is 0.
      reward: [B]; NaN is not observed: the loss is 0.
      top_k: length of the recommended list; 1 is plain off-policy REINFORCE.
      cap: highest importance weight, > 0; None: none.
      baseline: scalar or [B], subtracted from the reward, without gradient; may depend on the context, never on the action. It lowers the
        variance, and moves no mean gradient where top_k is 1 and cap None.
      entropy: >= 0, reward of -log pi(a | x): its mean gradient (top_k 1, no cap) is that of the policy's entropy.

    Raises:
      RecJaxError: top_k < 1, cap <= 0, entropy < 0, shapes that do not fit.

    Reference: Chen et al. 2019, "Top-K Off-Policy Correction for a REINFORCE Recommender System", section 4.
    """
    if not entropy >= 0:
        raise RecJaxError(f"entropy is {entropy!r}; expected a number >= 0: 0 turns it off")
    shape = np.shape(log_prob)
    check_same_shape("reward", reward, "log_prob", shape)
    if np.ndim(baseline):
        check_same_shape("baseline", baseline, "log_prob (or a scalar)", shape)
    weight = importance_weights(log_prob, propensity, cap=cap) * top_k_correction(log_prob, top_k=top_k)
    log_prob = _wide(log_prob)
    reward = jnp.asarray(reward, log_prob.dtype)
    # An action that the policy never takes has weight 0 and log-probability -inf.
    counts = (weight > 0) & ~jnp.isnan(reward)
    log_prob = jnp.where(counts, log_prob, 0)
    advantage = reward - jnp.asarray(baseline, log_prob.dtype) - entropy * log_prob
    advantage = jax.lax.stop_gradient(jnp.where(counts, weight * advantage, 0))
    return -advantage * log_prob


def entropy_of(scores: Array, *, mask: Array | None = None) -> jax.Array:
    """scores [B, K] of all that can be chosen -> entropy [B] of their softmax, in nats; to be subtracted from a loss.

    Args:
      scores: [B, K] logits or log-probabilities.
      mask: [B, K] bool, False for what cannot be chosen.

    Raises:
      RecJaxError: shapes that do not fit.
    """
    scores, there = masked_scores("scores", scores, mask)
    log_p = log_softmax(scores, there)
    return -jnp.where(there, jnp.exp(log_p) * log_p, 0).sum(-1)


def preference_loss(
    chosen: Array,
    rejected: Array,
    *,
    reference_chosen: Array,
    reference_rejected: Array,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    mask: Array | None = None,
) -> jax.Array:
    """chosen [B], rejected [B, K], and the reference policy's of both -> loss [B]: the chosen one over the rejected, DPO.

    With u = beta * (score - reference's score): -log softmax of u at the chosen one among itself and the rejected. For K = 1 that is DPO's
    -log sigmoid(u_chosen - u_rejected), for more its softmax form. Log-probabilities or plain scores: the normaliser of a context cancels.

    Args:
      chosen: [B] scores of the policy that is trained.
      rejected: [B, K].
      reference_chosen, reference_rejected: [B] and [B, K] scores of the policy that it starts from; get no gradient.
      beta: how strongly the policy is held at the reference, > 0: the higher, the closer it stays.
      label_smoothing: probability that a preference is the wrong way round, in [0, 1/2); beyond 0 for K = 1 only.
      mask: [B, K] bool, False for an empty place. Without any rejected the loss is 0.

    Raises:
      RecJaxError: beta <= 0, label_smoothing outside [0, 1/2) or with several rejected, shapes that do not fit.

    Reference: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; Chen et al. 2024, "On Softmax Direct Preference Optimization
    for Recommendation" (several rejected); Mitchell 2023, "A note on DPO with noisy preferences" (smoothing).
    """
    check_positive("beta", beta)
    rejected, there = masked_scores("rejected", rejected, mask)
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and rejected.shape[-1] > 1):
        raise RecJaxError(
            f"label_smoothing is {label_smoothing!r} with {rejected.shape[-1]} rejected; expected a number in [0, 1/2), and 0 with several"
        )
    check_same_shape("chosen", chosen, "rejected without its last axis", rejected.shape[:-1])
    check_same_shape("reference_chosen", reference_chosen, "chosen", np.shape(chosen))
    check_same_shape("reference_rejected", reference_rejected, "rejected", rejected.shape)
    some = there.any(-1)
    of_chosen = _gain(jnp.where(some, _wide(chosen), 0), jnp.where(some, _wide(reference_chosen), 0))
    of_rejected = _gain(rejected, jnp.where(there, _wide(reference_rejected), 0))
    difference = jnp.where(there, beta * (of_rejected - of_chosen[..., None]), 0)
    loss = jax.nn.softplus(log_sum_exp(difference, there))
    if label_smoothing:
        # softplus(-x) = softplus(x) - x
        loss = loss - label_smoothing * difference[..., 0]
    return loss


def ranking_preference_loss(scores: Array, reference: Array, *, beta: float = 0.1, mask: Array | None = None) -> jax.Array:
    """scores [B, K] in the preferred order, best first, and the reference policy's -> loss [B]: DPO over rankings, Plackett-Luce form.

    Args:
      scores: [B, K] log-probabilities or scores of the policy that is trained.
      reference: [B, K] of the policy that it starts from, in the same order; gets no gradient.
      beta: how strongly the policy is held at the reference, > 0.
      mask: [B, K] bool, False for an empty place, wherever it stands.

    Raises:
      RecJaxError: beta <= 0, shapes that do not fit.

    Reference: Rafailov et al. 2023, "Direct Preference Optimization", appendix A.3, eq. 20.
    """
    check_positive("beta", beta)
    scores, there = masked_scores("scores", scores, mask)
    check_same_shape("reference", reference, "scores", scores.shape)
    return plackett_luce_loss(beta * _gain(scores, jnp.where(there, _wide(reference), 0)), mask=there)


def _gain(scores: Any, reference: Any) -> jax.Array:
    return scores - jax.lax.stop_gradient(reference)


def _wide(values: Array) -> jax.Array:
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
