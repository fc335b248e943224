"""Task heads against a plain float64 reference, and each one learns 64 examples by heart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rec_jax.towers import bert, interactions
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.interactions import InteractionSpec, apply, cross_scores, init, init_cross, score_all
from rec_jax.types import RecJaxError

DIM = 6
HEADS = {
    "dot": InteractionSpec("dot", tasks=2, context=(3, 5), scale=4.0),
    "mlp": InteractionSpec("mlp", tasks=2, hidden=(16, 12), tower=(8,), context=(3, 5), context_dim=4),
    "dcn": InteractionSpec("dcn", tasks=2, hidden=(), cross_layers=2, tower=(16, 8)),
    "mmoe": InteractionSpec("mlp", tasks=3, hidden=(16, 12), sharing="mmoe", experts=4, tower=(8,)),
    "mmoe over dcn of low rank": InteractionSpec(
        "dcn", tasks=2, hidden=(16,), cross_layers=3, cross_rank=4, sharing="mmoe", experts=3, tower=(), context=(3,)
    ),
    "ple": InteractionSpec("mlp", tasks=2, hidden=(12,), sharing="ple", experts=2, task_experts=3, levels=1, tower=(8,)),
    "ple of three levels": InteractionSpec("mlp", tasks=3, hidden=(12,), sharing="ple", experts=2, task_experts=1, levels=3, tower=()),
}
every_head = pytest.mark.parametrize("spec", HEADS.values(), ids=HEADS.keys())
run, start = jax.jit(apply, static_argnums=1), jax.jit(init, static_argnums=(1, 2))


def random_params(spec: InteractionSpec, seed: int = 0):
    """With biases away from zero."""
    leaves, tree = jax.tree.flatten(start(jax.random.key(seed), spec, DIM))
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(leaf + 0.2 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def unit(random, *shape) -> np.ndarray:
    x = random.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def inputs(spec: InteractionSpec, n: int, seed: int = 1):
    random = np.random.default_rng(seed)
    context = np.stack([random.integers(-1, size, n) for size in spec.context], 1) if spec.context else None
    return unit(random, n, DIM), unit(random, n, DIM), context


# -- the reference: one example, one task, one expert at a time --


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def mlp(layers, x, *member):
    for n in range(len(layers)):
        kernel, bias = (np.asarray(layers[f"layer_{n}"][name], np.float64)[member] for name in ("kernel", "bias"))
        x = np.maximum(x @ kernel + bias, 0)
    return x


def reference(params, spec: InteractionSpec, user, item, context) -> np.ndarray:
    """One example -> logits [L]."""
    user, item = user.astype(np.float64), item.astype(np.float64)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    logits = params["dot"]["scale"] * (user @ item) + params["dot"]["bias"]
    embedded, first = [], 0
    for size, category in zip(spec.context, [] if context is None else context, strict=True):
        embedded.append(params["context"]["embedding"][first + (0 if category < 0 else 1 + category)])
        first += size + 1
    if spec.kind == "dot":
        return logits + sum(embedded)
    x = np.concatenate([user * DIM**0.5, item * DIM**0.5, user * item * DIM, *embedded])
    if spec.kind == "dcn":
        start = x
        for n in range(spec.cross_layers):
            layer = params["cross"][f"layer_{n}"]
            matrix = layer["down"] @ layer["kernel"] if spec.cross_rank else layer["kernel"]
            x = start * (x @ matrix + layer["bias"]) + x
    for task in range(spec.tasks):
        if spec.sharing == "bottom":
            mixed = mlp(params["shared"], x)
        elif spec.sharing == "mmoe":
            gate = softmax(x @ params["gates"]["kernel"][task])
            mixed = sum(gate[e] * mlp(params["experts"], x, e) for e in range(spec.experts))
        else:
            mixed = ple(params, spec, x)[task]
        logits[task] += mlp(params["tower"], mixed, task) @ params["out"]["kernel"][task]
    return logits


def ple(params, spec, x):
    mine, common = [x] * spec.tasks, x
    for n in range(spec.levels):
        level = params[f"level_{n}"]
        shared = [mlp(level["experts"], common, e) for e in range(spec.experts)]
        own = [[mlp(level["task_experts"], mine[t], t, e) for e in range(spec.task_experts)] for t in range(spec.tasks)]
        gates = [softmax(mine[t] @ level["gates"]["kernel"][t]) for t in range(spec.tasks)]
        if n + 1 < spec.levels:
            every = [expert for experts in own for expert in experts] + shared
            common = sum(g * e for g, e in zip(softmax(common @ level["gate"]["kernel"]), every, strict=True))
        mine = [sum(g * e for g, e in zip(gates[t], own[t] + shared, strict=True)) for t in range(spec.tasks)]
    return mine


@every_head
def test_logits_equal_the_reference(spec):
    params, (user, item, context) = random_params(spec), inputs(spec, 64)
    got = run(params, spec, user, item, context)
    assert got.shape == (64, spec.tasks)
    for i in range(0, 64, 9):
        expected = reference(params, spec, user[i], item[i], None if context is None else context[i])
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-4)


def test_leading_axes_mean_nothing():
    spec = HEADS["ple of three levels"]
    params, (user, item, _) = random_params(spec), inputs(spec, 64)
    square = run(params, spec, user.reshape(4, 16, -1), item.reshape(4, 16, -1))
    np.testing.assert_allclose(square.reshape(64, -1), run(params, spec, user, item), atol=1e-5)
    np.testing.assert_allclose(run(params, spec, user[:1], item)[3], run(params, spec, user, item[3:4])[0], atol=1e-5)


@every_head
def test_a_head_starts_as_the_dot_product(spec):
    params, (user, item, context) = start(jax.random.key(0), spec, DIM), inputs(spec, 64)
    logits = np.asarray(run(params, spec, user, item, context))
    dot = spec.scale * (user * item).sum(-1, keepdims=True)
    assert np.abs(logits - dot).max() < (1e-5 if spec.kind == "dot" else 1.0)
    assert np.abs(logits - dot).mean() < 0.3


@every_head
def test_a_head_learns_64_examples_by_heart(spec):
    """Vectors and head together, as in a task stage."""
    user, item, context = inputs(spec, 64)
    labels = np.random.default_rng(2).integers(0, 2, (64, spec.tasks)).astype(np.float32)
    state = {"head": start(jax.random.key(0), spec, DIM), "user": jnp.asarray(user), "item": jnp.asarray(item)}
    if spec.kind == "dot":  # one dot product cannot say different things to two tasks
        labels = np.repeat(labels[:, :1], spec.tasks, 1)
    optimizer = optax.adam(2e-2)

    def loss(state):
        logits = apply(state["head"], spec, state["user"], state["item"], context)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    @jax.jit
    def train(state):
        def step(carry, _):
            state, memory = carry
            value, gradients = jax.value_and_grad(loss)(state)
            updates, memory = optimizer.update(gradients, memory)
            return (optax.apply_updates(state, updates), memory), value

        return jax.lax.scan(step, (state, optimizer.init(state)), None, length=300)

    (trained, _), losses = train(state)
    assert losses[0] > 0.3
    assert losses[-1] < 0.01
    for path, moved in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: (a != b).any(), trained, state)):
        assert moved, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["dot", "mlp", "ple of three levels"])
def test_score_all_equals_apply(name):
    spec = HEADS[name]
    params, random = random_params(spec), np.random.default_rng(3)
    users, items = unit(random, 4, DIM), unit(random, 16, DIM)
    context = np.stack([random.integers(-1, size, 4) for size in spec.context], 1) if spec.context else None
    task = spec.tasks - 1
    pairs = np.repeat(users, 16, 0), np.tile(items, (4, 1)), None if context is None else np.repeat(context, 16, 0)
    expected = np.asarray(run(params, spec, *pairs))[:, task].reshape(4, 16)
    score = jax.jit(score_all, static_argnums=1, static_argnames=("task", "block"))
    for block in (5,) if spec is not HEADS["mlp"] else (None, 1, 5, 50):
        np.testing.assert_allclose(score(params, spec, users, items, context, task=task, block=block), expected, atol=1e-5)
    if spec.context:
        unknown = run(params, spec, *pairs[:2], np.full((64, 2), -1))[:, task].reshape(4, 16)
        np.testing.assert_allclose(score(params, spec, users, items, task=task), unknown, atol=1e-5)


ONCE = {
    "mlp": HEADS["mlp"],
    "dcn": InteractionSpec("dcn", hidden=(12, 7), cross_layers=3, tower=(5,), context=(3, 5), context_dim=4),
    "dcn of low rank": InteractionSpec("dcn", tasks=2, hidden=(12,), cross_layers=2, cross_rank=3, tower=()),
}


@pytest.mark.parametrize("spec", ONCE.values(), ids=ONCE.keys())
def test_what_is_of_the_user_alone_may_be_worked_out_once(spec, monkeypatch):
    monkeypatch.setattr(interactions, "ITEMS_ONCE", 4)  # 10 items are two blocks and a half
    params, random = random_params(spec), np.random.default_rng(3)
    users, items = unit(random, 3, DIM), unit(random, 10, DIM)
    context = np.stack([random.integers(-1, size, 3) for size in spec.context], 1) if spec.context else None
    found = jax.jit(score_all, static_argnums=1, static_argnames=("task", "once"))(
        params, spec, users, items, context, task=spec.tasks - 1, once=True
    )
    circumstances = [None] * 3 if context is None else context
    pairs = [[reference(params, spec, u, i, c)[-1] for i in items] for u, c in zip(users, circumstances, strict=True)]
    np.testing.assert_allclose(found, pairs, atol=2e-5 * np.abs(pairs).max())


def test_heads_that_share_otherwise_are_scored_pair_by_pair():
    for name in ("dot", "mmoe", "dcn"):  # the last without a network that tasks share
        spec, (users, items, context) = HEADS[name], inputs(HEADS[name], 4)
        params = random_params(spec)
        once, plain = (score_all(params, spec, users, items, context, once=once) for once in (True, False))
        np.testing.assert_array_equal(once, plain)


def test_score_all_makes_a_block_of_features_at_a_time():
    spec = InteractionSpec("mlp", hidden=(8,), tower=())
    params = start(jax.random.key(0), spec, DIM)
    shapes = jax.ShapeDtypeStruct((64, DIM), jnp.float32), jax.ShapeDtypeStruct((4096, DIM), jnp.float32)
    sizes = {}
    for block in (64, 4096):
        compiled = jax.jit(lambda u, i, block=block: score_all(params, spec, u, i, block=block)).lower(*shapes).compile()
        sizes[block] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[64] < sizes[4096] / 8


@pytest.mark.parametrize("kind", ["dot", "mlp"])
def test_unknown_categories_have_a_row_of_their_own_and_wrong_ones_give_nan(kind):
    spec = InteractionSpec(kind, hidden=(8,), context=(2, 3))
    params, (user, item, _) = random_params(spec), inputs(spec, 4)
    pairs = np.array([[-1, 0], [0, 0], [1, 0], [2, 0], [0, -1], [0, 2], [0, 3]])
    logits = np.asarray(run(params, spec, user[:1], item[:1], pairs))[:, 0]
    np.testing.assert_array_equal(np.isnan(logits), [0, 0, 0, 1, 0, 0, 1])
    assert len({*logits[[0, 1, 2, 4, 5]].round(5)}) == 5
    gradient = jax.jit(jax.grad(lambda p: apply(p, spec, user[:1], item[:1], np.array([[-1, 1]])).sum()))(params)
    touched = np.abs(gradient["context"]["embedding"]).max(-1) > 0
    assert touched.tolist() == [True, False, False, False, False, True, False]


def test_dropout_depends_on_a_rows_key_alone():
    spec = dataclasses.replace(HEADS["ple"], dropout=0.5)
    params, keys = random_params(spec), jax.random.split(jax.random.key(0), 4)
    user, item = (unit(np.random.default_rng(n), 4, 3, DIM) for n in (0, 1))
    whole = np.asarray(run(params, spec, user, item, keys=keys))
    parts = [run(params, spec, user[i : i + 2], item[i : i + 2], keys=keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)
    assert np.abs(whole - run(params, spec, user, item)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fm"}, "kind='fm'.*dot, mlp, dcn"),
        ({"sharing": "none"}, "sharing='none'.*bottom, mmoe, ple"),
        ({"kind": "dot", "sharing": "mmoe"}, "sharing='mmoe' needs experts"),
        ({"sharing": "ple", "hidden": ()}, "sharing='ple' needs experts"),
        ({"tasks": 0}, "tasks=0: must be at least 1"),
        ({"cross_rank": -1}, "cross_rank=-1"),
        ({"hidden": [8]}, r"hidden=\[8\]: must be a tuple"),
        ({"context": (3, 0)}, r"context=\(3, 0\)"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
    ],
)
def test_spec_refuses(changes, message):
    with pytest.raises(RecJaxError, match=message):
        dataclasses.replace(HEADS["mlp"], **changes)


def test_context_and_task_must_fit():
    spec = InteractionSpec("mlp", hidden=(8,), context=(2, 3))
    params, (user, item, context) = random_params(spec), inputs(spec, 4)
    for given, what in ((None, "None"), (context[:, :1], "1")):
        with pytest.raises(RecJaxError, match=f"2 context fields, and the context given has {what}"):
            apply(params, spec, user, item, given)
    with pytest.raises(RecJaxError, match="0 context fields"):
        apply(params, HEADS["mmoe"], user, item, context)
    with pytest.raises(RecJaxError, match="task=1: the head has the tasks 0 to 0"):
        score_all(params, spec, user, item, context, task=1)


# -- cross-encoder --

TEXT = tiny.bert_spec(layers=1)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0], [1] * 5 + [2] * 7])
TOKENS = np.random.default_rng(4).integers(0, tiny.VOCAB, SEGMENTS.shape)


cross = jax.jit(cross_scores, static_argnums=2, static_argnames="texts_per_row")


def cross_params():
    return jax.jit(lambda key: (init_cross(key, TEXT), init_text(key, TEXT)))(jax.random.key(1))


def test_cross_scores_equal_numpy_and_one_pair_a_row():
    head, text = cross_params()
    head = jax.tree.map(lambda x: x + 0.1, head)
    packed = np.asarray(cross(head, text, TEXT, TOKENS, SEGMENTS, texts_per_row=3))
    assert packed.shape == (2, 3)
    hidden = np.asarray(jax.jit(bert, static_argnums=1)(text, TEXT, TOKENS, SEGMENTS))
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2)):
        mine = SEGMENTS[row] == segment
        pooled = hidden[row][mine].mean(0)
        inner = np.tanh(pooled @ np.asarray(head["transform"]["kernel"]) + head["transform"]["bias"])
        expected = inner @ np.asarray(head["out"]["kernel"])[:, 0] + head["out"]["bias"][0]
        np.testing.assert_allclose(packed[row, segment - 1], expected, atol=1e-5)
        alone, there = np.zeros((2, 12), int), np.zeros((2, 12), int)
        alone[0, : mine.sum()], there[0, : mine.sum()] = TOKENS[row][mine], 1
        np.testing.assert_allclose(packed[row, segment - 1], cross(head, text, TEXT, alone, there, texts_per_row=3)[0, 0], atol=1e-5)


def test_cross_scores_of_one_pair_change_no_bit_of_anothers():
    head, text = cross_params()
    others = np.where(SEGMENTS == 2, (TOKENS + 1) % tiny.VOCAB, TOKENS)
    before, after = (np.asarray(cross(head, text, TEXT, tokens, SEGMENTS, texts_per_row=3)) for tokens in (TOKENS, others))
    np.testing.assert_array_equal(before[:, [0, 2]], after[:, [0, 2]])
    assert (before[:, 1] != after[:, 1]).all()


def test_a_cross_encoder_learns_64_pairs_by_heart():
    random = np.random.default_rng(5)
    tokens, segments = random.integers(3, tiny.VOCAB, (16, 24)), np.tile(np.repeat(np.arange(1, 5), 6), (16, 1))
    labels = random.integers(0, 2, (16, 4)).astype(np.float32)
    state, optimizer = cross_params(), optax.adam(4e-3)

    def loss(state):
        logits = cross_scores(*state, TEXT, tokens, segments, texts_per_row=4)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    @jax.jit
    def step(state, memory):
        value, gradients = jax.value_and_grad(loss)(state)
        updates, memory = optimizer.update(gradients, memory)
        return optax.apply_updates(state, updates), memory, value

    memory = optimizer.init(state)
    for _ in range(500):
        state, memory, value = step(state, memory)
    assert value < 0.01
