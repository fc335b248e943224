"""Random changes to a batch's inputs that a model is trained to undo or to see through: hidden tokens, deleted tokens, views of histories.

Pure functions of arrays and a numpy Generator; the caller makes the generator from what names the batch, so that a resume draws the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rec_jax.types import Batch, RecJaxError

HIDDEN, RANDOM = 0.8, 0.1  # shares of the chosen tokens that become [MASK] and a random token; the rest stay as they are


@dataclasses.dataclass(frozen=True)
class Words:
    """What a tokenizer's vocabulary says about its entries; `rec_jax.data.vocabulary.words_of` reads it.

    Attributes:
      size: V.
      mask_id: of [MASK].
      special_ids: of [CLS], [SEP], [PAD], [MASK], [UNK]: never chosen, never deleted, never drawn.
      continues: [V] bool, which entries go on with the word of the token before.
    """

    size: int
    mask_id: int
    special_ids: tuple[int, ...]
    continues: np.ndarray


@dataclasses.dataclass(frozen=True)
class Masking:
    """Masked language modelling.

    Attributes:
      rate: share of the tokens that are chosen.
      places: P, the most that are chosen in a shard; 0 = rate x rows x row tokens, which never is too few.
      whole_words: tokens of a word are chosen together.
    """

    rate: float = 0.15
    places: int = 0
    whole_words: bool = False

    def __post_init__(self) -> None:
        _check_rate("masking", self.rate)
        if self.places < 0:
            raise RecJaxError(f"masking places={self.places}: must be at least 0, which makes room for all")

    def budget(self, rows: int, row_tokens: int) -> int:
        """P of a shard with R packed rows of T tokens."""
        return self.places or math.ceil(self.rate * rows * row_tokens)


@dataclasses.dataclass(frozen=True)
class Deletion:
    """Denoising: `rate` is the share of the tokens that are deleted."""

    rate: float = 0.6

    def __post_init__(self) -> None:
        _check_rate("deletion", self.rate)


@dataclasses.dataclass(frozen=True)
class Corruption:
    """What `corrupt` adds to a batch; None leaves the fields of it None."""

    words: Words
    masking: Masking | None = None
    deletion: Deletion | None = None


def _check_rate(name: str, rate: float) -> None:
    if not 0.0 < rate < 1.0:
        raise RecJaxError(f"{name} rate={rate}: must lie between 0 and 1, both excluded")


def corrupt(part: Batch, corruption: Corruption, rng: np.random.Generator) -> Batch:
    """A shard's part of a batch with item_tokens [R, T] -> the same with masked and noisy copies of them, as `corruption` says.

    Raises:
      RecJaxError: the batch has no texts.
    """
    if part.item_tokens is None:
        raise RecJaxError("tokens can only be hidden or deleted where texts are in the batch: set config.towers.text.source='tokens'")
    tokens, segments, words = part.item_tokens, part.item_segments, corruption.words
    out = dataclasses.replace(part)
    if corruption.masking is not None:
        masking = corruption.masking
        out.masked_tokens, out.masked_places = mask_tokens(
            tokens,
            segments,
            rng,
            rate=masking.rate,
            places=masking.budget(*tokens.shape),
            whole_words=masking.whole_words,
            continues=words.continues,
            mask_id=words.mask_id,
            special_ids=words.special_ids,
            vocab_size=words.size,
        )
    if corruption.deletion is not None:
        rate = corruption.deletion.rate
        out.noisy_tokens, out.noisy_segments = delete_tokens(tokens, segments, rng, rate=rate, special_ids=words.special_ids)
    return out


def mask_tokens(
    tokens: np.ndarray,
    segments: np.ndarray,
    rng: np.random.Generator,
    *,
    places: int,
    continues: np.ndarray,
    mask_id: int,
    special_ids: Sequence[int],
    vocab_size: int,
    rate: float = 0.15,
    whole_words: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """tokens [R, T], segments [R, T] -> (masked tokens [R, T], places [P] int32 of the chosen ones in the flattened [R * T]).

    Of the N tokens that may be chosen, round(rate N), at least 1 and at most P, are, drawn over all texts alike. Of these 80%
    become [MASK], 10% a random token, and 10% stay. Whole words are drawn one after the other until the next has no room.

    Args:
      places: P; the places left over are -1.
      continues: [V] bool, entries that go on with the word of the token before; for whole_words.
      mask_id: of [MASK].
      special_ids: never chosen, and never drawn as a random token.
      vocab_size: V, entries to draw random tokens from.
      rate: share of the tokens to choose.
      whole_words: choose all tokens of a word or none. Each of them is hidden, replaced or left by a draw of its own.

    Reference: Devlin et al., 2019, https://arxiv.org/abs/1810.04805, section 3.1.
    """
    flat = tokens.reshape(-1)
    may = (segments > 0) & ~np.isin(tokens, special_ids)
    candidates = np.flatnonzero(may)
    masked, out = flat.copy(), np.full(places, -1, np.int32)
    room = min(places, max(1, round(rate * len(candidates))))
    if whole_words:
        words = _words(tokens, segments, may, continues)
        order = rng.permutation(int(words[-1]) + 1 if len(words) else 0)
        # A word longer than the room itself may come first, and goes in whole where P allows: else it could never be chosen.
        filled = np.cumsum(np.bincount(words)[order])
        drawn = order[(filled <= room) | ((np.arange(len(order)) == 0) & (filled <= places))]
        chosen = candidates[np.isin(words, drawn)]
    else:
        chosen = np.sort(rng.permutation(candidates)[:room])
    out[: len(chosen)] = chosen
    draw = rng.random(len(chosen))
    masked[chosen[draw < HIDDEN]] = mask_id
    replaced = chosen[(draw >= HIDDEN) & (draw < HIDDEN + RANDOM)]
    masked[replaced] = _random_tokens(rng, len(replaced), special_ids, vocab_size)
    return masked.reshape(tokens.shape), out


def _words(tokens: np.ndarray, segments: np.ndarray, may: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Of each token that may be chosen, in order, the number of its word from 0: a word ends at another text, row or special token."""
    goes_on = np.zeros(tokens.shape, bool)
    goes_on[:, 1:] = continues[tokens[:, 1:]] & may[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    return np.cumsum(~goes_on[may]) - 1


def _random_tokens(rng: np.random.Generator, count: int, special_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """`count` ids drawn uniformly from the entries that are not special."""
    special = sorted(set(special_ids))
    ids = rng.integers(vocab_size - len(special), size=count)
    for special_id in special:  # in order, so that each step over one is counted before the next
        ids += ids >= special_id
    return ids


def delete_tokens(
    tokens: np.ndarray, segments: np.ndarray, rng: np.random.Generator, *, special_ids: Sequence[int], rate: float = 0.6
) -> tuple[np.ndarray, np.ndarray]:
    """tokens [R, T], segments [R, T] -> what is left of them (tokens [R, T], segments [R, T]), moved together to the row's start.

    A text stays one run of neighbouring places with its segment id, so that it is pooled where it was, and its tokens keep their
    order; their positions are those of the shorter text. Special tokens stay, and of each text's other tokens at least one.

    Args:
      special_ids: never deleted.
      rate: probability of deleting a token.

    Reference: Wang et al., 2021 (TSDAE), https://arxiv.org/abs/2104.06979, section 3.
    """
    there = segments > 0
    real = there & ~np.isin(tokens, special_ids)
    draw = rng.random(tokens.shape)
    text = np.arange(len(tokens))[:, None] * (int(segments.max(initial=0)) + 1) + segments
    highest = np.zeros(int(text.max(initial=0)) + 1)
    np.maximum.at(highest, text[real], draw[real])
    kept = there & (~real | (draw >= rate) | (draw == highest[text]))  # the highest draw is the one that would stay longest
    order = np.argsort(~kept, axis=1, kind="stable")
    return tuple(np.take_along_axis(np.where(kept, a, 0).astype(np.int32), order, axis=1) for a in (tokens, segments))  # type: ignore[return-value]


# -- histories --


def crop_items(items: np.ndarray, rng: np.random.Generator, rate: float) -> np.ndarray:
    """items [n] -> [floor(rate n), at least 1], a run of neighbouring ones that begins anywhere."""
    length = max(1, math.floor(rate * len(items)))
    start = int(rng.integers(len(items) - length + 1))
    return items[start : start + length].copy()


def mask_items(items: np.ndarray, rng: np.random.Generator, rate: float, *, mask_item: int = -1) -> np.ndarray:
    """items [n] -> [n], with floor(rate n) of them, drawn uniformly, replaced by `mask_item`."""
    out = items.copy()
    out[rng.permutation(len(items))[: math.floor(rate * len(items))]] = mask_item
    return out


def reorder_items(items: np.ndarray, rng: np.random.Generator, rate: float) -> np.ndarray:
    """items [n] -> [n], with a run of floor(rate n) of them, which begins anywhere, in random order."""
    out, length = items.copy(), math.floor(rate * len(items))
    start = int(rng.integers(len(items) - length + 1))
    out[start : start + length] = rng.permutation(out[start : start + length])
    return out


def uniform_by_place(seed: int, positions: np.ndarray, lengths: np.ndarray, stream: int) -> np.ndarray:
    """Uniform draws of the events of examples: a function of the example's position, the event's place, seed and stream alone.

    Args:
      seed: of the run.
      positions: of the examples in their order [n].
      lengths: events of each [n].
      stream: sets draws for one purpose apart from those for another.

    Returns:
      [sum of lengths] float64 in [0, 1), example by example.

    Reference: Steele et al., "Fast Splittable Pseudorandom Number Generators" (2014), with the constants of SplitMix64.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mixed(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    run = mixed(np.asarray([(seed + int(golden) * (stream + 1)) % 2**64], np.uint64))  # arrays wrap around without a warning
    example = mixed(run + golden * (np.asarray(positions).astype(np.uint64) + np.uint64(1)))
    places = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    event = mixed(np.repeat(example, lengths) + golden * (places.astype(np.uint64) + np.uint64(1)))
    return (event >> np.uint64(11)).astype(np.float64) * 2.0**-53


def kept_events(draws: np.ndarray, lengths: np.ndarray, rate: float) -> np.ndarray:
    """Which events of windows stay -> [sum of lengths] bool; each goes with probability `rate`.

    Where fewer than two of a window would stay, none of it goes. `draws` are uniform, `lengths` [n] the windows'.
    """
    kept = draws >= rate
    window = np.repeat(np.arange(len(lengths)), lengths)
    stay = np.bincount(window, weights=kept, minlength=len(lengths))
    return kept | (stay < np.minimum(2, lengths))[window]


# Views of a history by name; two of the same history are each other's positives.
# Reference: Xie et al., 2022 (CL4SRec), https://arxiv.org/abs/2010.14395, section 3.3.
HISTORY_VIEWS: dict[str, Callable[[np.ndarray, np.random.Generator, float], np.ndarray]] = {
    "crop": crop_items,
    "mask": mask_items,
    "reorder": reorder_items,
}


@dataclasses.dataclass(frozen=True)
class HistoryViews:
    """How two views of a history are made, by the names of `config.objectives.history_views`.

    Attributes:
      kinds: names of HISTORY_VIEWS, one of which is drawn for each view; () = both are the history itself.
      crop: share of the items that a crop keeps.
      mask: share of them that a mask hides.
      reorder: share of them in the run that is reordered.
    """

    kinds: tuple[str, ...] = tuple(HISTORY_VIEWS)
    crop: float = 0.6
    mask: float = 0.3
    reorder: float = 0.6

    def __post_init__(self) -> None:
        place = "config.objectives.history_views"
        if not set(self.kinds) <= set(HISTORY_VIEWS):
            raise RecJaxError(f"{place}.kinds={self.kinds!r}: expected some of {', '.join(HISTORY_VIEWS)}, or () for dropout alone")
        for kind in HISTORY_VIEWS:
            if not 0.0 < self.rate(kind) < 1.0:
                raise RecJaxError(f"{place}.{kind}={self.rate(kind)}: must lie between 0 and 1, both excluded")

    @classmethod
    def from_config(cls, config: Any) -> HistoryViews | None:
        """As `config.objectives.history_views` says; None where it has no weight."""
        o = config.objectives.history_views
        return cls(tuple(o.kinds), o.crop, o.mask, o.reorder) if o.weight > 0 else None

    def rate(self, kind: str) -> float:
        """The share that a kind of view works with."""
        return {"crop": self.crop, "mask": self.mask, "reorder": self.reorder}[kind]

    @property
    def hides(self) -> bool:
        """Whether items may be hidden, for which the history tower needs a vector."""
        return "mask" in self.kinds

    def draw(self, items: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """items [n] -> two views of them, each [1 .. n], -1 where an item is hidden."""
        return self._one(items, rng), self._one(items, rng)

    def _one(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self.kinds:
            return items.copy()
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        return HISTORY_VIEWS[kind](items, rng, self.rate(kind))
