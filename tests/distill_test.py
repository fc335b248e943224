"""Distillation from scores: over all candidates against the whole matrix, on one device and on eight, and over lists."""

import functools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from scipy.special import log_softmax

from rec_jax import losses
from rec_jax.types import RecJaxError

B, N, D, E, K = 16, 40, 8, 11, 6
STUDENT = ("query", "item", "student_scale", "student_bias")


def data(seed=0):
    rng = np.random.default_rng(seed)
    f32 = lambda *shape: rng.normal(size=shape).astype(np.float32)
    query_mask, item_mask = rng.random(B) < 0.8, rng.random(N) < 0.8
    query_mask[2] = False
    item_ids = rng.permutation(N).astype(np.int32)
    excluded = rng.integers(-1, N, (B, 3)).astype(np.int32)
    return {
        "query": f32(B, D),
        "item": f32(N, D),
        "teacher_query": f32(B, E),
        "teacher_item": f32(N, E),
        "student_scale": np.float32(1.5),
        "teacher_scale": np.float32(0.7),
        "student_bias": f32(N),
        "teacher_bias": f32(N),
        "query_mask": query_mask,
        "item_mask": item_mask,
        "excluded_ids": excluded,
        "item_ids": item_ids,
    }


PLAIN = ("query", "item", "teacher_query", "teacher_item", "student_scale", "teacher_scale")
VARIANTS = {"plain": PLAIN, "everything": tuple(data())}


def naive(query, item, student_scale, student_bias=0.0, *, rest, temperature):
    """The whole [B, N] matrix, by definition."""
    there = np.ones((B, N), bool)
    if "query_mask" in rest:
        there &= rest["query_mask"][:, None] & rest["item_mask"]
        there &= ~(rest["excluded_ids"][:, :, None] == rest["item_ids"]).any(1)
    student = (student_scale * query @ item.T + student_bias) / temperature
    wide = {k: np.float64(v) for k, v in rest.items()}
    teacher = (wide["teacher_scale"] * wide["teacher_query"] @ wide["teacher_item"].T + wide.get("teacher_bias", 0)) / temperature
    log_p, log_q = (log_softmax(np.where(there, x, -1e30), axis=1) for x in (teacher, student))
    return temperature**2 * np.where(there, np.exp(log_p) * (log_p - log_q), 0).sum(1)


def parts(variant):
    d = {k: v for k, v in data().items() if k in VARIANTS[variant]}
    return {k: v for k, v in d.items() if k in STUDENT}, {k: v for k, v in d.items() if k not in STUDENT}


def mesh_of(devices, names=("data",)):
    shape = (devices,) if len(names) == 1 else (2, devices // 2)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:devices])


def weighted(temperature, rest, **options):
    """-> (the weighted form as a function of what the student learns, its weights)."""
    rest = dict(rest)
    mask = rest.pop("query_mask", np.ones(B, bool))
    weights = np.where(mask, np.linspace(-1, 2, B), 0).astype(np.float32)
    return (
        lambda **floats: losses.weighted_kl_over_candidates(**floats, **rest, weights=weights, temperature=temperature, **options),
        np.float64(weights),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.05, 4.0])
def test_kl_over_candidates_equals_the_matrix(variant, temperature):
    floats, rest = parts(variant)
    definition = functools.partial(naive, rest=rest, temperature=temperature)
    tolerance = 1e-5 if temperature >= 1 else 5e-5
    per_example = lambda **f: losses.kl_over_candidates(**f, **rest, temperature=temperature, block=16)
    float64.assert_equal(per_example, definition, floats, tolerance)
    fast, weights = weighted(temperature, rest, block=5)
    float64.assert_equal(fast, lambda **f: np.sum(weights * definition(**f)), floats, tolerance)


