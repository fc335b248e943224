"""The streaming fold against whole matrices in float64: every accumulator, both sides, blocks, and a ring of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rec_jax.losses import blockwise, tiles
from rec_jax.losses.tiles import ActiveCount, Count, HingeSum, LogSumExp, Maximum, Side, SoftplusSum, TeacherMean, Total
from rec_jax.types import RecJaxError

B, N, D = 24, 40, 8
ACCUMULATORS = (
    LogSumExp(),
    LogSumExp("positives"),
    LogSumExp("all"),
    Total(),
    Total("positives"),
    Count(),
    SoftplusSum(),
    HingeSum("all"),
    ActiveCount(),
    Maximum(),
    Maximum(below_zero=True),
    TeacherMean(),
)


def mesh_of(devices, names=("data",)):
    shape = (devices,) if len(names) == 1 else (2, devices // 2)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:devices])


def data(seed=0, b=B, n=N, d=D):
    rng = np.random.default_rng(seed)
    f32 = lambda *shape: rng.normal(size=shape).astype(np.float32)
    numbers = rng.integers(-1, n, (b, 2)).astype(np.int32)
    query_bias, item_bias = np.zeros(b, np.float32), f32(n)
    query_bias[3], item_bias[5] = -np.inf, -np.inf
    query = Side(f32(b, d), numbers, rng.integers(0, 30, (b, 1)).astype(np.int32), query_bias, f32(b), f32(b, 3))
    item = Side(
        f32(n, d), np.arange(n, dtype=np.int32)[:, None], rng.integers(0, 30, (n, 1)).astype(np.int32), item_bias, f32(n), f32(n, 3)
    )
    item.vectors[7] = item.vectors[6]  # equal logits
    return query, item


def naive(query, item, scale, teacher_scale, accumulators, axis):
    """Every accumulator's value by definition, over the whole matrix."""
    positive = (query.numbers[:, :, None] == item.numbers[:, 0]).any(1)
    same = query.ids == item.ids[:, 0]
    real = [np.isfinite(side.bias) for side in data()]
    there = real[0][:, None] & real[1]
    pairs = {"others": there & ~positive & ~same, "positives": there & positive, "all": there & (positive | ~same)}
    logits = scale * query.vectors @ item.vectors.T
    own, other = (query, item) if axis == 1 else (item, query)
    bias = jnp.where(real[1 if axis == 1 else 0], other.bias, 0)
    logits = logits + jnp.expand_dims(bias, 1 - axis) + jnp.expand_dims(own.shift, axis)
    teacher = teacher_scale * query.teacher @ item.teacher.T
    out = []
    for a in accumulators:
        p = pairs[a.over]
        some = p.any(axis)
        masked = jnp.where(p, logits, -jnp.inf)
        total = lambda x, p=p: jnp.where(p, x, 0).sum(axis)
        if isinstance(a, LogSumExp):
            out.append(jnp.where(some, jax.nn.logsumexp(jnp.where(p | ~jnp.expand_dims(some, axis), masked, -jnp.inf), axis), -jnp.inf))
        elif isinstance(a, Maximum):
            out.append(jnp.where(p & (logits < 0) if a.below_zero else p, logits, -jnp.inf).max(axis))
        elif isinstance(a, TeacherMean):
            share = jax.nn.softmax(jnp.where(p, teacher, -1e30), axis)
            out.append(total(share * logits))
        else:
            terms = {
                Total: lambda x: x,
                Count: jnp.ones_like,
                SoftplusSum: jax.nn.softplus,
                HingeSum: jax.nn.relu,
                ActiveCount: lambda x: (x > 0) * 1.0,
            }
            out.append(total(terms[type(a)](logits)))
    return out


def values(folded, accumulators):
    """The one number per row of each accumulator that naive has."""
    pick = {Maximum: lambda v: v[0], TeacherMean: lambda v: v.student_mean}
    return [pick.get(type(a), lambda v: v)(v) for a, v in zip(accumulators, folded, strict=True)]


