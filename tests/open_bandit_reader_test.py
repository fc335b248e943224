"""Open Bandit: one log and several, users by their features, bad input, and the counts of the real files."""

from __future__ import annotations

import gzip

import pytest

from rec_jax import config as config_lib
from rec_jax.data import prepare, readers
from rec_jax.types import RecJaxError

HEADER = ",timestamp,item_id,position,click,propensity_score,{},{}\n".format(
    ",".join(f"user_feature_{i}" for i in range(4)), ",".join(f"user-item_affinity_{i}" for i in range(3))
)
ROWS = (
    "0,2019-11-24 00:00:01.979311+00:00,2,2,0,0.25,a,b,c,d,0.0,5.0,0.0\n"
    "1,2019-11-24 00:00:03+00:00,1,3,1,0.5,a,b,c,d,0.0,5.0,0.0\n"
    "2,2019-11-24 00:00:02.5+00:00,0,1,0,1.0,a,b,c,e,2.0,0.0,0.0\n"
    "3,2019-11-24 00:00:09.1+00:00,1,1,1,0.5,a,b,c,e,0.0,0.0,0.0\n"
)
ITEMS = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n" + "".join(f"{i},{i},0.{i},{{0}}x,y,z\n" for i in range(3))
START = 1574553600


def write_log(folder, salt="", rows=ROWS, packed=False):
    folder.mkdir(parents=True)
    for name, text in ((f"{folder.name}.csv", HEADER + rows), ("item_context.csv", ITEMS.format(salt))):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def make(path, tmp_path, **on_bad):
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache = "open_bandit", str(path), str(tmp_path / "cache")
    c.data.impressions.split, c.data.split.kind = "temporal", "impressions"
    c.data.split.valid, c.data.split.test, c.data.filter.min_user_events = 0.0, 0.25, 1
    c.data.on_bad.update({"empty_text": "keep", **on_bad})
    return c


@pytest.mark.parametrize("packed", [False, True])
def test_one_log(tmp_path, packed):
    out = readers.read(make(write_log(tmp_path / "bts" / "men", packed=packed), tmp_path).data)
    assert out.events.select("user", "item", "time", "rating", "impression").rows() == [
        ("a-b-c-d", "1", START + 3, 1.0, 1),
        ("a-b-c-e", "1", START + 9, 1.0, 3),
    ]
    assert out.users.rows() == [("a-b-c-d", "a", "b", "c", "d"), ("a-b-c-e", "a", "b", "c", "e")]
    shown = out.impressions.frame
    assert shown["label.click"].to_list() == [0, 1, 0, 1]
    assert shown["propensity"].to_list() == [0.25, 0.5, 1.0, 0.5]
    assert shown["context.position"].to_list() == ["2", "3", "1", "1"]
    assert shown["context.affinity"].to_list() == ["0", "3", "2", "0"], "of the item that was shown, more than 3 as 3"
    assert [c for c in shown.columns if c.startswith("context.")][:4] == [f"context.user_feature_{i}" for i in range(4)]
    assert len([c for c in shown.columns if c.startswith("context.")]) == 6
    assert out.items.select("item", "item_feature_0", "item_feature_1").rows() == [("0", "0.0", "x"), ("1", "0.1", "x"), ("2", "0.2", "x")]
    assert out.clock
    name = "men.csv.gz" if packed else "men.csv"
    assert out.impressions.place(2).endswith(f"bts/men/{name}:4")
    assert out.event_place(1).endswith(f"bts/men/{name}:5")


def test_several_logs(tmp_path):
    for policy in ("random", "bts"):
        write_log(tmp_path / "obd" / policy / "men", salt=policy)
    write_log(tmp_path / "obd" / "bts" / "women", salt="w")
    config = make(tmp_path / "obd", tmp_path)
    out = readers.read(config.data)
    assert [(p.parent.parent.name, p.name) for p in readers.inputs(config.data)] == [
        (policy, name)
        for policy, campaign in (("bts", "men"), ("bts", "women"), ("random", "men"))
        for name in ("item_context.csv", f"{campaign}.csv")
    ]
    assert out.items["item"].to_list() == [f"{c}/{i}" for c in ("men", "women") for i in range(3)]
    assert out.items["item_feature_1"].to_list() == ["btsx"] * 3 + ["wx"] * 3
    assert out.users.height == 2
    shown = out.impressions.frame
    assert shown.select("context.policy", "context.campaign").unique(maintain_order=True).rows() == [
        ("bts", "men"), ("bts", "women"), ("random", "men"),
    ]  # fmt: skip
    assert out.impressions.place(4).endswith("bts/women/women.csv:2")
    assert out.event_place(5).endswith("random/men/men.csv:5")
    assert out.item_place(4).endswith("bts/women/item_context.csv:3")
    prepared = prepare.prepare(config)
    assert prepared.impressions("test").time.tolist() == [START + 9] * 3