@pytest.mark.parametrize(("devices", "names"), [(1, ("data",)), (8, ("data",)), pytest.param(8, ("data", "fsdp"), marks=pytest.mark.slow)])
def test_a_ring_of_devices_changes_nothing(devices, names):
    floats, rest = parts("everything")
    definition = functools.partial(naive, rest=rest, temperature=2.0)
    options = {"mesh": mesh_of(devices, names), "axis": names[0] if len(names) == 1 else names}
    float64.assert_equal(lambda **f: losses.kl_over_candidates(**f, **rest, temperature=2.0, **options), definition, floats)
    fast, weights = weighted(2.0, rest, **options)
    float64.assert_equal(fast, lambda **f: np.sum(weights * definition(**f)), floats)


def test_kl_by_hand():
    # student even over two: 1/2, 1/2. teacher's logits log 3, 0: 3/4, 1/4. KL = 3/4 log(3/2) + 1/4 log(1/2)
    query, item = np.zeros((1, 1), np.float32), np.float32([[1], [2]])
    teacher_query, teacher_item = np.float32([[1, 0]]), np.float32([[np.log(3), 5], [0, 5]])
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    run = functools.partial(losses.kl_over_candidates, query, item, teacher_query, teacher_item)
    np.testing.assert_allclose(run(), [kl], rtol=1e-5)
    # at temperature 1/2 the teacher's are 9/10, 1/10; the factor is 1/4
    sharp = 0.25 * (0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    np.testing.assert_allclose(run(temperature=0.5), [sharp], rtol=1e-5)
    fast = losses.weighted_kl_over_candidates(query, item, teacher_query, teacher_item, weights=np.float32([3]), temperature=0.5)
    np.testing.assert_allclose(fast, 3 * sharp, rtol=1e-5)
    # gradient of the student's logits: p_student - p_teacher = -1/4, 1/4, times items 1, 2
    d_query = jax.grad(lambda q: losses.kl_over_candidates(q, item, teacher_query, teacher_item)[0])(query)
    np.testing.assert_allclose(d_query, [[0.25]], rtol=1e-5)
    student, teacher = np.zeros((1, 2), np.float32), np.float32([[np.log(3), 0]])
    np.testing.assert_allclose(losses.kl_over_scores(student, teacher), [kl], rtol=1e-5)
    np.testing.assert_allclose(losses.kl_over_scores(student, teacher, temperature=0.5), [sharp], rtol=1e-5)


@pytest.mark.parametrize("form", [losses.kl_over_candidates, functools.partial(losses.weighted_kl_over_candidates, weights=np.ones(B))])
def test_a_student_equal_to_its_teacher_has_loss_and_gradient_zero(form):
    d = data()
    run = lambda q, i: form(q, i, d["query"], d["item"], student_scale=3.0, teacher_scale=3.0).sum()
    value, gradients = jax.jit(jax.value_and_grad(run, (0, 1)))(d["query"], d["item"])
    for x in (value, *gradients):
        np.testing.assert_allclose(x, 0, atol=2e-5)


@pytest.mark.parametrize("form", ["per_example", "weighted"])
def test_padding_reaches_nothing_and_the_teacher_gets_no_gradient(form):
    d = data()
    d["excluded_ids"] = np.concatenate([d["excluded_ids"], np.full((B, N - 3), -1, np.int32)], 1)
    d["excluded_ids"][5] = d["item_ids"]  # nothing left
    mask = d.pop("query_mask")
    floats = {k: d.pop(k) for k in (*STUDENT, "teacher_query", "teacher_item", "teacher_bias", "teacher_scale")}

    def run(floats):
        if form == "weighted":
            return losses.weighted_kl_over_candidates(**floats, **d, weights=mask.astype(np.float32))
        return losses.kl_over_candidates(**floats, **d, query_mask=mask).sum()

    garbage = dict(floats)
    for name in ("query", "teacher_query"):
        garbage[name] = np.where(mask[:, None], floats[name], np.nan)
    for name in ("item", "teacher_item"):
        garbage[name] = np.where(d["item_mask"][:, None], floats[name], np.nan)
    for name in ("student_bias", "teacher_bias"):
        garbage[name] = np.where(d["item_mask"], floats[name], np.nan)
    grad = jax.jit(jax.value_and_grad(run))
    value, gradients = grad(garbage)
    want, want_gradients = grad(floats)
    assert np.isfinite(want)
    np.testing.assert_array_equal(value, want)
    jax.tree.map(np.testing.assert_array_equal, gradients, want_gradients)
    for name in ("teacher_query", "teacher_item", "teacher_bias", "teacher_scale"):
        np.testing.assert_array_equal(gradients[name], 0)
    for name in ("query", "item", "student_scale", "student_bias"):
        assert np.isfinite(gradients[name]).all()
        assert np.abs(gradients[name]).max() > 0
    np.testing.assert_array_equal(gradients["query"][~mask], 0)
    np.testing.assert_array_equal(gradients["item"][~d["item_mask"]], 0)
    np.testing.assert_array_equal(gradients["query"][5], 0)


def test_one_query_without_candidates_left_has_loss_zero():
    d = {k: data()[k] for k in ("query", "item", "teacher_query", "teacher_item")}
    for form in (losses.kl_over_candidates, functools.partial(losses.weighted_kl_over_candidates, weights=np.ones(B, np.float32))):
        run = lambda q, form=form: jnp.sum(form(q, *list(d.values())[1:], item_mask=np.zeros(N, bool)))
        value, gradient = jax.jit(jax.value_and_grad(run))(d["query"])
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_of_nonzero_weights_are_the_losses():
    floats, rest = parts("plain")
    weights = np.linspace(0.5, 2, B).astype(np.float32)
    got = jax.jit(jax.grad(lambda w: 2 * losses.weighted_kl_over_candidates(**floats, **rest, weights=w, temperature=2.0)))(weights)
    np.testing.assert_allclose(got, 2 * losses.kl_over_candidates(**floats, **rest, temperature=2.0), rtol=2e-5, atol=1e-5)


def test_low_precision_vectors_sum_in_float32_and_get_their_own_gradients():
    floats, rest = parts("plain")
    low = {k: jnp.bfloat16(v) if np.ndim(v) == 2 else v for k, v in floats.items()}
    low_rest = {k: jnp.bfloat16(v) if np.ndim(v) == 2 else v for k, v in rest.items()}
    rounded = {k: np.float32(v) for k, v in low.items()}, {k: np.float32(v) for k, v in low_rest.items()}
    weights = np.ones(B, np.float32) / B
    for form in (lambda **f: losses.kl_over_candidates(**f).mean(), functools.partial(losses.weighted_kl_over_candidates, weights=weights)):
        grad = jax.jit(jax.value_and_grad(lambda f, rest, form=form: form(**f, **rest)))
        value, gradients = grad(low, low_rest)
        want, want_gradients = grad(*rounded)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, want, rtol=1e-5)
        for name in ("query", "item"):
            assert gradients[name].dtype == jnp.bfloat16
            np.testing.assert_allclose(np.float32(gradients[name]), want_gradients[name], atol=2e-2 * np.abs(want_gradients[name]).max())


