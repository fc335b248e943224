"""Distillation from vectors, relations, hidden states and attention: by hand, naive float64 forms, masks, zero vectors, bad input."""

import functools
import itertools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from rec_jax import losses
from rec_jax.losses import distill_vectors
from rec_jax.types import RecJaxError

B, D, E = 7, 3, 5
MASK = np.array([1, 1, 0, 1, 1, 1, 0], bool)


def data(seed=0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(B, D))), np.float32(rng.normal(size=(B, E)))


def naive_huber(x, y):
    e = np.abs(x - y)
    return np.where(e <= 1, e**2 / 2, e - 0.5)


def following(mask, neighbours):
    """The rows that each real row looks at."""
    real = list(np.flatnonzero(mask))
    out = {}
    for place, i in enumerate(real):
        others = real[place + 1 :] + real[:place]
        out[i] = others if neighbours is None else others[:neighbours]
    return out


def naive_distance(student, *, teacher, mask, neighbours):
    looks = following(mask, neighbours)
    pairs = [(i, j) for i, others in looks.items() for j in others]
    lengths = lambda x: {(i, j): np.sqrt(np.sum((x[i] - x[j]) ** 2)) for i, j in pairs}
    of_student, of_teacher = lengths(student), lengths(np.float64(teacher))
    mean_of = lambda d: sum(d.values()) / len(d)
    s, t = mean_of(of_student), mean_of(of_teacher)
    return np.stack(
        [
            sum(naive_huber(of_student[i, j] / s, of_teacher[i, j] / t) for j in looks[i]) / len(looks[i]) if i in looks else 0.0
            for i in range(len(mask))
        ]
    )


def naive_angle(student, *, teacher, mask, neighbours):
    looks = following(mask, neighbours)

    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2))

    out = []
    for j in range(len(mask)):
        pairs = list(itertools.permutations(looks.get(j, []), 2))
        terms = [naive_huber(cosine(student, i, j, k), cosine(np.float64(teacher), i, j, k)) for i, k in pairs]
        out.append(sum(terms) / len(terms) if terms else 0.0)
    return np.stack(out)


RELATIONS = {"distance": (losses.distance_loss, naive_distance), "angle": (losses.angle_loss, naive_angle)}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize(("masked", "neighbours"), [(False, None), (True, 3)])
def test_relations_equal_naive_float64(name, masked, neighbours, monkeypatch):
    monkeypatch.setattr(distill_vectors, "_ELEMENTS", 100)  # so that rows come in several turns, and one is left over
    loss, naive = RELATIONS[name]
    student, teacher = data()
    definition = functools.partial(naive, teacher=teacher, mask=MASK if masked else np.ones(B, bool), neighbours=neighbours)
    run = lambda student: loss(student, teacher, mask=MASK if masked else None, neighbours=neighbours)
    float64.assert_equal(run, definition, {"student": student}, 2e-5)