def test_prepared(tmp_path):
    prepared = prepare.prepare(make(write_log(tmp_path / "bts" / "men"), tmp_path))
    train, test = prepared.impressions("train"), prepared.impressions("test")
    assert prepared.item_ids() == ["0", "1", "2"], "what was never clicked is there too"
    assert (train.labels[:, 0].tolist(), test.labels[:, 0].tolist()) == ([0, 1, 0], [1])
    assert test.propensity.tolist() == [0.5]
    assert prepared.meta["splits"] == {"train": 1, "valid": 0, "test": 1}
    assert prepared.texts() == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("old", "new", "detail"),
    [
        ("00:00:03+00:00,1,", "soon,1,", "column timestamp is '2019-11-24 soon', expected a time like 2019"),
        ("+00:00,1,3,1,", "+00:00,3,3,1,", "column item_id is 3, expected a number from 0 to 2"),
        ("+00:00,1,3,1,", "+00:00,x,3,1,", "column item_id is 'x', expected a whole number"),
        ("+00:00,1,3,1,", "+00:00,1,3,2,", "column click is 2, expected 0 or 1"),
        (",3,1,0.5,", ",3,1,0.0,", "column propensity_score is 0.0, expected a probability"),
        (",3,1,0.5,", ",3,1,", "12 fields, expected 13"),
    ],
)
def test_bad_rows(tmp_path, old, new, detail):
    assert ROWS.count(old) == 1
    folder = write_log(tmp_path / "bts" / "men", rows=ROWS.replace(old, new))
    with pytest.raises(RecJaxError) as error:
        readers.read(make(folder, tmp_path).data)
    assert f"men.csv:3: {detail}" in str(error.value)
    assert "config.data.on_bad.bad_row='skip'" in str(error.value)
    out = readers.read(make(folder, tmp_path, bad_row="skip").data)
    assert out.report.counts == {"bad_row": 1}
    assert out.impressions.frame.height == 3
    assert out.impressions.place(1).endswith("men.csv:4")
    assert out.event_place(0).endswith("men.csv:5")


def test_other_name_of_the_propensity_and_no_affinities(tmp_path):
    folder = write_log(tmp_path / "bts" / "men")
    lines = [",".join(line.split(",")[:10]) for line in (HEADER + ROWS).replace("propensity_score", "action_prob").splitlines()]
    (folder / "men.csv").write_text("\n".join(lines) + "\n")
    shown = readers.read(make(folder, tmp_path).data).impressions.frame
    assert shown["propensity"].to_list() == [0.25, 0.5, 1.0, 0.5]
    assert "context.affinity" not in shown.columns


def test_no_log(tmp_path):
    (tmp_path / "obd" / "bts").mkdir(parents=True)
    with pytest.raises(RecJaxError, match=r"expected a folder CAMPAIGN with CAMPAIGN.csv and item_context.csv .* found bts"):
        readers.read(make(tmp_path / "obd", tmp_path).data)
    (tmp_path / "men.csv").write_text(HEADER)
    with pytest.raises(RecJaxError, match=r"found a file"):
        readers.read(make(tmp_path / "men.csv", tmp_path).data)


@pytest.mark.parametrize(
    ("log", "users", "items", "clicks"),
    [("bts/men", 238, 34, 69), ("bts/women", 212, 46, 46), ("random/men", 230, 34, 46), ("random/women", 205, 46, 46)],
)
def test_real_logs(tmp_path, data_dir, log, users, items, clicks):
    config = make(data_dir / "open-bandit" / log, tmp_path)
    config.data.split.valid = config.data.split.test = 0.1
    prepared = prepare.prepare(config)
    parts = [prepared.impressions(name) for name in ("train", "valid", "test")]
    assert (prepared.n_users, prepared.n_items) == (users, items)
    assert [len(part) for part in parts] == [8000, 1000, 1000]
    assert sum(int(part.labels.sum()) for part in parts) == clicks
    assert parts[0].time.max() < parts[1].time.min() <= parts[1].time.max() < parts[2].time.min()
    if log.startswith("random"):
        assert {float(p) for part in parts for p in part.propensity} == {float(parts[0].propensity[0])}
        assert parts[0].propensity[0] == pytest.approx(1 / items)


def test_all_real_logs(tmp_path, data_dir):
    prepared = prepare.prepare(make(data_dir / "open-bandit", tmp_path))
    parts = [prepared.impressions(name) for name in ("train", "test")]
    assert (prepared.n_users, prepared.n_items, sum(map(len, parts))) == (317, 80, 40000)
    assert sum(int(part.labels.sum()) for part in parts) == 207
    assert dict(zip(parts[0].fields, parts[0].sizes, strict=True))["policy"] == 2
