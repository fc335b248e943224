"""Several vectors of a user: how they are made, which one is trained, the highest of their scores in every ranking, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fusion_test import World

from rec_jax import mesh as mesh_lib
from rec_jax import topk
from rec_jax.data.pipeline import BatchSpec
from rec_jax.eval import model as model_lib
from rec_jax.eval import rankings
from rec_jax.eval.mine import mine
from rec_jax.serve.recommend import Recommender
from rec_jax.towers import history, interests, two_tower
from rec_jax.towers.batches import encode_batch
from rec_jax.train import stages
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Ragged, RecJaxError

ON = {"towers.user.interests": 3, "towers.user.dropout": 0.0}
SPEC = history.HistorySpec(dim=8, layers=1, heads=2, mlp=16, dropout=0.0, max_positions=32, interests=3)
IDS = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])


# -- the vectors --


def test_interests_are_those_of_a_slow_loop():
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    mask = np.asarray(history.places_seen(jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]]), causal=True))
    module = interests.Interests(3)
    params = module.init(jax.random.key(0), x, mask)["params"]
    assert jax.tree.map(jnp.shape, params) == {"hidden": {"kernel": (4, 16)}, "interest": {"kernel": (16, 3)}}
    found = module.apply({"params": params}, x, mask)
    first, second = (np.float64(params[name]["kernel"]) for name in ("hidden", "interest"))
    for row, place, k in np.ndindex(2, 6, 3):
        seen = np.flatnonzero(mask[row, place])
        weights = np.exp([(np.tanh(x[row, t] @ first) @ second)[k] for t in seen])
        want = x[row, place] + (weights / weights.sum()) @ x[row, seen]
        np.testing.assert_allclose(found[row, place, k], want, atol=1e-5)


def test_a_place_sees_neither_its_future_nor_other_windows():
    params = history.init(jax.random.key(0), SPEC)
    x = jax.random.normal(jax.random.key(1), (1, 10, 8))
    encode = jax.jit(lambda x, ids: history.encode(params, SPEC, x, ids))
    out = encode(x, IDS)
    assert out.shape == (1, 10, 3, 8)
    np.testing.assert_array_equal(out[:, :3], encode(x.at[:, 3:].add(5.0), IDS)[:, :3])
    np.testing.assert_array_equal(out[:, 5:9], encode(x.at[:, :5].add(3.0), IDS)[:, 5:9])
    np.testing.assert_allclose(out[:, 5:9], encode(x[:, 5:9], jnp.ones((1, 4), jnp.int32)), atol=1e-5)
    assert np.abs(np.asarray(out[0, 8, 0] - out[0, 8, 1])).max() > 1e-3, "they differ from the start"


def test_a_single_interest_is_the_tower_as_it_was():
    one = dataclasses.replace(SPEC, interests=1)
    params, several = history.init(jax.random.key(0), one), history.init(jax.random.key(0), SPEC)
    assert several.keys() - params.keys() == {"interests"}
    jax.tree.map(np.testing.assert_array_equal, params, {name: several[name] for name in params})
    x = jax.random.normal(jax.random.key(1), (1, 10, 8))
    out, more = history.encode(params, one, x, IDS), history.encode(several, SPEC, x, IDS)
    assert out.shape == (1, 10, 8)
    for k in range(3):  # a window's first place sees itself alone: each interest is its vector twice
        np.testing.assert_allclose(more[:, [0, 5], k], 2 * out[:, [0, 5]], rtol=1e-5, atol=1e-6)
    with_one = two_tower.make_spec(tiny.config().towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS)
    assert with_one.history.interests == 1


def test_the_sharded_layout_knows_their_parameters(tmp_path):
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = mesh_lib.shardings(tiny.task(tiny.config(**ON), tmp_path).params, mesh_lib.rules_of("sharded", ()), mesh)
    assert placed["user"]["interests"]["hidden"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert placed["user"]["interests"]["interest"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp")


# -- in training --


def test_the_nearest_to_the_target_is_taken_and_trained():
    rng = np.random.default_rng(0)
    users, targets = rng.normal(size=(2, 5, 3, 4)).astype(np.float32), rng.normal(size=(2, 5, 4)).astype(np.float32)
    users[1, 2, 2] = users[1, 2, 0]
    targets[1, 2] = users[1, 2, 0] * 10
    found, gradient = jax.value_and_grad(lambda u: interests.nearest(u, targets).sum())(users)
    best = np.argmax([[[users[a, b, k] @ targets[a, b] for k in range(3)] for b in range(5)] for a in range(2)], axis=-1)
    assert best[1, 2] == 0, "of equal ones the first"
    assert float(found) == pytest.approx(sum(users[a, b, best[a, b]].sum() for a, b in np.ndindex(2, 5)), rel=1e-5)
    np.testing.assert_array_equal(gradient, np.broadcast_to((np.arange(3) == best[..., None])[..., None], users.shape))


@pytest.mark.parametrize("cloze", [0.0, 0.4])
def test_a_batchs_queries_are_routed_and_every_interest_gets_gradient(cloze, tmp_path):
    task = tiny.task(tiny.config(**{**ON, "batch.cloze": cloze}), tmp_path)
    spec, params = task.spec.towers, task.params

    @jax.jit
    def forward(batch):
        out = encode_batch(params, spec, batch, table=tiny.table(), catalogue=False, keys=None)
        hidden = (batch.history < 0) & (batch.history_segments > 0)
        places = jnp.maximum(batch.history, 0).reshape(8, -1)
        vectors = jax.vmap(lambda item, at: item[at])(out.item, places).reshape(16, 16, 8)
        segments = batch.history_segments.reshape(16, 16)
        every = history.encode(params["user"], spec.history, vectors, segments, hidden=hidden.reshape(16, 16) if cloze else None)
        return out, every.reshape(8, 32, 3, 8)

    gradient = jax.jit(jax.grad(lambda p, b: loss_and_metrics(p, task.spec, b, task.constants, None)[0]))
    iterator, seen = iter(task.batches), np.zeros(3)
    for _ in range(3):
        batch = jax.tree.map(jnp.asarray, next(iterator))
        made, every = jax.device_get(forward(batch))
        out, item = made.user, made.item
        for g, q in np.argwhere(np.asarray(batch.weights) > 0):
            all_of_it = every[g, q] / np.linalg.norm(every[g, q], axis=-1, keepdims=True)
            scores = all_of_it @ item[g, int(batch.targets[g, q])]
            np.testing.assert_allclose(out[g, q], all_of_it[np.argmax(scores)], atol=1e-5)
        seen += np.abs(np.asarray(gradient(params, batch)["user"]["interests"]["interest"]["kernel"])).max(0) > 0
    assert (seen > 0).all()


def test_devices_agree_on_the_gradient(tmp_path):
    gradient = tiny.gradient_of_one_device_and_eight(tiny.task(tiny.config(**ON), tmp_path))
    assert np.abs(gradient["user"]["interests"]["interest"]["kernel"]).max() > 0


# -- in rankings --


@pytest.mark.parametrize("block", [128, 16384])
@pytest.mark.parametrize("devices", [None, 8])
def test_top_k_and_ranks_are_those_of_the_highest_scores(block, devices):
    rng = np.random.default_rng(0)
    query, item = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((13, 4, 6), (403, 6)))  # whole numbers: ties everywhere
    exclude = rng.integers(-1, 403, (13, 20)).astype(np.int32)
    target = np.stack([rng.permutation(403)[:3] for _ in range(13)]).astype(np.int32)
    scores = np.max([query[:, k] @ item.T for k in range(4)], axis=0)
    options = {} if devices is None else {"mesh": mesh_lib.make_mesh({"data": devices}), "axis": "data"}
    found = topk.rank_and_top_k(query, item, target, k=9, exclude=exclude, block=block, **options)
    want = topk.rank_and_top_k_of_scores(scores, target, k=9, exclude=exclude)
    for name in ("ranks", "ranks_all", "scores", "ids", "own"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name), err_msg=name)
    best, ids = topk.top_k(query, item, k=9, exclude=exclude, block=block, **options)
    left = scores.copy()
    for row, gone in enumerate(exclude):
        left[row, gone[gone >= 0]] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(403), left.shape), -left), axis=1)[:, :9]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, np.take_along_axis(left, order, axis=1))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(RecJaxError, match=r"query \(2, 0, 3\), item \(4, 3\): expected \[Q, D\] or \[Q, K, D\]"):
        topk.top_k(np.zeros((2, 0, 3), np.float32), np.zeros((4, 3), np.float32), k=1)
    with pytest.raises(RecJaxError, match=r"of one width"):
        topk.top_k(np.zeros((2, 3, 2), np.float32), np.zeros((4, 3), np.float32), k=1)


class Named(World):
    def names(self):
        return [f"item {n}" for n in range(tiny.N_ITEMS)]

    def item_ids(self):
        return list(range(tiny.N_ITEMS))


@pytest.fixture(scope="module")
def trained():
    c, prepared = tiny.config(**{**ON, "eval.k": (10,), "eval.users_per_block": 16}), Named()
    spec = model_lib.towers_of(c, prepared, tiny.bert_spec())
    model = model_lib.Model(c, prepared, tiny.tokens(), spec, tiny.table())
    params = two_tower.init(jax.random.key(0), spec)
    items = np.array(model.item_vectors(params))
    items[7] = items[3]  # twins
    return model_lib.Trained(model, params, 0, items)


def test_an_evaluation_is_that_of_a_slow_loop(trained):
    model, eval_set = trained.model, trained.model.prepared.eval_set("test")
    users = model.user_vectors(trained.params, trained.items, eval_set.history)
    assert users.shape == (tiny.N_USERS, 3, 8)
    np.testing.assert_allclose(np.linalg.norm(users, axis=-1), 1, atol=1e-5)
    ranked = model.rank(trained.params, eval_set, name="test", items=trained.items)
    scores = np.stack([np.max([u @ trained.items.T for u in of_user], axis=0) for of_user in users])
    close = 1e-6
    for n in range(len(users)):
        target, gone = eval_set.targets[n][0], set(eval_set.history[n].tolist())
        rivals = [i for i in range(tiny.N_ITEMS) if i != target]
        ahead = lambda margin, rivals, n=n, target=target: 1 + sum(bool(scores[n, i] >= scores[n, target] + margin) for i in rivals)
        open_ = [i for i in rivals if i not in gone]
        assert ahead(close, rivals) <= ranked.ranks_all[n, 0] <= ahead(-close, rivals)
        assert ahead(close, open_) <= ranked.ranks[n, 0] <= ahead(-close, open_)
        if target in (3, 7):
            assert ranked.ranks_all[n, 0] > 1, "its twin counts against it"
        ids = [i for i in ranked.ids[n].tolist() if i not in (3, 7)]
        assert (np.diff(scores[n, ids]) <= close).all()
    again = rankings.evaluate_scores(model.scorer(trained.params, trained.items), eval_set, ks=(10,), users_per_block=16)
    assert (again.ids == ranked.ids).mean() > 0.98
    np.testing.assert_allclose(model.scorer(trained.params, trained.items)(Ragged.from_rows([eval_set.history[0]])), scores[:1], atol=1e-5)


def test_an_empty_history_prefers_nothing(trained):
    users = trained.model.user_vectors(trained.params, trained.items, Ragged.from_rows([[], [5]]))
    assert not users[0].any()
    assert users[1].any(-1).all()


def test_recommendations_are_by_the_highest_score(trained):
    answer = Recommender(trained).recommend(["item 4", "item 9", "item 11"], k=5)
    users = trained.model.user_vectors(trained.params, trained.items, Ragged.from_rows([[4, 9, 11]]))
    scores = (users[0] @ trained.items.T).max(0)
    scores[[4, 9, 11]] = -np.inf
    np.testing.assert_allclose([r.score for r in answer], np.sort(scores)[::-1][:5], atol=1e-5)
    np.testing.assert_allclose([scores[int(r.item)] for r in answer], [r.score for r in answer], atol=1e-5)


def test_negatives_are_mined_by_the_highest_score():
    rng = np.random.default_rng(1)
    query, item = rng.normal(size=(5, 3, 4)).astype(np.float32), rng.normal(size=(40, 4)).astype(np.float32)
    positive, known = rng.integers(0, 40, 5).astype(np.int32), Ragged.from_rows([[1, 2]] * 5)
    found = mine(query, item, positive, known, k=4, window=20, margin=None, queries_per_block=4)
    scores = np.einsum("qkd,nd->qkn", query, item).max(1)
    np.testing.assert_allclose(found.positive, scores[np.arange(5), positive], rtol=1e-5)
    for n in range(5):
        order = [i for i in np.argsort(-scores[n]) if i not in (1, 2, positive[n])][:4]
        assert found.ids[n].tolist() == order


# -- what is refused --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.user.interests": 0}, r"config.towers.user.interests=0: must be at least 1"),
        ({"towers.user.kind": "text", "towers.text.source": "tokens"}, r"interests=3 are of the history tower: set it to 1, or"),
        ({"eval.rank_by": "task"}, r"interests=3: the task head scores a single vector; set it to 1, or config.eval.rank_by='vectors'"),
    ],
)
def test_bad_keys_are_named(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**{**ON, **changes})


BATCH = {"objectives.info_nce.candidates": "batch"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives.info_nce.positives": 2},
            r"positives=2: config.towers.user.interests=3 takes the vector nearest to one target",
        ),
        ({**BATCH, "objectives.info_nce.momentum": 0.99}, r"info_nce.momentum=0.99 makes single keys.*set momentum=0, or config.towers"),
        ({"objectives.history_views.weight": 0.1}, r"history_views: two views of a history have no target"),
        ({"objectives.task.weight": 0.1}, r"objectives.task: the task head scores a single vector"),
    ],
)
def test_objectives_of_a_single_vector_are_refused(changes, message, tmp_path):
    with pytest.raises(RecJaxError, match=message):
        tiny.task(tiny.config(**{**ON, **changes}), tmp_path)


@pytest.mark.parametrize("name", ["distill_kl", "distill_margin", "distill_rank", "preference"])
@pytest.mark.parametrize("of_student", [True, False])
def test_a_teacher_and_its_student_have_one_vector_each(name, of_student):
    make = lambda on: two_tower.make_spec(tiny.config(**(ON if on else {})).towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS)
    c, batch = tiny.config(**{f"objectives.{name}.weight": 1.0}), BatchSpec.from_config(tiny.config())
    message = r"compared one vector each, and" if of_student else r"the teacher has config.towers.user.interests=3"
    with pytest.raises(RecJaxError, match=rf"objectives.{name}: .*{message}"):
        stages.make_step(c, make(of_student), batch, teacher=make(not of_student))
    items = tiny.config(**{"objectives.distill_relations.weight": 1.0, "objectives.distill_relations.of": "item"})
    assert stages.make_step(items, make(of_student), batch, teacher=make(not of_student))
