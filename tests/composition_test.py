"""Everything at once, against whole matrices in float64: the losses compose, on any number of devices and for any block size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rec_jax.losses import Candidates, info_nce, matryoshka, sigmoid_loss, triplet_loss, weighted_info_nce
from rec_jax.types import RecJaxError

B, D, K, QUEUE, HARD, ITEMS = 16, 8, 2, 24, 3, 20
VECTORS = ("query", "item", "positive", "queue", "hard")


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def data(seed=0):
    rng = np.random.default_rng(seed)
    vectors = lambda *shape: np.float32(unit(rng.normal(size=(*shape, D))))
    ids = rng.integers(0, ITEMS, (B, K)).astype(np.int32)
    log_q = np.log(rng.dirichlet(np.ones(ITEMS))).astype(np.float32)
    weights = rng.random(B).astype(np.float32)
    weights[2] = 0
    positive = vectors(B, K)
    return {
        "query": vectors(B),
        "item": positive[:, 0].copy(),
        "positive": positive,
        "queue": vectors(QUEUE),
        "hard": vectors(B, HARD),
        "target": np.stack([np.arange(B), np.roll(np.arange(B), -1)], 1).astype(np.int32),
        "there": np.concatenate([np.ones((B, 1), bool), rng.random((B, K - 1)) < 0.7], 1),
        "ids": ids,
        "queue_ids": rng.integers(-1, ITEMS, QUEUE).astype(np.int32),
        "hard_ids": rng.integers(-1, ITEMS, (B, HARD)).astype(np.int32),
        "log_q": log_q,
        "weights": weights,
    }


def ours(vectors, scale, a, *, form="standard", fast=False, **options):
    def one(query, item, positive, queue, hard):
        arguments = {
            "temperature": 1 / scale,
            "weights": a["weights"],
            "target": a["target"],
            "positive": positive,
            "positive_mask": a["there"],
            "query_ids": a["ids"],
            "item_ids": a["ids"][:, 0],
            "item_mask": a["weights"] > 0,
            "log_q": a["log_q"][a["ids"][:, 0]],
            "negatives": [Candidates(queue, a["queue_ids"], a["queue_ids"] >= 0, a["log_q"][np.maximum(a["queue_ids"], 0)])],
            "hard_negatives": hard,
            "hard_ids": a["hard_ids"],
            "form": form,
            "positive_prior": 0.05 if form == "debiased" else 0.0,
        } | options
        return weighted_info_nce(query, item, **arguments) if fast else info_nce(query, item, **arguments).sum()

    return matryoshka(one, *(vectors[name] for name in VECTORS), widths=(D // 2, D), weights=(0.5, 1.0))


def naive(vectors, scale, a, *, form="standard"):
    """By definition, on whole matrices."""
    ids, own_there = a["ids"], a["there"] & (a["weights"] != 0)[:, None]
    query_ids = ids[:, :, None]
    batch = (a["weights"] > 0)[None, :] & ~(query_ids == ids[None, None, :, 0]).any(1)
    for k in range(K):
        batch = batch & ~(own_there[:, k, None] & (a["target"][:, k, None] == np.arange(B)))
    queue = (a["queue_ids"] >= 0)[None] & ~(query_ids == a["queue_ids"][None, None]).any(1)
    hard = (a["hard_ids"] >= 0) & ~(a["hard_ids"][:, :, None] == ids[:, None, :]).any(-1)
    draws = np.log((a["weights"] > 0).sum() + (a["queue_ids"] >= 0).sum() - 1)
    correction = np.concatenate([a["log_q"][ids[:, 0]], a["log_q"][np.maximum(a["queue_ids"], 0)]]) + draws
    kept = np.concatenate([batch, queue, hard], axis=1)

    def one(query, item, positive, queue_vectors, hard_vectors):
        s = scale * jnp.concatenate([query @ item.T, query @ queue_vectors.T], axis=1) - correction
        others = jnp.concatenate([s, scale * jnp.einsum("bd,bhd->bh", query, hard_vectors)], axis=1)
        own = scale * jnp.einsum("bd,bkd->bk", query, positive)
        # Everything relative to the highest logit, so that exp stays in range.
        top = jax.lax.stop_gradient(jnp.maximum(jnp.where(kept, others, -jnp.inf).max(1, keepdims=True), own.max(1, keepdims=True)))
        rest = jnp.sum(jnp.where(kept, jnp.exp(others - top), 0), axis=1, keepdims=True)
        if form == "debiased":
            n = kept.sum(1, keepdims=True)
            mean = jnp.sum(jnp.where(own_there, jnp.exp(own - top), 0), 1, keepdims=True) / jnp.maximum(own_there.sum(1, keepdims=True), 1)
            floor = jnp.exp(jax.lax.stop_gradient(-scale) - top)
            rest = n * jnp.maximum((rest / n - 0.05 * mean) / 0.95, floor)
        denominator = rest if form == "decoupled" else rest + jnp.exp(own - top)
        losses = jnp.log(denominator) + top - own
        mean = jnp.sum(jnp.where(own_there, losses, 0), 1) / jnp.maximum(own_there.sum(1), 1)
        return jnp.sum(a["weights"] * mean)

    return matryoshka(one, *(vectors[name] for name in VECTORS), widths=(D // 2, D), weights=(0.5, 1.0))


@functools.cache
def reference(scale, form):
    a = data()
    with jax.enable_x64(True):
        vectors = {name: jnp.asarray(a[name], jnp.float64) for name in VECTORS}
        out = jax.jit(jax.value_and_grad(functools.partial(naive, a=a, form=form), (0, 1)))(vectors, jnp.float64(scale))
        return jax.tree.map(np.asarray, out)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def check(form, temperatures, tolerance=1e-5, **options):
    a = data()
    run = jax.jit(jax.value_and_grad(functools.partial(ours, a=a, form=form, **options), (0, 1)))
    for temperature in temperatures:
        scale = np.float32(1 / temperature)
        got, want = run({name: a[name] for name in VECTORS}, scale), reference(float(scale), form)
        for (path, x), (_, y) in zip(jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want), strict=True):
            limit = tolerance * max(np.max(np.abs(y)), 1e-6) * (1 if temperature >= 0.1 else 5)
            assert np.max(np.abs(x - y)) <= limit, (form, temperature, jax.tree_util.keystr(path))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("form", ["standard", "decoupled", "debiased"])
def test_positives_log_q_queue_hard_negatives_masks_and_widths_in_one_loss(form, fast):
    # The debiased form takes one sum from another, which costs digits.
    check(form, (1.0, 0.1, 0.01), tolerance=3e-5 if form == "debiased" else 1e-5, fast=fast)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_same_on_a_ring_of_devices(devices):
    check("standard", (1.0, 0.05, 0.01), mesh=mesh_of(devices), axis="data", fast=True)


def test_block_sizes_change_nothing():
    check("standard", (0.1,), block=16)


def symmetric_naive(query, item, scale, ids):
    same = (ids[:, None] == ids) & ~np.eye(len(ids), dtype=bool)
    logits = jnp.where(same, -jnp.inf, scale * query @ item.T)
    own = jnp.diagonal(logits)
    return jnp.mean(jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0) - 2 * own) / 2


@pytest.mark.parametrize("devices", [None, 8])
def test_both_directions_from_one_pass(devices):
    a = data()
    ids = a["ids"][:, 0]
    options = {} if devices is None else {"mesh": mesh_of(devices), "axis": "data"}

    def run(query, item, scale):
        return weighted_info_nce(
            query, item, temperature=1 / scale, weights=jnp.full(B, 1 / B), query_ids=ids, item_ids=ids, symmetric=True, **options
        )

    compiled = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    for scale in (1.0, 20.0, 100.0):
        with jax.enable_x64(True):
            wide = [jnp.asarray(x, jnp.float64) for x in (a["query"], a["item"], scale)]
            want = jax.tree.map(np.asarray, jax.value_and_grad(symmetric_naive, (0, 1, 2))(*wide, ids))
        for x, y in zip(jax.tree.leaves(compiled(a["query"], a["item"], np.float32(scale))), jax.tree.leaves(want), strict=True):
            assert np.max(np.abs(x - y)) <= 1e-5 * (1 if scale < 100 else 5) * max(np.max(np.abs(y)), 1e-6)
    products = str(jax.make_jaxpr(lambda q, i: run(q, i, 5.0))(a["query"], a["item"])).count("dot_general")
    assert products <= 3  # the tile's, and the positives' for each direction


def pair_logits(a):
    ids = a["ids"][:, 0]
    return ids, (ids[:, None] == ids) & ~np.eye(B, dtype=bool)


def sigmoid_naive(query, item, scale, bias, a):
    _, same = pair_logits(a)
    logits = scale * query @ item.T + bias
    own = np.eye(B, dtype=bool)
    return jnp.sum(a["weights"][:, None] * jnp.where(own, jax.nn.softplus(-logits), jnp.where(same, 0, jax.nn.softplus(logits))))


@pytest.mark.parametrize("devices", [None, 8])
def test_sigmoid_loss_equals_the_matrix(devices):
    a = data()
    options = {} if devices is None else {"mesh": mesh_of(devices), "axis": "data"}

    def run(query, item, scale, bias):
        return sigmoid_loss(query, item, scale=scale, bias=bias, weights=a["weights"], item_ids=a["ids"][:, 0], **options).sum()

    floats = (a["query"], a["item"], np.float32(10), np.float32(-3))
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in floats]
        want = jax.tree.map(np.asarray, jax.value_and_grad(sigmoid_naive, (0, 1, 2, 3))(*wide, a))
    got = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3)))(*floats)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(x - y)) <= 1e-5 * np.max(np.abs(y))


def triplet_naive(query, item, margin, mining, a):
    _, same = pair_logits(a)
    s = query @ item.T
    own = jnp.diagonal(s)[:, None]
    negative = ~same & ~np.eye(B, dtype=bool)
    hardest = jnp.where(negative, s, -jnp.inf).max(1)
    if mining == "all":
        violation = jnp.where(negative, jax.nn.relu(margin + s - own), 0)
        loss = violation.sum(1) / jnp.maximum((violation > 0).sum(1), 1)
    elif mining == "hard":
        loss = jax.nn.relu(margin + hardest - own[:, 0])
    else:
        below = jnp.where(negative & (s < own), s, -jnp.inf).max(1)
        loss = jax.nn.relu(margin + jnp.where(below > -jnp.inf, below, hardest) - own[:, 0])
    return jnp.sum(a["weights"] * loss)


@pytest.mark.parametrize("devices", [None, 8])
@pytest.mark.parametrize("mining", ["hard", "semi_hard", "all"])
def test_triplet_loss_equals_the_matrix(mining, devices):
    a = data()
    options = {} if devices is None else {"mesh": mesh_of(devices), "axis": "data"}

    def run(query, item):
        return triplet_loss(query, item, margin=0.3, mining=mining, weights=a["weights"], item_ids=a["ids"][:, 0], **options).sum()

    with jax.enable_x64(True):
        wide = [jnp.asarray(a[name], jnp.float64) for name in ("query", "item")]
        want = jax.tree.map(np.asarray, jax.value_and_grad(triplet_naive, (0, 1))(*wide, 0.3, mining, a))
    assert want[0] > 0
    got = jax.jit(jax.value_and_grad(run, (0, 1)))(a["query"], a["item"])
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(x - y)) <= 1e-5 * np.max(np.abs(y))


def test_triplet_by_hand_and_without_negatives():
    query, item = np.float32([[1, 0], [0, 1]]), np.float32([[0.9, 0], [0.8, 0.5]])
    np.testing.assert_allclose(triplet_loss(query, item, margin=0.2), [0.1, 0], atol=1e-6)
    np.testing.assert_array_equal(triplet_loss(query[:1], item[:1], margin=0.2), [0])


def test_sigmoid_by_hand():
    eye = np.eye(2, dtype=np.float32)
    want = np.log1p(np.exp(-(2 - 1))) + np.log1p(np.exp(-1))
    np.testing.assert_allclose(sigmoid_loss(eye, eye, scale=2.0, bias=-1.0), [want] * 2, rtol=1e-6)


BAD = {
    "margin": (lambda a: triplet_loss(a["query"], a["item"], margin=0), "margin is 0"),
    "mining": (lambda a: triplet_loss(a["query"], a["item"], margin=1, mining="easy"), "one of hard, semi_hard, all"),
    "scale": (lambda a: sigmoid_loss(a["query"], a["item"], scale=0.0, bias=0.0), "scale is 0.0"),
    "width": (lambda a: matryoshka(lambda q: q.sum(), a["query"], widths=(4, D + 1)), "distinct widths from 1 to 8"),
    "form": (lambda a: info_nce(a["query"], a["item"], temperature=1, form="odd"), "one of standard, decoupled, debiased"),
    "prior": (lambda a: info_nce(a["query"], a["item"], temperature=1, form="debiased", positive_prior=1), "positive_prior is 1"),
    "hard": (lambda a: info_nce(a["query"], a["item"], temperature=1, hard_negatives=a["hard"][:3]), "hard_negatives has shape"),
    "axis": (lambda a: info_nce(a["query"], a["item"], temperature=1, mesh=mesh_of(2), axis="x"), "axis 'x' is not in the mesh"),
    "positives on a mesh": (
        lambda a: info_nce(a["query"], a["item"], temperature=1, target=a["target"], mesh=mesh_of(2), axis="data"),
        "pass `positive`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        call(data())
