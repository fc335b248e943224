"""Own vectors of seldom seen items in the ranking (`towers.item.id_shrinkage`)."""

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from rec_jax import config as config_lib
from rec_jax.eval import model, teacher
from rec_jax.towers import batches, two_tower
from rec_jax.train import adapt, chain
from rec_jax.types import RecJaxError

SHRUNK = {"towers.item.ids": True, "towers.item.id_shrinkage": 3.0}


class Seldom(tiny.World):
    """Item 0 is never seen, item 1 once, item 2 three times, item 3 nine times."""

    def item_counts(self):
        return np.array([0, 1, 3, 9, *[1000] * (tiny.N_ITEMS - 4)])


def made(**changes):
    """A model whose items have own vectors, and its parameters."""
    encoder = ({}, tiny.bert_spec())
    found = model.make_model(tiny.config(**{**SHRUNK, **changes}), Seldom(), tiny.tokens(), encoder, print, candidates=True)
    found.table = tiny.table()
    params = two_tower.init(jax.random.key(0), found.spec)
    params["ids"] = {"embedding": jax.random.normal(jax.random.key(1), params["ids"]["embedding"].shape)}
    return found, params


@pytest.fixture(autouse=True)
def _no_encoder(monkeypatch):
    monkeypatch.setattr(model, "text_table", lambda *_, **__: tiny.table())


def test_an_own_vector_counts_as_far_as_it_was_seen():
    found, params = made(**{"towers.normalize": False})
    texts = np.asarray(two_tower.text_item_vectors(params, found.spec, tiny.table()))
    own = np.asarray(params["ids"]["embedding"])[: tiny.N_ITEMS]
    share = np.array([0, 1 / 4, 1 / 2, 3 / 4, *[1000 / 1003] * (tiny.N_ITEMS - 4)])
    np.testing.assert_allclose(found.item_vectors(params), texts + share[:, None] * own, atol=1e-5)


def test_an_item_that_was_never_seen_is_its_text_and_off_is_off():
    found, params = made()
    texts = np.asarray(two_tower.text_item_vectors(params, found.spec, tiny.table()))
    np.testing.assert_allclose(found.item_vectors(params)[0], texts[0], atol=1e-6)
    assert np.abs(found.item_vectors(params)[3] - texts[3]).max() > 0.01
    found, _ = made(**{"towers.item.id_shrinkage": 0.0})
    np.testing.assert_allclose(found.item_vectors(params), two_tower.item_vectors(params, found.spec, tiny.table()), atol=1e-6)


def test_training_works_with_whole_vectors(tmp_path):
    task = tiny.task(tiny.config(**SHRUNK), tmp_path)
    _, params = made()
    batch = next(iter(task.batches))
    out = batches.encode_batch(params, task.spec.towers, batch, table=tiny.table(), catalogue=True, keys=None)
    np.testing.assert_allclose(out.catalogue, two_tower.item_vectors(params, task.spec.towers, tiny.table()), atol=1e-6)
    there = batch.item_ids >= 0
    np.testing.assert_allclose(np.asarray(out.item)[there], np.asarray(out.catalogue)[batch.item_ids[there]], atol=1e-6)


def test_a_teacher_teaches_what_it_ranks_by(monkeypatch, tmp_path):
    found, params = made()
    monkeypatch.setattr(teacher, "load", lambda *_, **__: model.Trained(found, {**params, "text": {}}, 7, found.item_vectors(params)))
    monkeypatch.setattr(teacher, "read_config", lambda _: tiny.config(**SHRUNK))
    monkeypatch.setattr(teacher, "text_table", lambda *_, **__: tiny.table())
    spec, arrays = teacher.teacher_of(tiny.config(**SHRUNK), tmp_path, "before", tiny.tokens(), print, meta={})
    np.testing.assert_allclose(two_tower.item_vectors(arrays["params"], spec, arrays["table"]), found.item_vectors(params), atol=1e-6)


def test_a_student_of_the_four_stages_keeps_what_it_was_taught():
    c = config_lib.load("configs/movielens.py", [("towers.item.id_shrinkage", "3.0")])
    assert [config_lib.for_stage(c, name).towers.item.id_shrinkage for name in ("contrastive", "task", "distill")] == [3.0, 3.0, 0.0]
    c = config_lib.load("configs/movielens.py:no_teacher")
    last = config_lib.for_stage(c, "distill").towers.item.id_shrinkage
    assert last == c.towers.item.id_shrinkage


def test_the_recipe_drops_it_with_the_texts():
    c = config_lib.load("configs/sequences.py", [("data.path", "x"), ("towers.item.id_shrinkage", "3.0")])
    assert adapt.without_texts(c, ["a", "b"], ["a", "b"]).towers.item.id_shrinkage == 0
    for preset in ("sasrec", "sasrec_ce", "bert4rec"):
        assert config_lib.load(f"configs/sequences.py:{preset}").towers.item.id_shrinkage == 0


def test_a_stage_that_was_trained_without_it_stays_what_it_is():
    mark = lambda **changes: chain.fingerprint(tiny.config(**changes))
    off, on = mark(**{"towers.item.ids": True}), mark(**SHRUNK)
    assert off != on
    kept = tiny.config(**{"towers.item.ids": True}).to_dict()
    del kept["towers"]["item"]["id_shrinkage"]
    assert "id_shrinkage" not in str(kept)
    older = config_lib.from_json(config_lib.to_json(ConfigDict(kept)))
    assert older.towers.item.id_shrinkage == 0
    assert chain.fingerprint(older) == off


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.item.id_shrinkage": -1.0}, r"id_shrinkage=-1.0: must be at least 0"),
        ({"towers.item.ids": False}, r"id_shrinkage=3.0 is of items' own vectors: set config.towers.item.ids=True"),
        ({"towers.item.text": False}, r"id_shrinkage=3.0 trusts the text of a seldom seen item .* set it to 0"),
        ({"towers.item.id_buckets": 8}, r"id_shrinkage=3.0 goes by item, and rows of config.towers.item.id_buckets=8 are shared"),
    ],
)
def test_keys_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(RecJaxError, match=message):
        made(**changes)


def test_impressions_are_scored_with_whole_vectors():
    impressions = {"batch.kind": "impressions", "towers.user.kind": "id", "objectives.task.weight": 1.0, "objectives.info_nce.weight": 0.0}
    with pytest.raises(RecJaxError, match=r"id_shrinkage=3.0 is for the ranking of a catalogue, and impressions .* set it to 0"):
        tiny.config(**{**SHRUNK, **impressions})
