"""Impressions: coding, drawn negatives, splits, and what a prepared folder gives back; data without them stays what it was."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import polars as pl
import pytest

from rec_jax import config as config_lib
from rec_jax.data import describe, identity, prepare, readers, tables
from rec_jax.data import impressions as impressions_lib
from rec_jax.types import RecJaxError

ROWS = """who,what,when,clicked,liked,day,place,shown
u1,a,10,1,,mon,home,0.5
u1,b,11,0,,tue,,0.25
u2,b,12,0,,mon,work,0.5
u2,c,13,1,0,wed,home,1
u3,c,14,0,,mon,home,0.125
u3,d,15,1,1,tue,work,0.5
u1,c,16,0,,mon,home,0.5
u2,a,17,1,,mon,home,0.5
u3,a,18,0,,tue,work,0.5
u1,d,19,1,1,wed,home,0.5
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "log.csv").write_text(ROWS)
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache = "table", str(tmp_path / "log.csv"), str(tmp_path / "cache")
    c.data.columns.update({"user": "who", "item": "what", "time": "when", "propensity": "shown"})
    c.data.columns.context, c.data.columns.labels = ("day", "place"), ("clicked", "liked")
    c.data.impressions.split, c.data.filter.min_user_events = "temporal", 1
    c.data.split.valid, c.data.split.test = 0.2, 0.2
    return c


def positives(n=300, users=12, items=9, seed=0):
    """Positives with one context field, some of it unknown."""
    random = np.random.default_rng(seed)
    draw = lambda high: random.integers(high, size=n).astype(np.int32)
    context, labels = draw(4)[:, None] - 1, np.ones((n, 1), np.float32)
    return impressions_lib.Impressions(draw(users), draw(items), context, labels, None, np.arange(n), {"f": ["x", "y", "z"]}, ("used",))


def keys(impressions):
    """(user, item, context) of each row."""
    return list(zip(impressions.user.tolist(), impressions.item.tolist(), map(tuple, impressions.context.tolist()), strict=True))


class TestNegatives:
    def test_are_never_items_used_in_that_context(self):
        made = positives()
        both, positive = impressions_lib.with_negatives(made, 3, n_items=9, seed=5)
        assert len(both) == len(made) * 4
        assert keys(both)[:300] == keys(made)
        used, negatives = set(keys(made)), both[300:]
        assert not used & set(keys(negatives))
        assert (negatives.labels == 0).all()
        assert (both.labels[:300] == 1).all()
        np.testing.assert_array_equal(positive[300:], np.repeat(np.arange(300), 3))
        for name in ("user", "context", "time"):
            np.testing.assert_array_equal(getattr(negatives, name), getattr(made, name)[positive[300:]])
        # Another context of the same user may have the item.
        pairs = {(u, i) for u, i, _ in used}
        assert any((u, i) in pairs for u, i, _ in keys(negatives))

    def test_every_other_item_is_drawn_alike(self):
        made = dataclasses.replace(positives(5000, users=1), context=np.zeros((5000, 0), np.int32), categories={})
        made = dataclasses.replace(made, item=made.item % 3)
        both, _ = impressions_lib.with_negatives(made, 2, n_items=9, seed=0)
        counts = np.bincount(both.item[5000:], minlength=9)
        assert (counts[:3] == 0).all()
        assert abs(counts[3:] - 10000 / 6).max() < 5 * np.sqrt(10000 / 6)

    def test_depend_on_the_seed_alone(self):
        draw = lambda seed: impressions_lib.with_negatives(positives(), 2, n_items=9, seed=seed)[0].item
        np.testing.assert_array_equal(draw(1), draw(1))
        assert (draw(1) != draw(2)).any()

    def test_bad_input(self):
        with pytest.raises(RecJaxError, match=r"user 0 \(row of the users table\), who has used all 9 items in one context"):
            impressions_lib.with_negatives(dataclasses.replace(positives(), user=np.zeros(300, np.int32)), 2, n_items=9, seed=0)
        with pytest.raises(RecJaxError, match=r"impressions.negatives=-1: expected 0 or more"):
            impressions_lib.with_negatives(positives(), -1, n_items=9, seed=0)
        assert len(impressions_lib.with_negatives(positives(), 0, n_items=9, seed=0)[0]) == 300


