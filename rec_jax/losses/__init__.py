"""Vectors -> loss: pure functions of arrays that never see params."""

from rec_jax.losses.contrastive import info_nce, weighted_info_nce
from rec_jax.losses.cross_entropy import softmax_cross_entropy, weighted_softmax_cross_entropy
from rec_jax.losses.matryoshka import matryoshka
from rec_jax.losses.pointwise import bce, bce_with_negatives
from rec_jax.losses.sigmoid import sigmoid_loss
from rec_jax.losses.softmax import Candidates
from rec_jax.losses.triplet import triplet_loss

__all__ = [
    "Candidates",
    "bce",
    "bce_with_negatives",
    "info_nce",
    "matryoshka",
    "sigmoid_loss",
    "softmax_cross_entropy",
    "triplet_loss",
    "weighted_info_nce",
    "weighted_softmax_cross_entropy",
]
