"""Items with every kind of feature, and words of their texts: trained, measured again, recommended, gone on from; each kind on and off."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from rec_jax.eval import final, model
from rec_jax.serve.recommend import Recommender
from rec_jax.train import __main__ as command
from rec_jax.types import RecJaxError

TINY = {**tiny.EIGHT_STEPS, "eval.fuse": ""}
KINDS = {"categorical": "('brand',)", "multi_hot": "('tags',)", "numeric": "('price',)"}
COLORS = ("red", "green", "blue", "black", "white")


def title(n):
    return f"thing {n} lot{n // 2}"


def item(n):
    """Title, brand, tags and price; some lack them. Two titles each have a word in common."""
    brand = "" if n % 7 == 0 else f"maker {n % 4}"
    tags = "" if n % 5 == 0 else ", ".join(dict.fromkeys((COLORS[n % 5], COLORS[n % 3])))
    return title(n), brand, tags, "" if n % 6 == 0 else str(3.5 * n)


def write(folder, users, items):
    folder.mkdir()
    (folder / "events.txt").write_text("".join(f"{u} {' '.join(map(str, row))}\n" for u, row in users.items()))
    lines = ["\t".join((str(n), *item(n))) for n in items]
    (folder / "items.tsv").write_text("\n".join(["item_id\ttitle\tbrand\ttags\tprice", *lines]) + "\n")
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    there = [n for n in items if n % 4]
    np.savez(folder / "image.npz", ids=np.array([str(n) for n in there]), vectors=vectors[there])


def train(folder, workdir, **changes):
    flags = TINY | {"data.path": f"{folder}/events.txt", "data.items": f"{folder}/items.tsv"} | changes
    flags = {f"data.features.{k}" if k in (*KINDS, "vectors") else k: v for k, v in flags.items()}
    return command.main(["--config=configs/sequences.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items())])


def everything(folder):
    return KINDS | {"vectors": f"('{folder}/image.npz',)"}


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def ranked(trained):
    """Parameters as a workdir's vectors were made: its own vectors of items by how often each was seen."""
    parts = trained.model
    return dict(model.two_tower.as_ranked(trained.params, parts.spec, parts.prepared.item_counts()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, the same with items in another order, data with new items and users, and a workdir that was trained on the first."""
    folder = tmp_path_factory.mktemp("features")
    random, users = np.random.default_rng(0), {}
    for user in range(40):
        users[user] = (random.integers(30) + np.cumsum(random.choice([1, 1, 5], random.integers(6, 14)))) % 30 + 1
    write(folder / "data", users, range(1, 31))
    new = {**users, **{100 + u: np.append(random.integers(1, 33, 5), 31 + u % 2) for u in range(10)}}
    write(folder / "new", new, [32, 31, *range(30, 0, -1)])
    assert train(folder / "data", folder / "work", **everything(folder / "data")) == 0
    return folder


def test_training_lowers_the_loss_and_moves_every_feature(world):
    found = losses(world / "work")
    assert np.mean(found[-2:]) < found[0] - 0.1
    trained = model.load(world / "work", say=lambda _: None)
    params = trained.params["features"]
    assert set(params) == {"categorical", "multi_hot", "numeric", "vectors", "words"}
    known = json.loads((world / "work" / "features.json").read_text())["words"]["text"]["known"]
    assert {f"lot{n}" for n in range(1, 15)} <= set(known)
    assert np.all(np.any(params["words"]["text"]["embedding"][1:], axis=1))
    assert not np.any(params["words"]["text"]["embedding"][0])
    assert np.all(np.any(params["categorical"]["brand"]["embedding"][1:], axis=1))
    assert np.any(params["multi_hot"]["tags"]["embedding"][1:])
    assert np.any(params["vectors"]["image"]["kernel"])
    assert not np.any(params["categorical"]["brand"]["embedding"][0])
    counts = trained.model.prepared.meta["bad_input"]["missing_feature"]["count"]
    assert counts == 4 + 6 + 5 + 7, "items that lack one are counted, and none fails"


def test_another_evaluation_gives_the_same_figures(world):
    before = (world / "work" / "eval" / "test.json").read_bytes()
    (kept,) = (world / "work").glob("item_vectors-*.npy")
    vectors = np.load(kept)
    kept.unlink()  # so that the features are read again
    final.run(world / "work", say=lambda _: None)
    assert (world / "work" / "eval" / "test.json").read_bytes() == before
    np.testing.assert_allclose(np.load(kept), vectors, atol=1e-6)
    trained = model.load(world / "work", say=lambda _: None)
    without = dataclasses.replace(trained.model.spec, features=None)
    texts = model.two_tower.item_vectors(trained.params, without, trained.model.table)
    assert np.abs(texts - vectors).max() > 0.05, "the features have a part in them"


def test_recommends(world):
    answer = Recommender(model.load(world / "work", say=lambda _: None)).recommend([title(3), title(4)], k=5)
    assert len({r.item for r in answer} - {"3", "4"}) == 5
    assert all(np.isfinite(r.score) for r in answer)


def test_the_order_of_the_items_does_not_matter(world, tmp_path):
    """Codes, parameters and vectors go with ids: the trained towers make the same vectors of the same items in another order."""
    trained = model.load(world / "work", say=lambda _: None)
    items, prepared = trained.items, trained.model.prepared
    c = trained.model.config.copy_and_resolve_references().unlock()
    lines = (world / "data" / "items.tsv").read_text().splitlines()
    (tmp_path / "items.tsv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    c.data["items"], c.data.cache = str(tmp_path / "items.tsv"), str(tmp_path / "cache")
    other = model.prepare(c)
    coding = model.feature_codes.kept(world / "work")
    assert model.feature_codes.of_run(c, other).categorical == coding.categorical
    order = [prepared.item_ids().index(name) for name in other.item_ids()]
    assert order != sorted(order)
    params = ranked(trained)
    params["ids"] = {"embedding": np.asarray(params["ids"]["embedding"])[order]}
    spec = dataclasses.replace(trained.model.spec, n_ids=len(order))
    found = model.two_tower.item_vectors(params, spec, trained.model.table[order], coding.arrays(other))
    np.testing.assert_allclose(found, items[order], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["concat", "gate"])
def test_other_fusions_with_dropped_modalities_periodic_numbers_and_texts_in_the_step(fusion, world, tmp_path):
    changes = {"towers.item.fusion": fusion, "towers.item.modality_dropout": 0.2, "towers.item.features.numeric": "periodic"}
    changes |= {"towers.text.source": "tokens", "objectives.info_nce.candidates": "batch"}
    assert train(world / "data", tmp_path / "w", **everything(world / "data"), **changes) == 0
    assert np.isfinite(losses(tmp_path / "w")).all()
    before = json.loads((tmp_path / "w" / "eval" / "test.json").read_text())
    for kept in (tmp_path / "w").glob("item_vectors-*.npy"):
        kept.unlink()
    final.run(tmp_path / "w", say=lambda _: None)
    again = json.loads((tmp_path / "w" / "eval" / "test.json").read_text())
    assert again == pytest.approx(before, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "vectors"])
def test_each_kind_alone(kind, world, tmp_path):
    assert train(world / "data", tmp_path / "w", **{kind: everything(world / "data")[kind]}) == 0
    params = model.load(tmp_path / "w", say=lambda _: None).params
    assert sorted(params["features"]) == sorted([kind, "words"])
    assert losses(tmp_path / "w") != losses(world / "work")


def test_a_run_goes_on_with_new_categories_and_without_features(world, tmp_path):
    """The new data has other items first, brands in another order of first events, and two new items."""
    lines = (world / "new" / "items.tsv").read_text().replace(f"{title(31)}\tmaker 3", f"{title(31)}\tA new maker")
    (world / "new" / "items.tsv").write_text(lines)
    changes = everything(world / "new") | {"start.path": world / "work"}
    assert train(world / "new", tmp_path / "second", **changes) == 0
    first, second = (
        json.loads((world / "work" / "features.json").read_text()),
        json.loads((tmp_path / "second" / "features.json").read_text()),
    )
    assert second["categorical"]["brand"] == [*first["categorical"]["brand"], "A new maker"]
    assert second["numeric"] == first["numeric"]
    assert second["vectors"] == first["vectors"]
    known = [x["words"]["text"]["known"] for x in (first, second)]
    assert known[1][: len(known[0])] == known[0]
    assert "lot15" in known[1][len(known[0]) :], "a word that one item had before"
    old, new = (model.load(w, say=lambda _: None) for w in (world / "work", tmp_path / "second"))
    assert new.params["features"]["categorical"]["brand"]["embedding"].shape == (6, 8)
    # Before its first step it made the old vectors of the old items, features and all.
    names = old.model.prepared.item_ids()
    rows = [new.model.prepared.item_ids().index(name) for name in names]
    features, table = new.model.features, new.model.table
    grown = np.zeros((6, 8), np.float32)
    grown[:5] = old.params["features"]["categorical"]["brand"]["embedding"]
    of_words = np.zeros((len(known[1]) + 1, 8), np.float32)
    of_words[: len(known[0]) + 1] = old.params["features"]["words"]["text"]["embedding"]
    tables = {"categorical": {"brand": {"embedding": grown}}, "words": {"text": {"embedding": of_words}}}
    params = {**old.params, "features": {**old.params["features"], **tables}}
    ids = np.zeros((len(table), 8), np.float32)
    ids[rows] = ranked(old)["ids"]["embedding"][: len(names)]
    params["ids"] = {"embedding": ids}
    spec = dataclasses.replace(new.model.spec, n_ids=len(table))
    np.testing.assert_allclose(model.two_tower.item_vectors(params, spec, table, features)[np.array(rows)], old.items, atol=1e-5)
    figures = json.loads((tmp_path / "second" / "eval" / "continual.json").read_text())
    assert np.isfinite(list(figures.values())).all()
    with pytest.raises(RecJaxError, match=r"features/.* is \(.*\) in .*work .* and absent in this run; set config.data.features"):
        train(world / "new", tmp_path / "third", **{"start.path": world / "work"})