def objective(out, weights):
    """A scalar that weighs every finite value differently."""
    return sum(jnp.sum(jnp.where(jnp.isfinite(v), v, 0) * w[: len(v)]) for v, w in zip(out, weights, strict=True))


def run(query, item, scale, weights, *, of_query, of_item, **options):
    by_query, by_item = blockwise.fold(query, item, scale, of_query=of_query, of_item=of_item, teacher_scale=0.7, **options)
    return objective(values(by_query, of_query) + values(by_item, of_item), weights)


def floats_of(query, item, scale):
    return (query.vectors, query.shift, item.vectors, item.bias, item.shift, scale)


def with_floats(query, item, f):
    return query._replace(vectors=f[0], shift=f[1]), item._replace(vectors=f[2], bias=f[3], shift=f[4]), f[5]


@functools.cache
def reference(scale, both):
    query, item = data()
    of_query, of_item = ACCUMULATORS, ACCUMULATORS if both else ()
    weights = np.random.default_rng(1).normal(size=(len(of_query) + len(of_item), max(B, N)))
    with jax.enable_x64(True):

        def whole(floats):
            q, i, s = with_floats(wide[0], wide[1], floats)
            out = naive(q, i, s, 0.7, of_query, 1)
            return objective(out + (naive(q, i, s, 0.7, of_item, 0) if both else []), weights)

        wide = [side._replace(teacher=np.float64(side.teacher)) for side in (query, item)]
        floats = tuple(jnp.asarray(np.where(np.isfinite(x), x, 0), jnp.float64) for x in floats_of(query, item, np.float64(scale)))
        return jax.tree.map(np.asarray, jax.value_and_grad(whole)(floats)), weights.astype(np.float32)


def check(scale, both, tolerance=1e-5, **options):
    query, item = data()
    (want, want_gradients), weights = reference(scale, both)
    plan = {"of_query": ACCUMULATORS, "of_item": ACCUMULATORS if both else ()}

    def folded(floats):
        q, i, s = with_floats(query, item, floats)
        return run(q, i, s, weights, **plan, **options)

    got, gradients = jax.jit(jax.value_and_grad(folded))(floats_of(query, item, np.float32(scale)))
    np.testing.assert_allclose(got, want, rtol=tolerance)
    for name, x, y in zip(("query", "query shift", "item", "item bias", "item shift", "scale"), gradients, want_gradients, strict=True):
        if name == "item bias":
            y = y * np.isfinite(item.bias)
        if y is not None and (both or name != "item shift"):
            assert np.max(np.abs(x - y)) <= tolerance * max(np.max(np.abs(y)), 1e-6), name


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_every_accumulator_of_both_sides_equals_the_matrix(scale):
    check(scale, both=True, tolerance=1e-5 if scale < 100 else 3e-5)


@pytest.mark.parametrize("block", [16, 32])
def test_blocks_of_both_sides_change_nothing(block, monkeypatch):
    monkeypatch.setattr(blockwise, "_LONGEST", 16)
    check(3.0, both=True, block=block)


@pytest.mark.parametrize(("devices", "travelling"), [(2, "item"), (4, "query"), (8, "item"), (8, "query")])
def test_a_ring_of_devices_changes_nothing(devices, travelling):
    check(3.0, both=True, travelling=travelling, mesh=mesh_of(devices), axis="data")


def test_a_ring_over_two_axes_and_of_one_side():
    check(3.0, both=False, mesh=mesh_of(8, ("data", "fsdp")), axis=("data", "fsdp"))


