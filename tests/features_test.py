"""Features of items: what is prepared, how it is coded, and how a coding goes on."""

import json

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from rec_jax import config as config_lib
from rec_jax.data import describe, feature_codes, features, identity, prepare
from rec_jax.types import RecJaxError

ITEMS = """item_id\ttitle\tbrand\ttags\tprice
1\tone\tnorth\tred, blue\t10
2\ttwo\t south \tblue\t20
3\t\tnorth\t\t
4\tfour\t\tred,red, green\t30
5\tfive\teast\tblue\t40
9\tunused\tnowhere\tviolet\tnot asked for
"""
EVENTS = "a 1 2 3 4\nb 2 3 4 5\nc 5 4 3 1\n"
ALL = {"categorical": ("brand",), "multi_hot": ("tags",), "numeric": ("price",)}


def config_of(folder, items=ITEMS, events=EVENTS, on_bad=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "events.txt").write_text(events)
    (folder / "items.tsv").write_text(items)
    c = config_lib.defaults()
    c.data.update({"reader": "sequences", "path": str(folder / "events.txt"), "items": str(folder / "items.tsv")})
    c.data.cache = str(folder / "cache")
    c.data.text.template = "{title}"
    c.data.on_bad.update({"empty_text": "keep", **(on_bad or {})})
    c.data.features.update(ALL | changes)
    c.towers.item.features.buckets = 2
    config_lib.check(c)
    return c


def test_columns_become_numbers_by_hand(tmp_path):
    c = config_of(tmp_path)
    prepared = prepare.prepare(c)
    assert prepared.item_ids() == ["1", "2", "3", "4", "5"]
    coding = feature_codes.of_run(c, prepared)
    assert coding.categorical == {"brand": ["east", "north", "south"]}
    assert coding.multi_hot == {"tags": ["blue", "green", "red"]}
    assert coding.numeric == {"price": {"kind": "buckets", "buckets": 2, "edges": [20.0]}}
    assert coding.sizes() == {"categorical": {"brand": 4}, "multi_hot": {"tags": 4}, "numeric": {"price": 3}, "vectors": {}, "words": {}}
    arrays = coding.arrays(prepared)
    assert arrays["categorical"]["brand"].tolist() == [2, 3, 2, 0, 1]
    assert arrays["multi_hot"]["tags"].tolist() == [[3, 1], [1, 0], [0, 0], [3, 2], [1, 0]]
    assert arrays["numeric"]["price"].tolist() == [1, 2, 0, 2, 2]
    assert all(a.dtype == np.int32 for kind in arrays.values() for a in kind.values())
    assert prepared.meta["features"] == {
        "categorical": {"brand": {"values": 3, "missing": 1}},
        "multi_hot": {"tags": {"values": 3, "missing": 1}},
        "numeric": {"price": {"values": 4, "missing": 1}},
    }
    assert prepared.meta["bad_input"]["missing_feature"]["count"] == 3
    assert prepared.meta["bad_input"]["missing_feature"]["examples"][0].endswith("items.tsv:5: item '4': column brand is empty")
    (section,) = describe._features(prepared)
    assert section.rows[2] == ["tags", "multi_hot", "3", "1"]


def test_an_item_that_is_kept_without_text_keeps_its_features(tmp_path):
    """Its text columns are blanked so that no template finds them; a feature is read before that."""
    c = config_of(tmp_path, items=ITEMS.replace("brand\t", "author\t", 1), categorical=("author",))
    prepared = prepare.prepare(c)
    assert prepared.texts()[2] == "3"
    assert features.read_columns(prepared.local)["categorical"]["author"].to_list() == ["north", "south", "north", None, "east"]


def test_numbers_in_standard_deviations(tmp_path):
    c = config_of(tmp_path)
    c.towers.item.features.numeric = "periodic"
    coding = feature_codes.of_run(c, prepare.prepare(c))
    assert coding.sizes()["numeric"] == {"price": 0}
    expected = (np.array([10, 20, np.nan, 30, 40]) - 25) / np.std([10, 20, 30, 40])
    np.testing.assert_allclose(coding.arrays(prepare.prepare(c))["numeric"]["price"], expected, rtol=1e-6)


def test_ranges_hold_as_many_items_each(tmp_path):
    values = np.random.default_rng(0).lognormal(size=1000)
    settings = config_lib.defaults().towers.item.features
    coded = feature_codes._coded(values, settings, "x", "config.data.features")
    counts = np.bincount(feature_codes._numeric(values, coded))
    assert len(counts) == 17
    assert counts[0] == 0
    assert np.ptp(counts[1:]) <= 1
    again = feature_codes._coded(np.array([0.0] * 90 + [1.0] * 10), settings, "x", "config.data.features")  # most ranges are one
    assert again["edges"] == [1.0]


def vectors_of(folder, ids=("4", "1", "2", "77"), seed=0):
    values = 5 + 3 * np.random.default_rng(seed).normal(size=(len(ids), 3)).astype(np.float32)
    np.savez(folder / "image.npz", ids=np.array(ids), vectors=values)
    return dict(zip(ids, values, strict=True))