def test_relations_by_hand():
    # on a line at 0, 1, 3: distances 1, 2, 3 of mean 2. Of the teacher at 0, 2, 4: 2, 2, 4 of mean 8/3.
    student, teacher = np.float32([[0], [1], [3]]), np.float32([[0, 0], [2, 0], [4, 0]])
    ab, bc, ac = (np.square(s / 2 - t * 3 / 8) / 2 for s, t in ((1, 2), (2, 2), (3, 4)))
    np.testing.assert_allclose(losses.distance_loss(student, teacher), [(ab + ac) / 2, (ab + bc) / 2, (bc + ac) / 2], rtol=1e-5, atol=1e-7)
    # scale and place do not matter
    np.testing.assert_allclose(losses.distance_loss(7 * teacher + 1, teacher), 0, atol=1e-6)
    np.testing.assert_allclose(losses.angle_loss(7 * teacher[:, ::-1] + 1, teacher), 0, atol=1e-6)
    # a right angle at the first against a straight line: cosines 0 and 1, at the others cos 45 and 1: halves of the squares
    student = np.float32([[0, 0], [1, 0], [0, 1]])
    line = np.float32([[0, 0], [1, 0], [3, 0]])
    cosines = np.array([0, np.sqrt(0.5), np.sqrt(0.5)]), np.array([1, -1, 1])
    want = [naive_huber(s, t) for s, t in zip(*cosines, strict=True)]
    np.testing.assert_allclose(losses.angle_loss(student, line), want, rtol=1e-5)
    assert want[1] == np.sqrt(0.5) + 0.5  # |e| > 1 is linear


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_masks_ties_and_the_teachers_gradient(name):
    loss, _ = RELATIONS[name]
    student, teacher = data()

    def total(student, teacher, mask):
        values = loss(student, teacher, mask=mask)
        return values.sum(), values

    grad = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    garbage = [np.where(MASK[:, None], x, np.nan) for x in (student, teacher)]
    (_, values), (d_student, d_teacher) = grad(*garbage, MASK)
    packed = grad(student[MASK], teacher[MASK], np.ones(MASK.sum(), bool))  # where the padding stands does not matter
    np.testing.assert_allclose(values[MASK], packed[0][1], rtol=1e-5)
    np.testing.assert_allclose(d_student[MASK], packed[1][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(d_student[~MASK], 0)
    np.testing.assert_array_equal(d_teacher, 0)
    np.testing.assert_array_equal(values[~MASK], 0)
    ties = student.copy()
    ties[1], ties[4] = ties[0], 0
    for s in (ties, np.zeros_like(student), 1e15 * ties, 1e-25 * ties):
        for t in (teacher, np.zeros_like(teacher)):
            (value, _), (d_student, _) = grad(s, t, MASK)
            assert np.isfinite(value)
            assert np.isfinite(d_student).all()
    for count in (0, 1, 2):
        few = np.arange(B) < count
        (value, _), (d_student, _) = grad(student, teacher, few)
        assert np.isfinite(d_student).all()
        np.testing.assert_allclose(value, 0, atol=1e-6)
    # shards of a batch: vmap
    both = jax.jit(jax.vmap(loss))(np.stack([student, 2 * student[::-1]]), np.stack([teacher, teacher]))
    alone = [grad(s, teacher, np.ones(B, bool))[0][1] for s in (student, student[::-1])]
    np.testing.assert_allclose(both, np.stack(alone), rtol=1e-4, atol=1e-6)


def test_memory_of_angles_grows_slower_than_a_matrix_of_pairs():
    def temporary(b):
        shapes = [jax.ShapeDtypeStruct((b, 64), jnp.float32)] * 2
        compiled = jax.jit(jax.grad(lambda s, t: losses.angle_loss(s, t).sum())).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < small + 3072 * 4096 * 4  # not even as one matrix [B, B] does


def test_vectors_equal_naive_float64_and_by_hand():
    student, teacher = data()
    teacher, wide = teacher[:, :D], np.float64(teacher[:, :D])

    def cosine(student):
        lengths = np.sqrt((student**2).sum(1)) * np.sqrt((wide**2).sum(1))
        return 1 - (student * wide).sum(1) / lengths

    float64.assert_equal(lambda student: losses.vector_loss(student, teacher), cosine, {"student": student})
    mse = lambda student: ((student - wide) ** 2).mean(1)
    float64.assert_equal(lambda student: losses.vector_loss(student, teacher, form="mse"), mse, {"student": student})

    # 3-4-5 against the first axis: cosine 3/5; mean of (3 - 1)^2 and 4^2; opposite: 2; any leading axes
    x, y = np.float32([[3, 4], [-2, 0]]), np.float32([[1, 0], [7, 0]])
    np.testing.assert_allclose(losses.vector_loss(x, y), [0.4, 2], rtol=1e-6)
    np.testing.assert_allclose(losses.vector_loss(x, y, form="mse"), [10, 40.5], rtol=1e-6)
    np.testing.assert_allclose(losses.vector_loss(x[:, None], y[:, None]), [[0.4], [2]], rtol=1e-6)


@pytest.mark.parametrize("form", distill_vectors.VECTOR_FORMS)
def test_vectors_zero_extreme_and_the_teachers_gradient(form):
    student, teacher = data()
    teacher = teacher[:, :D]
    grad = jax.jit(jax.grad(lambda s, t: losses.vector_loss(s, t, form=form).sum(), (0, 1)))
    np.testing.assert_array_equal(grad(student, teacher)[1], 0)
    for s, t in ((0 * student, teacher), (student, 0 * teacher), (1e-25 * student, teacher), (1e15 * student, teacher)):
        assert np.isfinite(losses.vector_loss(s, t, form=form)).all()
        assert np.isfinite(grad(s, t)[0]).all()
    if form == "cosine":
        np.testing.assert_array_equal(losses.vector_loss(0 * student, teacher), 1)
        np.testing.assert_array_equal(grad(0 * student, teacher)[0], 0)
        np.testing.assert_allclose(losses.vector_loss(1e15 * student, 1e-20 * teacher), losses.vector_loss(student, teacher), rtol=1e-5)


R, T, H = 2, 5, 2
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])
TOKENS = SEGMENTS > 0
KEYS = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & TOKENS[:, :, None]


