"""Weights of events by their ratings: in batches, in means over queries and over several positives, on several devices, from a file."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tiny

from rec_jax import config as config_lib
from rec_jax.config_places import columns_of, place_columns
from rec_jax.data import event_weights, prepare
from rec_jax.data.event_weights import EventWeight
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.losses import info_nce as info_nce_loss
from rec_jax.losses import weighted_info_nce
from rec_jax.towers.batches import encode_batch
from rec_jax.towers.dropout import fold
from rec_jax.train import stages
from rec_jax.train.objectives import info_nce
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Ragged, RecJaxError

KEY = jax.random.key(3, impl=RNG)
PLAIN = {"towers.item.ids": True, "towers.user.dropout": 0.0, "objectives.info_nce.learn_temperature": False}
PLAIN |= {"objectives.info_nce.temperature": 0.2}


def records():
    """Those of the tiny world, with ratings that say of which item and user an event is: 100 * item + user."""
    rated = lambda user, record: {**record, "ratings": np.float32(100 * record["items"] + user)}
    return [rated(user, record) for user, record in enumerate(tiny.records())]


def batches_of(c, weight, source="memory"):
    world, histories = tiny.World(), records()
    if source == "memory":
        train = [r["splits"] == 0 for r in histories]
        ratings = np.concatenate([r["ratings"][t] for r, t in zip(histories, train, strict=True)])
        rows = Ragged.from_rows([r["items"][t] for r, t in zip(histories, train, strict=True)])
        histories = dataclasses.replace(rows, columns={"ratings": ratings})
    spec = BatchSpec.from_config(c)
    return Batches(histories, world.train_lengths(), spec, seed=0, texts=tiny.tokens(), event_weight=weight)


def weighed(changes, folder):
    """A task whose batches have weights, and one batch of it."""
    task = tiny.task(tiny.config(**PLAIN, **changes), folder)
    task = dataclasses.replace(task, batches=batches_of(tiny.config(**PLAIN, **changes), EventWeight("rating", 3000.0)))
    return task, next(iter(task.batches))


# -- in the data --

KINDS = {
    "next": {},
    "records": {},
    "shuffled": {"batch.shuffle_events": True, "towers.user.positions": "none", "batch.drop_events": 0.3},
    "cloze": {"batch.cloze": 0.4},
    "text": {"towers.user.kind": "text", "towers.text.source": "tokens", "towers.text.path": "scratch"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_target_weighs_what_its_own_event_does(kind):
    source = "records" if kind == "records" else "memory"
    c = tiny.config(**KINDS[kind])
    weighs, plain = (iter(batches_of(c, weight, source)) for weight in (EventWeight("rating", 2.5), None))
    for _ in range(3):
        batch, off = next(weighs), next(plain)
        assert off.event_weights is None
        assert batch.event_weights.dtype == np.float32
        jax.tree.map(np.testing.assert_array_equal, off, dataclasses.replace(batch, event_weights=None))
        there = batch.weights > 0
        assert (batch.event_weights[~there] == 0).all()
        rating = np.round(batch.event_weights * np.float32(2.5)).astype(int)
        for g in range(8):
            items, here = batch.item_ids[g], there[g]
            np.testing.assert_array_equal(rating[g][here] // 100, items[batch.targets[g][here]])
            assert set(rating[g][here] % 100) <= set(batch.examples[g].tolist())


def test_log_of_one_plus_the_rating():
    ratings = np.float32([0, 1, 9, 11754])
    np.testing.assert_allclose(EventWeight("log_rating", 2.0)(ratings), np.log(1 + np.float64(ratings)) / 2, rtol=1e-6)
    assert set(event_weights.KINDS) | {""} == set(config_lib.CHOICES["batch.event_weight"])


@pytest.fixture
def played(tmp_path):
    """A config of a small file with hours."""
    random = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", float(random.integers(5))) for u in range(12) for i in random.permutation(9)]
    pl.DataFrame(rows, schema=["user", "item", "hours"], orient="row").write_csv(tmp_path / "events.csv")
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache, c.data.columns.rating = "table", f"{tmp_path}/events.csv", f"{tmp_path}/cache", "hours"
    c.batch.event_weight = "log_rating"
    return c


def test_train_events_weigh_one_on_average(played):
    prepared = prepare.prepare(played)
    weight, ratings = event_weights.of_run(played, prepared), prepared.train_histories().columns["ratings"]
    assert weight.mean == pytest.approx(np.log1p(ratings).mean())
    assert weight(ratings).mean() == pytest.approx(1, rel=1e-6)
    assert prepared.eval_set("test").history.columns.keys() == {"ratings"}
    played.batch.event_weight = ""
    assert event_weights.of_run(played, prepare.prepare(played)) is None
    assert prepare.prepare(played).columns == ()
    # A stage of its own that has weights is enough; places get no column for it.
    played.stages, played.stage = ("first", "second"), {"first": {}, "second": {"batch": {"event_weight": "rating"}}}
    assert (columns_of(played), place_columns(played)) == (("ratings",), ())


def test_batches_of_a_stage_have_them(played):
    prepared = prepare.prepare(played)
    inputs = types.SimpleNamespace(prepared=prepared, tokens=None, replay=None)
    batch = next(iter(stages.make_batches(played, inputs, tiny.one_device())))
    assert batch.history_ratings is None
    weights = np.unique(np.float64(batch.event_weights[batch.weights > 0]))
    expected = np.log1p(np.arange(5)) / event_weights.of_run(played, prepared).mean
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_ratings_that_are_no_weights(played, tmp_path):
    first = (pl.col("user") == "u3") & pl.col("user").is_first_distinct()  # a train event
    changed = pl.when(first).then(-2.0).otherwise("hours")
    frame = pl.read_csv(tmp_path / "events.csv").with_columns(hours=changed)
    frame.write_csv(tmp_path / "events.csv")
    item = frame.filter(user="u3", hours=-2.0)["item"][0]
    message = rf"event_weight='log_rating': user 'u3' has item '{item}' of config\.data\.path=.* with the rating -2, .*min_rating"
    with pytest.raises(RecJaxError, match=message):
        event_weights.of_run(played, prepare.prepare(played))
    played.data.filter.min_rating = 1.0  # the error's advice
    assert event_weights.of_run(played, prepare.prepare(played)).mean > 0
    played.data.columns.rating = ""
    with pytest.raises(RecJaxError, match=r"all ratings of .*\(config\.data\.reader='table'\) are 1, so all events weigh the same"):
        event_weights.of_run(played, prepare.prepare(played))


@pytest.mark.parametrize("kind", ["impressions", "pairs", "texts"])
def test_only_histories_have_events_that_weigh(kind):
    changes = {"batch.event_weight": "rating", "batch.kind": kind, "towers.text.source": "tokens", "train.monitor": "valid/pair_mrr"}
    changes |= {"towers.user.kind": "id"} if kind == "impressions" else {}
    with pytest.raises(RecJaxError, match=rf"event_weight='rating' weighs the events of histories, and config\.batch\.kind is '{kind}'"):
        tiny.config(**changes)
    with pytest.raises(RecJaxError, match=r"event_weight='hours': expected one of , rating, log_rating"):
        tiny.config(**{"batch.event_weight": "hours"})


# -- in the losses --


@functools.partial(jax.jit, static_argnums=1)
def loss_of(params, spec, batch, constants):
    return loss_and_metrics(params, spec, batch, constants, KEY)[0]


@pytest.mark.parametrize("places", [0, 6])
@pytest.mark.parametrize("positives", [1, 3])
def test_the_weighted_mean_over_the_catalogue_equals_a_naive_one(positives, places, tmp_path):
    """In float64: the sum of weight * loss over all (place, positive), a place's positives a share of it each, over the sum of weights."""
    task, batch = weighed({"objectives.info_nce.positives": positives, "objectives.info_nce.places": places}, tmp_path)
    # Some weigh nothing at all, among them all that a shard's places seek.
    batch.event_weights[:, ::3] = 0
    batch.event_weights[2] = 0
    out = jax.jit(encode_batch, static_argnames=("spec", "catalogue"))(
        task.params, task.spec.towers, batch, table=task.constants.table, catalogue=True, keys=None
    )
    taken = batch.weights > 0
    if places:
        drawn = np.asarray(info_nce.drawn_places(fold(KEY, "info_nce"), batch.weights, places))
        taken &= np.stack([np.isin(np.arange(32), row) for row in drawn])
    following, catalogue = np.asarray(info_nce.next_places(batch, positives)), np.float64(out.catalogue)
    total = weight = 0.0
    for g, q in zip(*np.nonzero(taken), strict=True):
        found = [place for place in following[g, q] if place >= 0]
        ids = [batch.item_ids[g][batch.targets[g, place]] for place in found]
        logits = catalogue @ np.float64(out.user[g, q]) / 0.2
        others = np.logaddexp.reduce(np.delete(logits, ids))
        for place, item in zip(found, ids, strict=True):
            w = np.float64(batch.event_weights[g, place]) / len(found)
            total, weight = total + w * (np.logaddexp(others, logits[item]) - logits[item]), weight + w
    found = float(loss_of(task.params, task.spec, batch, task.constants))
    assert found == pytest.approx(total / weight, rel=1e-5)
    plain = float(loss_of(task.params, task.spec, dataclasses.replace(batch, event_weights=None), task.constants))
    assert abs(found - plain) > 1e-4
    same = dataclasses.replace(batch, event_weights=np.float32(batch.weights * 0.3))
    assert float(loss_of(task.params, task.spec, same, task.constants)) == pytest.approx(plain, rel=1e-6)