def test_given_vectors_are_centred_and_of_one_length(tmp_path):
    given = vectors_of(tmp_path)
    c = config_of(tmp_path, vectors=(f"{tmp_path}/image.npz",))
    prepared = prepare.prepare(c)
    assert prepared.meta["features"]["vectors"] == {"image": {"width": 3, "missing": 2, "unused": 1}}
    kept = features.read_vectors(prepared.local, "image")
    np.testing.assert_array_equal(kept, [given["1"], given["2"], [np.nan] * 3, given["4"], [np.nan] * 3])
    coding = feature_codes.of_run(c, prepared)
    assert coding.sizes()["vectors"] == {"image": 3}
    out = coding.arrays(prepared)["vectors"]["image"]
    np.testing.assert_array_equal(out[[2, 4]], 0)
    there = out[[0, 1, 3]]
    np.testing.assert_allclose(there.mean(0), 0, atol=1e-6)
    assert np.square(there).sum(1).mean() == pytest.approx(1, rel=1e-5)
    rows = np.array([given[i] for i in "124"], np.float64)
    expected = (rows - rows.mean(0)) / np.sqrt(np.square(rows - rows.mean(0)).sum(1).mean())
    np.testing.assert_allclose(there, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [*ALL, "vectors"])
def test_each_kind_alone(kind, tmp_path):
    vectors_of(tmp_path)
    named = ALL | {"vectors": (f"{tmp_path}/image.npz",)}
    c = config_of(tmp_path, **{k: names if k == kind else () for k, names in named.items()})
    prepared = prepare.prepare(c)
    arrays = feature_codes.of_run(c, prepared).arrays(prepared)
    assert {k: len(of_kind) for k, of_kind in arrays.items()} == {k: int(k == kind) for k in named}
    assert {k for k, of_kind in prepared.meta["features"].items() if of_kind} == {kind}


def test_another_file_or_feature_is_another_folder_and_none_is_the_old_one(tmp_path):
    vectors_of(tmp_path)
    plain = prepare.fingerprint_of(config_of(tmp_path, categorical=(), multi_hot=(), numeric=()))
    c = config_of(tmp_path, vectors=(f"{tmp_path}/image.npz",))
    marks = [plain, prepare.fingerprint_of(config_of(tmp_path)), prepare.fingerprint_of(c)]
    vectors_of(tmp_path, seed=1)
    marks.append(prepare.fingerprint_of(c))
    assert len(set(marks)) == 4
    settings = identity.settings_of(config_of(tmp_path, categorical=(), multi_hot=(), numeric=()))
    assert "features" not in settings
    assert "missing_feature" not in settings["on_bad"]


def test_a_workdir_keeps_its_coding(tmp_path):
    vectors_of(tmp_path)
    c = config_of(tmp_path, vectors=(f"{tmp_path}/image.npz",))
    coding = feature_codes.of_run(c, prepare.prepare(c))
    feature_codes.keep(epath.Path(tmp_path / "work"), coding)
    assert feature_codes.kept(tmp_path / "work") == coding
    assert json.loads((tmp_path / "work" / "features.json").read_text())["categorical"]["brand"][0] == "east"
    feature_codes.keep(epath.Path(tmp_path / "none"), None)
    with pytest.raises(RecJaxError, match=r"none has features and no features.json .*run its training command again"):
        feature_codes.kept(tmp_path / "none")


def test_a_coding_goes_on_with_what_is_new_behind(tmp_path):
    old = feature_codes.Coding({"brand": ["north", "south"]}, {}, {"price": {"kind": "buckets", "buckets": 2, "edges": [7.0]}}, {})
    c = config_of(tmp_path)
    prepared = prepare.prepare(c)
    both = feature_codes.extended(old, feature_codes.learn(c, prepared), "runs/old")
    assert both.categorical == {"brand": ["north", "south", "east"]}
    assert both.multi_hot == {"tags": ["blue", "green", "red"]}
    assert both.arrays(prepared)["categorical"]["brand"].tolist() == [1, 2, 1, 0, 3]
    assert both.arrays(prepared)["numeric"]["price"].tolist() == [2, 2, 0, 2, 2], "by the old ranges"
    # What the old coding alone knows stays unknown, and the order of what is known stays.
    assert old.categorical["brand"] == ["north", "south"]
    assert feature_codes._numbers(features.read_columns(prepared.local)["categorical"]["brand"], ["south"]).tolist() == [0, 1, 0, 0, 0]
    tags = features.read_columns(prepared.local)["multi_hot"]["tags"]
    assert feature_codes._padded(tags, ["green"]).tolist() == [[0], [0], [0], [1], [0]]
    c.towers.item.features.buckets = 3
    with pytest.raises(RecJaxError, match=r"features.buckets is 2 in runs/old and 3 here, and 'price' has been"):
        feature_codes.extended(old, feature_codes.learn(c, prepared), "runs/old")
    c.towers.item.features.numeric = "periodic"
    with pytest.raises(RecJaxError, match=r"features.numeric is 'buckets' in runs/old and 'periodic' here"):
        feature_codes.extended(old, feature_codes.learn(c, prepared), "runs/old")
    wide = feature_codes.Coding({}, {}, {}, {"image": {"mean": [0.0] * 5, "scale": 1.0}})
    vectors_of(tmp_path)
    c = config_of(tmp_path, vectors=(f"{tmp_path}/image.npz",))
    with pytest.raises(RecJaxError, match="'image' has vectors of 3 numbers, and the towers have learned such of 5"):
        wide.arrays(prepare.prepare(c))


