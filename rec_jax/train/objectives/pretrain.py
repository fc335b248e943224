"""What an encoder learns from texts alone: hidden words, and whole texts from what deletion left of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import weighted_softmax_cross_entropy
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs


@dataclasses.dataclass(frozen=True)
class MaskedSpec:
    """Keys of `config.objectives.mlm`; the data does what they say."""

    rate: float
    whole_words: bool

    def __post_init__(self) -> None:
        base.check_range("mlm.rate", self.rate, above=0, below=1)


@dataclasses.dataclass(frozen=True)
class DenoiseSpec:
    """Keys of `config.objectives.denoise`; `rate` is the data's, `layers` the decoder's."""

    rate: float
    layers: int

    def __post_init__(self) -> None:
        base.check_range("denoise.rate", self.rate, above=0, below=1)
        base.check_range("denoise.layers", self.layers, least=1)


def masked_words(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The words that stood at the masked places [G * P] int32 (0 where there is none), and weights [G * P] that sum to 1."""
    places = jnp.asarray(batch.masked_places)
    shards = places.shape[0]
    words = base.lookup(jnp.asarray(batch.item_tokens).reshape(shards, -1), places).reshape(-1)
    there = (places >= 0).reshape(-1)
    return jnp.where(there, words, 0), there / jnp.maximum(there.sum(), 1)


def mlm(outputs: Outputs, batch: Batch, context: Context, spec: MaskedSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the hidden words over the whole vocabulary -> (loss, metrics).

    Reference: Devlin et al., "BERT" (2019), section 3.1, task 1.
    """
    words, weights = masked_words(batch)
    loss = _word_loss(base.flat(outputs.masked), words, weights, outputs.vocabulary, "masked_bias")
    return loss, {"mlm": loss}


def denoise(outputs: Outputs, batch: Batch, context: Context, spec: DenoiseSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of every word of the undamaged texts, told one after the other -> (loss, metrics).

    Reference: Wang, Reimers & Gurevych, "TSDAE" (2021), section 3.
    """
    there = (jnp.asarray(batch.item_segments) > 0).reshape(-1)
    words = jnp.where(there, jnp.asarray(batch.item_tokens).reshape(-1), 0)
    hidden = outputs.denoised.reshape(-1, outputs.denoised.shape[-1])
    loss = _word_loss(hidden, words, there / jnp.maximum(there.sum(), 1), outputs.vocabulary, "denoised_bias")
    return loss, {"denoise": loss}


def _word_loss(hidden: jax.Array, words: jax.Array, weights: jax.Array, vocabulary: Any, bias: str) -> jax.Array:
    # Places are split over the devices, which all hold the word table: no ring, its gradient is summed.
    table = vocabulary["table"].astype(hidden.dtype)
    return weighted_softmax_cross_entropy(hidden, table, words, weights=weights, scale=1.0, bias=vocabulary[bias])


def make_mlm(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.mlm` -> Objective."""
    return base.Objective("mlm", weight, MaskedSpec(**keys), mlm, masked=True)


def make_denoise(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.denoise` -> Objective."""
    return base.Objective("denoise", weight, DenoiseSpec(**keys), denoise, denoised=True)
