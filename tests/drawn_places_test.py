"""InfoNCE of some places, drawn anew each step, against the same by hand; and the keys that go with data without order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.train.objectives import base, info_nce
from rec_jax.types import Context, Outputs, RecJaxError

SPEC = info_nce.InfoNCESpec("catalogue", 0.2, False, 1.0, True, False, 0.0)


@pytest.fixture(scope="module")
def batch():
    world = tiny.World()
    return next(iter(Batches(world.source(), world.train_lengths(), BatchSpec.from_config(tiny.config()), seed=0, texts=tiny.tokens())))


@pytest.fixture(scope="module")
def outputs(batch):
    draw = lambda key, *shape: jax.random.normal(jax.random.key(key), (*shape, 8))
    return Outputs(user=draw(0, *batch.targets.shape), catalogue=draw(1, tiny.N_ITEMS))


def loss_of(outputs, batch, spec, seed=0):
    context = Context(scalars={}, log_q=None, rng=jax.random.key(seed))
    return jax.jit(lambda o, b: info_nce.info_nce(o, b, context, spec)[0])(outputs, batch)


def by_hand(outputs, batch, places, positives):
    """Mean over the places that have a target, of the mean over their positives of the loss against all that are none of them."""
    following = np.asarray(info_nce.next_places(batch, positives))
    ids, losses = np.asarray(base.target_ids(batch)), []
    for g, row in enumerate(np.asarray(places)):
        for place in row:
            if batch.weights[g, place] == 0:
                continue
            own = [int(ids[g, p]) for p in following[g, place] if p >= 0]
            logits = np.asarray(outputs.catalogue, np.float64) @ np.asarray(outputs.user[g, place], np.float64) / 0.2
            rest = np.exp(np.delete(logits, own)).sum()
            losses.append(np.mean([np.log(np.exp(logits[i]) + rest) - logits[i] for i in own]))
    return np.mean(losses)


@pytest.mark.parametrize("positives", [1, 3])
def test_the_loss_is_that_of_the_drawn_places(outputs, batch, positives):
    spec = dataclasses.replace(SPEC, places=5, positives=positives)
    places = info_nce.drawn_places(jax.random.key(7), batch.weights, 5)
    np.testing.assert_allclose(loss_of(outputs, batch, spec, seed=7), by_hand(outputs, batch, places, positives), rtol=1e-5)


@pytest.mark.parametrize("positives", [1, 3])
def test_all_places_drawn_are_all_places(outputs, batch, positives):
    whole = dataclasses.replace(SPEC, positives=positives)
    drawn = dataclasses.replace(whole, places=10_000)
    np.testing.assert_allclose(loss_of(outputs, batch, drawn), loss_of(outputs, batch, whole), rtol=1e-5)
    gradient = lambda spec: jax.grad(lambda o: loss_of(dataclasses.replace(outputs, catalogue=o), batch, spec))(outputs.catalogue)
    np.testing.assert_allclose(gradient(drawn), gradient(whole), atol=1e-6)


def test_places_with_a_target_are_drawn_as_often_as_each_other():
    weights = jnp.asarray(np.random.default_rng(0).random((3, 20)) < 0.5, jnp.float32).at[2].set(0.0).at[2, 4].set(1.0)
    drawn = np.stack([info_nce.drawn_places(jax.random.key(seed), weights, 4) for seed in range(400)])
    assert drawn.shape == (400, 3, 4)
    for shard in range(2):
        there = np.flatnonzero(np.asarray(weights[shard]))
        assert set(drawn[:, shard].ravel().tolist()) == set(there.tolist()), "only places with a target, and each of them"
        assert all(len(set(row.tolist())) == 4 for row in drawn[:, shard]), "without replacement"
        share = np.bincount(drawn[:, shard].ravel(), minlength=20)[there] / 400
        np.testing.assert_allclose(share, 4 / len(there), atol=0.1)
    assert (drawn[:, 2, 0] == 4).all(), "of a shard with too few, these come first, and the others have no weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"places": -1}, r"places=-1: must be at least 0"),
        ({"places": 4, "candidates": "batch"}, r"places=4 goes with candidates='catalogue'"),
        ({"places": 4, "neighbour_share": 0.3}, r"places=4 goes with .*neighbour_share=0"),
    ],
)
def test_bad_places(changes, message):
    with pytest.raises(RecJaxError, match=message):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch.shuffle_events": True}, r"shuffle_events=True.*towers\.user\.positions='none'.*it is 'learned'"),
        (
            {"batch.shuffle_events": True, "towers.user.positions": "none", "towers.user.time_bias": True},
            r"shuffle_events=True.*time_bias and session_gap off",
        ),
        ({"towers.user.positions": "some"}, r"towers\.user\.positions='some': expected one of learned, rotary, relative, none"),
        ({"towers.user.readout": "first"}, r"towers\.user\.readout='first': expected one of last, mean"),
    ],
)
def test_bad_keys(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**changes)
