"""Words of texts: which count, their numbers, and a run that goes on from another with new items."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest
import tiny

from rec_jax.data import words
from rec_jax.types import RecJaxError

TEXTS = ["OPI Nail Lacquer, red", "OPI nail lacquer &amp; blue", "opi Shatter", "", "Blue Shatter red", *(f"filler {n}" for n in range(35))]


def test_a_text_is_its_words_and_pairs():
    assert words.of_text("Wet n Wild; wet N wild") == ["wet", "n", "wild", "wet n", "n wild", "wild wet"]
    assert words.of_text("  ") == []


def test_known_words_are_those_that_some_items_share():
    counts = collections.Counter()
    for text in TEXTS:  # by another way: pairs by a pattern that looks ahead
        low = text.replace("&amp;", "&").lower()
        counts.update(
            set(re.findall(r"[a-z0-9]+", low)) | {f"{a} {b}" for a, b in re.findall(r"(?=\b([a-z0-9]+)[^a-z0-9]+([a-z0-9]+))", low)}
        )
    known = words.known(TEXTS)
    assert set(known) == {word for word, count in counts.items() if 2 <= count <= 4}
    assert "filler" not in known
    assert known[0] == "opi"
    assert [counts[w] for w in known] == sorted((counts[w] for w in known), reverse=True)


def test_numbers_are_the_rarest_words_first():
    known = words.known(TEXTS)
    found = words.numbers(TEXTS, known, most=3)
    assert found.dtype == np.int32
    assert found.shape == (40, 3)
    assert [known[n - 1] for n in found[0]] == sorted(set(words.of_text(TEXTS[0])) & set(known), key=known.index)[:-4:-1]
    assert not found[3].any()
    assert (np.count_nonzero(found[5:]) == 0) == ("filler" not in known)
    assert words.numbers(["", "new"], known, most=3).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.item.words": -1}, r"towers\.item\.words=-1: must be at least 0"),
        ({"towers.item.words": 4, "towers.item.text": False, "towers.item.ids": True}, r"words=4 are of texts"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**changes)