def test_no_row_counts_gives_minus_infinity_and_no_gradient():
    side = Side(jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32), None, jnp.zeros(2))
    alone = side._replace(bias=jnp.full(2, -jnp.inf))

    def run(vectors):
        (lse, (peak, _)), _ = blockwise.fold(side._replace(vectors=vectors), alone, 1.0, of_query=(LogSumExp(), Maximum()))
        return jnp.sum(jnp.exp(lse)) + jnp.sum(jnp.exp(peak)), (lse, peak)

    gradient, (lse, peak) = jax.grad(run, has_aux=True)(side.vectors)
    np.testing.assert_array_equal([lse, peak], -np.inf)
    np.testing.assert_array_equal(gradient, 0)


def test_of_equal_logits_the_first_row_gets_the_gradient_of_the_maximum():
    query = Side(jnp.ones((8, 1)), jnp.full((8, 1), -1), None, jnp.zeros(8))
    item = Side(jnp.float32([[1], [3], [3], [2], [3], [0], [0], [0]]), jnp.arange(8)[:, None], None, jnp.zeros(8))

    def highest(vectors, **options):
        ((peak, _),), _ = blockwise.fold(query, item._replace(vectors=vectors), 1.0, of_query=(Maximum(),), **options)
        return peak.sum()

    for options in ({}, {"mesh": mesh_of(8), "axis": "data"}):
        np.testing.assert_array_equal(jax.grad(functools.partial(highest, **options))(item.vectors)[:, 0], [0, 8, 0, 0, 0, 0, 0, 0])


def compiled_ring(b, d=64, devices=8):
    mesh = mesh_of(devices)

    def loss(query, item):
        numbers, zeros = jnp.arange(b, dtype=jnp.int32)[:, None], jnp.zeros(b)
        (lse,), _ = blockwise.fold(
            Side(query, numbers, None, zeros), Side(item, numbers, None, zeros), 20.0, of_query=(LogSumExp(),), mesh=mesh, axis="data"
        )
        return jnp.mean(jax.nn.softplus(lse - 20.0 * jnp.einsum("bd,bd->b", query, item)))

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shapes = [jax.ShapeDtypeStruct((b, d), jnp.float32)] * 2
    return jax.jit(jax.grad(loss, (0, 1)), in_shardings=(rows, rows)).lower(*shapes).compile()


def test_a_ring_holds_no_matrix_and_gathers_nothing():
    sizes, temp = (8192, 32768), []
    for b in sizes:
        compiled = compiled_ring(b)
        text = compiled.as_text()
        assert "all-gather" not in text
        assert f"[{b // 8},{b}]" not in text
        assert "collective-permute" in text
        temp.append(compiled.memory_analysis().temp_size_in_bytes)
    exponent = np.log(temp[1] / temp[0]) / np.log(sizes[1] / sizes[0])
    assert exponent <= 1.05


def test_block_sizes_cover_rows_evenly():
    assert blockwise.even_block(40, 16) == 16
    assert blockwise.even_block(1024, 256) == 256
    assert blockwise.even_block(12101, 4096) == 4048  # 3 blocks, 43 rows of padding
    split = blockwise.split({"x": jnp.arange(5)}, 2)["x"]
    np.testing.assert_array_equal(split, [[0, 1], [2, 3], [4, 0]])
    np.testing.assert_array_equal(blockwise.join(split, 5), range(5))


def test_any_equal():
    left, right = np.int32([[1, 2], [3, -1]]), np.int32([[2], [3], [-2]])
    np.testing.assert_array_equal(tiles.any_equal(left, right), [[True, False, False], [False, True, False]])


BAD = {
    "axis": ({"axis": "model"}, "axis 'model' is not in the mesh; it has data"),
    "rows": ({"axis": "data", "b": 20}, "query has 20 rows, which the 8 devices of axis 'data' do not divide; pad it to 24"),
    "candidates": ({"axis": "data", "n": 41}, "item has 41 rows"),
    "mesh alone": ({"axis": None}, "give both"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    query, item = data(b=change.get("b", B), n=change.get("n", N))
    with pytest.raises(RecJaxError, match=message):
        blockwise.fold(query, item, 1.0, of_query=(LogSumExp(),), mesh=mesh_of(8), axis=change["axis"])
