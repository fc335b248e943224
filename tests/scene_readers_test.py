"""Readers of data without times (Last.fm, Steam, goodbooks, MSWeb): tables of small files, bad input, and the counts of the real files."""

from __future__ import annotations

import pytest
from reading import data, rows, write

from rec_jax import config as config_lib
from rec_jax.data import prepare, readers
from rec_jax.types import RecJaxError

LASTFM = {
    "user_artists.dat": "userID\tartistID\tweight\n2\t51\t13883\n2\t7\t10\n9\t51\t1\n",
    "artists.dat": "id\tname\turl\tpictureURL\n7\tSigur Rós\thttp://x\t\n51\tDuran Duran\thttp://y\thttp://z\n60\tNobody\thttp://y\t\n",
    "tags.dat": "tagID\ttagValue\n1\tpop\n2\t80's\n3\tnew wave\n4\tb\n5\tc\n6\td\n7\t\n8\tislandés\n",
    "user_taggedartists.dat": "userID\tartistID\ttagID\tday\tmonth\tyear\n"
    + "".join(f"{user}\t{artist}\t{tag}\t1\t4\t2009\n" for user, artist, tag in [
        (2, 51, 3), (9, 51, 3), (3, 51, 3), (2, 51, 2), (9, 51, 2), (2, 51, 6), (2, 51, 4), (2, 51, 5), (2, 51, 1), (2, 51, 7),
        (2, 7, 8), (2, 88, 1),
    ]),
    "user_friends.dat": "userID\tfriendID\n9\t2\n9\t44\n2\t9\n",
}  # fmt: skip
STEAM = {
    "game_purchase.dat": "User_ID\tGame_ID\tPurchase\n1\t22\t1.0\n2\t22\t1.0\n1\t5\t1.0\n",
    "game_play.dat": "User_ID\tGame_ID\tHours\n2\t22\t2.5\n2\t22\t1.5\n1\t5\t0.5\n",
    "item_info.dat": "Game_ID\tGame Name\n22\tDota 2\n5\tAlien, the \"Game\"\n",
}  # fmt: skip
BOOKS = {
    "ratings_some.csv": "user_id,book_id,rating\n7,2,5\n7,1,3\n9,2,1\n",
    "books.csv": 'id,book_id,authors,title\n1,500,"Ann, Bob","Emma, or ""E"""\n2,1,,Dune\n',
}
MSWEB = (
    'I,4,"www.microsoft.com","created by getlog.pl"\nT,1,"VRoot",0,0,"VRoot"\nN,0,"0"\nA,1287,1,"International AutoRoute","/autoroute"\n'
    'A,1000,1,"Home, sweet","/home"\nC,"10001",10001\nV,1000,1\nV,1287,1\nC,"10002",10002\nV,1000,1\n'
)


def folder(path, members, **changed):
    for name, text in {**members, **changed}.items():
        write(path / name, text, "latin-1" if name == "tags.dat" else "utf-8")
    return path


def test_lastfm(tmp_path):
    out = readers.read(data("lastfm", folder(tmp_path, LASTFM)))
    assert rows(out.events, "user", "item", "time", "rating") == [(2, 51, 0, 13883.0), (2, 7, 1, 10.0), (9, 51, 2, 1.0)]
    assert rows(out.items, "item", "title", "genres") == [
        (7, "Sigur Rós", "islandés"),
        (51, "Duran Duran", "new wave, 80's, pop, b, c"),  # by users, then in the order of tags.dat, the first five
        (60, "Nobody", ""),
    ]
    assert rows(out.users, "user", "friends") == [(2, "9"), (9, "2, 44")]
    assert not out.clock
    assert out.event_place(1).endswith("user_artists.dat:3")
    assert out.item_place(1).endswith("artists.dat:3")


def test_lastfm_without_tags_and_friends(tmp_path):
    out = readers.read(data("lastfm", folder(tmp_path, {name: LASTFM[name] for name in ("user_artists.dat", "artists.dat")})))
    assert out.items.columns == ["item", "title", "name"]
    assert out.users.columns == ["user"]


def test_steam(tmp_path):
    out = readers.read(data("steam", folder(tmp_path, STEAM)))
    assert rows(out.events, "user", "item", "time", "rating") == [(1, 22, 0, 0.0), (2, 22, 1, 4.0), (1, 5, 2, 0.5)]
    assert rows(out.items, "item", "title") == [(22, "Dota 2"), (5, 'Alien, the "Game"')]
    assert not out.clock


@pytest.mark.parametrize(
    "books",
    [BOOKS["books.csv"], 'book_id,goodreads_book_id,authors,title\n1,500,"Ann, Bob","Emma, or ""E"""\n2,1,,Dune\n'],
    ids=["first layout", "later layout"],
)
def test_goodbooks_ids_are_those_of_the_ratings_in_both_layouts(tmp_path, books):
    out = readers.read(data("goodbooks", folder(tmp_path, BOOKS, **{"books.csv": books})))
    assert rows(out.items, "item", "title", "author") == [(1, 'Emma, or "E"', "Ann, Bob"), (2, "Dune", "")]
    assert rows(out.events, "user", "item", "time", "rating") == [(7, 2, 0, 5.0), (7, 1, 1, 3.0), (9, 2, 2, 1.0)]