BAD = {
    "column": (
        {"categorical": ("colour",)},
        {},
        r"features.categorical names 'colour', which is no column of the items; these have: item,",
    ),
    "number": (
        {"numeric": ("brand",)},
        {},
        r"items.tsv:2: column brand is 'north', expected a number or nothing.*on_bad.bad_feature='skip'",
    ),
    "missing": ({}, {"missing_feature": "error"}, r"items.tsv:5: item '4': column brand is empty.*on_bad.missing_feature='skip'"),
    "no values": ({"categorical": ("empty",)}, {}, "names 'empty', which has no value in any item; leave it out"),
    "separator": ({"multi_hot": ("bars",)}, {}, r"no cell has config.data.features.separator=',', but 'x\|y' has '\|'"),
    "vectors": ({"vectors": ("other.npz",)}, {}, r"no item of the catalogue has a vector; ids there are like 'z', of items like '1'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_are_named_with_their_place(case, tmp_path, monkeypatch):
    changes, on_bad, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", ids=np.array(["z"]), vectors=np.ones((1, 2)))
    lines = ITEMS.splitlines()
    items = "\n".join([lines[0] + "\tempty\tbars", *(line + "\t\tx|y" for line in lines[1:])]) + "\n"
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(config_of(tmp_path, items=items, on_bad=on_bad, **changes))


def test_what_is_no_number_counts_as_none_where_that_is_asked_for(tmp_path):
    items = ITEMS.replace("\t20\n", "\tcheap\n").replace("\t40\n", "\tinf\n").replace("\t30\n", "\tNaN\n")
    prepared = prepare.prepare(config_of(tmp_path, items=items, on_bad={"bad_feature": "skip"}))
    assert features.read_columns(prepared.local)["numeric"]["price"].to_list() == [10.0, None, None, None, None]
    assert prepared.meta["bad_input"]["bad_feature"]["count"] == 2
    c = config_of(tmp_path, items=items, on_bad={"bad_feature": "skip"})
    with pytest.raises(RecJaxError, match=r"features.numeric names 'price', which is 10 wherever it is there; leave it out"):
        feature_codes.of_run(c, prepared)


def test_bars_where_the_separator_is_one(tmp_path):
    items = ITEMS.replace("red, blue", "red | blue").replace("red,red, green", "red|red|green")
    prepared = prepare.prepare(config_of(tmp_path, items=items, separator="|"))
    assert features.read_columns(prepared.local)["multi_hot"]["tags"].to_list()[:4] == [["red", "blue"], ["blue"], None, ["red", "green"]]


CONFIGS = {
    "data.features.categorical": (("brand", "brand"), "names 'brand' twice"),
    "data.features.multi_hot": (("a/b",), "names 'a/b': a feature's name is part of its parameters', without '/'"),
    "data.features.numeric": ((1,), r"\(1,\): expected names, like \('name',\)"),
    "towers.item.modality_dropout": (1.0, r"=1.0: must be at least 0 and below 1"),
    "towers.item.fusion": ("product", "expected one of sum, concat, gate"),
    "towers.item.features.numeric": ("log", "expected one of buckets, periodic"),
    "towers.item.features.buckets": (0, "must be above 0"),
    "towers.item.features.dim": (8, "a width of their own is for fusion='concat'"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_bad_keys(key, tmp_path):
    value, message = CONFIGS[key]
    c = config_of(tmp_path)
    *groups, name = key.split(".")
    with c.unlocked():
        config_lib.get(c, ".".join(groups))[name] = value
    with pytest.raises(RecJaxError, match=f"config.{key}.*{message}"):
        config_lib.check(c)


@pytest.mark.parametrize(("key", "value"), [("fusion", "gate"), ("modality_dropout", 0.5)])
def test_keys_about_features_need_some(key, value):
    c = config_lib.defaults()
    c.towers.item[key] = value
    with pytest.raises(RecJaxError, match=rf"config.towers.item.{key}='?{value}'? is about features, and config.data.features names none"):
        config_lib.check(c)
    c.towers.item[key] = config_lib.defaults().towers.item[key]
    c.data.features.update({"multi_hot": ("tags",), "separator": " "})
    with pytest.raises(RecJaxError, match="separator=' ': expected a character that no value has"):
        config_lib.check(c)
    c.data.features.separator = ","
    c.stages, c.stage.one = ("one",), ConfigDict({"data": {"features": {"multi_hot": ()}}})
    with pytest.raises(RecJaxError, match=r"config.stage.one.data.features: all stages have the same features"):
        config_lib.check(c)
