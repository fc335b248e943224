"""A student's start from its teacher: fewer layers, narrower, or no transformer at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers.bert import BertSpec, encode_texts, init
from rec_jax.types import Array, Params, RecJaxError

# A layer norm of a variance far below this epsilon divides all vectors by the same number, so that a word's vector keeps its length.
LINEAR_EPS = 100.0


def layer_map(teacher: int, student: int) -> tuple[int, ...]:
    """Numbers of layers -> the teacher's layer that each of the student's begins as, and may imitate.

    They are evenly spaced from the first to the last; a single one is the last. Of MiniLM's layers these keep more of its similarities,
    before any training, than the lowest ones or every second one.

    Raises:
      RecJaxError: a student of more layers than its teacher.
    """
    if not 0 <= student <= teacher:
        raise RecJaxError(f"a student of {student} layers cannot begin as layers of a teacher that has {teacher}")
    return tuple(int(n) for n in np.linspace(teacher - 1, 0, student).round()[::-1])


def shrink(
    text_params: Params, spec: BertSpec, *, layers: int, width: int = 0, key: jax.Array | None = None
) -> tuple[dict[str, Any], BertSpec]:
    """A teacher's parameters and spec -> a student's.

    Of the same width: the teacher's embeddings and the layers of `layer_map`. Narrower: the embeddings' tables projected on the principal
    components of the word table, and fresh layers with heads and MLP narrowed in proportion.

    Args:
      text_params, spec: the teacher's.
      layers: of the student; 0 leaves the embeddings.
      width: of the student; 0 = the teacher's.
      key: typed key of the fresh layers; needed where a narrower student has any.

    Raises:
      RecJaxError: more layers or more width than the teacher has, a width that is no whole number of its attention heads, no key.
    """
    if width in (0, spec.width):
        student = {"embeddings": text_params["embeddings"]}
        student |= {f"layer_{n}": text_params[f"layer_{m}"] for n, m in enumerate(layer_map(spec.layers, layers))}
        return student, dataclasses.replace(spec, layers=layers)
    head = spec.width // spec.heads
    if not 0 < width < spec.width or (layers and width % head):
        raise RecJaxError(
            f"student width {width}: must be below the teacher's {spec.width}, and with layers a multiple of its heads' {head}"
        )
    if layers and key is None:
        raise RecJaxError(f"a student of width {width} needs a key for its {layers} fresh layers")
    heads, mlp_width = (width // head, spec.mlp_width * width // spec.width) if layers else (1, width)
    narrow = dataclasses.replace(spec, layers=layers, width=width, heads=heads, mlp_width=mlp_width)
    components = _components(np.asarray(text_params["embeddings"]["word"]["embedding"]), width)
    # Without layers the key does not matter: every table of it is replaced.
    fresh = jax.jit(init, static_argnums=1)(jax.random.key(0) if key is None else key, narrow)
    tables = {
        name: {"embedding": jnp.asarray(np.asarray(text_params["embeddings"][name]["embedding"]) @ components)}
        for name in ("word", "position", "token_type")
    }
    return {**fresh, "embeddings": {**fresh["embeddings"], **tables}}, narrow


def static_table(text_params: Params, spec: BertSpec, *, before: Sequence[int], after: Sequence[int], block: int = 1024) -> np.ndarray:
    """A teacher's parameters -> its pooled vectors of single words [V, D] float32, on the host: what `from_table` takes.

    Args:
      text_params, spec: the teacher's.
      before, after: tokens around each word: [CLS] and [SEP], without which MiniLM's vectors of words are far worse.
      block: words encoded at a time.

    Reference: Tulkens and van Dongen 2024, "Model2Vec".
    """
    plain = dataclasses.replace(spec, normalize=False)
    encode = jax.jit(lambda params, tokens: encode_texts(params, plain, tokens, jnp.ones_like(tokens)))
    out = np.zeros((spec.vocab_size, spec.width), np.float32)
    for start in range(0, spec.vocab_size, block):
        words = np.minimum(np.arange(start, start + block), spec.vocab_size - 1)  # the last block is filled up, for one compilation
        frame = [np.full(block, token) for token in before], [np.full(block, token) for token in after]
        vectors = encode(text_params, np.stack([*frame[0], words, *frame[1]], axis=1).astype(np.int32))
        out[start : start + block] = np.asarray(vectors)[: spec.vocab_size - start]
    return out


def from_table(table: Array, spec: BertSpec, *, width: int = 0) -> tuple[dict[str, Any], BertSpec]:
    """A table of word vectors [V, D], the teacher's spec -> a student of no layers whose text vector is the mean of its words' rows.

    The rows keep their lengths, by which some words count more than others: positions start at zero, and the layer norm, which would make
    all rows alike, is made all but linear (`LINEAR_EPS`). The result is a BERT of 0 layers like any other.

    Args:
      table: e.g. of `static_table`.
      spec: the teacher's.
      width: of the student; 0 = D. A narrower one takes the table's principal components.

    Raises:
      RecJaxError: a table of another number of words, or of fewer columns than `width`.
    """
    table = np.asarray(table, np.float32)
    width = width or table.shape[1]
    if len(table) != spec.vocab_size or width > table.shape[1]:
        raise RecJaxError(f"a table of shape {table.shape} makes no student of {spec.vocab_size} words and width {width}")
    rows = table - table.mean(0)
    rows = rows if width == table.shape[1] else rows @ _components(table, width)
    student = dataclasses.replace(spec, layers=0, width=width, heads=1, mlp_width=width, layer_norm_eps=LINEAR_EPS, pooling="mean")
    embeddings = {
        "word": {"embedding": jnp.asarray(rows / rows.std())},
        "position": {"embedding": jnp.zeros((spec.max_positions, width))},
        "token_type": {"embedding": jnp.zeros((spec.type_vocab, width))},
        "norm": {"scale": jnp.full(width, LINEAR_EPS**0.5), "bias": jnp.zeros(width)},
    }
    return {"embeddings": embeddings}, student


def _components(table: np.ndarray, width: int) -> np.ndarray:
    """table [N, D] -> its first principal components [D, width] float32."""
    _, vectors = np.linalg.eigh(np.cov(table.astype(np.float64).T))
    vectors = vectors[:, ::-1][:, :width]
    # eigh leaves the sign of a vector open; the largest entry is made positive, so that every machine starts alike.
    return (vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(width)])).astype(np.float32)