def test_no_matrix_is_held():
    def temporary(form, b, n=32768):
        shapes = [jax.ShapeDtypeStruct((rows, 16), jnp.float32) for rows in (b, n, b, n)]
        compiled = jax.jit(jax.grad(lambda *x: form(*x).sum(), (0, 1))).lower(*shapes).compile()
        assert f"[{b},{n}]" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    fast = lambda *x: losses.weighted_kl_over_candidates(*x, weights=jnp.ones(x[0].shape[0]))
    for form in (losses.kl_over_candidates, fast):
        small, large = temporary(form, 1024), temporary(form, 4096)
        assert large < small + 3072 * 32768  # a byte for each element more of the matrix would be as much


# Lists


def lists(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((5, K)) < 0.7
    mask[:, 0], mask[3], mask[4] = True, False, np.arange(K) == 2
    f32 = lambda *shape: np.float32(rng.normal(size=shape))
    return f32(5, K), f32(5, K), mask


def rows(function, mask):
    return np.stack([function(i, np.flatnonzero(m)) for i, m in enumerate(mask)])


def test_lists_equal_naive_float64():
    student, teacher, mask = lists()
    wide = np.float64(teacher)

    def kl(student):
        def one(i, there):
            if not len(there):
                return 0.0
            log_p, log_q = (log_softmax(x[i][there] / 3) for x in (wide, student))
            return 9 * np.sum(np.exp(log_p) * (log_p - log_q))

        return rows(one, mask)

    float64.assert_equal(lambda student: losses.kl_over_scores(student, teacher, temperature=3.0, mask=mask), kl, {"student": student})

    def margins(positive, student):
        def one(i, there):
            errors = [(positive[i] - student[i, j]) - (wide[i, 0] + 1 - wide[i, j]) for j in there]
            return sum(e**2 for e in errors) / max(len(errors), 1)

        return rows(one, mask)

    def run(positive, student):
        return losses.margin_mse(positive, student, teacher_positive=teacher[:, 0] + 1, teacher_negatives=teacher, mask=mask)

    float64.assert_equal(run, margins, {"positive": student[:, 1], "student": student})

    def order(student, top):
        def one(i, there):
            if not len(there):
                return 0.0
            ranked = sorted(there, key=lambda j: -teacher[i, j])
            weights = [1 / np.log2(2 + k) for k in range(min(top, len(ranked)))]
            terms = [np.log(sum(np.exp(student[i, j]) for j in ranked[k:])) - student[i, ranked[k]] for k in range(len(weights))]
            return sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)

        return rows(one, mask)

    for top in (3, K):
        run = lambda student, top=top: losses.rank_order_loss(student, teacher, top=top, mask=mask)
        float64.assert_equal(run, functools.partial(order, top=top), {"student": student})


