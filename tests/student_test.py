"""A student's start: its layers are the teacher's, its tables the teacher's or their principal components."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax.towers import bert, encode_texts
from rec_jax.towers.bert import encode_layers
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.student import from_table, layer_map, shrink, static_table
from rec_jax.types import RecJaxError

TEACHER = tiny.bert_spec(layers=4, normalize=True)
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (3, 9))
SEGMENTS = np.array([[1] * 4 + [2] * 5, [1] * 9, [1] * 6 + [0] * 3])


@pytest.fixture(scope="module")
def teacher():
    params = jax.jit(init_text, static_argnums=1)(jax.random.key(0), TEACHER)
    return jax.tree.map(lambda x: x * 5, params)  # so that tokens differ and layers do something


def shapes(spec):
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: init_text(jax.random.key(0), spec)))


def test_layers_are_evenly_spaced_from_the_first_to_the_last():
    assert layer_map(6, 6) == (0, 1, 2, 3, 4, 5)
    assert layer_map(6, 3) == (0, 2, 5)
    assert layer_map(12, 6) == (0, 2, 4, 7, 9, 11)
    assert layer_map(6, 2) == (0, 5)
    assert layer_map(6, 1) == (5,)
    assert layer_map(6, 0) == layer_map(0, 0) == ()
    with pytest.raises(RecJaxError, match="5 layers cannot begin as layers of a teacher that has 4"):
        layer_map(4, 5)


@pytest.mark.parametrize("layers", [0, 1, 2, 4])
def test_a_students_layers_are_its_teachers(teacher, layers):
    params, spec = shrink(teacher, TEACHER, layers=layers)
    assert spec == dataclasses.replace(TEACHER, layers=layers)
    assert jax.tree.map(jnp.shape, params) == shapes(spec)
    assert params["embeddings"] is teacher["embeddings"]
    for n, m in enumerate(layer_map(4, layers)):
        assert params[f"layer_{n}"] is teacher[f"layer_{m}"]
    if layers == 0:
        hidden = jax.jit(encode_layers, static_argnums=1)(teacher, TEACHER, TOKENS, SEGMENTS).hidden[0]
        np.testing.assert_array_equal(hidden, jax.jit(bert, static_argnums=1)(params, spec, TOKENS, SEGMENTS))


@pytest.mark.parametrize(("layers", "width"), [(0, 5), (2, 8)])
def test_narrower_tables_are_principal_components(teacher, layers, width):
    params, spec = shrink(teacher, TEACHER, layers=layers, width=width, key=jax.random.key(1))
    assert (spec.width, spec.layers, spec.heads, spec.mlp_width) == ((5, 0, 1, 5) if layers == 0 else (8, 2, 1, 16))
    assert jax.tree.map(jnp.shape, params) == shapes(spec)
    word, whole = (np.asarray(p["embeddings"]["word"]["embedding"], np.float64) for p in (params, teacher))
    covariance = np.cov(word.T)
    values = np.linalg.svd(whole - whole.mean(0), compute_uv=False)[:width] ** 2 / (len(whole) - 1)
    np.testing.assert_allclose(covariance, np.diag(values), atol=1e-5)
    position = np.asarray(params["embeddings"]["position"]["embedding"])
    # One map for all tables: what is linear in them stays so.
    projection = np.linalg.lstsq(whole, word, rcond=None)[0]
    np.testing.assert_allclose(position, np.asarray(teacher["embeddings"]["position"]["embedding"]) @ projection, atol=1e-5)
    assert np.isfinite(jax.jit(bert, static_argnums=1)(params, spec, TOKENS, SEGMENTS)).all()


def test_static_table_holds_the_teachers_vectors_of_single_words(teacher):
    plain = dataclasses.replace(TEACHER, normalize=False)
    table = static_table(teacher, TEACHER, before=[1], after=[2], block=16)
    assert table.shape == (tiny.VOCAB, 16)
    encode = jax.jit(encode_texts, static_argnums=1)
    for word in (0, 15, 16, 49):
        np.testing.assert_allclose(table[word], encode(teacher, plain, np.array([[1, word, 2]]), np.ones((1, 3)))[0], atol=1e-5)
    bare = static_table(teacher, TEACHER, before=(), after=())
    np.testing.assert_allclose(bare[7], encode(teacher, plain, np.array([[7, 0, 0]]), np.array([[1, 0, 0]]))[0], atol=1e-5)


@pytest.mark.parametrize("width", [0, 6])
def test_a_student_of_a_table_is_the_mean_of_its_rows(teacher, width):
    table = np.random.default_rng(1).normal(size=(tiny.VOCAB, 16)) * np.random.default_rng(2).uniform(0.1, 3, (tiny.VOCAB, 1))
    params, spec = from_table(table, TEACHER, width=width)
    assert (spec.layers, spec.width, spec.normalize) == (0, width or 16, True)
    assert jax.tree.map(jnp.shape, params) == shapes(spec)
    vectors = np.asarray(jax.jit(encode_texts, static_argnums=1)(params, spec, TOKENS, SEGMENTS == 1))
    rows = np.asarray(params["embeddings"]["word"]["embedding"])
    rows = rows - rows.mean(-1, keepdims=True)  # what a layer norm cannot but do
    for i in range(3):
        expected = rows[TOKENS[i][SEGMENTS[i] == 1]].mean(0)
        np.testing.assert_allclose(vectors[i], expected / np.linalg.norm(expected), atol=0.03)
    centred = table - table.mean(0)
    ours = rows @ rows.T if width else np.asarray(params["embeddings"]["word"]["embedding"]) @ params["embeddings"]["word"]["embedding"].T
    assert np.corrcoef(ours.ravel(), (centred @ centred.T).ravel())[0, 1] > (0.7 if width else 0.999)


def test_refusals(teacher):
    for width in (-1, 17, 12):
        with pytest.raises(RecJaxError, match=f"student width {width}: must be below the teacher's 16, and with layers a multiple"):
            shrink(teacher, TEACHER, layers=1, width=width, key=jax.random.key(0))
    with pytest.raises(RecJaxError, match="needs a key for its 1 fresh layers"):
        shrink(teacher, TEACHER, layers=1, width=8)
    with pytest.raises(RecJaxError, match="has 4"):
        shrink(teacher, TEACHER, layers=5)
    for shape, width in (((49, 16), 0), ((50, 16), 17)):
        with pytest.raises(RecJaxError, match=r"makes no student of 50 words"):
            from_table(np.zeros(shape), TEACHER, width=width)
