"""Packed texts -> text vectors, as the encoder makes them, before any head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers.bert import BertSpec, encode, unit_length
from rec_jax.towers.pool import pool_segments
from rec_jax.types import Array, Params


def packed_text_vectors(
    text_params: Params, spec: BertSpec, tokens: Array, segment_ids: Array, *, texts_per_row: int, keys: jax.Array | None = None
) -> jax.Array:
    """Packed tokens [R, T], segment_ids [R, T] -> text vectors [R, K, D_text]."""
    hidden = encode(text_params, spec, tokens, segment_ids, keys=keys)
    pooled = pool_segments(hidden, jnp.asarray(segment_ids), segments=texts_per_row, kind=spec.pooling)
    return unit_length(pooled) if spec.normalize else pooled


def encode_blocks(text_params: Params, spec: BertSpec, blocks: Iterable[Any], n_texts: int) -> np.ndarray:
    """Blocks of packed texts (tokens, segment_ids, texts, places, per_row) -> text vectors [N, D_text] float32, on the host."""
    vectors_of = jax.jit(packed_text_vectors, static_argnames=("spec", "texts_per_row"))
    out = np.zeros((n_texts, spec.width), np.float32)
    for block in blocks:
        vectors = vectors_of(text_params, spec, block.tokens, block.segment_ids, texts_per_row=block.per_row)
        out[block.texts] = np.asarray(vectors).reshape(-1, spec.width)[block.places]
    return out
