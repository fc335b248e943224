import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax.data.packing import pack_texts, texts_per_row
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.towers import batches, encode_texts, heads, history, places, two_tower
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.packed_texts import encode_blocks
from rec_jax.types import RecJaxError

SPEC = history.HistorySpec(dim=8, layers=2, heads=2, mlp=16, dropout=0.5, max_positions=32)


encode_batch = jax.jit(batches.encode_batch, static_argnames=("spec", "catalogue"))


def vectors(rows, places, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, places, 8)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return history.init(jax.random.key(0), SPEC)


def test_a_place_sees_only_its_past(params):
    x, ids = vectors(1, 10), jnp.ones((1, 10), jnp.int32)
    before = history.encode(params, SPEC, x, ids)
    after = history.encode(params, SPEC, x.at[:, 6:].add(5.0), ids)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(np.asarray(before[:, 6:] - after[:, 6:])).max() > 1e-3


# A layer under another, or under the mean, sees its places' own pasts, which an order makes.
SETS = [{"positions": "none", "layers": 1}, {"positions": "none", "readout": "mean", "layers": 0}]


@pytest.mark.parametrize("changes", SETS, ids=str)
def test_without_places_a_history_is_a_set(changes):
    spec = dataclasses.replace(SPEC, **changes)
    params = history.init(jax.random.key(0), spec)
    assert "position" not in params
    x, ids = vectors(2, 9), jnp.ones((2, 9), jnp.int32)
    mixed = np.random.default_rng(0).permutation(8).tolist()  # the order before the last place
    out, other = (history.encode(params, spec, v, ids) for v in (x, x[:, jnp.asarray([*mixed, 8])]))
    np.testing.assert_allclose(out[:, 8], other[:, 8], atol=1e-5)
    ordered = history.init(jax.random.key(0), SPEC)
    with_places = [history.encode(ordered, SPEC, v, ids)[:, 8] for v in (x, x[:, jnp.asarray([*mixed, 8])])]
    assert np.abs(np.asarray(with_places[0] - with_places[1])).max() > 1e-2


def test_the_mean_readout_is_the_mean_of_the_own_past():
    spec = dataclasses.replace(SPEC, positions="none", readout="mean", layers=0)
    params = history.init(jax.random.key(0), spec)
    x, ids = vectors(1, 9), jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2])
    out = np.asarray(history.encode(params, spec, x, ids))
    into = np.asarray(x[0]) * 8**0.5 @ np.asarray(params["in"]["kernel"])
    for start, place in ((0, 0), (0, 3), (4, 6)):
        mean = into[start : place + 1].mean(0)
        scaled = mean / np.sqrt((mean**2).mean() + 1e-6) * np.asarray(params["norm"]["scale"])
        np.testing.assert_allclose(out[0, place], scaled @ np.asarray(params["project"]["kernel"]), atol=1e-4)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer": "hstu"}, {"positions": "rotary"}, {"readout": "mean"}, {"readout": "mean", "layers": 0, "positions": "none"}],
    ids=str,
)
def test_a_tower_can_begin_near_its_items(changes):
    drawn = dataclasses.replace(SPEC, dim=64, mlp=128, **changes)
    x, ids = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 64)) / 8, jnp.float32), jnp.ones((3, 9), jnp.int32)
    expected = np.cumsum(x, 1) if drawn.readout == "mean" else np.asarray(x)  # of the place's own item, or of the past's mean
    cosines = []
    for spec in (dataclasses.replace(drawn, near_items=True), drawn):
        out = np.asarray(history.encode(history.init(jax.random.key(0), spec), spec, x, ids))
        cosines.append(np.sum(out * expected, -1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(expected, axis=-1))
    assert cosines[0].min() > 0.95
    assert np.abs(cosines[1]).mean() < 0.3
    near, far = (jax.tree.map(jnp.shape, history.init(jax.random.key(0), s)) for s in (spec, drawn))
    assert near == far


def test_a_tower_with_relative_positions_begins_near_its_recent_items():
    """Its newest item, and half of a mean over the history that each head makes of its part of the numbers, the first of the nearest."""
    spec = dataclasses.replace(SPEC, dim=64, heads=2, mlp=128, positions="relative", near_items=True)
    params = history.init(jax.random.key(0), spec)
    x, ids = np.random.default_rng(0).normal(size=(3, 9, 64)).astype(np.float32) / 8, jnp.ones((3, 9), jnp.int32)
    rows = np.asarray(places.distance_rows(9, spec.max_positions))
    biases = np.asarray(params["layer_1"]["distance"]["bias"])[rows]  # [9, 9, heads]
    distance = np.arange(9)[:, None] - np.arange(9)
    np.testing.assert_allclose(biases[distance >= 0][:, 0], -distance[distance >= 0] / 2, atol=1e-6)
    np.testing.assert_allclose(biases[distance >= 0][:, 1], -distance[distance >= 0] / 16, atol=1e-6)
    weights = np.where(distance[..., None] >= 0, np.exp(biases), 0)
    weights = np.repeat(weights / weights.sum(1, keepdims=True), 32, axis=-1)
    past = np.einsum("std,rtd->rsd", weights, x)
    cosine = lambda a, b: (np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()
    out = np.asarray(history.encode(params, spec, jnp.asarray(x), ids))
    assert cosine(out, x + history.PAST * past) > cosine(out, x) + 0.005
    alike = {**params["layer_0"], "query": {"kernel": jnp.zeros_like(params["layer_0"]["query"]["kernel"])}}
    out = np.asarray(history.encode({**params, "layer_0": alike}, spec, jnp.asarray(x), ids))
    assert cosine(out, x + history.PAST * past) > 0.993 > 0.99 > cosine(out, x)
    for layer in ("hstu", "attention"):  # and where the longest distance ends a range, or there is no layer
        for changes in ({"layers": 0}, {"max_positions": 3}, {"heads": 1}):
            other = history.init(jax.random.key(0), dataclasses.replace(spec, layer=layer, **changes))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other))
            if layer == "hstu" and "layer_0" in other:
                assert not np.any(other["layer_0"]["distance"]["bias"]), "SiLU would learn nothing from far below zero"


