"""Histories that are longer than ranking or training take: the counts and limits that are said are those of what is done."""

import types

import jax
import numpy as np
import pytest
import tiny

from rec_jax.data import lengths
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.eval import model as model_lib
from rec_jax.towers import two_tower
from rec_jax.types import Ragged

TRAIN = np.asarray([3, 8, 9, 10, 11, 40, 1, 0])
TESTED = np.asarray([4, 7, 8, 9, 41])
TEXT = {"towers.user.kind": "text", "towers.text.source": "tokens"}
PAIRS = {"batch.kind": "pairs", "towers.text.source": "tokens", "train.monitor": "valid/pair_mrr", "objectives.info_nce.weight": 0.0}
PAIRS |= {"objectives.cross.weight": 1.0}
IMPRESSIONS = {"batch.kind": "impressions", "towers.user.kind": "id", "objectives.info_nce.weight": 0.0, "objectives.task.weight": 1.0}


def said(**changes):
    return lengths.long_histories(TRAIN, TESTED, tiny.config(**{"batch.history_length": 8, **changes}))


def test_what_is_said():
    assert said() == [
        "histories in the test: 2 of 5 have more than 8 events (the longest 41): the newest 8 rank (config.batch.history_length=8)",
        "histories in training: 3 of 8 have more than 9 events (the longest 40): all train, in windows of 8 places and the next event "
        "(config.batch.history_length=8)",
    ]
    assert said(**{"eval.history_length": 9})[0] == (
        "histories in the test: 1 of 5 have more than 9 events (the longest 41): the newest 9 rank (config.eval.history_length=9)"
    )
    assert said(**{"batch.cloze": 0.3}) == [
        "histories in the test: 3 of 5 have more than 7 events (the longest 41): the newest 7 rank, beside a hidden place "
        "(config.batch.history_length=8)",
        "histories in training: 4 of 8 have more than 8 events (the longest 40): all train, in windows of 8 places "
        "(config.batch.history_length=8)",
    ]
    dropped = said(**{"batch.drop_events": 0.2, "batch.shuffle_events": True, "towers.user.positions": "none"})
    assert dropped[1].partition(" (the longest 40): ")[2] == (
        "all train less config.batch.drop_events, in windows of 8 places and the next event, each in random order "
        "(config.batch.history_length=8)"
    )


@pytest.mark.parametrize("kind", [TEXT, PAIRS])
def test_what_is_said_of_histories_that_are_written_out(kind):
    assert said(**kind) == [
        "histories in the test: 4 of 5 have more than 4 events (the longest 41): the newest 4 are written out to rank, as far as "
        "config.batch.row_tokens=64 goes (config.batch.user_history=4)",
        "histories in training: 5 of 8 have more than 5 events (the longest 40): an epoch predicts one of them, drawn anew, from at most 4 "
        "before it (config.batch.user_history=4)",
    ]


def test_nothing_is_said_where_none_is_longer_or_there_are_no_histories():
    c = tiny.config(**{"batch.history_length": 8})
    assert lengths.long_histories(np.asarray([9, 0, 3]), np.asarray([8, 2]), c) == []
    assert lengths.long_histories(np.zeros(0, int), np.zeros(0, int), c) == []
    assert said(**IMPRESSIONS) == []


@pytest.mark.parametrize("cloze", [0.0, 0.3])
def test_those_counted_in_training_are_those_of_several_windows(cloze):
    train = np.random.default_rng(0).integers(0, 40, 50)
    c = tiny.config(**{"batch.history_length": 8, "batch.cloze": cloze})
    batches = Batches(Ragged.from_rows([[0] * n for n in train]), train, BatchSpec.from_config(c), seed=0, texts=tiny.tokens())
    several = sum(windows > 1 for windows in np.bincount(batches._windows.user, minlength=50).tolist())
    (line,) = lengths.long_histories(train, np.zeros(0, int), c)
    assert line.startswith(f"histories in training: {several} of 50 ")
    assert 10 < several < 45


@pytest.mark.parametrize("changes", [{}, {"batch.cloze": 0.3}, {"eval.history_length": 12}])
def test_the_events_that_are_said_to_rank_are_those_that_do(changes):
    c = tiny.config(**{"batch.history_length": 8, "eval.users_per_block": 4, **changes})
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=tiny.N_ITEMS, causal=not c.batch.cloze)
    model = model_lib.Model(c, tiny.World(), tiny.tokens(), spec, tiny.table())
    params = two_tower.init(jax.random.key(0), spec)
    most, history = lengths.ranked_events(c), np.arange(20)
    rows = [history, *(np.where(np.arange(20) == 20 - back, 50, history) for back in (most + 1, most))]
    whole, older, oldest = model.user_vectors(params, model.item_vectors(params), Ragged.from_rows(rows))
    np.testing.assert_array_equal(whole, older)
    assert np.abs(whole - oldest).max() > 1e-4


def test_stages_are_named_where_they_differ():
    histories = types.SimpleNamespace(lengths=lambda: TESTED)

    class Prepared(lengths.Prepared):
        train_lengths = lambda self: TRAIN
        eval_set = lambda self, split: {"test": types.SimpleNamespace(history=histories)}[split]

    prepared = Prepared(None, {})
    stages = {"one": {"batch": {"history_length": 8}}, "two": {"batch": {"history_length": 10}}, "three": {}}
    c = tiny.config(**{"batch.history_length": 8}).unlock()
    c.stage, c.stages = type(c)(stages), tuple(stages)
    lines = lengths.of_run(c.lock(), prepared)
    assert [line.rpartition(", stage ")[2] for line in lines] == ["one, three", "one, three", "two", "two"]
    del stages["two"]
    c = c.copy_and_resolve_references().unlock()
    c.stage, c.stages = type(c)(stages), tuple(stages)
    assert lengths.of_run(c.lock(), prepared) == said()
