"""Words of items' texts, and pairs of words that follow each other, as the item tower reads them beside the text's vector.

A text's vector says what it is about; which brand, series or maker it names is often in a word or two, of which frozen vectors keep
little. A word that few items share has a vector that all of them train, also for those that are seldom seen.
"""

from __future__ import annotations

import collections
import html
import itertools
import re
from collections.abc import Sequence

import numpy as np

LEAST, LARGEST_SHARE = 2, 0.1  # items that have a word in common: at least so many, and at most that share of the catalogue
WORD = re.compile(r"\w+")


def of_text(text: str) -> list[str]:
    """A text -> its words, in lower case, and pairs "a b" of neighbours, each once."""
    found = WORD.findall(html.unescape(text).casefold())
    return list(dict.fromkeys([*found, *(f"{a} {b}" for a, b in itertools.pairwise(found))]))


def known(texts: Sequence[str]) -> list[str]:
    """Texts of the catalogue [N] -> the words that LEAST to LARGEST_SHARE of its items have, commonest first, then by the alphabet."""
    counts = collections.Counter(word for text in texts for word in of_text(text))
    most = LARGEST_SHARE * len(texts)
    return sorted((word for word, count in counts.items() if LEAST <= count <= most), key=lambda word: (-counts[word], word))


def numbers(texts: Sequence[str], known: Sequence[str], *, most: int) -> np.ndarray:
    """Texts [N] -> numbers of each one's words among the known ones, from 1, [N, K] int32; 0 = no more.

    Of a text with more than `most` the last in the order of `known` count, which are its rarest. K is the longest row's, at least 1.
    """
    number = {word: n for n, word in enumerate(known, start=1)}
    rows = [sorted((number[word] for word in of_text(text) if word in number), reverse=True)[:most] for text in texts]
    out = np.zeros((len(texts), max((len(row) for row in rows), default=0) or 1), np.int32)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out