def test_packed_histories_do_not_leak(params):
    x = vectors(1, 12)
    ids = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3])
    packed = history.encode(params, SPEC, x, ids)
    alone = history.encode(params, SPEC, x[:, 5:9], jnp.ones((1, 4), jnp.int32))
    np.testing.assert_allclose(packed[:, 5:9], alone, atol=1e-5)
    other = history.encode(params, SPEC, x.at[:, :5].add(3.0), ids)
    np.testing.assert_array_equal(packed[:, 5:9], other[:, 5:9])
    assert np.isfinite(packed).all()


def test_dropout_depends_on_the_rows_key_alone(params):
    x, ids, keys = vectors(4, 6), jnp.ones((4, 6), jnp.int32), jax.random.split(jax.random.key(1), 4)
    whole = history.encode(params, SPEC, x, ids, keys=keys)
    parts = [history.encode(params, SPEC, x[i : i + 2], ids[i : i + 2], keys=keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), atol=1e-6)
    assert np.abs(np.asarray(whole - history.encode(params, SPEC, x, ids))).max() > 1e-2


def test_whitened_head_is_pca():
    table = np.random.default_rng(0).normal(size=(200, 16)) @ np.diag(np.linspace(0.1, 3, 16)) + 5
    head = heads.init(jax.random.key(0), text_width=16, dim=6, hidden=8, kind="mlp")
    out = np.asarray(heads.apply(heads.whitened(head, table), table, dim=6, hidden=8, kind="mlp"))
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(out.T), np.eye(6), atol=1e-3)
    short = np.asarray(heads.apply(heads.whitened(head, table, length=0.5), table, dim=6, hidden=8, kind="mlp"))
    assert np.sqrt((short**2).sum(1).mean()) == pytest.approx(0.5, rel=0.01)
    np.testing.assert_allclose(short * 6**0.5 / 0.5, out, atol=1e-4)
    with pytest.raises(RecJaxError, match=r"at most 4 dimensions, but towers.dim=6"):
        heads.whitened(heads.init(jax.random.key(0), text_width=4, dim=6, hidden=8, kind="linear"), table[:, :4])


def batch_and_spec(kind, source, **changes):
    c = tiny.config(**{"towers.user.kind": kind, "towers.text.source": source, **changes})
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=texts_per_row(c.batch.row_tokens), n_items=tiny.N_ITEMS)
    world = tiny.World()
    batches = Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=0, texts=tiny.tokens())
    start = two_tower.init(jax.random.key(0), spec, text_params=init_text(jax.random.key(1), tiny.bert_spec()) if spec.encode else None)
    return next(iter(batches)), spec, start


def test_item_vectors_of_a_batch_are_those_of_the_texts_alone():
    batch, spec, params = batch_and_spec("history", "tokens")
    out = encode_batch(params, spec, batch, table=None, catalogue=False, keys=None)
    texts, lengths = tiny.tokens(), tiny.tokens().lengths()
    padded = np.zeros((tiny.N_ITEMS, lengths.max()), np.int32)
    for n in range(tiny.N_ITEMS):
        padded[n, : lengths[n]] = texts[n]
    alone = two_tower.item_vectors(params, spec, encode_texts(params["text"], spec.text, padded, padded > 0))
    for g in range(8):
        there = batch.item_ids[g] >= 0
        np.testing.assert_allclose(out.item[g][there], alone[batch.item_ids[g][there]], atol=1e-5)
    blocks = list(pack_texts(texts, rows=4, row_tokens=64))
    table = encode_blocks(params["text"], spec.text, blocks, tiny.N_ITEMS)
    np.testing.assert_allclose(two_tower.item_vectors(params, spec, table), alone, atol=1e-5)


