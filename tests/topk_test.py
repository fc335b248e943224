"""Top-k and ranks against plain NumPy, with ties, exclusions and several targets; bitwise equal over block sizes and devices."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax import topk
from rec_jax.types import RecJaxError

N, D, Q, K = 1003, 16, 13, 37


def make(seed=0, *, whole=True, n=N, q=Q, d=D):
    """Vectors of small whole numbers: every dot product is exact in float32, and ties are everywhere."""
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-2, 3, shape)) if whole else (lambda shape: rng.normal(size=shape))
    query, item = draw((q, d)).astype(np.float32), draw((n, d)).astype(np.float32)
    exclude = rng.integers(-1, n, (q, 50)).astype(np.int32)  # with repeats and padding in the middle
    target = np.stack([rng.permutation(n)[:5] for _ in range(q)]).astype(np.int32)
    target[::3, 3:] = -1
    target[1, 0] = exclude[1, 0] = 7  # a target that is excluded too
    target[1, 1:] = [8, 9, 10, 11]
    return query, item, exclude, target


def naive_top_k(scores, k, exclude=None):
    scores = scores.copy()
    if exclude is not None:
        for row, ids in zip(scores, exclude, strict=True):
            row[ids[ids >= 0]] = -np.inf
    order = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])
    best = np.take_along_axis(scores, order, axis=1)
    return best, np.where(best == -np.inf, -1, order)


def naive_ranks(scores, target, exclude=None):
    out = np.zeros_like(target)
    for row in range(len(target)):
        targets = [t for t in target[row] if t >= 0]
        gone = set() if exclude is None else set(exclude[row].tolist())
        for place, t in enumerate(target[row]):
            if t < 0:
                continue
            rank = 1
            for item in range(scores.shape[1]):
                if item not in targets and item not in gone and scores[row, item] >= scores[row, t]:
                    rank += 1
            for other_place, other in enumerate(target[row]):
                if other >= 0 and other != t:
                    higher = scores[row, other] > scores[row, t]
                    rank += higher or (scores[row, other] == scores[row, t] and other_place < place)
            out[row, place] = rank
    return out


@pytest.mark.parametrize("block", [1, 300, 16384])
def test_top_k_is_numpys_with_the_lower_id_first_on_ties(block):
    query, item, exclude, _ = make()
    for left_out in (None, exclude):
        scores, ids = topk.top_k(query, item, k=K, block=block, exclude=left_out)
        expected_scores, expected_ids = naive_top_k(query @ item.T, K, left_out)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(scores, expected_scores)
    assert ids.dtype == jnp.int32
    assert scores.dtype == jnp.float32


@pytest.mark.parametrize("k", [1, 4, 8])
def test_groups_sorted_out_by_their_maxima_lose_nothing(k):
    """Few enough results for the short list (2 x k x 16 <= block), with ties within and between groups, and a NaN in the last block."""
    query, item, exclude, _ = make(4)
    assert 2 * k * topk.GROUP <= 256
    for block in (256, 16384):
        scores, ids = topk.top_k(query, item, k=k, block=block, exclude=exclude)
        expected_scores, expected_ids = naive_top_k(query @ item.T, k, exclude)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(scores, expected_scores)
    for place in (0, 255, 900, N - 1):
        broken = item.copy()
        broken[place, 0] = np.nan
        with pytest.raises(RecJaxError, match="NaN score"):
            topk.top_k(query, broken, k=k, block=256)


@pytest.mark.parametrize("block", [300, 16384])
def test_ranks_are_those_of_the_definition(block):
    query, item, exclude, target = make()
    scores = query @ item.T
    out = topk.rank_and_top_k(query, item, target, k=K, block=block, exclude=exclude)
    np.testing.assert_array_equal(out.ranks, naive_ranks(scores, target, exclude))
    np.testing.assert_array_equal(out.ranks_all, naive_ranks(scores, target))
    np.testing.assert_array_equal(topk.target_ranks(query, item, target, block=block), out.ranks_all)
    np.testing.assert_array_equal(topk.ranks_from_scores(scores, target, exclude), out.ranks)
    dense = topk.rank_and_top_k_of_scores(scores, target, k=K, exclude=exclude)
    for a, b in zip(dense, out, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = np.where((exclude[:, :, None] == target[:, None, :]).any(-1), -1, exclude)
    np.testing.assert_array_equal(out.ids, naive_top_k(scores, K, kept)[1])


def test_ties_never_favour_the_target():
    query, item = np.ones((1, 4), np.float32), np.ones((10, 4), np.float32)
    assert topk.target_ranks(query, item, np.array([[0]])).tolist() == [[10]]
    assert topk.target_ranks(query, item, np.array([[9, 0]])).tolist() == [[9, 10]]
    assert topk.target_ranks(query, item, np.array([[0]]), exclude=np.array([[0, 1, 1, -1]])).tolist() == [[9]]
    assert topk.ranks_from_scores(np.array([[0.0, -0.0]], np.float32), np.array([[0]])).tolist() == [[2]]
    assert topk.ranks_from_scores(np.array([[-0.0, 0.0]], np.float32), np.array([[1]])).tolist() == [[2]]
    assert topk.top_k(np.array([[-1.0]], np.float32), np.array([[0.0], [-0.0]], np.float32), k=2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("d", [24, 100, 384])
def test_a_twin_ties_exactly_wherever_it_stands(d):
    """Scores with rounding: the twin is in another block and another column than the target."""
    query, item, _, _ = make(1, whole=False, n=1500, d=d)
    for twin in (0, 129, 1498):
        twins = item.copy()
        twins[twin] = twins[1499]
        alone = topk.target_ranks(query, np.delete(twins, twin, axis=0), np.full((Q, 1), 1498), block=256)
        together = topk.target_ranks(query, twins, np.full((Q, 1), 1499), block=256)
        np.testing.assert_array_equal(together, alone + 1)


def bits(x):
    return np.asarray(x).tobytes()


def crowd(d=24):
    """Scores with rounding, and twins that stand on different devices."""
    query, item, exclude, target = make(2, whole=False, d=d)
    item[500:900] = item[:400]
    bias = np.random.default_rng(3).normal(size=N).astype(np.float32)
    bias[500:900] = bias[:400]
    return query, item, target, {"k": K, "exclude": exclude, "bias": bias}


@pytest.mark.parametrize("d", [24, 128, 384])
def test_same_bits_for_any_block_and_number_of_queries(d):
    query, item, target, options = crowd(d)
    plain = topk.rank_and_top_k(query, item, target, **options)
    for block in (128, 1024):
        assert [bits(x) for x in topk.rank_and_top_k(query, item, target, **options, block=block)] == [bits(x) for x in plain]
    options["exclude"] = options["exclude"][:1]
    alone = topk.rank_and_top_k(query[:1], item, target[:1], **options)
    assert [bits(x) for x in alone] == [bits(x[:1]) for x in plain]


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])  # 3 do not divide the rows that they share to merge
def test_same_bits_for_any_number_of_devices(devices):
    query, item, target, options = crowd()
    plain = topk.rank_and_top_k(query, item, target, **options)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    shared = topk.rank_and_top_k(query, item, target, **options, block=128, mesh=mesh, axis="data")
    assert [bits(x) for x in shared] == [bits(x) for x in plain]


@pytest.mark.parametrize("axis", ["fsdp", ("fsdp", "data")])
def test_a_mesh_of_two_axes_shards_in_their_order(axis):
    query, item, _, options = crowd()
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plain, shared = topk.top_k(query, item, **options), topk.top_k(query, item, **options, mesh=mesh, axis=axis)
    assert [bits(x) for x in shared] == [bits(x) for x in plain]


def test_a_device_receives_each_row_twice_not_once_from_every_device():
    rows, k, mesh = 64, 10, jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    query, item = jax.ShapeDtypeStruct((rows, D), jnp.float32), jax.ShapeDtypeStruct((8192, D), jnp.float32, sharding=sharded)
    text = jax.jit(lambda q, i: topk.top_k(q, i, k=k, mesh=mesh, axis="data")).lower(query, item).compile().as_text()
    moved = re.findall(r" = (.*) (all-to-all|all-gather|all-reduce|collective-permute)\(", text)
    assert {kind for _, kind in moved} == {"all-to-all", "all-gather"}
    sizes = [math.prod(map(int, dims.split(","))) for shapes, _ in moved for dims in re.findall(r"\[([\d,]+)\]", shapes)]
    assert sum(sizes) == 2 * 2 * rows * k, "scores and ids, to be merged and merged"


def test_fewer_candidates_than_k():
    query, item, _, _ = make(n=6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    exclude = np.tile(np.array([[1, 4]], np.int32), (Q, 1))
    bias = np.array([0, 0, -np.inf, 0, 0, 0], np.float32)
    for options in ({}, {"mesh": mesh, "axis": "data"}):
        scores, ids = topk.top_k(query, item, k=9, exclude=exclude, bias=bias, **options)
        assert sorted(ids[0, :3].tolist()) == [0, 3, 5]
        assert (ids[:, 3:] == -1).all()
        assert (scores[:, 3:] == -jnp.inf).all()


def test_bfloat16_is_summed_in_float32_and_works_inside_jit():
    query, item, _, _ = make()
    low = [jnp.asarray(x, jnp.bfloat16) for x in (query, item)]  # small whole numbers are exact
    scores, ids = jax.jit(lambda q, i: topk.top_k(q, i, k=K, block=256))(*low)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(ids, naive_top_k(query @ item.T, K)[1])


def test_no_array_of_all_scores():
    query, item = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((100_000, 16), jnp.float32)
    compiled = jax.jit(lambda q, i: topk.top_k(q, i, k=10, block=1024)).lower(query, item).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 1024 * 4 * 6


def test_bad_input_is_refused():
    query, item, exclude, target = make()
    broken = item.copy()
    broken[70, 0] = np.nan
    for call in (lambda: topk.top_k(query, broken, k=3), lambda: topk.target_ranks(query, broken, target)):
        with pytest.raises(RecJaxError, match="NaN score"):
            call()
    with pytest.raises(RecJaxError, match="one width"):
        topk.top_k(query[:, :3], item, k=3)
    with pytest.raises(RecJaxError, match="floating type"):
        topk.top_k(query, item.astype(np.float16), k=3)
    with pytest.raises(RecJaxError, match="names an item twice"):
        topk.target_ranks(query, item, np.full((Q, 2), 3))
    with pytest.raises(RecJaxError, match="there are 1003 items"):
        topk.target_ranks(query, item, np.full((Q, 1), N))
    with pytest.raises(RecJaxError, match="both or neither"):
        topk.top_k(query, item, k=3, axis="data")
    with pytest.raises(RecJaxError, match="at least 1"):
        topk.top_k(query, item, k=0)
    with pytest.raises(RecJaxError, match="float32"):
        topk.ranks_from_scores(np.zeros((1, 3)), np.array([[0]]))
    with pytest.raises(RecJaxError, match="exclude"):
        topk.top_k(query, item, k=3, exclude=exclude[:2])
    with pytest.raises(RecJaxError, match="not in the mesh"):
        topk.top_k(query, item, k=3, mesh=jax.make_mesh((8,), ("data",)), axis="model")


@pytest.mark.parametrize("devices", [0, 1, 8])
def test_named_items_scores_come_from_the_same_pass(devices):
    query, item, target, options = crowd()
    mesh = None
    if devices:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    shared = {**options, "block": 128, "mesh": mesh, "axis": "data" if devices else None}
    whole_scores, whole_ids = topk.top_k(query, item, **{**options, "k": N})
    scores, ids, own = topk.top_k_with_scores_of(query, item, target, **shared)
    assert [bits(scores), bits(ids)] == [bits(whole_scores[:, :K]), bits(whole_ids[:, :K])], "a named item may be left out"
    assert bits(own) == bits(topk.rank_and_top_k(query, item, target, **options).own)
    left_out = 0
    for row in range(Q):
        found = dict(zip(whole_ids[row].tolist(), np.asarray(whole_scores[row]).tolist(), strict=True))
        for place, i in enumerate(target[row].tolist()):
            left_out += i >= 0 and i not in found
            assert i < 0 or i not in found or found[i] == own[row, place]
    assert left_out, "the target that is excluded too"
    assert (own[target < 0] == 0).all()
    with pytest.raises(RecJaxError, match="names item 1003"):
        topk.top_k_with_scores_of(query, item, np.full((Q, 1), N), k=3)
    with pytest.raises(RecJaxError, match="k=0"):
        topk.top_k_with_scores_of(query, item, target, k=0)