def layers(number, shape, seed):
    rng = np.random.default_rng(seed)
    return [np.float32(rng.normal(size=shape)) for _ in range(number)]


MAP = ((0, 1), (1, 3))


def test_hidden_states_equal_naive_float64_and_by_hand():
    student, teacher = layers(2, (R, T, D), 0), layers(4, (R, T, D), 1)

    def naive(first, second):
        errors = [((s - np.float64(teacher[j])) ** 2).mean(-1) for s, (_, j) in zip((first, second), MAP, strict=True)]
        return (errors[0] + errors[1]) / 2 * TOKENS

    run = lambda first, second: losses.hidden_states_loss([first, second], teacher, layer_map=MAP, mask=TOKENS)
    float64.assert_equal(run, naive, {"first": student[0], "second": student[1]})
    # one token real: (1 + 9) / 2 and (0 + 4) / 2 in the two layers, mean 3.5
    s, t = np.float32([[[1, 0], [8, 8]]]), [np.float32([[[0, 3], [0, 0]]]), np.float32([[[1, 2], [0, 0]]])]
    loss = losses.hidden_states_loss([s], t, layer_map=((0, 0), (0, 1)), mask=np.array([[True, False]]))
    np.testing.assert_allclose(loss, [[3.5, 0]], rtol=1e-6)


def test_attention_equals_naive_float64_and_by_hand():
    student, teacher = layers(2, (R, H, T, T), 2), layers(4, (R, H, T, T), 3)

    def naive(first, second):
        out = []
        for r, q in itertools.product(range(R), range(T)):
            keys = np.flatnonzero(KEYS[r, q])
            terms = []
            for (s, (_, j)), h in itertools.product(zip((first, second), MAP, strict=True), range(H)):
                if not len(keys):
                    break
                log_p, log_q = (log_softmax(x[r, h, q][keys]) for x in (np.float64(teacher[j]), s))
                terms.append(np.sum(np.exp(log_p) * (log_p - log_q)))
            out.append(sum(terms) / len(terms) if len(keys) else 0.0)
        return np.stack(out).reshape(R, T)

    run = lambda first, second: losses.attention_loss([first, second], teacher, layer_map=MAP, mask=KEYS)
    float64.assert_equal(run, naive, {"first": student[0], "second": student[1]})
    # student even over two keys, teacher 3/4, 1/4; the third key belongs to another text
    s, t = np.float32([[[[0, 0, 9]] * 3]]), np.float32([[[[np.log(3), 0, 9]] * 3]])
    mask = np.array([[[True, True, False], [False, False, True], [False] * 3]])
    want = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(losses.attention_loss([s], [t], layer_map=[(0, 0)], mask=mask), [[want, 0, 0]], rtol=1e-5)