@pytest.mark.parametrize(("kind", "source"), [("history", "frozen"), ("history", "tokens"), ("text", "tokens")])
def test_shapes_and_unit_length(kind, source):
    batch, spec, params = batch_and_spec(kind, source)
    table = None if source == "tokens" else tiny.table()
    out = encode_batch(params, spec, batch, table=table, catalogue=table is not None, keys=None)
    assert out.user.shape == (*batch.targets.shape, 8)
    assert out.item.shape == (*batch.item_ids.shape, 8)
    there = batch.weights > 0
    np.testing.assert_allclose(np.linalg.norm(np.asarray(out.user)[there], axis=-1), 1, atol=1e-5)
    if table is not None:
        assert out.catalogue.shape == (tiny.N_ITEMS, 8)
        np.testing.assert_allclose(out.item[0, 0], out.catalogue[batch.item_ids[0, 0]], atol=1e-6)


def test_items_without_their_own_vectors_are_the_same_on_both_sides_of_the_loss():
    batch, spec, params = batch_and_spec("history", "frozen", **{"towers.item.ids": True, "towers.item.id_dropout": 0.5})
    params["ids"] = {"embedding": jax.random.normal(jax.random.key(2), params["ids"]["embedding"].shape)}
    row = jax.vmap(jax.vmap(jax.random.key))(np.zeros((8, 4), np.uint32))
    run = lambda keys: encode_batch(params, spec, batch, table=tiny.table(), catalogue=True, keys=keys)
    out = run({"text": row, "user": row[:, : batch.history.shape[1]], "head": row[:, :1], "ids": jax.random.key(5)})
    whole, texts = run(None).catalogue, two_tower.text_item_vectors(params, spec, tiny.table())
    alone = np.isclose(out.catalogue, texts, atol=1e-6).all(1)
    assert 0.2 < alone.mean() < 0.8
    np.testing.assert_allclose(out.catalogue, np.where(alone[:, None], texts, whole), atol=1e-6)
    there = batch.item_ids >= 0
    np.testing.assert_allclose(out.item[there], out.catalogue[batch.item_ids[there]], atol=1e-6)
    with pytest.raises(RecJaxError, match=r"config.towers.item.id_dropout=1.0: must be at least 0 and below 1"):
        batch_and_spec("history", "frozen", **{"towers.item.id_dropout": 1.0})
    with pytest.raises(RecJaxError, match=r"config.towers.item.id_dropout=0.5 drops items' own vectors: set config.towers.item.ids"):
        batch_and_spec("history", "frozen", **{"towers.item.id_dropout": 0.5})
    with pytest.raises(RecJaxError, match=r"config.towers.item.text_length=-1.0: must be at least 0"):
        batch_and_spec("history", "frozen", **{"towers.item.text_length": -1.0})


def test_gradients_reach_every_weight_of_the_encoder():
    batch, spec, params = batch_and_spec("history", "tokens")

    def loss(p):
        out = encode_batch(p, spec, batch, table=None, catalogue=False, keys=None)
        return jnp.sum(out.user * batch.weights[..., None] * jnp.arange(8.0))

    grads = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
    still = {jax.tree_util.keystr(path) for path, g in grads if not np.abs(np.asarray(g)).max() > 0}
    # Softmax over keys does not see a constant, so a key bias has no gradient but rounding; nothing else may be still.
    assert not [name for name in still if "key" not in name], still


def test_user_vectors_for_ranking_are_those_of_training():
    batch, spec, params = batch_and_spec("history", "frozen")
    out = encode_batch(params, spec, batch, table=tiny.table(), catalogue=True, keys=None)
    segment = batch.history_segments[0, 0] == 1
    ids = batch.item_ids[0][batch.history[0, 0][segment]]
    histories = np.full((2, 20), -1, np.int32)
    histories[0, : len(ids)] = ids
    ranked = two_tower.user_vectors(params, spec, out.catalogue, histories)
    np.testing.assert_allclose(ranked[0], out.user[0][np.flatnonzero(segment)[-1]], atol=1e-5)
    np.testing.assert_array_equal(ranked[1], np.zeros(8))


def test_a_catalogue_needs_a_table():
    batch, spec, params = batch_and_spec("history", "frozen")
    with pytest.raises(RecJaxError, match="need a table of text vectors"):
        encode_batch(params, spec, batch, table=None, catalogue=True, keys=None)
    with pytest.raises(RecJaxError, match="written-out histories"):
        two_tower.user_vectors(params, dataclasses.replace(spec, history=None), np.zeros((3, 8)), np.zeros((1, 2), np.int32))
