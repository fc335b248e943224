"""Tables: schema checks, the policies that need all three tables, order, codes and the report."""

import numpy as np
import polars as pl
import pytest

from rec_jax import config as config_lib
from rec_jax.data import tables
from rec_jax.data.tables import Report, Tables
from rec_jax.types import RecJaxError


def settings(min_user_events=1, **on_bad):
    c = config_lib.defaults().data
    c.filter.min_user_events = min_user_events
    c.on_bad.update(on_bad)
    return c


def make(events, items=None, **kwargs):
    """Tables from (user, item, time[, rating]) rows."""
    full = [(*e, 1.0)[:4] for e in events]
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64, "rating": pl.Float32}
    frame = pl.DataFrame(full, schema=schema, orient="row")
    items = tables.items_of(frame) if items is None else items
    return Tables(tables.with_names(items), tables.users_of(frame), frame, Report(), **kwargs)


def ids(items, users, coded):
    """Coded events as (user id, item id, time)."""
    return [(users["user"][int(u)], items["item"][int(i)], int(t)) for u, i, t in zip(coded.user, coded.item, coded.time, strict=True)]


def test_order_is_user_time_then_place():
    t = make([("b", "x", 5), ("a", "z", 9), ("b", "y", 5), ("a", "x", 1), ("b", "z", 2), ("a", "y", 9)])
    tables.check(t)
    items, users, coded = tables.code(t, settings())
    assert ids(items, users, coded) == [("b", "z", 2), ("b", "x", 5), ("b", "y", 5), ("a", "x", 1), ("a", "z", 9), ("a", "y", 9)]
    assert users["user"].to_list() == ["b", "a"]
    assert items["item"].to_list() == ["x", "z", "y"]
    arrays = (coded.user, coded.item, coded.time, coded.rating, coded.split)
    assert [a.dtype for a in arrays] == [
        np.int32,
        np.int32,
        np.int64,
        np.float32,
        np.uint8,
    ]


def test_events_that_go_back_in_time_are_counted_among_those_that_are_sorted():
    t = make([("b", "x", 5, 4.0), ("a", "z", 9, 4.0), ("b", "y", 7, 1.0), ("a", "x", 1, 4.0), ("b", "z", 6, 4.0), ("a", "y", 0, 4.0)])
    assert tables.code(t, settings())[2].backwards == (3, 2)
    rated = settings()
    rated.filter.min_rating = 2  # leaves y of b out, after which z of b no longer goes back
    assert tables.code(t, rated)[2].backwards == (2, 1)
    assert tables.code(make([("b", "x", 5), ("a", "z", 1), ("b", "y", 5)]), settings())[2].backwards == (0, 0)


def test_catalogue_is_the_items_with_events_in_table_order():
    table = pl.DataFrame({"item": ["c", "never", "b", "a"], "title": ["C", "N", "B", "A"]})
    items, _, coded = tables.code(make([("u", "a", 1), ("u", "c", 2), ("v", "b", 3)], table), settings())
    assert items["item"].to_list() == ["c", "b", "a"]
    assert coded.item.tolist() == [2, 0, 1]
    assert (coded.n_users, coded.n_items) == (2, 3)


def test_items_that_no_event_has_stay_where_they_are_asked_for():
    table = pl.DataFrame({"item": ["c", "never", "b", "a", "nameless"], "title": ["C", "N", "B", "A", ""]})
    events = make([("u", "a", 1), ("u", "c", 2), ("v", "b", 3)], table)
    data = settings()
    data.filter.unseen_items = True
    data.on_bad.empty_text = "skip"
    items, _, coded = tables.code(events, data)
    assert items["item"].to_list() == ["c", "never", "b", "a"], "an item without text is left out all the same"
    assert coded.item.tolist() == [3, 0, 2]
    assert coded.item.dtype == np.int32
    assert (coded.n_users, coded.n_items) == (2, 4)


def test_integer_ids_become_text_in_the_coded_tables():
    frame = pl.DataFrame({"user": [7, 9], "item": [30, 20], "time": [1, 2], "rating": pl.Series([1, 1], dtype=pl.Float32)})
    t = Tables(tables.with_names(tables.items_of(frame)), tables.users_of(frame), frame, Report())
    tables.check(t)
    items, users, _ = tables.code(t, settings())
    assert items["item"].to_list() == ["30", "20"]
    assert users["user"].to_list() == ["7", "9"]


def test_min_rating_drops_and_counts():
    t = make([("u", "a", 1, 4.0), ("u", "b", 2, 3.5), ("u", "c", 3, 2.0)])
    c = settings()
    c.filter.min_rating = 3.5
    items, users, coded = tables.code(t, c)
    assert ids(items, users, coded) == [("u", "a", 1), ("u", "b", 2)]
    assert t.report.counts == {"min_rating": 1}
    assert t.report.examples["min_rating"] == ["event 3: rating 2 is below 3.5"]


def test_duplicate_event_policies():
    events = [("u", "a", 9), ("u", "b", 5), ("u", "a", 1), ("v", "a", 3), ("u", "a", 4)]
    place = {"event_place": lambda row: f"f:{row + 1}"}
    t = make(events, **place)
    assert ids(*tables.code(t, settings())) == [("u", "a", 1), ("u", "b", 5), ("v", "a", 3)]
    assert t.report.counts == {"duplicate_event": 2}
    assert t.report.examples["duplicate_event"] == ["f:5: user 'u' has item 'a' a second time", "f:1: user 'u' has item 'a' a second time"]
    assert len(tables.code(make(events, **place), settings(duplicate_event="keep"))[2].user) == 5
    with pytest.raises(RecJaxError, match=r"f:5: user 'u' has item 'a'.*config\.data\.on_bad\.duplicate_event='skip'"):
        tables.code(make(events, **place), settings(duplicate_event="error"))
    many = make([("u", "a", i) for i in range(10)])
    tables.code(many, settings())
    assert many.report.counts == {"duplicate_event": 9}
    assert len(many.report.examples["duplicate_event"]) == 3


