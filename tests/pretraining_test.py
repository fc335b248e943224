"""Masked language model's head and denoising decoder against plain float64 references, and what a text may not see."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rec_jax.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated
from rec_jax.towers import bert
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.pool import pool_segments
from rec_jax.towers.pretraining import decode, init_decoder, init_mlm, masked_hidden, word_table
from rec_jax.types import RecJaxError

SPEC = tiny.bert_spec(layers=1)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0], [1] * 6 + [2] * 7])
TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB, SEGMENTS.shape)


def shaken(params, seed: int = 0):
    """Biases and scales away from their first values."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(leaf + 0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


run = jax.jit(decode, static_argnums=2)


@pytest.fixture(scope="module")
def text():
    return shaken(jax.jit(init_text, static_argnums=1)(jax.random.key(0), SPEC))


@pytest.fixture(scope="module")
def first_decoder():
    """As drawn."""
    return jax.jit(lambda key: init_decoder(key, SPEC, layers=2))(jax.random.key(1))


@pytest.fixture(scope="module")
def decoder(first_decoder):
    return shaken(first_decoder, 1)


# -- plain float64 --


def dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + SPEC.layer_norm_eps) * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"])


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def transform(p, x):
    return norm(p["norm"], gelu(dense(p["transform"], x)))


def told_one_by_one(decoder, text, pooled, tokens) -> np.ndarray:
    """One text [T] and its pooled vector [D] -> hidden [T, D]; what a place sees is cut out, not masked."""
    rows = {name: np.asarray(text["embeddings"][name]["embedding"], np.float64) for name in ("word", "position", "token_type")}
    told = [SPEC.pad_id, *tokens[:-1]]
    x = norm(text["embeddings"]["norm"], rows["word"][told] + rows["position"][: len(tokens)] + rows["token_type"][0])
    for n in range(sum(name.startswith("layer") for name in decoder)):
        p, width = decoder[f"layer_{n}"], SPEC.width // SPEC.heads
        q, k, v = (dense(p["attention"][role], x).reshape(len(x), SPEC.heads, width) for role in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for t in range(len(x)):
            for h in range(SPEC.heads):
                scores = np.exp(k[: t + 1, h] @ q[t, h] / math.sqrt(width))
                mixed[t, h] = scores / scores.sum() @ v[: t + 1, h]
        x = norm(p["attention_norm"], x + dense(p["attention"]["out"], mixed.reshape(len(x), -1)))
        x = norm(p["memory_norm"], x + dense(p["memory"], np.asarray(pooled, np.float64)))
        x = norm(p["mlp_norm"], x + dense(p["mlp"]["down"], gelu(dense(p["mlp"]["up"], x))))
    return transform(decoder, x)


# -- masked language model --


def test_masked_hidden_equals_the_reference():
    head, random = shaken(jax.jit(init_mlm, static_argnums=1)(jax.random.key(0), SPEC)), np.random.default_rng(1)
    hidden = random.normal(size=(2, 3, 5, SPEC.width)).astype(np.float32)
    places = np.array([[0, 7, 14, -1], [3, 3, 12, 1]])
    got = jax.jit(masked_hidden, static_argnums=1)(head, SPEC, hidden, places)
    assert got.shape == (2, 4, SPEC.width)
    for g, p in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)):
        expected = transform(head, hidden[g].reshape(15, -1)[places[g, p]].astype(np.float64))
        np.testing.assert_allclose(got[g, p], expected, atol=1e-5)
    np.testing.assert_array_equal(got[0, 3], got[0, 0])
    half = masked_hidden(head, dataclasses.replace(SPEC, dtype="bfloat16"), hidden, places)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), got, atol=0.1)


def test_init_mlm_is_tied_and_starts_small(text):
    head = init_mlm(jax.random.key(0), SPEC)
    assert jax.tree.map(jnp.shape, head) == {
        "transform": {"kernel": (16, 16), "bias": (16,)},
        "norm": {"scale": (16,), "bias": (16,)},
        "bias": (tiny.VOCAB,),
    }
    assert 0.01 < float(head["transform"]["kernel"].std()) < 0.03
    assert word_table(text) is text["embeddings"]["word"]["embedding"]


def test_masked_places_are_found_without_asking_another_device():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    head = jax.device_put(init_mlm(jax.random.key(0), SPEC), replicated(mesh))
    hidden = jax.device_put(jnp.ones((8, 2, 6, SPEC.width)), batch_sharding(mesh))
    places = jax.device_put(jnp.ones((8, 3), jnp.int32), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(masked_hidden, static_argnums=1).lower(head, SPEC, hidden, places).compile()
        text = compiled.as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter") if name in text]
    assert compiled(head, hidden, places).sharding.spec == jax.sharding.PartitionSpec(BATCH_AXES)


def test_masked_hidden_refuses_flat_rows():
    with pytest.raises(RecJaxError, match=r"\[G, R, T, D\].*\(3, 5, 16\)"):
        masked_hidden(init_mlm(jax.random.key(0), SPEC), SPEC, np.zeros((3, 5, 16)), np.zeros((3, 2), int))


# -- denoising auto-encoder --


def pooled_vectors(seed: int = 2):
    return np.random.default_rng(seed).normal(size=(2, 3, SPEC.width)).astype(np.float32)


def test_decode_equals_the_reference_packed_and_alone(text, decoder):
    pooled = pooled_vectors()
    packed = np.asarray(run(decoder, text, SPEC, pooled, TOKENS, SEGMENTS))
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2)):
        mine, vector = SEGMENTS[row] == segment, pooled[row, segment - 1]
        np.testing.assert_allclose(packed[row, mine], told_one_by_one(decoder, text, vector, TOKENS[row, mine]), atol=1e-4)
        alone, there = np.zeros((2, 13), int), np.zeros((2, 13), int)
        alone[0, : mine.sum()], there[0, : mine.sum()] = TOKENS[row, mine], 1
        hidden = run(decoder, text, SPEC, np.broadcast_to(vector, (2, 3, 16)), alone, there)
        np.testing.assert_allclose(packed[row, mine], hidden[0, : mine.sum()], atol=1e-5)
    assert (packed[SEGMENTS == 0] == 0).all()


