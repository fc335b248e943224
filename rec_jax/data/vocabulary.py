"""A WordPiece vocabulary made from texts, and what a tokenizer's vocabulary says about its entries."""

from __future__ import annotations

import collections
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rec_jax import config as config_lib
from rec_jax.data import folders
from rec_jax.data.augment import Words
from rec_jax.data.corpus import Corpus, ItemTexts, TextFiles
from rec_jax.data.prepare import Prepared
from rec_jax.data.start import start_of
from rec_jax.data.text import item_tokens
from rec_jax.types import Ragged, RecJaxError

FORMAT = 1  # of the folder; raise it when the same texts give another vocabulary
MARKER = "tokenizer.json"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4: empty places of packed rows hold 0
CONTINUES = "##"
MAX_ALPHABET = 1000  # the most frequent characters that have entries of their own; a word with another one is [UNK]
MIN_PAIRS = 2  # times that two neighbouring pieces must occur to become one
MAX_WORD = 100  # characters; a longer word is [UNK]
WORDS_AT_ONCE = 4096


def vocabulary(corpus: Corpus, *, size: int, cache: epath.PathLike, lowercase: bool = True) -> Path:
    """A corpus -> the local folder of a WordPiece tokenizer made from its texts; made once, then found by its fingerprint.

    The folder has tokenizer.json, tokenizer_config.json and vocab.txt, and opens as `config.data.text.tokenizer` and in transformers.

    Args:
      corpus: the texts.
      size: V, entries, special tokens included. Fewer where the texts have no more that occur twice.
      cache: folder under which it is kept, maybe on gs://.
      lowercase: whether case and accents are dropped.

    Raises:
      RecJaxError: a size that does not hold the special tokens and the characters.
    """
    settings = {"format": FORMAT, "corpus": corpus.fingerprint, "size": size, "lowercase": lowercase}
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = epath.Path(cache) / f"vocabulary-{corpus.name}-{fingerprint[:12]}"
    if not (folder / MARKER).exists():
        entries = train(corpus, size=size, lowercase=lowercase)
        fewer = f" (not {size:,}: the texts have no more)" if len(entries) < size else ""
        print(f"{len(entries):,} WordPiece entries{fewer} at {folder}", file=sys.stderr, flush=True)
        with folders.new(folder, MARKER) as unfinished:
            write(entries, unfinished, lowercase=lowercase)
    return folders.local_copy(folder, MARKER)


def train(texts: Iterable[str], *, size: int, lowercase: bool = True) -> list[str]:
    """texts -> WordPiece entries in the order of their ids: special tokens, characters, what goes on with a word, longer pieces.

    The same texts give the same entries, in whatever order they come. The trainer of the library numbers pieces as it meets words in
    a hash table, and breaks ties by number, so all pieces of one character are numbered here beforehand.

    Raises:
      RecJaxError: as `vocabulary` does.
    """
    words = _count_words(texts, lowercase)
    characters: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    alphabet = sorted(sorted(characters, key=lambda c: (-characters[c], c))[:MAX_ALPHABET])
    allowed = set(alphabet)
    words = {word: count for word, count in sorted(words.items()) if allowed.issuperset(word)}
    inside = {character for word in words for character in word[1:]}
    first = [*SPECIAL, *alphabet, *(CONTINUES + c for c in alphabet if c in inside)]
    if size < len(first):
        raise RecJaxError(
            f"a vocabulary of size={size} does not hold {len(SPECIAL)} special tokens and {len(first) - len(SPECIAL)} characters"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_PAIRS,
        special_tokens=first,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(_repeated(words), trainer)
    ids = trained.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def _count_words(texts: Iterable[str], lowercase: bool) -> dict[str, int]:
    """How often each word occurs, as BERT cuts texts into words; those that it takes for too long are left out."""
    normalizer, splitter = _normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    chunks: collections.Counter[str] = collections.Counter()
    for text in texts:
        chunks.update(normalizer.normalize_str(text).split())
    words: collections.Counter[str] = collections.Counter()
    for chunk, count in chunks.items():  # each different one is cut only once
        for word, _ in splitter.pre_tokenize_str(chunk):
            if len(word) <= MAX_WORD:
                words[word] += count
    return words


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Texts that have each word as often as it was counted: the trainer takes no counts."""
    for word, count in words.items():
        for start in range(0, count, WORDS_AT_ONCE):
            yield " ".join([word] * min(WORDS_AT_ONCE, count - start))


def write(entries: Sequence[str], folder: Path, *, lowercase: bool = True) -> None:
    """WordPiece entries in the order of their ids -> tokenizer.json, tokenizer_config.json and vocab.txt in a folder that is there."""
    ids = {entry: number for number, entry in enumerate(entries)}
    model = models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=CONTINUES, max_input_chars_per_word=MAX_WORD)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), "utf-8")
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2) + "\n")


def words_of(tokenizer: tokenizers.Tokenizer) -> Words:
    """A BERT tokenizer -> what hiding and deleting tokens must know of its entries.

    Raises:
      RecJaxError: it has no [MASK].
    """
    mask_id = tokenizer.token_to_id("[MASK]")
    if mask_id is None:
        raise RecJaxError("this tokenizer has no [MASK]: a masked language model needs the vocabulary of a BERT")
    ids = tokenizer.get_vocab(with_added_tokens=True)
    continues = np.zeros(max(ids.values()) + 1, bool)
    continues[[number for entry, number in ids.items() if entry.startswith(CONTINUES) and entry != CONTINUES]] = True
    special = sorted(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return Words(len(continues), mask_id, tuple(special), continues)


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    """BERT's: control characters dropped, Chinese characters words of their own; accents go with the case."""
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase)


def corpus_of(config: Any, prepared: Prepared) -> Corpus:
    """The texts that `config.data.corpus` names: files, or the item texts."""
    if not config.data.corpus.path:
        return ItemTexts(prepared)
    cache, column = config_lib.cache_dir(config), config.data.corpus.column
    return TextFiles(config.data.corpus.path, cache=cache, column=column, on_bad=config.data.on_bad, key="config.data.corpus.path")


def tokenizer_of(config: Any, prepared: Prepared) -> str:
    """Who has the tokenizer: `config.data.text.tokenizer`, the encoder's folder, or, from scratch, a vocabulary made of the corpus.

    A run that goes on from another (`config.start`) has that one's words.
    """
    text_tower = config.towers.text
    if config.data.text.tokenizer or text_tower.path != "scratch":
        return config.data.text.tokenizer or text_tower.path
    if config.start.path:
        start = start_of(config)
        return tokenizer_of(start.whole, start.prepared)
    corpus, cache = corpus_of(config, prepared), config_lib.cache_dir(config)
    return str(vocabulary(corpus, size=text_tower.scratch.words, cache=cache))


def catalogue_tokens(config: Any, prepared: Prepared) -> Ragged:
    """Token ids of each catalogue item's text [N rows] int32; made once, then read from the prepared folder."""
    return item_tokens(prepared, tokenizer_of(config, prepared), config.data.text.max_tokens)
