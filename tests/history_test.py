"""The history tower's layers, positions, times, ratings and sessions: each sees its own segment's past alone, and is what it says."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.towers import history, history_layers, history_spec, places
from rec_jax.types import RecJaxError

OFF = history.HistorySpec(dim=8, layers=2, heads=2, mlp=16, dropout=0.5, max_positions=32)
ON = dataclasses.replace(OFF, inputs=("gap", "rating"), ratings=(1.0, 2.0, 3.0, 4.0), time_bias=True, session_gap=60)
KINDS = list(itertools.product(history_layers.LAYERS, history_spec.POSITIONS))
encode, fresh = jax.jit(history.encode, static_argnames="spec"), jax.jit(history.init, static_argnames="spec")  # op by op is slow


def of_kind(layer, positions):
    return dataclasses.replace(ON, layer=layer, positions=positions)


@functools.cache
def params_of(spec):
    """Fresh parameters, moved from where they start, so that tables that begin at zero count."""
    params = fresh(jax.random.key(0), spec)
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [x + 0.3 * random.normal(size=x.shape).astype(np.float32) for x in leaves])


def inputs(rows, length, seed=0):
    """vectors, times (ascending, with pauses on both sides of a session's) and ratings of rows of places."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.choice([1, 20, 59, 60, 400], (rows, length)), axis=1)
    vectors = random.normal(size=(rows, length, 8)) * 8**-0.5
    return {
        "vectors": vectors.astype(np.float32),
        "times": times.astype(np.int32),
        "ratings": random.integers(0, 6, (rows, length)).astype(np.float32),
    }


def run(spec, known, segments):
    return np.asarray(encode(params_of(spec), spec, segment_ids=jnp.asarray(segments), **known))


@pytest.mark.parametrize(("layer", "positions"), KINDS)
def test_packed_histories_are_what_they_are_alone_and_see_their_past_alone(layer, positions):
    spec, known = of_kind(layer, positions), inputs(1, 12)
    segments = np.asarray([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    packed = run(spec, known, segments)
    assert np.isfinite(packed).all()
    alone = run(spec, {name: np.roll(x, -5, axis=1) for name, x in known.items()}, np.asarray([[1] * 4 + [0] * 8], np.int32))
    np.testing.assert_allclose(packed[:, 5:9], alone[:, :4], atol=1e-5)
    if positions == "relative":  # and in a row of another length
        short = run(spec, {name: x[:, 5:9] for name, x in known.items()}, np.ones((1, 4), np.int32))
        np.testing.assert_allclose(packed[:, 5:9], short, atol=1e-5)
    later = dict(known, times=known["times"] + 1000)
    np.testing.assert_allclose(run(spec, later, segments), packed, atol=1e-5)  # only differences of times count
    changes = {"vectors": lambda x: -3 * x, "times": lambda x: x + 1000 * np.arange(1, x.shape[1] + 1), "ratings": lambda x: (x + 2) % 6}
    for name, change in changes.items():
        for changed, same in ((slice(0, 5), slice(5, 9)), (slice(7, 9), slice(0, 7))):  # another segment; the future
            other = known[name].copy()
            other[:, changed] = change(other[:, changed])
            found = run(spec, dict(known, **{name: other}), segments)
            np.testing.assert_array_equal(found[:, same], packed[:, same], err_msg=name)
            assert np.abs(found[:, changed] - packed[:, changed]).max() > 1e-3, f"{name} changes nothing"


@pytest.mark.parametrize("layer", list(history_layers.LAYERS))
def test_without_times_and_ratings_they_are_unknown(layer):
    spec, known = of_kind(layer, "none"), inputs(2, 6)
    unknown = dict(known, times=np.full((2, 6), -1, np.int32), ratings=np.full((2, 6), np.nan, np.float32))
    segments = np.ones((2, 6), np.int32)
    found = run(spec, {"vectors": known["vectors"]}, segments)
    np.testing.assert_array_equal(found, run(spec, unknown, segments))
    assert np.isfinite(found).all()
    assert np.abs(found - run(spec, known, segments)).max() > 1e-3
    # Tables begin at zero: what is unknown adds nothing, and neither does what is known.
    plain = dataclasses.replace(spec, inputs=(), ratings=(), time_bias=False)
    out = encode(fresh(jax.random.key(0), spec), spec, segment_ids=segments, **known)
    bare = fresh(jax.random.key(0), plain)
    np.testing.assert_array_equal(out, encode(bare, plain, segment_ids=segments, vectors=known["vectors"], times=known["times"]))


@pytest.mark.parametrize(("layer", "positions"), [("attention", "learned"), ("attention", "rotary"), ("hstu", "relative")])
def test_gradients_reach_every_parameter_and_the_default_has_none_more(layer, positions):
    spec, known = of_kind(layer, positions), inputs(2, 24)
    weights = np.random.default_rng(2).normal(size=(2, 24, 8))
    loss = lambda p: jnp.sum(weights * history.encode(p, spec, segment_ids=jnp.ones((2, 24), jnp.int32), **known))
    grads = jax.jit(jax.grad(loss))(params_of(spec))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(g).max() for path, g in jax.tree.leaves_with_path(grads)}
    assert all(g > 0 for g in names.values()), names
    tables = {"gap/embedding", "rating/embedding", "layer_0/time/bias", "layer_1/time/bias"}
    tables |= {"relative": {"layer_0/distance/bias", "layer_1/distance/bias"}, "learned": {"position/embedding"}}.get(positions, set())
    assert {name for name in names if name.partition("/")[0] in ("gap", "rating", "position") or name.endswith("/bias")} == tables
    gated, dense = {"uvqk/kernel", "value_norm/scale"}, {"query/kernel", "key/kernel", "value/kernel", "mlp_in/kernel", "mlp_out/kernel"}
    here = {name.removeprefix("layer_0/") for name in names if name.startswith("layer_0/")}
    assert here >= (gated if layer == "hstu" else dense)
    assert not here & (dense if layer == "hstu" else gated)
    if layer == "attention":
        plain = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params_of(OFF))}
        assert plain - {"position/embedding"} == set(names) - tables


