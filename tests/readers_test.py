"""Readers: a small file of each format, its layouts, encodings and archives; the real folders' counts."""

import json
import zipfile

import polars as pl
import pytest
from reading import BEHAVIORS, LAYOUTS, NEWS, REVIEWS, data, encode, rows, write

from rec_jax.data import readers, tables
from rec_jax.data.readers import files
from rec_jax.data.readers.movielens import split_title
from rec_jax.types import RecJaxError


@pytest.mark.parametrize("pack", ["folder", "gz", "zip", "converted to utf-8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movielens_layouts(tmp_path, layout, pack):
    place = tmp_path / "ml"
    for name, text in LAYOUTS[layout].items():
        raw = text.encode() if pack == "converted to utf-8" else encode(layout, text)
        write(place / (name + ".gz" if pack == "gz" else name), raw)
    if pack == "zip":
        with zipfile.ZipFile(tmp_path / "ml.zip", "w") as z:
            for name in LAYOUTS[layout]:
                z.write(place / name, f"ml-1m/{name}")
                z.writestr(f"__MACOSX/ml-1m/{name}", b"\0")
        place = tmp_path / "ml.zip"
    out = readers.read(data("movielens", place))
    genres = "Action, Comedy"
    assert rows(out.items, "item", "name", "title", "year", "genres") == [
        (10, "Misérables, Les (1995)", "Les Misérables", "1995", genres),
        (20, "unknown", "unknown", "", ""),
    ]
    assert rows(out.events, "user", "item", "time", "rating") == [(1, 10, 100, 4.0), (2, 20, 50, 5.0), (1, 20, 90, 3.0)]
    if layout == "csv":
        assert out.users["user"].to_list() == [1, 2]
    else:
        assert rows(out.users, "user", "gender", "age") == [(2, "F", 53), (1, "M", 24)]
    assert out.event_place(2).endswith(":4" if layout == "csv" else ":3")
    assert out.report.counts == {}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Toy Story (1995)", ("Toy Story", "1995")),
        ("American President, The (1995)", ("The American President", "1995")),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            ("The City of Lost Children (La Cité des enfants perdus)", "1995"),
        ),
        ("Avventura, L' (Adventure, The) (1960)", ("L'Avventura (The Adventure)", "1960")),
        ("Cry, the Beloved Country (1995)", ("Cry, the Beloved Country", "1995")),
        ("Assembly (Ji jie hao) (2007) ", ("Assembly (Ji jie hao)", "2007")),
        ("Fawlty Towers (1975-1979)", ("Fawlty Towers", "1975")),
        ("Babylon 5", ("Babylon 5", "")),
        ("2001: A Space Odyssey", ("2001: A Space Odyssey", "")),
        ("", ("", "")),
    ],
)
def test_movielens_titles(raw, expected):
    assert split_title(raw) == expected


def test_movielens_unknown_layout(tmp_path):
    write(tmp_path / "ratings.csv", "x")
    with pytest.raises(RecJaxError, match=r"no MovieLens layout.*ratings\.csv and movies\.csv; found ratings\.csv"):
        readers.read(data("movielens", tmp_path))


# The other formats


