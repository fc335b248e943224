"""Frappe: the log and the apps' texts, bad input, and the counts of the real files."""

from __future__ import annotations

import numpy as np
import pytest

from rec_jax import config as config_lib
from rec_jax.data import prepare, readers
from rec_jax.data.readers import frappe
from rec_jax.types import RecJaxError

LOG = """user\titem\tcnt\tdaytime\tweekday\tisweekend\thomework\tcost\tweather\tcountry\tcity
0\t7\t1\tmorning\tsunday\tweekend\tunknown\tfree\tsunny\tUnited States\t0
1\t8\t428\tnight\tmonday\tworkday\thome\tpaid\tcloudy\tSpain\t369
0\t8\t3\tmorning\tsunday\tweekend\tunknown\tfree\tsunny\tUnited States\t0
0\t7\t5\tnight\tsunday\tweekend\thome\tfree\tunknown\tUnited States\t0
1\t9\t2\tnight\tsunday\tweekend\thome\tfree\tunknown\tSpain\t369
"""
META = """item\tpackage\tcategory\tdownloads\tdeveloper\ticon\tlanguage\tdescription\tname\tprice\trating\tshort desc
7\tcom.a\tTools\t1\tAnn "A" Co.\thttp://x\ten\tLong\tAnyDo\tFree\t4.5\tTo-dos
8\tunknown\tunknown\tunknown\tunknown\tunknown\tunknown\tunknown\tunknown\tunknown\tunknown\tunknown
9\tcom.c\tGames\t1\tC\thttp://x\ten\tLong\tChess\tFree\t4.5\tNone
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "frappe.csv").write_text(LOG)
    (tmp_path / "in" / "meta.csv").write_text(META)
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache = "frappe", str(tmp_path / "in"), str(tmp_path / "cache")
    c.data.impressions.split, c.data.impressions.negatives = "random", 1
    c.data.filter.min_user_events, c.data.on_bad.empty_text = 1, "keep"
    return c


def test_rows_are_events_and_positives(config):
    out = readers.read(config.data)
    events = [(0, 7, 0, 1.0), (1, 8, 1, 428.0), (0, 8, 2, 3.0), (0, 7, 3, 5.0), (1, 9, 4, 2.0)]
    assert out.events.select("user", "item", "time", "rating").rows() == events
    assert not out.clock
    shown = out.impressions.frame
    assert shown.select("user", "item").rows() == out.events.select("user", "item").rows()
    assert [c for c in shown.columns if c.startswith("context.")] == [f"context.{field}" for field in frappe.FIELDS]
    assert shown.select(f"context.{f}" for f in frappe.FIELDS).row(1) == (
        "night", "monday", "workday", "home", "paid", "cloudy", "Spain", "369",
    )  # fmt: skip
    assert shown["label.used"].to_list() == [1.0] * 5
    assert out.impressions.positives
    assert out.impressions.place(3).endswith("frappe.csv:5")


def test_fields_of_the_context_may_be_features_of_events(config):
    config.data.event_features = ("weekday", "city")
    events = readers.read(config.data).events
    assert events["event_weekday"].to_list() == ["sunday", "monday", "sunday", "sunday", "sunday"]
    assert events["event_city"].to_list()[1] == "369"


def test_texts_are_those_of_the_apps(config):
    items = readers.read(config.data).items
    assert items.select("item", "title", "categories", "brand", "description").rows() == [
        (7, "AnyDo", "Tools", 'Ann "A" Co.', "To-dos"),
        (8, "", "", "", ""),
        (9, "Chess", "Games", "C", ""),
    ]
    assert prepare.prepare(config).texts() == ['AnyDo. Tools. Ann "A" Co. To-dos', "8", "Chess. Games. C"]


def test_without_impressions_there_are_events_alone(config):
    config.data.impressions.split = ""
    out = readers.read(config.data)
    assert out.impressions is None
    assert out.events.columns == ["user", "item", "time", "rating"]
    assert prepare.prepare(config).meta["events"] == 4


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("0\tx\t1" + "\tmorning" * 8, "frappe.csv:7: column item is 'x', expected a whole number"),
        ("0\t7\tmany" + "\tmorning" * 8, "frappe.csv:7: column cnt is 'many', expected a number"),
        ("0\t7\t1\tmorning", "frappe.csv:7: 4 fields, expected 11"),
        ("0\t5\t1" + "\tmorning" * 8, "frappe.csv:7: item 5 is not in the items table"),
    ],
)
def test_bad_rows(config, line, detail):
    with open(f"{config.data.path}/frappe.csv", "a") as f:
        f.write(line + "\n")
    with pytest.raises(RecJaxError, match=detail):
        prepare.prepare(config)
    config.data.on_bad.bad_row = config.data.on_bad.unknown_item = "skip"
    prepared = prepare.prepare(config)
    assert sum(prepared.meta["impressions"]["splits"].values()) == 10
    assert sum(kind in ("bad_row", "unknown_item") for kind in prepared.meta["bad_input"]) == 1


def test_missing_file(config, tmp_path):
    (tmp_path / "in" / "meta.csv").unlink()
    with pytest.raises(RecJaxError, match=r"expected a folder or .zip with frappe.csv and meta.csv; found frappe.csv"):
        readers.read(config.data)
    config.data.path = str(tmp_path / "none")
    with pytest.raises(RecJaxError, match=r"no such file or folder; reader 'frappe' expects a folder or .zip with frappe.csv"):
        readers.read(config.data)


def test_real_counts(config, data_dir):
    config.data.path, config.data.impressions.negatives = str(data_dir / "frappe"), 2
    prepared = prepare.prepare(config)
    assert (prepared.n_users, prepared.n_items, prepared.meta["events"]) == (957, 4082, 18842)
    parts = [prepared.impressions(name) for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [230889, 28860, 28860]
    assert sum(map(len, parts)) == 3 * 96203 == 288609, "as the literature has it"
    assert sum(int(part.labels.sum()) for part in parts) == 96203
    assert parts[0].sizes == (7, 7, 2, 3, 2, 9, 80, 233)
    assert 957 + 4082 + sum(parts[0].sizes) == 5382, "features, as the literature has them"
    width = np.cumprod([1, 4082, *(size + 1 for size in parts[0].sizes)], dtype=object)[-1] * 957
    assert width < 2**63
    keys = [_keys(part) for part in parts]
    used = np.unique(np.concatenate([k[part.labels[:, 0] == 1] for k, part in zip(keys, parts, strict=True)]))
    drawn = np.concatenate([k[part.labels[:, 0] == 0] for k, part in zip(keys, parts, strict=True)])
    assert not np.isin(drawn, used).any(), "no negative was used in its context"


def _keys(part):
    key = part.user.astype(np.int64) * 4082 + part.item
    for column, size in zip(part.context.T, part.sizes, strict=True):
        key = key * (size + 1) + column + 1
    return key
