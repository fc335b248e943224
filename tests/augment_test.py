"""What is hidden or deleted, by counting; what must never be, by looking; views of histories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rec_jax.data import augment
from rec_jax.types import Batch, RecJaxError

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = (PAD, UNK, CLS, SEP, MASK)
VOCAB = 105
CONTINUES = np.zeros(VOCAB, bool)
CONTINUES[60:] = True  # 5..59 begin words, 60..104 go on with them
WORDS = augment.Words(VOCAB, MASK, SPECIAL, CONTINUES)


def packed(rows=8, row_tokens=64, seed=0, longest=14):
    """Texts of 3 to `longest` tokens, [CLS] words [SEP], side by side in rows -> tokens, segments."""
    random = np.random.default_rng(seed)
    tokens, segments = np.zeros((rows, row_tokens), np.int32), np.zeros((rows, row_tokens), np.int32)
    for row in range(rows):
        at, segment = 0, 1
        while at + longest <= row_tokens:
            n = int(random.integers(3, longest + 1))
            tokens[row, at : at + n] = [CLS, *random.integers(5, VOCAB, n - 2), SEP]
            segments[row, at : at + n] = segment
            at, segment = at + n, segment + 1
    return tokens, segments


def mask(tokens, segments, rng, **changes):
    options = {"places": 80, "continues": CONTINUES, "mask_id": MASK, "special_ids": SPECIAL, "vocab_size": VOCAB}
    return augment.mask_tokens(tokens, segments, rng, **{**options, **changes})


def within(count, n, share, sigmas=4.5):
    return abs(count - n * share) <= sigmas * np.sqrt(n * share * (1 - share))


class TestMasking:
    @pytest.mark.parametrize("whole_words", [False, True])
    def test_80_10_10_of_the_chosen_and_the_rest_untouched(self, whole_words):
        tokens, segments = packed()
        hidden = replaced = same = chosen = 0
        drawn = np.zeros(VOCAB, int)
        for step in range(400):
            masked, places = mask(tokens, segments, np.random.default_rng(step), whole_words=whole_words)
            at = places[places >= 0]
            others = np.delete(np.arange(tokens.size), at)
            np.testing.assert_array_equal(masked.reshape(-1)[others], tokens.reshape(-1)[others])
            before, after = tokens.reshape(-1)[at], masked.reshape(-1)[at]
            hidden += (after == MASK).sum()
            same += (after == before).sum()
            new = after[(after != MASK) & (after != before)]
            replaced += len(new)
            drawn += np.bincount(new, minlength=VOCAB)
            chosen += len(at)
        assert within(hidden, chosen, 0.8)
        # A random token is the old one in 1 of 100 draws.
        assert within(replaced, chosen, 0.1 * 0.99)
        assert within(same, chosen, 0.1 + 0.1 * 0.01)
        assert (drawn[list(SPECIAL)] == 0).all()
        assert (drawn[5:] > 0).all()
        assert all(within(count, replaced, 1 / 100) for count in drawn[5:])

    def test_the_rate_is_kept_and_every_token_is_as_likely(self):
        tokens, segments = packed()
        may = (segments > 0) & ~np.isin(tokens, SPECIAL)
        counts, steps = np.zeros(tokens.size, int), 3000
        for step in range(steps):
            _, places = mask(tokens, segments, np.random.default_rng(step))
            assert (places >= 0).sum() == round(0.15 * may.sum())
            counts[places[places >= 0]] += 1
        assert (counts[~may.reshape(-1)] == 0).all(), "[CLS], [SEP] and padding"
        assert all(within(count, steps, 0.15) for count in counts[may.reshape(-1)])

    def test_whole_words_are_chosen_together_and_at_nearly_the_rate(self):
        tokens, segments = packed()
        tokens[0, 3] = UNK  # a special token ends a word
        may = (segments > 0) & ~np.isin(tokens, SPECIAL)
        words, taken, steps = [], 0, 200
        for row, column in np.argwhere(may):
            goes_on = (
                column and CONTINUES[tokens[row, column]] and may[row, column - 1] and segments[row, column - 1] == segments[row, column]
            )
            place = row * tokens.shape[1] + column
            words[-1].append(place) if goes_on else words.append([place])
        assert max(map(len, words)) > 3
        seen = np.zeros(len(words), int)
        for step in range(steps):
            _, places = mask(tokens, segments, np.random.default_rng(step), whole_words=True)
            chosen = set(places[places >= 0].tolist())
            for n, word in enumerate(words):
                assert len(chosen & set(word)) in (0, len(word))
                seen[n] += word[0] in chosen
            assert len(chosen) <= round(0.15 * may.sum())
            taken += len(chosen)
        assert 0.13 < taken / steps / may.sum() <= 0.15
        assert (seen > 0).all()

    @pytest.mark.parametrize("whole_words", [False, True])
    def test_never_more_than_the_budget_and_the_surplus_is_left_alone(self, whole_words):
        tokens, segments = packed()
        texts = np.arange(len(tokens))[:, None] * 100 + segments
        reached = set()
        for step in range(300):
            masked, places = mask(tokens, segments, np.random.default_rng(step), places=12, whole_words=whole_words)
            assert places.shape == (12,)
            assert places.dtype == np.int32
            filled = places[places >= 0]
            assert len(filled) == 12 or (whole_words and len(filled) > 0)
            assert (places[len(filled) :] == -1).all()
            assert (np.diff(filled) > 0).all()
            assert (masked != tokens).sum() <= 12
            reached |= set(texts.reshape(-1)[filled].tolist())
        assert reached == set(texts[segments > 0].tolist()), "texts of the last rows as well"

    def test_a_draw_is_of_its_generator_alone_and_input_stays(self):
        tokens, segments = packed()
        before = tokens.copy()
        a, b, c = (mask(tokens, segments, np.random.default_rng(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        assert (a[1] != c[1]).any()
        np.testing.assert_array_equal(tokens, before)

    @pytest.mark.parametrize("whole_words", [False, True])
    def test_one_token_at_least_and_none_where_there_is_none(self, whole_words):
        rng = np.random.default_rng(0)
        tokens, segments = np.array([[CLS, 7, SEP, 0]], np.int32), np.array([[1, 1, 1, 0]], np.int32)
        assert mask(tokens, segments, rng, places=2, whole_words=whole_words)[1].tolist() == [1, -1]
        bare = np.array([[CLS, SEP, 0, 0]], np.int32)
        masked, places = mask(bare, (bare > 0).astype(np.int32), rng, places=2, whole_words=whole_words)
        np.testing.assert_array_equal(masked, bare)
        assert places.tolist() == [-1, -1]
        empty = np.zeros((2, 4), np.int32)
        assert mask(empty, empty, rng, places=3, whole_words=whole_words)[1].tolist() == [-1] * 3

    def test_a_word_longer_than_its_share_is_hidden_whole(self):
        tokens = np.array([[CLS, 7, 70, 71, 72, SEP]], np.int32)
        _, places = mask(tokens, np.ones_like(tokens), np.random.default_rng(0), places=4, whole_words=True)
        assert places.tolist() == [1, 2, 3, 4]


class TestDeletion:
    def test_order_segments_and_special_tokens_stay(self):
        tokens, segments = packed()
        for step in range(50):
            noisy, noisy_segments = augment.delete_tokens(tokens, segments, np.random.default_rng(step), special_ids=SPECIAL)
            assert noisy.shape == tokens.shape
            assert noisy.dtype == noisy_segments.dtype == np.int32
            for row in range(len(tokens)):
                n = int((noisy_segments[row] > 0).sum())
                assert (noisy_segments[row, :n] > 0).all(), "no gap: each text is one run"
                assert (noisy[row, n:] == PAD).all()
                assert (np.diff(noisy_segments[row, :n]) >= 0).all()
                for segment in range(1, segments[row].max() + 1):
                    old = tokens[row][segments[row] == segment].tolist()
                    new = noisy[row][noisy_segments[row] == segment].tolist()
                    assert new[0] == CLS
                    assert new[-1] == SEP
                    assert len(new) >= 3, "at least one real token"
                    rest = iter(old)
                    assert all(token in rest for token in new), "a subsequence"

    def test_rate_and_that_each_token_is_as_likely(self):
        row = np.array([[CLS, *range(10, 60), SEP]], np.int32)
        kept, steps = np.zeros(VOCAB, int), 1500
        for step in range(steps):
            noisy, _ = augment.delete_tokens(row, np.ones_like(row), np.random.default_rng(step), special_ids=SPECIAL, rate=0.6)
            kept += np.bincount(noisy[noisy > 0], minlength=VOCAB)
        assert all(within(count, steps, 0.4) for count in kept[10:60])

    def test_the_one_that_stays_is_any(self):
        row = np.array([[CLS, 10, 11, 12, SEP]], np.int32)
        stays = np.zeros(VOCAB, int)
        for step in range(600):
            noisy, segments = augment.delete_tokens(row, np.ones_like(row), np.random.default_rng(step), special_ids=SPECIAL, rate=0.9999)
            assert segments.tolist() == [[1, 1, 1, 0, 0]]
            stays[noisy[0, 1]] += 1
        assert all(within(count, 600, 1 / 3) for count in stays[10:13])

    def test_texts_of_special_tokens_and_padding_stay(self):
        tokens = np.array([[CLS, UNK, SEP, CLS, SEP, 0], [0] * 6], np.int32)
        segments = np.array([[1, 1, 1, 2, 2, 0], [0] * 6], np.int32)
        noisy, noisy_segments = augment.delete_tokens(tokens, segments, np.random.default_rng(0), special_ids=SPECIAL)
        np.testing.assert_array_equal(noisy, tokens)
        np.testing.assert_array_equal(noisy_segments, segments)


class TestCorrupt:
    def part(self):
        tokens, segments = packed()
        none = np.full(1, -1, np.int32)
        return Batch(none, none, np.zeros(1, np.float32), none, item_tokens=tokens, item_segments=segments)

    def test_fills_the_fields_that_are_asked_for(self):
        part, rng = self.part(), lambda: np.random.default_rng(5)
        both = augment.corrupt(part, augment.Corruption(WORDS, augment.Masking(whole_words=True), augment.Deletion(0.3)), rng())
        assert part.masked_tokens is None, "the batch that came in stays as it was"
        assert both.item_tokens is part.item_tokens
        tokens, places = mask(part.item_tokens, part.item_segments, rng(), places=77, whole_words=True)  # 77 = ceil(.15 x 8 x 64)
        np.testing.assert_array_equal(both.masked_tokens, tokens)
        np.testing.assert_array_equal(both.masked_places, places)
        assert (both.noisy_segments > 0).sum() < (part.item_segments > 0).sum()
        masked = augment.corrupt(part, augment.Corruption(WORDS, augment.Masking(places=9)), rng())
        assert masked.masked_places.shape == (9,)
        assert masked.noisy_tokens is None
        noisy = augment.corrupt(part, augment.Corruption(WORDS, deletion=augment.Deletion()), rng())
        assert noisy.masked_places is None
        assert noisy.noisy_tokens.shape == part.item_tokens.shape

    def test_bad_input(self):
        bare = dataclasses.replace(self.part(), item_tokens=None)
        with pytest.raises(RecJaxError, match=r"text.source='tokens'"):
            augment.corrupt(bare, augment.Corruption(WORDS, augment.Masking()), np.random.default_rng(0))
        for make, message in (
            (lambda: augment.Masking(rate=0.0), "masking rate=0.0"),
            (lambda: augment.Masking(places=-1), "places=-1"),
            (lambda: augment.Deletion(rate=1.0), "deletion rate=1.0"),
        ):
            with pytest.raises(RecJaxError, match=message):
                make()


class TestHistoryViews:
    ITEMS = np.arange(100, 120)

    @pytest.mark.parametrize("name", sorted(augment.HISTORY_VIEWS))
    def test_of_their_generator_alone_and_the_input_stays(self, name):
        items = self.ITEMS.copy()
        a, b, c = (augment.HISTORY_VIEWS[name](items, np.random.default_rng(s), 0.6) for s in (1, 1, 3))
        np.testing.assert_array_equal(a, b)
        assert a.tolist() != c.tolist()
        np.testing.assert_array_equal(items, self.ITEMS)
        a[:] = 0
        np.testing.assert_array_equal(items, self.ITEMS)

    def test_crop_is_a_run_that_begins_anywhere(self):
        starts = set()
        for seed in range(200):
            view = augment.crop_items(self.ITEMS, np.random.default_rng(seed), 0.6)
            np.testing.assert_array_equal(view, np.arange(view[0], view[0] + 12))
            starts.add(int(view[0]))
        assert starts == set(range(100, 109))

    def test_mask_hides_its_share_and_any_place(self):
        hidden = np.zeros(20, int)
        for seed in range(200):
            view = augment.mask_items(self.ITEMS, np.random.default_rng(seed), 0.3, mask_item=7)
            assert ((view == 7) | (view == self.ITEMS)).all()
            assert (view == 7).sum() == 6
            hidden += view == 7
        assert all(within(count, 200, 0.3) for count in hidden)

    def test_reorder_moves_items_of_one_run_only(self):
        moved = np.zeros(20, int)
        for seed in range(200):
            view = augment.reorder_items(self.ITEMS, np.random.default_rng(seed), 0.25)
            assert sorted(view) == self.ITEMS.tolist()
            at = np.flatnonzero(view != self.ITEMS)
            assert len(at) == 0 or at[-1] - at[0] < 5
            moved[at] += 1
        assert (moved > 0).all()

    def test_one_item(self):
        rng = np.random.default_rng(0)
        for name, view in augment.HISTORY_VIEWS.items():
            assert view(np.array([5]), rng, 0.2).tolist() == [5], name