def test_hidden_states_and_attention_masks_and_the_teachers_gradient():
    for loss, shape, mask, place in (
        (losses.hidden_states_loss, (R, T, D), TOKENS, TOKENS[..., None]),
        (losses.attention_loss, (R, H, T, T), KEYS, KEYS[:, None]),
    ):
        student, teacher = layers(1, shape, 4), layers(1, shape, 5)
        grad = jax.jit(jax.value_and_grad(lambda s, t, loss=loss, mask=mask: loss(s, t, layer_map=[(0, 0)], mask=mask).sum(), (0, 1)))
        value, ((d_student,), (d_teacher,)) = grad([np.where(place, student[0], np.nan)], [np.where(place, teacher[0], np.nan)])
        want, ((want_student,), _) = grad(student, teacher)
        np.testing.assert_array_equal(value, want)
        np.testing.assert_array_equal(d_student, want_student)
        np.testing.assert_array_equal(d_student * ~place, 0)
        np.testing.assert_array_equal(d_teacher, 0)
        assert np.isfinite(grad([1e4 * student[0]], [-1e4 * teacher[0]])[0])
        assert np.isfinite(grad([0 * student[0]], teacher)[1][0][0]).all()


def test_attention_scores():
    rng = np.random.default_rng(0)
    query, key = (np.float32(rng.normal(size=(R, T, 6))) for _ in range(2))
    got = losses.attention_scores(query, key, heads=2)
    want = np.stack([query[..., p] @ key[..., p].swapaxes(1, 2) / np.sqrt(3) for p in (slice(0, 3), slice(3, 6))], 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # one head of width 4, 1 1 1 1 against itself: 4 / 2
    ones = np.ones((1, 1, 4), np.float32)
    np.testing.assert_allclose(losses.attention_scores(ones, ones, heads=1), [[[[2]]]])
    # widths may differ: relations of both have one shape
    narrow, wide = np.float32(rng.normal(size=(R, T, 4))), np.float32(rng.normal(size=(R, T, 12)))
    relations = [[losses.attention_scores(x, x, heads=2)] for x in (narrow, wide)]
    assert losses.attention_loss(*relations, layer_map=[(0, 0)], mask=KEYS).shape == (R, T)


X, M3, M4 = np.ones((3, 2), np.float32), [np.ones((2, 3, 4), np.float32)], [np.ones((2, 1, 3, 3), np.float32)]
BAD = {
    "form": (lambda: losses.vector_loss(X, X, form="l1"), "form is 'l1'; expected one of cosine, mse"),
    "vectors": (lambda: losses.vector_loss(X, X[:, :1]), r"student has shape \(3, 2\) and teacher \(3, 1\)"),
    "rows": (lambda: losses.distance_loss(X, X[:2]), r"expected \[B, D\] and \[B, E\]"),
    "mask": (lambda: losses.angle_loss(X, X, mask=np.ones(2, bool)), r"mask has shape \(2,\)"),
    "neighbours": (lambda: losses.distance_loss(X, X, neighbours=0), "neighbours is 0; expected an integer >= 1"),
    "angle's neighbours": (lambda: losses.angle_loss(X, X, neighbours=1), "neighbours is 1; expected an integer >= 2"),
    "empty map": (lambda: losses.hidden_states_loss(M3, M3, layer_map=(), mask=np.ones((2, 3), bool)), "layer_map is empty"),
    "layer": (
        lambda: losses.hidden_states_loss(M3, M3, layer_map=[(0, 1)], mask=np.ones((2, 3), bool)),
        "layer 1 of the teacher, which has 1: expected 0 to 0",
    ),
    "width": (
        lambda: losses.hidden_states_loss(M3, [M3[0][..., :2]], layer_map=[(0, 0)], mask=np.ones((2, 3), bool)),
        "expected one shape of 3 axes",
    ),
    "token mask": (lambda: losses.hidden_states_loss(M3, M3, layer_map=[(0, 0)], mask=np.ones((2, 4), bool)), r"mask has shape \(2, 4\)"),
    "key mask": (lambda: losses.attention_loss(M4, M4, layer_map=[(0, 0)], mask=np.ones((2, 3), bool)), r"mask has shape \(2, 3\)"),
    "heads": (lambda: losses.attention_scores(M3[0], M3[0], heads=3), "heads is 3, which does not divide the width 4"),
    "scores": (lambda: losses.attention_scores(X, X, heads=1), r"query has shape \(3, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(RecJaxError, match=message):
        call()
