"""Items files made of MovieLens' films: by hand, through the command, and read again beside user sequences."""

import pytest
from reading import LAYOUTS, data, encode, rows, write

from rec_jax.data import __main__ as command
from rec_jax.data import items, readers
from rec_jax.types import RecJaxError

FILE = {"100k": "u.item", "1m": "movies.dat", "csv": "movies.csv"}
TABLE = "item_id\ttitle\tyear\tgenres\n"
HERO, UNKNOWN = "Les Misérables\t1995\tAction, Comedy\n", "unknown\t\t\n"


@pytest.mark.parametrize("layout", FILE)
def test_films_as_they_are_called(tmp_path, layout, capsys):
    path = write(tmp_path / FILE[layout], encode(layout, LAYOUTS[layout][FILE[layout]]))
    out = tmp_path / "items.tsv"
    assert command.main(["items", "--reader=movielens", f"--path={path}", f"--out={out}"]) == 0
    assert out.read_text() == TABLE + "10\t" + HERO + "20\t" + UNKNOWN
    assert capsys.readouterr().out == f"2 items with title, year, genres: {out}\n"


def test_films_under_other_ids_go_with_their_sequences(tmp_path):
    path = write(tmp_path / "movies.dat", encode("1m", LAYOUTS["1m"]["movies.dat"] + "30::A\tTab (2000)::Drama\n"))
    ids, out = write(tmp_path / "ids.txt", "1 30\nx 10\n"), tmp_path / "items.tsv"
    said = items.write("movielens", str(path), str(out), str(ids))
    assert said == f"2 items with title, year, genres: {out}; 1 others are not in {ids}"
    assert out.read_text() == TABLE + "1\tA Tab\t2000\tDrama\n" + "x\t" + HERO
    read = readers.read(data("sequences", write(tmp_path / "s.txt", "ann x 1\n"), out))
    assert rows(read.items, "item", "name", "year") == [("1", "A Tab", "2000"), ("x", "Les Misérables", "1995")]


@pytest.mark.parametrize(
    ("films", "ids", "message"),
    [
        ("10::A::B\n10::C::D\n", "", r"movies\.dat:2: item id '10' occurs a second time; the first is at .*:1"),
        ("10::A::B\n20::C\n", "", r"movies\.dat:2: 2 fields, expected 3"),
        ("10::A::B\n", "1 10\n2\n", r"ids\.txt:2: 1 columns, expected 2"),
        ("10::A::B\n", "1 11\n", r"ids\.txt:1: no item has the id '11'; are the columns the other way round"),
        ("10::A::B\n", "1 10\n\n1 10\n", r"ids\.txt:3: id '1' occurs a second time"),
        ("10::A::B\n", "\n", r"ids\.txt: the file is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, films, ids, message):
    path, out = write(tmp_path / "movies.dat", films), tmp_path / "items.tsv"
    with pytest.raises(RecJaxError, match=message):
        items.write("movielens", str(path), str(out), str(write(tmp_path / "ids.txt", ids)) if ids else "")
    assert not out.exists()


def test_bad_words_are_refused(tmp_path):
    path = write(tmp_path / "movies.dat", "10::A::B\n")
    for words, message in (
        ({"reader": "mind"}, "no such reader of items; there are movielens"),
        ({"path": str(tmp_path / "no.dat")}, r"--path='.*no\.dat': no such file"),
        ({"path": str(write(tmp_path / "films.dat", ""))}, r"films\.dat: reader 'movielens' has items in u\.item, movies\.dat"),
        ({"out": str(tmp_path / "no" / "items.tsv")}, "there is no folder"),
        ({"ids": str(tmp_path / "no.txt")}, r"--ids='.*no\.txt': no such file"),
    ):
        with pytest.raises(RecJaxError, match=message):
            items.write(**{"reader": "movielens", "path": str(path), "out": str(tmp_path / "items.tsv"), **words})
    with pytest.raises(RecJaxError, match=r"--config\.seed: items takes no config"):
        command.main(["items", "--reader=movielens", f"--path={path}", f"--out={tmp_path}/o.tsv", "--config.seed=1"])


def test_real_films_cover_the_real_sequences(data_dir, tmp_path):
    folder, out = data_dir / "ml-1m", tmp_path / "items.tsv"
    items.write("movielens", str(folder / "movies.dat"), str(out), str(folder / "sas_to_original_items.txt"))
    read = readers.read(data("sequences", folder / "ml-1m.sasrec_reconstructed.txt", out))
    assert read.items.height == 3416
    assert set(read.events["item"]) == set(read.items["item"])
    assert rows(read.items, "item", "title", "year", "genres")[0] == ("1", "Raiders of the Lost Ark", "1981", "Action, Adventure")