class TestPrepared:
    def test_parts_hold_the_rows_of_the_file(self, config):
        prepared = prepare.prepare(config)
        parts = {name: prepared.impressions(name) for name in ("train", "valid", "test")}
        users, items = prepared.users()["user"].to_list(), prepared.item_ids()
        found = []
        for name, part in parts.items():
            assert (part.fields, part.sizes, part.tasks) == (("day", "place"), (3, 2), ("clicked", "liked"))
            assert (part.user.dtype, part.item.dtype, part.context.dtype) == (np.int32, np.int32, np.int32)
            assert (part.labels.dtype, part.propensity.dtype, part.time.dtype) == (np.float32, np.float32, np.int64)
            for row in range(len(part)):
                day, place = (
                    "" if code < 0 else part.categories[field][code] for field, code in zip(part.fields, part.context[row], strict=True)
                )
                labels = [None if np.isnan(x) else int(x) for x in part.labels[row]]
                found.append((users[part.user[row]], items[part.item[row]], int(part.time[row]), *labels, day, place, part.propensity[row]))
            assert [x[2] for x in found][-len(part) :] == sorted(part.time.tolist()), name
        expected = []
        for line in ROWS.splitlines()[1:]:
            who, what, when, clicked, liked, day, place, shown = line.split(",")
            expected.append((who, what, int(when), int(clicked), int(liked) if liked else None, day, place, float(shown)))
        assert found == expected  # in time order as the parts follow one another, for the split is by dates
        assert [len(part) for part in parts.values()] == [6, 2, 2]
        assert parts["train"].categories == {"day": ["mon", "tue", "wed"], "place": ["home", "work"]}

    def test_events_are_the_rows_whose_first_label_is_above_0(self, config):
        prepared = prepare.prepare(config)
        ids, users = prepared.item_ids(), prepared.users()["user"].to_list()
        events = {(users[u], ids[i]) for u in range(prepared.n_users) for i in prepared.source()[u]["items"]}
        assert events == {("u1", "a"), ("u2", "c"), ("u3", "d"), ("u2", "a"), ("u1", "d")}

    def test_items_and_users_without_an_event_stay(self, config):
        prepared = prepare.prepare(config)
        assert sorted(prepared.item_ids()) == ["a", "b", "c", "d"], "b was shown and never clicked"
        with open(config.data.path, "a") as f:
            f.write("u9,e,20,0,,mon,home,0.5\n")
        prepared = prepare.prepare(config)
        assert prepared.n_users == 4
        assert prepared.lengths().tolist() == [2, 2, 1, 0]
        assert prepared.train_histories()[3].tolist() == []
        assert describe._samples(prepared)

    def test_random_split_is_disjoint_whole_and_stable(self, config, tmp_path):
        config.data.impressions.split = "random"
        prepared = prepare.prepare(config)
        parts = [prepared.impressions(name) for name in ("train", "valid", "test")]
        assert [len(p) for p in parts] == [6, 2, 2]
        times = [p.time.tolist() for p in parts]
        assert sorted(itertools.chain(*times)) == list(range(10, 20))
        config.data.cache = str(tmp_path / "other")
        assert [prepare.prepare(config).impressions(n).time.tolist() for n in ("train", "valid", "test")] == times
        config.seed = 1
        other = prepare.prepare(config)
        assert other.folder.name != prepared.folder.name
        assert other.impressions("test").time.tolist() != times[2]

    def test_events_may_take_the_split_of_their_impressions(self, config):
        config.data.split.kind = "impressions"
        prepared = prepare.prepare(config)
        where = {t: name for name in ("train", "valid", "test") for t in prepared.impressions(name).time.tolist()}
        parts = list(impressions_lib.PARTS)
        seen = 0
        for user in range(prepared.n_users):
            record = prepared.source()[user]
            assert [parts[s] for s in record["splits"]] == [where[t] for t in record["times"].tolist()]
            seen += len(record["splits"])
        assert seen == 5

    def test_made_of_events(self, tmp_path):
        config = config_lib.defaults()
        (tmp_path / "r.csv").write_text("user,item,stars\n" + "".join(f"u{u},i{(u + n) % 7},{n}\n" for u in range(5) for n in range(1, 5)))
        config.data.reader, config.data.path, config.data.cache = "table", str(tmp_path / "r.csv"), str(tmp_path)
        config.data.columns.rating, config.data.impressions.split = "stars", "events"
        prepared = prepare.prepare(config)
        assert prepared.meta["splits"] == {"train": 10, "valid": 5, "test": 5}
        histories = [set(prepared.source()[u]["items"].tolist()) for u in range(5)]
        for name, events in prepared.meta["splits"].items():
            part = prepared.impressions(name)
            assert (len(part), part.tasks, part.fields, part.context.shape) == (3 * events, ("used", "rating"), (), (3 * events, 0))
            used = part.labels[:, 0] == 1
            assert used.sum() == events
            assert not np.isnan(part.labels[used, 1]).any()
            assert np.isnan(part.labels[~used, 1]).all()
            for user, item, positive in zip(part.user, part.item, used, strict=True):
                assert (item in histories[user]) == positive
        targets = prepared.eval_set("test").targets.flat
        assert sorted(targets) == sorted(prepared.impressions("test").item[prepared.impressions("test").labels[:, 0] == 1])

    def test_positives_alone_get_negatives(self, config):
        config.data.columns.labels, config.data.columns.propensity, config.data.impressions.split = (), "", "random"
        config.data.split.valid = config.data.split.test = 0.0
        part = prepare.prepare(config).impressions("train")
        assert (part.tasks, part.propensity, len(part)) == (("used",), None, 30)
        assert part.labels[:, 0].tolist() == [1.0] * 10 + [0.0] * 20
        assert not set(keys(part)[:10]) & set(keys(part)[10:])

    def test_unknown_items_go_by_their_policy(self, config, tmp_path):
        (tmp_path / "items.tsv").write_text("item_id\ttitle\na\tA\nc\tC\nd\t\n")
        config.data["items"] = str(tmp_path / "items.tsv")
        with pytest.raises(RecJaxError, match=r"log.csv:3: item 'b' is not in the items table.*on_bad.unknown_item='skip'"):
            prepare.prepare(config)
        config.data.on_bad.unknown_item = "skip"
        prepared = prepare.prepare(config)
        assert sum(prepared.meta["impressions"]["splits"].values()) == 6, "nor is there one of an item without text"
        assert prepared.meta["bad_input"]["unknown_impression"]["count"] == 2

    def test_described(self, config):
        text = [(s.heading, s.rows, s.lines) for s in describe._impressions(prepare.prepare(config))]
        ((heading, rows, lines),) = text
        assert heading == "Impressions (temporal)"
        assert rows[0][4:] == ["clicked: observed", "liked: observed", "clicked: mean", "liked: mean"]
        assert rows[1] == ["train", "6", "3", "4", "6", "2", "0.5", "0.5"]
        assert rows[3] == ["test", "2", "2", "2", "2", "1", "0.5", "1"]
        assert lines == ["context, with categories: day (3), place (2)", "propensities from 0.125 to 1"]


