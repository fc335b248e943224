"""The cloze form of histories: what is hidden, what the tower makes of it, the losses on it, and a hidden place to rank by."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from fusion_test import World

from rec_jax import config as config_lib
from rec_jax.data.cloze import Cloze
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.data.windows import Replay
from rec_jax.eval import model as model_lib
from rec_jax.towers import history, two_tower
from rec_jax.towers.batches import encode_batch
from rec_jax.train import stages
from rec_jax.train.draws import unseen_items
from rec_jax.train.objectives import make_objectives
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Ragged, RecJaxError

ON = {"batch.cloze": 0.4, "batch.cloze_last": 0.2, "towers.user.dropout": 0.0}
LAST = {**ON, "batch.cloze_last": 1.0}
SPEC = history.HistorySpec(dim=8, layers=2, heads=2, mlp=16, dropout=0.0, max_positions=32, mask=True, causal=False)
KEY = jax.random.key(3, impl=RNG)


def make(seed=3, replay=None, negatives=None, **changes):
    c, world = tiny.config(**{**ON, **changes}), tiny.World()
    options = {"texts": tiny.tokens(), "replay": replay, "negatives": negatives}
    return Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=seed, **options)


def windows(batch):
    """(shard, row, places of a window in the row, its items in order, which are hidden) of a batch."""
    for g, row in np.ndindex(*batch.history.shape[:2]):
        segments, targets = batch.history_segments[g, row], batch.targets[g].reshape(batch.history[g].shape)[row]
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            hidden = batch.history[g, row, places] < 0
            yield g, row, places, batch.item_ids[g][np.where(hidden, targets[places], batch.history[g, row, places])], hidden


# -- in the data --


@pytest.mark.parametrize("source", ["frozen", "tokens"])
def test_batches_are_the_windows_with_some_of_their_items_hidden(source):
    batches = make(**{"towers.text.source": source})
    iterator, found, last_alone, seen = iter(batches), collections.Counter(), 0, 0
    for _ in range(5):
        batch = next(iterator)
        real = batch.history_segments > 0
        hidden = (real & (batch.history < 0)).reshape(batch.targets.shape)
        np.testing.assert_array_equal(batch.weights, hidden)
        np.testing.assert_array_equal(batch.targets >= 0, hidden)
        assert (batch.history[~real] == -1).all()
        for _, _, places, items, of_window in windows(batch):
            n, k = len(places), of_window.sum()
            assert (np.diff(places) == 1).all()
            assert n <= 16, "the whole window stands in the row"
            only_last = k == 1 and of_window[-1]
            assert only_last or k == min(n - 1, max(1, round(0.4 * n)))
            last_alone, seen = last_alone + only_last, seen + 1
            found[tuple(items.tolist())] += 1
    assert 0.15 < last_alone / seen < 0.5  # a fifth, and some of the short windows
    expected = collections.Counter()
    for shard, place in iterator.get_state()["shards"].items():
        for number in set(range(place["next"])) - set(place["waiting"]):
            expected[tuple(batches.example(number * 8 + int(shard))[1].tolist())] += 1
    assert found == expected


def test_a_resume_hides_the_same_and_an_epoch_others():
    batches = make(**{"batch.drop_events": 0.2})
    iterator = iter(batches)
    next(iterator)
    place = iterator.get_state()
    expected = [next(iterator) for _ in range(5)]
    other = iter(make(**{"batch.drop_events": 0.2}))
    other.set_state(place)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(other), batch)
    cloze = Cloze(0.4, 0.2)
    assert len({tuple(cloze.draw(10, 0, position).tolist()) for position in range(50)}) > 25
    assert len({tuple(cloze.draw(10, seed, 7).tolist()) for seed in range(50)}) > 25


def test_every_place_is_hidden_as_often_as_times_says():
    cloze, draws = Cloze(0.6, 0.25), 4000
    for n in (2, 3, 10):
        often = np.mean([cloze.draw(n, 0, position) for position in range(draws)], axis=0)
        expected = np.full(n, float(cloze.times(np.asarray(n))))
        expected[-1] += 0.25
        np.testing.assert_allclose(often, expected, atol=5 * np.sqrt(0.25 / draws))
    assert [int(cloze.count(n)) for n in (2, 3, 4, 10)] == [1, 2, 2, 6], "one is always left to be seen"
    assert int(Cloze(0.1, 0.0).count(2)) == 1
    assert not Cloze(0.99, 0.0).draw(2, 0, 0).all()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_times_predicted_are_those_of_the_windows(share):
    lengths = tiny.World().train_lengths()
    new = np.zeros(lengths.sum(), bool)
    new[np.cumsum(lengths)[::4] - 1] = True  # of every fourth user the last event is new
    batches = make(replay=Replay(share, new))
    always = np.repeat(np.arange(len(lengths)) % 4 == 0, lengths)
    epochs, times, count = 60, np.zeros(lengths.sum()), batches.examples_per_epoch
    start = np.cumsum(lengths) - lengths
    histories = tiny.World().train_histories()
    for position in range(epochs * count):
        user, items = batches.example(position)[:2]
        own = histories[user]
        (at,) = (n for n in range(len(own) - len(items) + 1) if (own[n : n + len(items)] == items).all())
        times[start[user] + at + np.flatnonzero(batches.spec.cloze.draw(len(items), batches.seed, position))] += 1
    predicted = batches.times_predicted()
    np.testing.assert_allclose(times / epochs, predicted, atol=5 * np.sqrt(0.25 / epochs))
    assert (times / epochs).sum() == pytest.approx(predicted.sum(), rel=0.01)
    assert predicted.min() > 0, "a first event too"
    if share == 1:
        assert predicted[always].mean() == pytest.approx(predicted[~always].mean(), rel=0.1)


def test_a_window_with_a_new_first_event_is_new():
    new = np.zeros(7, bool)
    new[3] = True
    lengths = np.array([3, 4])
    w = make()._windows.of(lengths, 15)
    assert [len(x) for x in Replay(0.5, new).turns(w, lengths, whole=True)[:2]] == [1, 1]
    with pytest.raises(RecJaxError, match="no window predicts an event"):
        Replay(0.5, new).turns(w, lengths)


def test_hidden_places_alone_carry_mined_negatives():
    random = np.random.default_rng(0)
    table = np.stack([random.permutation(tiny.N_ITEMS)[:3] for _ in range(tiny.N_USERS)]).astype(np.int32)
    batch = next(iter(make(negatives=table)))
    assert (batch.negatives[batch.weights == 0] == -1).all()
    for g, row, places, items, hidden in windows(batch):
        local = batch.negatives[g][row * 16 + places[hidden]]
        assert not np.isin(np.append(batch.item_ids[g], -1)[local], items).any()
        assert (local >= 0).any()


# -- the tower --


def test_a_hidden_place_sees_both_sides_but_not_its_item_nor_other_windows():
    params = history.init(jax.random.key(0), SPEC)
    x = jax.random.normal(jax.random.key(1), (1, 10, 8))
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    hidden = jnp.zeros((1, 10), bool).at[0, 6].set(True)
    encode = jax.jit(lambda x, ids, hidden: history.encode(params, SPEC, x, ids, hidden=hidden))
    out = encode(x, ids, hidden)
    np.testing.assert_array_equal(out, encode(x.at[0, 6].add(5.0), ids, hidden))
    np.testing.assert_array_equal(out[:, 4:9], encode(x.at[:, :4].add(3.0), ids, hidden)[:, 4:9])
    alone = encode(x[:, 4:9], jnp.ones((1, 5), jnp.int32), hidden[:, 4:9])
    np.testing.assert_allclose(out[:, 4:9], alone, atol=1e-5)
    for other in (4, 8):
        assert np.abs(np.asarray(encode(x.at[0, other].add(1.0), ids, hidden) - out)[0, 6]).max() > 1e-3


def spec_of(c, **changes):
    made = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS, causal=not c.batch.cloze)
    return dataclasses.replace(made, **changes)


def forward(task, batch):
    """What the towers make of a batch, without dropout, and of the catalogue."""
    return jax.jit(lambda p, b: encode_batch(p, task.spec.towers, b, table=tiny.table(), catalogue=True, keys=None))(task.params, batch)


def test_in_a_batch_hidden_items_have_no_part_in_the_vectors(tmp_path):
    task = tiny.task(tiny.config(**ON), tmp_path)
    batch, spec = next(iter(task.batches)), task.spec.towers
    assert task.params["user"]["mask"].shape == (8,)
    assert not spec.history.causal
    encode = jax.jit(lambda b: encode_batch(task.params, spec, b, table=tiny.table(), catalogue=False, keys=None))
    out = encode(batch)
    others = dataclasses.replace(batch, targets=np.where(batch.targets >= 0, 0, -1).astype(np.int32))
    np.testing.assert_array_equal(out.user, encode(others).user)
    alone = jax.jit(lambda v, h: history.encode(task.params["user"], spec.history, v, jnp.ones(v.shape[:2], jnp.int32), hidden=h))
    checked = 0
    for g, row, places, _, hidden in windows(batch):
        if g == 0:
            vectors = np.asarray(out.item)[g][batch.history[g, row, places]]
            want = np.asarray(alone(vectors[None], hidden[None]))[0]
            found = out.user[g].reshape(2, 16, 8)[row, places]
            np.testing.assert_allclose(found, want / np.linalg.norm(want, axis=-1, keepdims=True), atol=1e-5)
            checked += 1
    assert checked > 1


def test_to_rank_a_hidden_place_stands_behind_the_history():
    c = tiny.config(**{**ON, "batch.history_length": 20, "eval.users_per_block": 4})
    spec = spec_of(c)
    params = two_tower.init(jax.random.key(0), spec)
    model = model_lib.Model(c, tiny.World(), tiny.tokens(), spec, tiny.table())
    items, rng = model.item_vectors(params), np.random.default_rng(1)
    histories = Ragged.from_rows([rng.integers(0, tiny.N_ITEMS, n) for n in (0, 1, 15, 16, 5, 19, 20, 61)])
    found = model.user_vectors(params, items, histories)
    encode = jax.jit(lambda v, ids: history.encode(params["user"], spec.history, v, ids))
    np.testing.assert_array_equal(found[0], np.zeros(8))
    for n in range(1, len(histories)):
        newest = histories[n][-19:]
        row, ids = np.zeros((1, 20, 8), np.float32), np.zeros((1, 20), np.int32)
        row[0, : len(newest)], row[0, len(newest)], ids[0, : len(newest) + 1] = items[newest], params["user"]["mask"], 1
        want = np.asarray(encode(row, ids))[0, len(newest)]
        np.testing.assert_allclose(found[n], want / np.linalg.norm(want), atol=1e-5)
    # A row that the history fills: the oldest item makes room.
    full, cut = np.asarray(histories[6], np.int32)[None], np.append(histories[6][1:], -1).astype(np.int32)[None]
    users = jax.jit(lambda rows: two_tower.user_vectors(params, spec, items, rows))
    np.testing.assert_array_equal(users(full), users(cut))


def test_training_on_last_places_asks_what_ranking_asks(tmp_path):
    task = tiny.task(tiny.config(**LAST), tmp_path)
    batch, spec = next(iter(task.batches)), task.spec.towers
    out = forward(task, batch)
    rows, places = np.full((40, 16), -1, np.int32), []
    for n, (g, row, at, items, hidden) in enumerate(windows(batch)):
        assert hidden.tolist() == [False] * (len(at) - 1) + [True]
        rows[n, : len(items) - 1] = items[:-1]
        places.append((g, row * 16 + at[-1]))
    found = np.asarray(jax.jit(lambda rows: two_tower.user_vectors(task.params, spec, out.catalogue, rows))(rows))
    np.testing.assert_allclose(found[: len(places)], [out.user[place] for place in places], atol=1e-5)


# -- the losses --


def hidden_queries(task, batch):
    """Vectors of the hidden places [Q, D], of the catalogue [N, D], in float64, and what is hidden [Q]."""
    out = forward(task, batch)
    there = batch.weights > 0
    targets = np.take_along_axis(batch.item_ids, np.maximum(batch.targets, 0), axis=1)
    return np.float64(out.user)[there], np.float64(out.catalogue), targets[there]


FIXED = {"objectives.info_nce.learn_temperature": False, "objectives.info_nce.temperature": 0.5, "objectives.info_nce.log_q": 0.0}


@pytest.mark.parametrize("candidates", ["catalogue", "batch"])
def test_the_softmax_is_over_hidden_places_alone(candidates, tmp_path):
    task = tiny.task(tiny.config(**{**ON, **FIXED, "objectives.info_nce.candidates": candidates}), tmp_path)
    batch = next(iter(task.batches))
    users, items, targets = hidden_queries(task, batch)
    if candidates == "catalogue":
        logits = users @ items.T / 0.5
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]
    else:
        logits = users @ items[targets].T / 0.5
        twin = (targets[:, None] == targets) & ~np.eye(len(targets), dtype=bool)
        losses = np.log(np.where(twin, 0, np.exp(logits)).sum(1)) - np.diag(logits)
    found = jax.jit(lambda p: loss_and_metrics(p, task.spec, batch, task.constants, None)[0])(task.params)
    assert float(found) == pytest.approx(losses.mean(), rel=1e-5)


def test_drawn_items_are_none_of_the_window_hidden_or_not(tmp_path):
    batch = next(iter(make(**{"towers.item.ids": True})))
    drawn = np.asarray(jax.jit(lambda b: unseen_items(KEY, b, n_items=tiny.N_ITEMS, draws=400))(batch))
    for g, row, places, items, _ in windows(batch):
        left = sorted(set(range(tiny.N_ITEMS)) - set(items.tolist()))
        found = drawn[g, row * 16 + places]
        assert not np.isin(found, items).any()
        assert sorted(set(found.ravel().tolist())) == left, "every other item may be drawn"


MIXES = {
    "catalogue": {},
    "drawn": {"objectives.info_nce.weight": 0.0, "objectives.bce.weight": 1.0, "objectives.bce.draw": "catalogue"},
    "batch": {"objectives.info_nce.candidates": "batch", "objectives.info_nce.symmetric": True},
}


@pytest.mark.parametrize("mix", ["catalogue", *(pytest.param(mix, marks=pytest.mark.slow) for mix in ("drawn", "batch"))])
def test_64_histories_are_learned_by_heart(mix, tmp_path):
    rows = {"batch.shards": 1, "batch.history_rows": 48, "batch.cloze": 0.2, "towers.dim": 16, "towers.item.ids": True}
    task = tiny.task(tiny.config(**{**ON, **rows, **MIXES[mix]}), tmp_path)
    batch, tx = next(iter(task.batches)), optax.adam(1e-2)
    assert (batch.examples >= 0).sum() >= 64

    @jax.jit
    def many(params, state):
        def step(carried, n):
            params, state = carried
            key = jax.random.fold_in(KEY, n)
            loss, grads = jax.value_and_grad(lambda p: loss_and_metrics(p, task.spec, batch, task.constants, key)[0])(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), jnp.arange(250))

    (params, _), losses = many(task.params, tx.init(task.params))
    users, items, targets = hidden_queries(dataclasses.replace(task, params=params), batch)
    scores = users @ items.T
    rank = (scores > scores[np.arange(len(targets)), targets][:, None]).sum(1)
    assert np.mean(losses[-20:]) < 0.5 * float(losses[0])
    most = 3 if mix == "drawn" else 0  # there the window's other items are no negatives
    assert (rank <= most).mean() > 0.9


def test_devices_agree_on_the_gradient(tmp_path):
    task = tiny.task(tiny.config(**{**ON, "towers.user.dropout": 0.2}), tmp_path)
    gradient = tiny.gradient_of_one_device_and_eight(task)
    assert np.abs(gradient["user"]["mask"]).max() > 0


def test_a_model_ranks_and_scores_alike():
    c, prepared = tiny.config(**{**ON, "eval.k": (10,), "eval.users_per_block": 16}), World()
    spec = model_lib.towers_of(c, prepared, tiny.bert_spec())
    assert (spec.history.causal, spec.history.mask) == (False, True)
    model = model_lib.Model(c, prepared, tiny.tokens(), spec, tiny.table())
    params = two_tower.init(jax.random.key(0), spec)
    items, eval_set = model.item_vectors(params), prepared.eval_set("test")
    ranked = model.rank(params, eval_set, name="test", items=items)
    users = model.user_vectors(params, items, eval_set.history)
    for n in range(len(users)):
        scores, target = items @ users[n], eval_set.targets[n][0]
        rivals = set(range(tiny.N_ITEMS)) - set(eval_set.history[n].tolist()) - {target}
        rank = 1 + sum(bool(scores[i] >= scores[target] - 1e-6) for i in rivals)
        assert abs(rank - ranked.ranks[n, 0]) <= 1


# -- what is refused --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch.cloze": 1.0}, r"config.batch.cloze=1.0: must be at least 0 and below 1"),
        ({"batch.cloze": -0.1}, r"config.batch.cloze=-0.1: must be at least 0"),
        ({"batch.cloze_last": 1.5}, r"config.batch.cloze_last=1.5: must be between 0 and 1"),
        ({"towers.user.kind": "text", "towers.text.source": "tokens"}, r"cloze=0.4 hides places of a packed history: set it to 0, or"),
        ({"towers.user.positions": "relative"}, r"cloze=0.4 sees both sides.*user.positions='relative' does not tell apart"),
        ({"towers.user.inputs": ("gap",)}, r"cloze=0.4: nobody knows the times of a hidden event, which the tower reads"),
        ({"batch.history_length": 1}, r"hides one of config.batch.history_length=1 places"),
        ({"eval.history_length": 1}, r"hides one of config.eval.history_length=1 places"),
    ],
)
def test_bad_keys_are_named(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**{**ON, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.info_nce.positives": 2}, r"info_nce.positives goes by a place's past and its next items.*info_nce.positives=1, or"),
        ({"objectives.info_nce.neighbour_share": 0.3}, r"set config.objectives.info_nce.neighbour_share=0, or config.batch.cloze=0"),
        ({"objectives.history_views.weight": 0.1}, r"history_views reads a view at its last item.*history_views.weight=0"),
    ],
)
def test_objectives_that_go_by_next_items_are_refused(changes, message, tmp_path):
    with pytest.raises(RecJaxError, match=message):
        tiny.task(tiny.config(**{**ON, **changes}), tmp_path)


@pytest.mark.parametrize("of_student", [True, False])
def test_a_teacher_of_the_other_form_is_refused_where_users_are_compared(of_student):
    student, teacher = (spec_of(tiny.config(**(ON if on else {}))) for on in (of_student, not of_student))
    batch = BatchSpec.from_config(tiny.config())
    kl = {"objectives.distill_kl.weight": 1.0}
    with pytest.raises(RecJaxError, match=r"distill_kl: the teacher seeks .*config.batch.cloze.*both must read the same places"):
        stages.make_step(tiny.config(**kl), student, batch, teacher=teacher)
    assert stages.make_step(tiny.config(**kl), student, batch, teacher=student)
    items = {"objectives.distill_vectors.weight": 1.0, "objectives.distill_vectors.of": "item"}
    assert stages.make_step(tiny.config(**items), student, batch, teacher=teacher)


def test_the_preset_is_sasrecs_with_the_same_loss():
    c, other = (config_lib.load(f"configs/sequences.py:{preset}") for preset in ("bert4rec", "sasrec_ce"))
    assert c.towers == other.towers
    assert c.objectives == other.objectives
    assert c.optimizer == other.optimizer
    (only,) = make_objectives(c.objectives.to_dict())
    assert (only.name, only.catalogue) == ("info_nce", True)
    assert BatchSpec.from_config(c).cloze == Cloze(0.6, 0.1)
    assert dataclasses.replace(BatchSpec.from_config(c), cloze=None) == BatchSpec.from_config(other)
    stages.make_step(c, spec_of(c), BatchSpec.from_config(c))