def test_lists_by_hand():
    # margins 2 - 1 = 1 and 2 - 0 = 2 of the student; 5 - 3 = 2 and 5 - 4 = 1 of the teacher: (1 + 1) / 2; masked: 1
    run = functools.partial(losses.margin_mse, np.float32([2]), np.float32([[1, -1]]), teacher_positive=np.float32([5]))
    taught = np.float32([[3, 4]])
    np.testing.assert_allclose(run(teacher_negatives=taught), [((1 - 2) ** 2 + (3 - 1) ** 2) / 2])
    np.testing.assert_allclose(run(teacher_negatives=taught, mask=np.array([[True, False]])), [1])
    # the teacher's order is 2, 0, 1; the student's odds there 3, 1, 2: -log 3/6, -log 1/3, 0
    student, teacher = np.log(np.float32([[1, 2, 3]])), np.float32([[5, -1, 9]])
    np.testing.assert_allclose(losses.rank_order_loss(student, teacher, position_weights=np.ones(3)), [np.log(6) / 3], rtol=1e-5)
    weights = 1 / np.log2([2, 3, 4])
    want = (weights[0] * np.log(2) + weights[1] * np.log(3)) / weights.sum()
    np.testing.assert_allclose(losses.rank_order_loss(student, teacher), [want], rtol=1e-5)
    np.testing.assert_allclose(losses.rank_order_loss(student, teacher, top=1), [np.log(2)], rtol=1e-5)
    # only the order counts
    np.testing.assert_array_equal(losses.rank_order_loss(student, np.exp(teacher)), losses.rank_order_loss(student, teacher))
    # of equal scores the first place goes first
    np.testing.assert_allclose(losses.rank_order_loss(student, np.zeros((1, 3)), top=1), [np.log(6)], rtol=1e-5)


