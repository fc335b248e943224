"""Readers: each kind of bad input is named with file and line, and skipped and counted where that is asked for."""

import gzip
import json

import polars as pl
import pytest
from reading import BEHAVIORS, LAYOUTS, NEWS, REVIEWS, data, encode, rows, write

from rec_jax.data import readers
from rec_jax.types import RecJaxError

CSV_HEADER = "userId,movieId,rating,timestamp\n"
BAD_FILES = {
    "csv, few fields": ("ratings.csv", CSV_HEADER + "1,10,4.0,100\n2,20\n1,20,3.0,90\n", ":3", "2 fields, expected 4"),
    "csv, many fields": ("ratings.csv", CSV_HEADER + "1,10,4.0,100\n2,20,5,50,9\n1,20,3,90\n", ":3", "5 fields, expected 4"),
    "csv, no number": ("ratings.csv", CSV_HEADER + "1,10,4.0,100\n1,20,3,90\n2,20,five,50\n", ":4", "column rating is 'five'"),
    "csv, not finite": ("ratings.csv", CSV_HEADER + "1,10,4.0,100\n1,20,3,90\n2,20,nan,50\n", ":4", "column rating is 'nan'"),
    "csv, too big": ("ratings.csv", CSV_HEADER + "1,10,4.0,100\n9999999999,20,3,9\n1,20,3,90\n", ":3", "column userId is '9999999999'"),
    "csv, empty field": ("ratings.csv", CSV_HEADER + "1,10,4.0,100\n2,,5.0,50\n1,20,3,90\n", ":3", "column movieId is ''"),
    "dat, few fields": ("ratings.dat", "1::10::4::100\n1::20::3::90\n2::20::5\n", ":3", "3 fields, expected 4"),
    "tab, no number": ("u.data", "1\t10\t4\t100\n\nx\t20\t5\t50\n1\t20\t3\t90\n", ":3", "column user is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_row_movielens(tmp_path, case):
    name, text, line, detail = BAD_FILES[case]
    layout = next(k for k, v in LAYOUTS.items() if name in v)
    for other, good in LAYOUTS[layout].items():
        write(tmp_path / other, encode(layout, good))
    write(tmp_path / name, text)
    with pytest.raises(RecJaxError) as error:
        readers.read(data("movielens", tmp_path))
    assert f"{name}{line}: {detail}" in str(error.value)
    assert "config.data.on_bad.bad_row='skip'" in str(error.value)
    out = readers.read(data("movielens", tmp_path, bad_row="skip"))
    assert rows(out.events, "user", "item", "time") == [(1, 10, 100), (1, 20, 90)]
    assert out.report.counts == {"bad_row": 1}
    assert f"{name}{line}: {detail}" in out.report.examples["bad_row"][0]
    last = text.rstrip("\n").count("\n") + (0 if line == f":{text.count(chr(10))}" else 1)
    assert out.event_place(1) == f"{tmp_path / name}:{last}"  # places stay exact after skipped and blank lines


def check_bad(make, kind, place, detail):
    """`make(**on_bad)` raises naming place and detail; with "skip" it is counted. Returns the tables."""
    with pytest.raises(RecJaxError) as error:
        make()
    assert place in str(error.value)
    assert detail in str(error.value)
    assert f"config.data.on_bad.{kind}='skip'" in str(error.value)
    out = make(**{kind: "skip"})
    assert out.report.counts[kind] == 1
    assert place in out.report.examples[kind][0]
    assert detail in out.report.examples[kind][0]
    return out


def test_bad_row_other_readers(tmp_path):
    items = write(tmp_path / "i.tsv", "item_id\ttitle\na\tA\nb\nc\tC\n")
    path = write(tmp_path / "s.txt", "u a c\n")
    out = check_bad(lambda **p: readers.read(data("sequences", path, items, **p)), "bad_row", "i.tsv:3", "1 fields, expected 2")
    assert out.items["item"].to_list() == ["a", "c"]
    assert out.item_place(1).endswith(":4")

    inter = write(tmp_path / "x.inter", "user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\nu\tj\tsoon\n")
    check_bad(lambda **p: readers.read(data("recbole", inter, **p)), "bad_row", "x.inter:3", "'soon', expected a number")

    good = json.dumps(REVIEWS["2018"][0][0]) + "\n"
    for wrong, detail in (
        ('{"reviewerID": "A", "asin"', "no JSON"),
        ("[1]", "expected an object"),
        ('{"reviewerID": "A", "asin": "P", "overall": "5", "unixReviewTime": 1}', "field overall is '5', expected a number"),
        ('{"user_id": "A", "rating": 5, "timestamp": 1}', "field parent_asin is None, expected text"),
    ):
        path = write(tmp_path / "r.json", good + wrong + "\n")
        check_bad(lambda path=path, **p: readers.read(data("amazon", path, **p)), "bad_row", "r.json:2", detail)
    meta = write(tmp_path / "m.json", '{"asin": "P1", "title": "T"}\n{"title": "T"}\n')
    path = write(tmp_path / "r.json", good)
    check_bad(lambda **p: readers.read(data("amazon", path, meta, **p)), "bad_row", "m.json:2", "no field parent_asin or asin")

    write(tmp_path / "mind" / "news.tsv", NEWS)
    for wrong, detail in (
        ("4\tU1\t2019-11-15\t\tN1-1", "column time is '2019-11-15'"),
        ("4\tU1\t11/15/2019 1:00:00 PM\t\tN1 N2", "column impressions is 'N1 N2'"),
        ("4\tU1\t11/15/2019 1:00:00 PM", "3 fields, expected 5"),
    ):
        write(tmp_path / "mind" / "behaviors.tsv", "\n".join([*BEHAVIORS, wrong]) + "\n")
        out = check_bad(lambda **p: readers.read(data("mind", tmp_path / "mind", **p)), "bad_row", "behaviors.tsv:4", detail)
        assert out.events.height == 6

    columns = {"time": "t", "rating": "r"}
    for wrong, detail in (("b,y,soon,1", "time='soon'"), ("b,y,3,inf", "column r is 'inf'"), (",y,3,1", "column user is ''")):
        path = write(tmp_path / "t.csv", f"user,item,t,r\na,x,1,1\n{wrong}\nc,z,2.5,1\n")
        out = check_bad(lambda path=path, **p: readers.read(data("table", path, "", columns, **p)), "bad_row", "t.csv:3", detail)
        assert rows(out.events, "user", "time") == [("a", 1), ("c", 2)]
        assert out.event_place(1).endswith(":4")
    pl.DataFrame({"user": [1, None, 3], "item": [1, 2, 3]}).write_parquet(tmp_path / "t.parquet")
    out = check_bad(lambda **p: readers.read(data("table", tmp_path / "t.parquet", **p)), "bad_row", "t.parquet: row 2", "user=None")
    assert out.event_place(1).endswith("row 3")


def test_bad_encoding(tmp_path):
    items = write(tmp_path / "i.tsv", b"item_id\ttitle\na\tA\nb\tCaf\xe9\n")
    path = write(tmp_path / "s.txt", "u a\n")
    out = check_bad(lambda **p: readers.read(data("sequences", path, items, **p)), "bad_encoding", "i.tsv:3", r"b'Caf\xe9' is not UTF-8")
    assert out.items["item"].to_list() == ["a"]
    broken = write(tmp_path / "b.txt", b"u a\nv \xff\n")
    check_bad(lambda **p: readers.read(data("sequences", broken, **p)), "bad_encoding", "b.txt:2", r"\xff")
    broken = write(tmp_path / "t.csv", b"user,item\nu,a\nv,\xff\n")
    check_bad(lambda **p: readers.read(data("table", broken, **p)), "bad_encoding", "t.csv:3", r"b'\xff' is not UTF-8")
    broken = write(tmp_path / "r.json", json.dumps(REVIEWS["2018"][0][0]).encode() + b'\n{"reviewerID": "\xff"}\n')
    check_bad(lambda **p: readers.read(data("amazon", broken, **p)), "bad_encoding", "r.json:2", r"\xff")


@pytest.mark.parametrize(
    ("user", "kind", "detail"),
    [
        ('"bob": 5', "bad_row", "user 'bob': expected a list of items, found 5"),
        ('"bob": {"a": [1]}', "bad_row", "user 'bob': expected a list of items, found"),
        ('"bob": [1, 2.5]', "bad_row", "user 'bob': item 2.5 is neither a text nor a whole number"),
        ('"bob": [1, true]', "bad_row", "user 'bob': item true is neither"),
        ('"bob": [1, null]', "bad_row", "user 'bob': item null is neither"),
        ('"bob": [1, ""]', "bad_row", "user 'bob': item \"\" is neither"),
        ('"": [1]', "bad_row", "user '': the name is empty"),
        ('"bob": ["x\\ud800"]', "bad_encoding", "user 'bob': 'x\\ud800' has half a character"),
    ],
)
def test_bad_users_of_json(tmp_path, user, kind, detail):
    path = write(tmp_path / "s.json", '{"ann": [1, 2], ' + user + ', "eve": [2]}')
    out = check_bad(lambda **p: readers.read(data("sequences", path, **p)), kind, "s.json", detail)
    assert rows(out.events, "user", "item", "time") == [("ann", "1", 0), ("ann", "2", 1), ("eve", "2", 0)]
    assert out.event_place(2).endswith("user 'eve'")


def test_what_is_no_json_of_users(tmp_path):
    for raw, message in (
        (b'{"a": [1, 2}', r"s\.json: this is no JSON \(.*line 1 column 12"),
        (b"[[1, 2]]", r's\.json: expected an object \{"user": .* found list'),
        (b'{"a": ["\xff"]}', r"s\.json: byte 8 is not UTF-8"),
        (b"", r"s\.json: this is no JSON"),
    ):
        with pytest.raises(RecJaxError, match=message):
            readers.read(data("sequences", write(tmp_path / "s.json", raw)))


def test_duplicate_item(tmp_path):
    items = write(tmp_path / "i.tsv", "item_id\ttitle\na\tA\nb\tB\na\tAgain\nc\tC\n")
    path = write(tmp_path / "s.txt", "u a b c\n")
    out = check_bad(
        lambda **p: readers.read(data("sequences", path, items, **p)), "duplicate_item", "i.tsv:4", "item id 'a' occurs a second time"
    )
    assert out.items["title"].to_list() == ["A", "B", "C"]
    assert out.item_place(2).endswith(":5")


def test_quotes_that_do_not_match(tmp_path):
    items = write(tmp_path / "i.csv", 'item_id,title\na,A\nb,"B\nc,C\n')
    path = write(tmp_path / "s.txt", "u a\n")
    with pytest.raises(RecJaxError, match=r"i\.csv:3: the quotes do not match"):
        readers.read(data("sequences", path, items, bad_row="skip"))


def test_missing_files_and_columns(tmp_path):
    path = write(tmp_path / "t.csv", "user,item,stars\na,x,1\n")
    items = write(tmp_path / "i.tsv", "title\tbrand\nX\tY\n")
    cases = [
        (data("nope", path), r"reader='nope'.*movielens, sequences, recbole, amazon, mind, table"),
        (data("movielens", tmp_path / "ml"), r"ml'.*no such file or folder; reader 'movielens' expects a folder or \.zip"),
        (data("recbole", tmp_path / "ml"), r"no such file or folder; reader 'recbole' expects"),
        (data("sequences", ""), r"config\.data\.path is empty"),
        (data("sequences", tmp_path), r"is a folder.*i\.tsv, t\.csv"),
        (data("sequences", path, items), r"i\.tsv: no id column \(item_id or item or id\); columns there: title, brand"),
        (data("sequences", path, tmp_path / "no.tsv"), r"config\.data\.items='.*no\.tsv': no such file"),
        (data("movielens", "builtin:ml-9m"), r"no such data set; it has: builtin:ml-latest-small"),
        (data("mind", tmp_path), r"behaviors\.tsv and news\.tsv; found i\.tsv, t\.csv"),
        (data("table", path, "", {"rating": "rating"}), r"t\.csv: no column 'rating'; columns there: user, item, stars"),
        (data("table", path, "", {"rating": "user"}), r"columns\.rating='user' is also config\.data\.columns\.user"),
        (data("table", path, "", {"user": ""}), r"config\.data\.columns\.user is empty"),
        (data("table", path, "", {"weight": "stars"}), r"config\.data\.columns\.weight: no such role; roles: user, item, time, rating"),
    ]
    for c, message in cases:
        with pytest.raises(RecJaxError, match=message):
            readers.read(c)
    pl.DataFrame({"u": [1], "item": [1.5]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(RecJaxError, match=r"no column 'user' \(config\.data\.columns\.user\); columns there: u, item"):
        readers.read(data("table", tmp_path / "t.parquet"))
    with pytest.raises(RecJaxError, match=r"column item is Float64; ids must be text or integers"):
        readers.read(data("table", tmp_path / "t.parquet", "", {"user": "u"}))
    empty = write(tmp_path / "e.csv", "")
    with pytest.raises(RecJaxError, match=r"e\.csv: the file is empty"):
        readers.read(data("table", empty))
    with pytest.raises(RecJaxError, match="table events is empty"):
        readers.read(data("sequences", empty))
    broken = tmp_path / "b.txt.gz"
    broken.write_bytes(gzip.compress(b"u a b\n" * 1000)[:-12])
    with pytest.raises(RecJaxError, match=r"b\.txt\.gz: the archive is broken"):
        readers.read(data("sequences", broken))