def test_msweb(tmp_path):
    out = readers.read(data("msweb", write(tmp_path / "msweb.data", MSWEB)))
    assert rows(out.events, "user", "item", "time") == [(10001, 1000, 0), (10001, 1287, 1), (10002, 1000, 2)]
    assert rows(out.items, "item", "title", "description") == [
        (1287, "International AutoRoute", "/autoroute"),
        (1000, "Home, sweet", "/home"),
    ]
    assert out.event_place(2).endswith("msweb.data:10")
    assert out.item_place(1).endswith("msweb.data:5")


BAD = {
    "lastfm, no count": ("lastfm", LASTFM, "user_artists.dat", "2\t51\tmany\n", ":5: column weight is 'many', expected a number"),
    "lastfm, few fields": ("lastfm", LASTFM, "artists.dat", "61\n", ":5: 1 fields, expected 4"),
    "lastfm, tag": ("lastfm", LASTFM, "user_taggedartists.dat", "2\tx\t1\t1\t4\t2009\n", ":14: column artistID is 'x'"),
    "lastfm, friend": ("lastfm", LASTFM, "user_friends.dat", "2\t\n", ":5: column friendID is ''"),
    "steam, hours": ("steam", STEAM, "game_play.dat", "2\t5\t\n", ":5: column Hours is '', expected a number"),
    "goodbooks, user": ("goodbooks", BOOKS, "ratings_some.csv", "x,2,5\n", ":5: column user_id is 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_or_counted(tmp_path, case):
    reader, members, name, line, detail = BAD[case]
    folder(tmp_path, members, **{name: members[name] + line})
    with pytest.raises(RecJaxError) as error:
        readers.read(data(reader, tmp_path))
    assert name + detail in str(error.value)
    assert "config.data.on_bad.bad_row='skip'" in str(error.value)
    out = readers.read(data(reader, tmp_path, bad_row="skip"))
    assert out.report.counts == {"bad_row": 1}
    assert out.events.height == 3


@pytest.mark.parametrize(
    ("line", "detail", "events"),
    [
        ("V,many,1", "the number is 'many', expected a whole number", 3),
        ("A,5,1,Title", "4 fields, expected 5 in a line of kind A", 3),
        ("X,5,1", "a line of kind 'X', expected one of A, C, V, I, T, N", 3),
        ('A,5,1,"Title","/x', "the line cannot be read", 3),
        ('C,"10003",x\nV,1000,1', "the number is 'x'", 3),  # its visits are nobody else's
    ],
)
def test_bad_lines_of_msweb(tmp_path, line, detail, events):
    path = write(tmp_path / "msweb.data", MSWEB + line + "\n")
    with pytest.raises(RecJaxError) as error:
        readers.read(data("msweb", path))
    assert f"msweb.data:11: {detail}" in str(error.value)
    assert readers.read(data("msweb", path, bad_row="skip")).events.height == events


def test_msweb_visit_before_any_user(tmp_path):
    path = write(tmp_path / "msweb.data", "V,1000,1\n" + MSWEB)
    with pytest.raises(RecJaxError, match=r"msweb\.data:1: a visit before any user"):
        readers.read(data("msweb", path))
    with pytest.raises(RecJaxError, match=r"0 areas \(lines A\) and 0 visits \(lines V\)"):
        readers.read(data("msweb", write(tmp_path / "none.data", "N,0,1\n")))


@pytest.mark.parametrize(
    ("reader", "members", "gone", "expected"),
    [
        ("lastfm", LASTFM, "artists.dat", "expected a folder or .zip with user_artists.dat and artists.dat; found tags.dat"),
        ("steam", STEAM, "game_play.dat", "game_purchase.dat, game_play.dat and item_info.dat; found game_purchase.dat"),
        ("goodbooks", BOOKS, "ratings_some.csv", "ratings.csv, or one ratings_NAME.csv; found books.csv"),
    ],
)
def test_missing_files_are_named(tmp_path, reader, members, gone, expected):
    folder(tmp_path, {name: text for name, text in members.items() if name != gone})
    with pytest.raises(RecJaxError) as error:
        readers.read(data(reader, tmp_path))
    assert expected in str(error.value)


def test_goodbooks_takes_one_file_of_ratings(tmp_path):
    folder(tmp_path, BOOKS, **{"ratings_other.csv": BOOKS["ratings_some.csv"]})
    with pytest.raises(RecJaxError, match="found books.csv, ratings_other.csv, ratings_some.csv"):
        readers.read(data("goodbooks", tmp_path))
    write(tmp_path / "ratings.csv", "user_id,book_id,rating\n7,2,5\n")
    assert readers.read(data("goodbooks", tmp_path)).events.height == 1


@pytest.mark.parametrize(
    ("reader", "path", "counts"),
    [
        ("lastfm", "lastfm-hetrec", (1892, 17632, 92834)),
        ("steam", "steam", (12393, 5155, 128804)),
        ("goodbooks", "goodbooks-10k", (2672, 9990, 298176)),
        ("msweb", "msweb/anonymous-msweb.data", (32711, 285, 98654)),
    ],
)
def test_real_counts(tmp_path, data_dir, reader, path, counts):
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache = reader, str(data_dir / path), str(tmp_path / "cache")
    c.data.filter.min_user_events, c.data.on_bad.empty_text = 1, "keep"
    prepared = prepare.prepare(c)
    assert (prepared.n_users, prepared.n_items, prepared.meta["events"]) == counts