LISTS = {
    "kl": lambda s, t, mask: losses.kl_over_scores(s, t, mask=mask),
    "margin_mse": lambda s, t, mask: losses.margin_mse(
        jnp.where(mask.any(1), 1.0, s[:, 0]), s, teacher_positive=jnp.where(mask.any(1), 2.0, t[:, 0]), teacher_negatives=t, mask=mask
    ),
    "rank_order": lambda s, t, mask: losses.rank_order_loss(s, t, mask=mask),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_masks_extremes_and_the_teachers_gradient(name):
    student, teacher, mask = lists()
    grad = jax.jit(jax.value_and_grad(lambda s, t: LISTS[name](s, t, mask).sum(), (0, 1)))
    value, (d_student, d_teacher) = grad(np.where(mask, student, np.nan), np.where(mask, teacher, np.nan))
    want, (want_student, _) = grad(student, teacher)
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(d_student, want_student)
    np.testing.assert_array_equal(d_teacher, 0)
    for extreme in (np.zeros_like(student), 1e4 * np.sign(student)):
        value, (d_student, _) = grad(extreme, 100 * teacher)
        assert np.isfinite(value)
        assert np.isfinite(d_student).all()
    leading = lambda x: jnp.stack([x, x])
    if name != "margin_mse":
        two = jax.jit(LISTS[name])(leading(student), leading(teacher), leading(mask))
        np.testing.assert_allclose(two, leading(jax.jit(LISTS[name])(student, teacher, mask)), rtol=1e-6)


Q, C, ONES = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), np.ones((2, 3), np.float32)
BAD = {
    "width": (lambda f: f(Q, C[:, :2], Q, C), "one width D for both"),
    "teacher's width": (lambda f: f(Q, C, Q[:, :2], C), "one width D for both"),
    "teacher's rows": (lambda f: f(Q, C, Q, C[:3]), "teacher_query has 2 rows and teacher_item 3; expected 2 and 4"),
    "temperature": (lambda f: f(Q, C, Q, C, temperature=0), "temperature is 0; expected a number > 0"),
    "scale": (lambda f: f(Q, C, Q, C, student_scale=np.ones(2)), r"student_scale has shape \(2,\)"),
    "bias": (lambda f: f(Q, C, Q, C, teacher_bias=np.ones(2)), r"teacher_bias has shape \(2,\); expected \(4,\)"),
    "mask": (lambda f: f(Q, C, Q, C, item_mask=np.ones(2, bool)), r"item_mask has shape \(2,\)"),
    "ids": (lambda f: f(Q, C, Q, C, item_ids=np.arange(4)), "one of excluded_ids and item_ids is given"),
    "excluded": (lambda f: f(Q, C, Q, C, item_ids=np.arange(4), excluded_ids=np.arange(2)), r"excluded_ids has shape \(2,\)"),
    "block": (lambda f: f(Q, C, Q, C, block=0), "block is 0"),
    "axis": (lambda f: f(Q, C, Q, C, mesh=mesh_of(2), axis="model"), "axis 'model' is not in the mesh"),
    "mesh": (lambda f: f(Q, C, Q, C, axis="data"), "give both"),
    "rows": (lambda f: f(Q, C, Q, C, mesh=mesh_of(4), axis="data"), "query has 2 rows, which the 4 devices"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("form", ["per_example", "weighted"])
def test_bad_vectors_are_named(case, form):
    fast = functools.partial(losses.weighted_kl_over_candidates, weights=np.ones(2, np.float32))
    call, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        call(losses.kl_over_candidates if form == "per_example" else fast)


BAD_LISTS = {
    "query_mask": (lambda: losses.kl_over_candidates(Q, C, Q, C, query_mask=np.ones(3, bool)), "query_mask has shape"),
    "weights": (lambda: losses.weighted_kl_over_candidates(Q, C, Q, C, weights=np.ones(3)), r"weights has shape \(3,\)"),
    "teacher": (lambda: losses.kl_over_scores(ONES, ONES[0]), r"teacher has shape \(3,\); expected \(2, 3\), that of student"),
    "temperature": (lambda: losses.kl_over_scores(ONES, ONES, temperature=-1), "temperature is -1"),
    "mask": (lambda: losses.rank_order_loss(ONES, ONES, mask=ONES[0]), "mask has shape"),
    "top": (lambda: losses.rank_order_loss(ONES, ONES, top=0), "top is 0; expected an integer >= 1"),
    "position_weights": (lambda: losses.rank_order_loss(ONES, ONES, position_weights=np.ones(2)), "position_weights has shape"),
    "positive": (lambda: losses.margin_mse(ONES, ONES, teacher_positive=ONES[:, 0], teacher_negatives=ONES), "positive has shape"),
    "negatives": (lambda: losses.margin_mse(ONES[:, 0], ONES, teacher_positive=ONES[:, 0], teacher_negatives=Q.T), "teacher_negatives has"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_named(case):
    call, message = BAD_LISTS[case]
    with pytest.raises(RecJaxError, match=message):
        call()