OTHERS = {
    "bce": {"objectives.bce.weight": 1.0, "objectives.bce.negatives": 3},
    "bce, catalogue": {"objectives.bce.weight": 1.0, "objectives.bce.negatives": 3, "objectives.bce.draw": "catalogue"},
    "sigmoid": {"objectives.sigmoid.weight": 1.0},
    "triplet": {"objectives.triplet.weight": 1.0},
    "info_nce, batch": {"objectives.info_nce.weight": 1.0, "objectives.info_nce.candidates": "batch"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_means_of_the_other_losses_are_weighted_and_draws_and_candidates_are_not(name, tmp_path):
    """Parts of a weighted mean put together: so each query has its own loss, whatever it and the others weigh."""
    task, batch = weighed({"objectives.info_nce.weight": 0.0, **OTHERS[name]}, tmp_path)
    weights = batch.event_weights
    part = np.where(np.random.default_rng(0).random(weights.shape) < 0.5, weights, 0)
    loss = lambda w: float(loss_of(task.params, task.spec, dataclasses.replace(batch, event_weights=w), task.constants))
    sums = [np.float64(w).sum() for w in (part, weights - part, weights)]
    parts = loss(part) * sums[0] + loss(weights - part) * sums[1]
    assert loss(weights) == pytest.approx(parts / sums[2], rel=1e-5)
    assert abs(loss(part) - loss(weights - part)) > 1e-4
    assert loss(None) == pytest.approx(loss(batch.weights * np.float32(0.3)), rel=1e-6)


def test_eight_devices_find_the_loss_and_gradient_of_one(tmp_path):
    changes = {"objectives.info_nce.candidates": "batch", "objectives.info_nce.positives": 3}
    gradient = tiny.gradient_of_one_device_and_eight(weighed(changes, tmp_path)[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("form", ["standard", "decoupled"])
def test_positives_by_weight_equal_a_naive_float64_form(form):
    random = np.random.default_rng(0)
    query, item = (np.float32(random.normal(size=shape)) for shape in ((6, 4), (15, 4)))
    target = np.stack([random.permutation(15)[:3] for _ in range(6)]).astype(np.int32)
    target[1, 2], target[4] = -1, -1
    shares, weights = np.float32(random.random((6, 3))), np.float32(random.random(6))
    shares[0, 1], shares[2] = 0, 0

    def naive(query, item):
        logits, total = query @ item.T / 0.3, 0.0
        for i in range(6):
            there = [k for k in range(3) if target[i, k] >= 0]
            others = jax.nn.logsumexp(jnp.delete(logits[i], target[i, there], assume_unique_indices=True))
            losses = [others - logits[i, target[i, k]] for k in there]
            losses = losses if form == "decoupled" else [jax.nn.softplus(x) for x in losses]
            if shares[i, there].sum():
                total += weights[i] * sum(shares[i, k] * x for k, x in zip(there, losses, strict=True)) / shares[i, there].sum()
        return total

    with jax.enable_x64(True):
        want = jax.value_and_grad(naive, (0, 1))(jnp.float64(query), jnp.float64(item))
    options = {"temperature": 0.3, "weights": weights, "target": target, "positive_weights": shares, "form": form}
    for function in (weighted_info_nce, lambda *args, **kwargs: info_nce_loss(*args, **kwargs).sum()):
        found = jax.value_and_grad(functools.partial(function, **options), (0, 1))(query, item)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max())
    with pytest.raises(RecJaxError, match="positive_weights has shape"):
        info_nce_loss(query, item, **{**options, "positive_weights": shares[:, :2]})