class TestWithoutImpressions:
    def test_a_folder_prepared_before_there_were_impressions_stays_valid(self, config):
        """The settings that the fingerprint is made of are those of that time."""
        config.data.impressions.split, config.data.columns.propensity = "", ""
        config.data.columns.context, config.data.columns.labels = (), ()
        settings = identity.settings_of(config)
        assert sorted(settings) == ["columns", "filter", "on_bad", "reader", "split", "text"]
        assert settings["columns"] == {"user": "who", "item": "what", "time": "when", "rating": ""}
        config.data.impressions.negatives = 9
        assert identity.settings_of(config) == settings
        prepared = prepare.prepare(config)
        assert "impressions" not in prepared.meta
        assert not (prepared.local / "impressions").exists()
        assert describe._impressions(prepared) == []
        with pytest.raises(RecJaxError, match=r"has no impressions: set config.data.impressions.split to random, temporal"):
            prepared.impressions("train")

    def test_settings_that_matter(self, config):
        folders = {identity.identify(config)[0]}
        for key, value in (("negatives", 3), ("split", "random")):
            config.data.impressions[key] = value
            folders.add(identity.identify(config)[0])
        config.seed = 4
        folders.add(identity.identify(config)[0])
        assert len(folders) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impressions.split": ""}, r"columns.context names 'day', but config.data.impressions.split is ''"),
        ({"columns.time": ""}, r"impressions.split='temporal' needs times"),
        ({"columns.labels": ("clicked", "day")}, r"columns.labels='day' is also config.data.columns.context"),
        ({"columns.labels": ("bought",)}, r"no column 'bought'; columns there: who, what"),
        ({"columns.context": ("liked2",)}, r"no column 'liked2'"),
        ({"split.valid": 0.6, "split.test": 0.4}, r"split.valid=0.6 and test=0.4: expected shares"),
        ({"columns.labels": ("place",), "columns.context": ()}, r"log.csv:2: column place is 'home', expected a number"),
        ({"columns.propensity": "when"}, r"columns.propensity='when' is also config.data.columns.time"),
    ],
)
def test_bad_settings(config, change, message):
    for key, value in change.items():
        group, name = key.split(".")
        config.data[group][name] = value
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(config)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("u1,a,20,yes,,mon,home,0.5", "column clicked is 'yes', expected a number, or nothing"),
        ("u1,a,20,inf,,mon,home,0.5", "column clicked is 'inf'"),
        ("u1,a,20,1,,mon,home,0", "column shown is '0', expected a probability, above 0 and at most 1"),
        ("u1,a,20,1,,mon,home,1.5", "column shown is '1.5'"),
        ("u1,a,20,1,,mon,home,", "column shown is ''"),
        ("u1,a,20,1", "4 fields, expected 8"),
    ],
)
def test_bad_rows_are_named_and_skipped(config, line, detail):
    with open(config.data.path, "a") as f:
        f.write(f"{line}\nu1,d,30,0,,mon,home,0.5\n")
    with pytest.raises(RecJaxError) as error:
        readers.read(config.data)
    assert f"log.csv:12: {detail}" in str(error.value)
    assert "config.data.on_bad.bad_row='skip'" in str(error.value)
    config.data.on_bad.bad_row = "skip"
    out = readers.read(config.data)
    assert out.report.counts == {"bad_row": 1}
    assert out.impressions.frame.height == 11
    assert out.impressions.place(10).endswith("log.csv:13")
    assert out.event_place(4).endswith("log.csv:11")


