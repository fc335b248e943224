"""How well an encoder knows texts that it was not trained on: loss, perplexity, share of hidden words that it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers import batches
from rec_jax.train.forwards import Constants, StepSpec
from rec_jax.train.objectives.pretrain import masked_words
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Batch


class HeldOut:
    """Evaluates parameters on held-out texts, the same words hidden each time; without dropout, unless two views are compared.

    Args:
      spec: of the stage's step.
      constants: of the stage.
      make_batches: the held-out batches [1, ...], again at each call.
    """

    def __init__(self, spec: StepSpec, constants: Constants, make_batches: Callable[[], Iterable[Batch]]):
        self._make_batches = make_batches
        self._masked = any(o.masked for o in spec.objectives)
        # Two views differ by their dropout alone: then it acts here too, with the same key each time.
        key = jax.random.key(0, impl=RNG) if any(o.views for o in spec.objectives) else None

        def measure(params: Any, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
            _, metrics = loss_and_metrics(params, spec, batch, constants, key)
            texts = jnp.sum(jnp.asarray(batch.item_ids) >= 0)
            if not self._masked:
                return metrics, texts, jnp.zeros(2)
            words, weights = masked_words(batch)
            out = batches.encode_texts(params, spec.towers, batch, keys=None, masked=True)
            hidden = out.masked.reshape(-1, out.masked.shape[-1])
            guess = jnp.argmax(hidden @ out.vocabulary["table"].T.astype(hidden.dtype) + out.vocabulary["masked_bias"], axis=-1)
            return metrics, texts, jnp.stack([jnp.sum((guess == words) & (weights > 0)), jnp.sum(weights > 0)])

        self._measure = jax.jit(measure)

    def __call__(self, params: Any, *, step: int) -> dict[str, float]:
        """Parameters -> valid/NAME of each objective's loss, valid/perplexity and valid/masked_accuracy where words are hidden.

        A mean over batches, each weighted by what its loss is a mean of: hidden words, else texts.
        """
        del step
        total: dict[str, float] = {}
        weight, found = 0.0, np.zeros(2)
        for batch in self._make_batches():
            metrics, texts, hits = jax.device_get(self._measure(params, batch))
            share = float(hits[1] if self._masked else texts)
            weight, found = weight + share, found + hits
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + share * float(value)
        out = {f"valid/{name}": value / max(weight, 1.0) for name, value in total.items()}
        if self._masked:
            out["valid/perplexity"] = math.exp(min(out["valid/mlm"], 700.0))
            out["valid/masked_accuracy"] = float(found[0] / max(found[1], 1.0))
        return out