def test_a_place_sees_neither_its_own_token_nor_later_ones_nor_other_texts(text, decoder):
    pooled = pooled_vectors()
    before = np.asarray(run(decoder, text, SPEC, pooled, TOKENS, SEGMENTS))
    changed = TOKENS.copy()
    changed[0, 5] = (changed[0, 5] + 1) % tiny.VOCAB  # the middle token of the second text
    differs = (before != np.asarray(run(decoder, text, SPEC, pooled, changed, SEGMENTS))).any(-1)
    np.testing.assert_array_equal(np.flatnonzero(differs[0]), [6])
    assert not differs[1].any()
    other = pooled.copy()
    other[0, 1] += 1.0
    differs = (before != np.asarray(run(decoder, text, SPEC, other, TOKENS, SEGMENTS))).any(-1)
    np.testing.assert_array_equal(np.flatnonzero(differs[0]), [4, 5, 6])
    assert not differs[1].any()


def test_decoder_has_random_layers_of_its_own_and_dropout_by_row(text, first_decoder, decoder):
    params = first_decoder
    assert not np.array_equal(params["layer_0"]["memory"]["kernel"], params["layer_1"]["memory"]["kernel"])
    assert params["bias"].shape == (tiny.VOCAB,)
    spec, keys, pooled = dataclasses.replace(SPEC, dropout=0.3), jax.random.split(jax.random.key(3), 2), pooled_vectors()
    whole = np.asarray(run(decoder, text, spec, pooled, TOKENS, SEGMENTS, keys=keys))
    turned = run(decoder, text, spec, pooled[::-1], TOKENS[::-1], SEGMENTS[::-1], keys=keys[::-1])
    np.testing.assert_allclose(whole[::-1], turned, atol=1e-5)
    assert np.abs(whole - run(decoder, text, SPEC, pooled, TOKENS, SEGMENTS)).max() > 0.1


def test_decode_and_init_decoder_refuse(text, decoder):
    with pytest.raises(RecJaxError, match="0 layers"):
        init_decoder(jax.random.key(0), SPEC, layers=0)
    with pytest.raises(RecJaxError, match=r"\(1, 3, 16\), \(2, 13\)"):
        decode(decoder, text, SPEC, pooled_vectors()[:1], TOKENS, SEGMENTS)


@pytest.mark.parametrize("objective", ["mlm", "denoise"])
def test_both_learn_a_few_texts_by_heart(objective):
    random = np.random.default_rng(5)
    tokens, segments = random.integers(3, tiny.VOCAB, (4, 16)), np.tile(np.repeat([1, 2], 8), (4, 1))
    places = np.array([[1, 6, 9, 14, 17, 22, 27, 30, 33, 40, 50, 61]])
    masked = tokens.copy()
    masked.reshape(1, -1)[0, places[0]] = 2
    gone = np.tile(np.arange(16) % 2, (4, 1))  # every other token is deleted

    @jax.jit
    def start(key):
        head = init_mlm(key, SPEC) if objective == "mlm" else init_decoder(key, SPEC, layers=1)
        return {"text": init_text(key, SPEC), "head": head}

    optimizer = optax.adam(1e-2)

    def words(state, hidden, target):
        logits = hidden @ word_table(state["text"]).T + state["head"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    def loss(state, told=tokens):
        if objective == "mlm":
            hidden = bert(state["text"], SPEC, masked, segments)
            return words(state, masked_hidden(state["head"], SPEC, hidden[None], places)[0], tokens.reshape(-1)[places[0]])
        left = np.where(gone, 0, segments)
        pooled = pool_segments(bert(state["text"], SPEC, told, left), jnp.asarray(left), segments=2, kind="mean")
        return words(state, decode(state["head"], state["text"], SPEC, pooled, tokens, segments), tokens)

    @jax.jit
    def train(state):
        def step(carry, _):
            state, memory = carry
            value, gradients = jax.value_and_grad(loss)(state)
            updates, memory = optimizer.update(gradients, memory)
            return (optax.apply_updates(state, updates), memory), value

        return jax.lax.scan(step, (state, optimizer.init(state)), None, length=200)

    (state, _), losses = train(start(jax.random.key(0)))
    assert losses[0] > 3.0
    assert losses[-1] < 0.02
    if objective == "denoise":  # it was the pooled vector that told the decoder which text it is
        assert jax.jit(loss)(state, told=np.roll(tokens, 1, axis=0)) > 1.0
