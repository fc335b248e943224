import numpy as np
import pytest

from rec_jax.data import packing
from rec_jax.types import Ragged, RecJaxError


def random_texts(n, longest, seed=0):
    random = np.random.default_rng(seed)
    return Ragged.from_rows([random.integers(1, 1000, random.integers(1, longest + 1)) for _ in range(n)])


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_every_text_stands_once_and_whole(rows):
    texts = random_texts(300, 32)
    seen = []
    for block in packing.pack_texts(texts, rows=rows, row_tokens=32):
        assert block.tokens.shape == block.segment_ids.shape == (rows, 32)
        for text, place in zip(block.texts, block.places, strict=True):
            row, segment = divmod(int(place), block.per_row)
            at = np.flatnonzero(block.segment_ids[row] == segment + 1)
            np.testing.assert_array_equal(block.tokens[row, at], texts[int(text)])
            np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
        seen += block.texts.tolist()
        assert (block.segment_ids > 0).sum() == sum(len(texts[int(t)]) for t in block.texts)
    assert sorted(seen) == list(range(300))


def test_rows_are_nearly_full():
    texts = random_texts(3000, 40, seed=1)
    blocks = list(packing.pack_texts(texts, rows=32, row_tokens=64))
    filled = [(b.segment_ids > 0).mean() for b in blocks[:-1]]
    assert np.mean(filled) > 0.9


def test_a_text_longer_than_a_row_is_an_error():
    with pytest.raises(RecJaxError, match="text 1 has 9 tokens, a packed row 8"):
        list(packing.pack_texts(Ragged.from_rows([[1], [1] * 9]), rows=2, row_tokens=8))


def test_rows_place_first_fit_and_undo():
    rows = packing.Rows(2, 10, per_row=2)
    assert rows.place(6) == (0, 0, 1)
    mark = rows.mark()
    assert rows.place(4) == (0, 6, 2)
    assert rows.place(1) == (1, 0, 1)
    rows.reset(mark)
    assert rows.place(4) == (0, 6, 2)
    assert rows.place(11) is None
    assert rows.has_room()
    assert rows.place(10) == (1, 0, 1)
    assert not rows.has_room()


def test_per_row_bounds_the_pieces():
    rows = packing.Rows(1, 100, per_row=3)
    assert [rows.place(1) for _ in range(4)] == [(0, 0, 1), (0, 1, 2), (0, 2, 3), None]
