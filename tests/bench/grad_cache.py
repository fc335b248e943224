"""Gradient cache: compiled temporary memory of a contrastive step over B pairs of texts, in chunks and whole. Nothing is run.

    python tests/bench/grad_cache.py [--texts 256 512 1024 2048 4096] [--chunk 64]

MiniLM shapes, rows of 64 tokens with two texts each, one device. The loss's own memory is that of InfoNCE alone on B vectors; the
vectors kept are those of all texts, pooled, with their gradients. What is left must not grow with B: exponent <= 0.1, else exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import config as config_lib
from rec_jax.data.packing import texts_per_row
from rec_jax.losses import weighted_info_nce
from rec_jax.towers import BertSpec, two_tower
from rec_jax.train import objectives
from rec_jax.train.state import RNG
from rec_jax.train.step import Constants, loss_and_metrics, make_spec
from rec_jax.types import Batch

ROW_TOKENS, TEXTS_PER_ROW = 64, 2


def config() -> Any:
    """Both towers encode texts in the step; candidates are the batch."""
    c = config_lib.defaults()
    c.batch.row_tokens = ROW_TOKENS
    c.towers.dim, c.towers.text.source, c.towers.text.dropout, c.towers.user.kind = 384, "tokens", 0.1, "text"
    c.objectives.info_nce.candidates = "batch"
    config_lib.check(c)
    return c


def shapes(texts: int) -> Batch:
    """One shard with that many items, and as many queries, as abstract arrays."""
    ints = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    rows = texts // TEXTS_PER_ROW
    weights = jax.ShapeDtypeStruct((1, texts), jnp.float32)
    packed = {f"{tower}_{part}": ints(rows, ROW_TOKENS) for tower in ("item", "user") for part in ("tokens", "segments")}
    places = {"item_places": ints(texts), "user_places": ints(texts)}
    return Batch(item_ids=ints(texts), targets=ints(texts), weights=weights, examples=ints(texts), **packed, **places)


def step_bytes(texts: int, chunk_rows: int) -> int:
    """Temporary bytes of loss and gradients."""
    c = config()
    towers = two_tower.make_spec(c.towers, BertSpec(), texts_per_row=texts_per_row(ROW_TOKENS), n_items=1000)
    made = objectives.make_objectives(c.objectives.to_dict())
    spec = make_spec(towers, made, shards=1, queries=texts, chunk_rows=chunk_rows)
    learned = {name: jnp.asarray(value) for o in made for name, value in o.scalars}
    params = jax.eval_shape(lambda k: {**two_tower.init(k, towers), "scalars": learned}, jax.random.key(0))
    constants = Constants(None, jax.ShapeDtypeStruct((1000,), jnp.float32))

    def gradients(params: Any, batch: Batch, constants: Constants, rng: jax.Array) -> Any:
        key = jax.random.wrap_key_data(rng, impl=RNG)
        return jax.value_and_grad(lambda p: loss_and_metrics(p, spec, batch, constants, key)[0])(params)

    rng = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return temporaries(jax.jit(gradients).lower(params, shapes(texts), constants, rng))


def loss_bytes(texts: int) -> int:
    """Temporary bytes of InfoNCE alone."""

    def gradients(query: jax.Array, item: jax.Array, ids: jax.Array) -> Any:
        weights = jnp.full(texts, 1 / texts)
        loss = lambda q, i: weighted_info_nce(
            q, i, temperature=0.07, weights=weights, query_ids=ids, item_ids=ids, log_q=jnp.zeros(texts), item_mask=ids >= 0
        )
        return jax.value_and_grad(loss, (0, 1))(query, item)

    vectors = jax.ShapeDtypeStruct((texts, 384), jnp.float32)
    return temporaries(jax.jit(gradients).lower(vectors, vectors, jax.ShapeDtypeStruct((texts,), jnp.int32)))


def temporaries(lowered: Any) -> int:
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--chunk", type=int, default=64, help="texts that go through the encoder at a time")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; MB of temporaries, compiled")
    print(f"{'texts':>6}{'whole':>10}{'chunked':>10}{'loss':>8}{'the rest':>10}{'whole / chunked':>17}")
    rest = []
    for texts in arguments.texts:
        whole, chunked, loss = step_bytes(texts, 0), step_bytes(texts, arguments.chunk // TEXTS_PER_ROW), loss_bytes(texts)
        rest.append(chunked - loss)
        mb = [x / 1e6 for x in (whole, chunked, loss, rest[-1])]
        print(f"{texts:6}{mb[0]:10.1f}{mb[1]:10.1f}{mb[2]:8.1f}{mb[3]:10.1f}{whole / chunked:17.1f}", flush=True)
    exponent = float(np.polyfit(np.log(arguments.texts), np.log(np.maximum(rest, 1)), 1)[0])
    print(f"the rest grows with texts to the power {exponent:.3f}; must be <= 0.1")
    return int(exponent > 0.1)


if __name__ == "__main__":
    sys.exit(main())