@pytest.mark.parametrize("ending", ["", ".gz", ".zip"])
def test_sequences(tmp_path, ending):
    text = "ann a b c\n\nbob b\nann d\neve\n"
    path = write(tmp_path / f"s.txt{ending}", text) if ending != ".zip" else tmp_path / "s.zip"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("s.txt", text)
    items = write(tmp_path / "i.tsv", 'item_id\ttitle\tbrand\nd\tDé "quoted"\t\na\tA\tX\nb\tB\t\nc\tC\t\n')
    out = readers.read(data("sequences", path, items))
    assert rows(out.events, "user", "item", "time") == [("ann", "a", 0), ("ann", "b", 1), ("ann", "c", 2), ("bob", "b", 0), ("ann", "d", 3)]
    assert out.users["user"].to_list() == ["ann", "bob", "eve"]
    assert not out.clock
    assert rows(out.items, "item", "title", "name", "brand")[0] == ("d", 'Dé "quoted"', 'Dé "quoted"', "")
    assert [out.event_place(i).rpartition(":")[2] for i in range(5)] == ["1", "1", "1", "3", "4"]
    alone = readers.read(data("sequences", path))
    assert rows(alone.items, "item", "title", "name") == [(c, c, c) for c in "abcd"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_sequences_as_json(tmp_path, ending):
    path = write(tmp_path / f"s.json{ending}", '{"7": [3, 1, 3], "café": ["b c", 1], "none": [], "7": [2]}')
    items = write(tmp_path / "i.tsv", "item_id\ttitle\n1\tOne\n2\tTwo\n3\tThree\nb c\tB\n")
    out = readers.read(data("sequences", path, items))
    expected = [("7", "3", 0), ("7", "1", 1), ("7", "3", 2), ("café", "b c", 0), ("café", "1", 1), ("7", "2", 3)]
    assert rows(out.events, "user", "item", "time") == expected
    assert out.users["user"].to_list() == ["7", "café", "none"]
    assert not out.clock
    assert rows(out.items, "item", "title") == [("1", "One"), ("2", "Two"), ("3", "Three"), ("b c", "B")]
    assert [out.event_place(n).rpartition(": ")[2] for n in (0, 4, 5)] == ["user '7'", "user 'café'", "user '7'"]
    text = write(tmp_path / "same.txt", "7 3 1 3\ncafé bc 1\nnone\n7 2\n")
    as_text = readers.read(data("sequences", text)).events
    assert rows(as_text, "user", "time") == rows(out.events, "user", "time")


@pytest.mark.parametrize("where", ["folder", "file", "prefix"])
def test_recbole(tmp_path, where):
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\ti1\t4.0\t10.0\nu2\ti2\t2.5\t20\n"
    write(tmp_path / "ml.inter", inter)
    write(tmp_path / "ml.user", "user_id:token\tage:token\nu2\t30\n")
    write(tmp_path / "ml.item.gz", "item_id:token\tmovie_title:token_seq\tclass:token_seq\ni1\tToy Story\tAnimation Comedy\ni2\tHeat\t\n")
    out = readers.read(data("recbole", {"folder": tmp_path, "file": tmp_path / "ml.inter", "prefix": tmp_path / "ml"}[where]))
    assert rows(out.events, "user", "item", "time", "rating") == [("u1", "i1", 10, 4.0), ("u2", "i2", 20, 2.5)]
    assert rows(out.items, "item", "title", "genres", "name") == [
        ("i1", "Toy Story", "Animation, Comedy", "Toy Story"),
        ("i2", "Heat", "", "Heat"),
    ]
    assert rows(out.users, "user", "age") == [("u2", "30"), ("u1", None)]


def test_recbole_without_ratings_and_several_files(tmp_path):
    write(tmp_path / "a.inter", "user_id:token\titem_id:token\nu\ti\nu\tj\n")
    out = readers.read(data("recbole", tmp_path))
    assert rows(out.events, "user", "item", "time", "rating") == [("u", "i", 0, 1.0), ("u", "j", 1, 1.0)]
    assert not out.clock
    write(tmp_path / "b.inter", "user_id:token\titem_id:token\n")
    with pytest.raises(RecJaxError, match=r"several \.inter files \(a\.inter, b\.inter\)"):
        readers.read(data("recbole", tmp_path))
    with pytest.raises(RecJaxError, match=r"b\.inter:1.*column:type.*found user, item"):
        readers.read(data("recbole", write(tmp_path / "b.inter", "user\titem\n")))


@pytest.mark.parametrize("release", REVIEWS)
def test_amazon(tmp_path, release):
    reviews, product = REVIEWS[release]
    key = next(k for k in product if k.endswith("asin"))
    meta = [product, {key: "P9", "title": "never bought"}, {key: "P2", "title": "Two", "description": None}]
    path = write(tmp_path / "r.json.gz", "".join(json.dumps(r) + "\n" for r in reviews))
    items = write(tmp_path / "m.jsonl", "".join(json.dumps(m) + "\n" for m in meta))
    out = readers.read(data("amazon", path, items))
    assert rows(out.events, "user", "item", "time", "rating") == [("A", "P1", 100, 5.0), ("B", "P2", 7, 1.0)]
    assert rows(out.items, "item", "title", "brand", "categories", "description") == [
        ("P1", "Salt & Pepper", "Acme", "Food, Spices", "Fine salt."),
        ("P2", "Two", "", "", ""),
    ]
    assert out.item_place(1).endswith("m.jsonl:3")
    assert readers.read(data("amazon", path)).items["title"].to_list() == ["P1", "P2"]


@pytest.mark.parametrize("pack", ["folder", "zip"])
def test_mind(tmp_path, pack):
    place = tmp_path / "mind"
    write(place / "behaviors.tsv", "\n".join(BEHAVIORS) + "\n")
    write(place / "news.tsv", NEWS)
    if pack == "zip":
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as z:
            for name in ("behaviors.tsv", "news.tsv"):
                z.write(place / name, name)
        place = tmp_path / "m.zip"
    out = readers.read(data("mind", place))
    noon = 1573819200
    u1 = out.events.filter(pl.col("user") == "U1").sort("time", maintain_order=True)
    assert rows(u1, "item", "time") == [("N1", noon - 2), ("N2", noon - 1), ("N5", noon), ("N3", noon), ("N4", noon + 3605)]
    assert rows(out.events.filter(pl.col("user") == "U2"), "item", "time") == [("N1", noon + 3600)]
    assert out.users["user"].to_list() == ["U1", "U2"]
    assert rows(out.items, "item", "title", "categories", "abstract")[0] == ("N1", "Title 1", "news, world", "")


@pytest.mark.parametrize("kind", ["parquet", "folder", "csv", "csv.gz", "tsv"])
def test_table(tmp_path, kind):
    frame = pl.DataFrame({"u": [7, 8], "thing": [1, 2], "at": [100, 50], "stars": [4.5, 2.0], "more": ["x", "y"]})
    path = tmp_path / f"t.{kind}"
    if kind == "folder":
        path.mkdir()
        frame[:1].write_parquet(path / "part-0.parquet")
        frame[1:].write_parquet(path / "part-1.parquet")
    elif kind == "parquet":
        frame.write_parquet(path)
    else:
        write(path, frame.write_csv(separator="\t" if kind == "tsv" else ","))
    columns = {"user": "u", "item": "thing", "time": "at", "rating": "stars"}
    items = write(tmp_path / "i.csv", 'thing,title\n2,"two, or\nthree"\n1,one\n')
    out = readers.read(data("table", path, items, columns))
    ids = [(7, 1), (8, 2)] if kind in ("parquet", "folder") else [("7", "1"), ("8", "2")]
    assert rows(out.events, "user", "item") == ids
    assert rows(out.events, "time", "rating") == [(100, 4.5), (50, 2.0)]
    assert out.items["item"].to_list() == [ids[1][1], ids[0][1]]
    assert out.items["title"].to_list() == ["two, or\nthree", "one"]
    assert out.clock
    assert out.item_place(1).endswith("i.csv:4")
    plain = readers.read(data("table", path, "", {"user": "u", "item": "thing"}))
    assert rows(plain.events, "time", "rating") == [(0, 1.0), (1, 1.0)]
    assert not plain.clock


def test_table_dates(tmp_path):
    path = write(tmp_path / "t.csv", "user,item,when\na,x,1970-01-02 00:00:01\nb,y,1970-01-03 00:00:00\n")
    assert readers.read(data("table", path, "", {"time": "when"})).events["time"].to_list() == [86401, 172800]
    frame = pl.read_csv(path, try_parse_dates=True)
    frame.write_parquet(tmp_path / "t.parquet")
    assert readers.read(data("table", tmp_path / "t.parquet", "", {"time": "when"})).events["time"].to_list() == [86401, 172800]


def test_table_items_parquet_lists(tmp_path):
    pl.DataFrame({"user": ["a"], "item": ["x"]}).write_parquet(tmp_path / "e.parquet")
    pl.DataFrame({"item_id": ["x"], "title": ["X"], "genres": [["A", "B"]], "year": [1999]}).write_parquet(tmp_path / "i.parquet")
    out = readers.read(data("table", tmp_path / "e.parquet", tmp_path / "i.parquet"))
    assert rows(out.items, "item", "title", "genres", "year") == [("x", "X", "A, B", "1999")]


def test_inputs_names_every_file(tmp_path):
    for name in ("ml.inter", "ml.item", "other.txt"):
        write(tmp_path / name, "x")
    names = [p.name for p in readers.inputs(data("recbole", tmp_path / "ml"))]
    assert names == ["ml.inter", "ml.item"]
    assert [p.name for p in readers.inputs(data("sequences", tmp_path / "other.txt", tmp_path / "ml.item"))] == ["ml.item", "other.txt"]
    assert "ratings.csv.gz" in [p.name for p in readers.inputs(data("movielens", "builtin:ml-latest-small"))]


# Real data


def coded_counts(c):
    out = readers.read(c)
    c.filter.min_user_events = 1
    _, _, coded = tables.code(out, c)
    return coded.n_users, coded.n_items, len(coded.user)


def test_builtin_movielens():
    out = readers.read(data("movielens", "builtin:ml-latest-small"))
    assert (out.items.height, out.events.height, out.report.counts) == (9742, 100836, {})
    assert coded_counts(data("movielens", "builtin:ml-latest-small")) == (610, 9724, 100836)
    folder = files.resolve("builtin:ml-latest-small")
    assert "redistribute" in (folder / "README.txt").read_text()


def test_real_movielens(data_dir, tmp_path):
    assert coded_counts(data("movielens", data_dir / "ml-latest-small")) == (610, 9724, 100836)
    assert coded_counts(data("movielens", data_dir / "ml-100k")) == (943, 1682, 100000)
    lines = (data_dir / "ml-1m" / "ml-1m.chronological_original_ids.txt").read_text().splitlines()
    pairs = ((user, place, item) for user, *items in (line.split() for line in lines) for place, item in enumerate(items))
    write(tmp_path / "ratings.dat", "".join(f"{u}::{i}::5::{t}\n" for u, t, i in pairs))  # the released ratings.dat is not among the files
    for name in ("movies.dat", "users.dat"):
        write(tmp_path / name, (data_dir / "ml-1m" / name).read_bytes())
    assert coded_counts(data("movielens", tmp_path)) == (6040, 3706, 1000209)
    titles = readers.read(data("movielens", tmp_path)).items
    assert titles.filter(pl.col("item") == 73)["title"].item() == "Les Misérables"


def test_real_sequences_and_mind(data_dir):
    beauty = data_dir / "amazon-beauty"
    assert coded_counts(data("sequences", beauty / "Beauty.txt", beauty / "Beauty.items.tsv")) == (22363, 12101, 198502)
    games = data_dir / "amazon-games-2018" / "Games.items.tsv"
    c = data("sequences", beauty / "Beauty.txt", games, empty_text="skip", unknown_item="skip")
    out = readers.read(c)
    tables.code(out, c)
    assert out.items.height == 16859
    assert out.report.counts["empty_text"] == 14
    as_json = data("sequences", games.parent / "Games.inter.json", games, empty_text="keep")
    assert coded_counts(as_json) == (50546, 16859, 452989)
    mind = data("mind", data_dir / "mind-sample")
    out = readers.read(mind)
    assert (out.users.height, out.items.height) == (4637, 2000)
    with pytest.raises(RecJaxError, match=r"behaviors\.tsv:1: item 'N138' is not in the items table"):
        tables.code(out, mind)
    assert coded_counts(data("mind", data_dir / "mind-sample", unknown_item="skip"))[1] > 500