def test_unknown_item_policies():
    table = pl.DataFrame({"item": ["a"], "title": ["A"]})
    events = [("u", "a", 1)] + [("u", f"x{i}", i) for i in range(7)]
    with pytest.raises(RecJaxError, match=r"event 2: item 'x0' is not in the items table.*config\.data\.on_bad\.unknown_item='skip'"):
        tables.code(make(events, table), settings())
    t = make(events, table)
    assert ids(*tables.code(t, settings(unknown_item="skip"))) == [("u", "a", 1)]
    assert t.report.counts == {"unknown_item": 7}
    assert len(t.report.examples["unknown_item"]) == 3


def test_empty_text_policies():
    table = pl.DataFrame({"item": ["a", "b", "c"], "title": ["A", " ", ""], "genres": ["", "", "Drama"], "code": ["1", "2", "3"]})
    events = [("u", "a", 1), ("u", "b", 2), ("v", "b", 3), ("v", "c", 4)]
    t = make(events, table)
    assert ids(*tables.code(t, settings(empty_text="skip"))) == [("u", "a", 1), ("v", "c", 4)]
    assert t.report.counts == {"empty_text": 1}
    assert "item 'b', of 2 events" in t.report.examples["empty_text"][0]
    items, _, coded = tables.code(make(events, table), settings(empty_text="keep"))
    assert items["title"].to_list() == ["A", "b", ""]
    assert len(coded.user) == 4
    with pytest.raises(RecJaxError, match=r"item 2: item 'b', of 2 events, has no text.*'skip'.*'keep'"):
        tables.code(make(events, table), settings(empty_text="error"))
    untitled = pl.DataFrame({"item": ["a", "b", "c"]})
    assert tables.code(make(events, untitled), settings(empty_text="keep"))[0]["title"].to_list() == ["a", "b", "c"]


def test_short_user_policies():
    events = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("v", "a", 1), ("v", "b", 2)]
    t = make(events)
    _, users, coded = tables.code(t, settings(3))
    assert users["user"].to_list() == ["u"]
    assert coded.n_users == 1
    assert t.report.to_dict() == {"short_user": {"count": 1, "examples": ["user 'v': 2 events are left; filter.min_user_events=3"]}}
    with pytest.raises(RecJaxError, match=r"user 'v': 2 events are left.*config\.data\.on_bad\.short_user='skip'"):
        tables.code(make(events), settings(3, short_user="error"))
    with pytest.raises(RecJaxError, match="no events are left after the filters; left out 2 users"):
        tables.code(make(events), settings(9))


def test_k_core_and_short_users_hold_together():
    rng = np.random.default_rng(3)
    draws = zip(rng.random(500), rng.random(500), strict=True)
    events = {(f"u{int(40 * a**1.3)}", f"i{int(60 * b**2)}", 0) for a, b in draws}
    c = settings(8)
    c.filter.k_core = 4
    t = make(sorted(events))
    _, _, coded = tables.code(t, c)
    assert np.bincount(coded.user).min() >= 8
    assert np.bincount(coded.item).min() >= 4
    left = set(events)
    while True:
        users = {u: sum(e[0] == u for e in left) for u, _, _ in left}
        items = {i: sum(e[1] == i for e in left) for _, i, _ in left}
        fewer = {e for e in left if users[e[0]] >= 8 and items[e[1]] >= 4}
        if fewer == left:
            break
        left = fewer
    assert len(coded.user) == len(left) > 0
    assert t.report.counts["k_core"] > 0
    assert t.report.counts["short_user"] > 0


def test_check_says_what_is_wrong():
    good = make([("u", "a", 1)])
    tables.check(good)
    wrong = [
        ({"events": good.events.drop("time")}, r"table events has no column time; it has: user, item, rating"),
        ({"events": good.events.with_columns(time=pl.lit(1.5))}, r"column time is Float64; expected Int64"),
        ({"events": good.events.with_columns(item=pl.lit(3))}, r"column item is String in table items but Int32 in table events"),
        ({"events": good.events.clear()}, r"table events is empty"),
        ({"items": good.items.with_columns(title=pl.lit(3))}, r"table items: column title is Int32; expected text"),
        ({"items": pl.concat([good.items, good.items])}, r"column item has 1 ids that occur again"),
        ({"users": good.users.with_columns(user=pl.lit(None, pl.String))}, r"table users: column user has 1 empty values"),
        ({"items": good.items.with_columns(item=pl.lit(1.0))}, r"column item is Float64; expected text or integers"),
    ]
    for change, message in wrong:
        parts = {"items": good.items, "users": good.users, "events": good.events} | change
        with pytest.raises(RecJaxError, match=message):
            tables.check(Tables(**parts, report=Report()))


def test_report():
    report = Report()
    for line in range(5):
        report.add("bad_row", f"f:{line}", "broken", 2)
    assert report.lines() == [
        "left out 10 rows with a wrong number of fields or a bad value (bad_row)",
        *(f"  f:{i}: broken" for i in range(3)),
    ]
    with pytest.raises(KeyError, match="no kind 'bad_day'"):
        report.add("bad_day", "f:1", "")