def test_parquet_columns_of_any_type(config, tmp_path):
    frame = pl.read_csv(config.data.path).with_columns(clicked=pl.col("clicked") == 1, day=pl.col("day").cast(pl.Categorical))
    frame.write_parquet(tmp_path / "log.parquet")
    expected = prepare.prepare(config).impressions("test")
    config.data.path = str(tmp_path / "log.parquet")
    got = prepare.prepare(config).impressions("test")
    for name in ("user", "item", "context", "labels", "propensity", "time"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    frame.with_columns(place=pl.lit(0.5)).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(RecJaxError, match=r"column place is Float64; context fields are categories"):
        prepare.prepare(config)


def test_schema_of_a_reader(config):
    out = readers.read(config.data)
    frame = out.impressions.frame
    for change, message in (
        ({"user": pl.lit(1)}, r"column user is Int32; expected String"),
        ({"label.clicked": pl.lit(1.0)}, r"column label.clicked is Float64; expected Float32"),
        ({"context.day": pl.lit(None, pl.String)}, r"column context.day has 10 empty values"),
        ({"propensity": pl.lit(2.0, pl.Float32)}, r"log.csv:2: propensity 2; expected a probability"),
    ):
        out.impressions = dataclasses.replace(out.impressions, frame=frame.with_columns(**change))
        with pytest.raises(RecJaxError, match=message):
            tables.check(out)
    out.impressions = impressions_lib.ImpressionTable(frame.drop("label.clicked", "label.liked"))
    with pytest.raises(RecJaxError, match=r"has no column label.NAME"):
        tables.check(out)


def test_other_readers_have_none(tmp_path):
    config = config_lib.defaults()
    (tmp_path / "s.txt").write_text("u a b c\n")
    config.data.reader, config.data.path, config.data.cache = "sequences", str(tmp_path / "s.txt"), str(tmp_path)
    config.data.impressions.split = "random"
    with pytest.raises(RecJaxError, match=r"reader 'sequences' gives no impressions of this input; set it to 'events'"):
        prepare.prepare(config)
    config.data.impressions.split = "ratio"
    with pytest.raises(RecJaxError, match=r"impressions.split='ratio': expected '' or one of random, temporal, events"):
        prepare.prepare(config)
    config.data.impressions.split, config.data.split.kind = "", "impressions"
    with pytest.raises(RecJaxError, match=r"split.kind='impressions' needs config.data.impressions.split"):
        prepare.prepare(config)


MIND = """1\tU1\t11/15/2019 1:00:05 PM\tN1 N2\tN3-0 N4-1
2\tU2\t11/14/2019 1:00:00 AM\t\tN1-1 N2-0 N5-0
3\tU1\t11/14/2019 2:00:00 AM\tN1 N2\t
"""


def test_mind(tmp_path):
    (tmp_path / "behaviors.tsv").write_text(MIND)
    (tmp_path / "news.tsv").write_text("".join(f"N{i}\tnews\tworld\tTitle {i}\t\thttp://x\t[]\t[]\n" for i in range(1, 6)))
    config = config_lib.defaults()
    config.data.reader, config.data.path, config.data.cache = "mind", str(tmp_path), str(tmp_path / "cache")
    config.data.impressions.split, config.data.split.kind, config.data.filter.min_user_events = "temporal", "impressions", 1
    config.data.split.valid, config.data.split.test = 0.0, 0.4
    out = readers.read(config.data)
    frame = out.impressions.frame
    assert frame.select("user", "item", "label.click").rows() == [
        ("U1", "N3", 0.0), ("U1", "N4", 1.0), ("U2", "N1", 1.0), ("U2", "N2", 0.0), ("U2", "N5", 0.0),
    ]  # fmt: skip
    assert frame.select("context.weekday", "context.hour").unique(maintain_order=True).rows() == [("5", "13"), ("4", "1")]
    assert out.impressions.place(4).endswith("behaviors.tsv:2")
    prepared = prepare.prepare(config)
    assert [len(prepared.impressions(name)) for name in ("train", "valid", "test")] == [3, 0, 2]
    ids = prepared.item_ids()
    record = prepared.source()[0]
    assert [ids[i] for i in record["items"]] == ["N1", "N2", "N4"]
    assert record["splits"].tolist() == [0, 0, 2], "the history lies before the log"


def test_a_field_without_values(config):
    with open(config.data.path, "w") as f:
        f.write("\n".join(line.replace(",home,", ",,").replace(",work,", ",,") for line in ROWS.splitlines()) + "\n")
    with pytest.raises(RecJaxError, match=r"context field 'place' has no value in any impression; leave it out"):
        prepare.prepare(config)