def test_what_is_hidden_says_nothing_of_its_event():
    spec, known = dataclasses.replace(ON, mask=True), inputs(1, 6)
    hidden, segments = jnp.asarray([[False, True, False, False, True, False]]), np.ones((1, 6), np.int32)
    found = np.asarray(encode(params_of(spec), spec, segment_ids=segments, hidden=hidden, **known))
    other = {name: np.where(np.asarray(hidden).reshape(1, 6, *[1] * (x.ndim - 2)), x + 1, x) for name, x in known.items()}
    np.testing.assert_array_equal(encode(params_of(spec), spec, segment_ids=segments, hidden=hidden, **other), found)


def naive_rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def naive_bucket(value, bits):
    """Two to the `bits` ranges an octave, by searching the lower ends."""
    ends = list(range(2**bits)) + [(2**bits + n) << shift for shift in range(40) for n in range(2**bits)]
    return max(n for n, end in enumerate(ends) if end <= value)


def naive_turned(x, position):
    """x [d]: pairs (n, n + d/2) as complex numbers, times e^(i position 10000^(-2n/d))."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize(
    ("layer", "positions"), [("hstu", "relative"), ("hstu", "rotary"), ("attention", "relative"), ("attention", "rotary")]
)
def test_a_layer_is_what_a_loop_makes(layer, positions):
    spec, known = of_kind(layer, positions), inputs(1, 23, seed=3)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(spec)["layer_0"])
    x, times = known["vectors"][0].astype(np.float64), known["times"][0]
    seen = places.Places(
        positions=jnp.arange(23)[None] if positions == "rotary" else None,
        distances=places.distance_rows(23, spec.max_positions) if positions == "relative" else None,
        times=places.time_difference_rows(jnp.asarray(known["times"])),
    )
    mask = history.places_seen(jnp.ones((1, 23), jnp.int32), causal=True)
    module = history_layers.LAYERS[layer](spec)
    got = jax.jit(lambda p, x: module.apply({"params": p}, x, mask, seen, None))(params_of(spec)["layer_0"], known["vectors"])[0]

    silu = lambda z: z / (1 + np.exp(-z))
    y = naive_rms(x, params["attention_norm"]["scale"])
    if layer == "hstu":
        made = silu(y @ params["uvqk"]["kernel"]).reshape(23, 2, 4, 4)  # places, heads, u v q k, width
        u, v, q, k = (made[:, :, n] for n in range(4))
    else:
        q, k, v = (np.einsum("sd,dhw->shw", y, params[n]["kernel"]) for n in ("query", "key", "value"))
    if positions == "rotary":
        q, k = (np.asarray([[naive_turned(z[s, h], s) for h in range(2)] for s in range(23)]) for z in (q, k))
    out = np.zeros((23, 2, 4))
    for s, h in itertools.product(range(23), range(2)):
        scores = np.zeros(s + 1)
        for t in range(s + 1):
            scores[t] = q[s, h] @ k[t, h] * (1 if layer == "hstu" else 4**-0.5)
            scores[t] += params["time"]["bias"][1 + naive_bucket(times[s] - times[t], 1), h]
            if positions == "relative":
                scores[t] += params["distance"]["bias"][naive_bucket(s - t, 3), h]
        weights = silu(scores) / (s + 1) if layer == "hstu" else np.exp(scores) / np.exp(scores).sum()
        out[s, h] = weights @ v[: s + 1, h]
    if layer == "hstu":
        gated = naive_rms(out.reshape(23, 8), params["value_norm"]["scale"]).reshape(23, 2, 4) * u
        want = x + np.einsum("shw,hwd->sd", gated, params["out"]["kernel"])
        np.testing.assert_allclose(got, want, atol=1e-4)
        return
    z = x + np.einsum("shw,hwd->sd", out, params["out"]["kernel"])
    inner = naive_rms(z, params["mlp_norm"]["scale"]) @ params["mlp_in"]["kernel"]
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    np.testing.assert_allclose(got, z + gelu @ params["mlp_out"]["kernel"], atol=1e-4)


def test_rotary_scores_depend_on_distances_alone():
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 2, 6)).repeat(9, 1), jnp.float32) for _ in range(2))

    def scores(start):
        at = jnp.arange(start, start + 9)[None]
        return np.einsum("rshd,rthd->rhst", places.rotated(q, at), places.rotated(k, at))

    found = scores(0)
    np.testing.assert_allclose(scores(50), found, atol=1e-4)
    for distance in range(-8, 9):  # one q and one k at all places: what differs is the distance
        assert np.ptp(np.diagonal(found, distance, 2, 3), axis=-1).max() < 1e-4
    assert np.ptp(found[0, 0, 8]) > 0.1


@pytest.mark.parametrize("bits", [1, 3])
def test_buckets_are_found_by_search_and_fill_the_table(bits):
    values = np.unique(np.concatenate([np.arange(300), *(2**n + np.arange(-2, 3) for n in range(3, 31)), [2**31 - 1]])).clip(0)
    found = np.asarray(places.log_buckets(jnp.asarray(values, jnp.int32), bits=bits))
    np.testing.assert_array_equal(found, [naive_bucket(int(v), bits) for v in values])
    assert found.max() + 1 == places.bucket_count(2**31 - 1, bits=bits)
    for largest in (0, 1, 5, 31, 255):
        assert places.bucket_count(largest, bits=bits) == naive_bucket(largest, bits) + 1
    assert np.asarray(places.time_rows(jnp.asarray([-1, 0, 2**31 - 1]))).tolist() == [0, 1, places.TIME_ROWS - 1]


def test_gaps_sessions_and_ratings_are_those_of_a_loop():
    known, segments = inputs(3, 15, seed=5), np.asarray([[1] * 15, [1] * 6 + [2] * 7 + [0] * 2, [1] + [2] * 14])
    times = known["times"].copy()
    times[0, 4], times[2, 9:11] = -1, -1
    gaps = np.asarray(places.gaps(jnp.asarray(times), jnp.asarray(segments)))
    for gap in (20, 60, 400):
        same = np.asarray(places.same_session(jnp.asarray(times), jnp.asarray(segments), gap))
        for row in range(3):
            for late, early in itertools.combinations_with_replacement(reversed(range(15)), 2):
                if segments[row, late] != segments[row, early]:
                    continue  # the mask of segments tells them apart
                chain = range(early + 1, late + 1)
                pauses = [times[row, n] - times[row, n - 1] if min(times[row, n], times[row, n - 1]) >= 0 else -1 for n in chain]
                assert gaps[row, early + 1 : late + 1].tolist() == pauses
                assert same[row, late, early] == same[row, early, late] == all(pause < gap for pause in pauses)
    assert (gaps[:, 0] == -1).all()
    assert gaps[1, 6] == gaps[2, 1] == -1  # the first of a segment
    rows = places.rating_rows(jnp.asarray([np.nan, 0.5, 1.0, 1.5, 4.0, 9.0]), (1.0, 2.0, 4.0))
    assert np.asarray(rows).tolist() == [0, 0, 1, 1, 3, 3]


def test_the_first_half_of_the_layers_sees_its_own_session_alone():
    times = np.asarray([[0, 10, 20, 500, 510, 520]], np.int32)
    known, segments = dict(inputs(1, 6), times=times), np.ones((1, 6), np.int32)
    other = dict(known, vectors=np.concatenate([-3 * known["vectors"][:, :3], known["vectors"][:, 3:]], 1))
    # Of three layers one sees sessions; and of two layers, where the second adds nothing, the later session sees nothing of the first.
    deep = dataclasses.replace(ON, layers=2, inputs=("gap",), time_bias=False)
    params = jax.tree.map(jnp.asarray, params_of(deep))
    still = {**params, "layer_1": jax.tree.map(jnp.zeros_like, params["layer_1"])}
    for p, seen in ((params, True), (still, False)):
        a, b = (np.asarray(encode(p, deep, segment_ids=segments, **x))[:, 3:] for x in (known, other))
        assert (np.abs(a - b).max() > 1e-3) == seen
    without = dataclasses.replace(deep, session_gap=0)
    a, b = (np.asarray(encode(still, without, segment_ids=segments, **x))[:, 3:] for x in (known, other))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("layer", list(history_layers.LAYERS))
def test_dropout_depends_on_the_rows_key_alone(layer):
    spec, known, keys = of_kind(layer, "relative"), inputs(4, 6), jax.random.split(jax.random.key(1), 4)
    ids = jnp.ones((4, 6), jnp.int32)
    whole = encode(params_of(spec), spec, segment_ids=ids, keys=keys, **known)
    part = {name: x[2:] for name, x in known.items()}
    np.testing.assert_allclose(whole[2:], encode(params_of(spec), spec, segment_ids=ids[2:], keys=keys[2:], **part), atol=1e-5)
    assert np.abs(np.asarray(whole) - run(spec, known, ids)).max() > 1e-2


def test_kinds_that_do_not_exist():
    for key, value in {"layer": "gru", "positions": "alibi", "inputs": ("price",)}.items():
        with pytest.raises(RecJaxError, match=rf"HistorySpec.{key}=.* \(config.towers.user.{key}\): expected of "):
            dataclasses.replace(OFF, **{key: value})
    with pytest.raises(RecJaxError, match="no ranges of them: set HistorySpec.ratings"):
        history.init(jax.random.key(0), dataclasses.replace(OFF, inputs=("rating",)))
