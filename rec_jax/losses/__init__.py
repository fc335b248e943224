"""Vectors -> loss: pure functions of arrays that never see params."""

from rec_jax.losses.contrastive import info_nce, weighted_info_nce
from rec_jax.losses.cross_entropy import softmax_cross_entropy, weighted_softmax_cross_entropy
from rec_jax.losses.distill import kl_over_scores, margin_mse, rank_order_loss
from rec_jax.losses.distill_candidates import kl_over_candidates, weighted_kl_over_candidates
from rec_jax.losses.distill_vectors import (
    angle_loss,
    attention_loss,
    attention_scores,
    distance_loss,
    hidden_states_loss,
    vector_loss,
)
from rec_jax.losses.groups import group_info_nce
from rec_jax.losses.matryoshka import matryoshka
from rec_jax.losses.pointwise import (
    bce,
    bce_with_negatives,
    calibrated_logit,
    gbce_weight,
    observed,
    regression,
    sampled_bce,
)
from rec_jax.losses.policy import (
    entropy_of,
    importance_weights,
    preference_loss,
    ranking_preference_loss,
    top_k_correction,
    top_k_reinforce,
)
from rec_jax.losses.ranking import (
    bpr_loss,
    list_bpr_loss,
    list_margin_loss,
    list_softmax_loss,
    margin_loss,
    plackett_luce_loss,
    softmax_loss,
)
from rec_jax.losses.sigmoid import sigmoid_loss
from rec_jax.losses.softmax import Candidates
from rec_jax.losses.tasks import fixed_weights, task_means, uncertainty_weights
from rec_jax.losses.triplet import triplet_loss

__all__ = [
    "Candidates",
    "angle_loss",
    "attention_loss",
    "attention_scores",
    "bce",
    "bce_with_negatives",
    "bpr_loss",
    "calibrated_logit",
    "distance_loss",
    "entropy_of",
    "fixed_weights",
    "gbce_weight",
    "group_info_nce",
    "hidden_states_loss",
    "importance_weights",
    "info_nce",
    "kl_over_candidates",
    "kl_over_scores",
    "list_bpr_loss",
    "list_margin_loss",
    "list_softmax_loss",
    "margin_loss",
    "margin_mse",
    "matryoshka",
    "observed",
    "plackett_luce_loss",
    "preference_loss",
    "rank_order_loss",
    "ranking_preference_loss",
    "regression",
    "sampled_bce",
    "sigmoid_loss",
    "softmax_cross_entropy",
    "softmax_loss",
    "task_means",
    "top_k_correction",
    "top_k_reinforce",
    "triplet_loss",
    "uncertainty_weights",
    "vector_loss",
    "weighted_info_nce",
    "weighted_kl_over_candidates",
    "weighted_softmax_cross_entropy",
]
