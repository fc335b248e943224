"""What an item says about itself: text templates, the tokenizer, and the catalogue's tokens, kept on disk."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
import os
import re
import string
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, processors

from rec_jax.config import model_folder
from rec_jax.data.tables import TEXT_COLUMNS
from rec_jax.types import Ragged, RecJaxError

if TYPE_CHECKING:
    from rec_jax.data.prepare import Prepared

BRACKETS = {"(": ")", "[": "]"}
SEPARATOR = re.compile(r"[\s.,;:|/–—-]*")
TEXTS_AT_ONCE = 4096


# -- templates --


@dataclasses.dataclass(frozen=True)
class _Group:
    """A pair of brackets with fields inside."""

    open: str
    parts: tuple[Any, ...]
    close: str


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str


def default_template(columns: Sequence[str]) -> str:
    """Columns of the items table -> "{title}. {genres}. ..." of the text columns that are there, or "{name}" if none is."""
    there = [column for column in TEXT_COLUMNS if column in columns]
    return ". ".join(f"{{{column}}}" for column in there or ["name"])


def render(items: pl.DataFrame, template: str) -> list[str]:
    """items [N rows], "{title} ({year}). {genres}" -> text of each item [N]; "" where all fields are empty.

    An empty field takes its surroundings with it: a pair of brackets without a filled field vanishes, and so does the text between
    the previous field and an empty one. That text is a separator (spaces and . , ; : | / -) and a label; before the first filled
    field the separator is left out too, and its full stop after a text that ends in one. "{{" and "}}" are braces.

      "{title} ({year}). By {author}." of title Alien -> "Alien."; of author Le Guin -> "By Le Guin."

    Args:
      template: "" = `default_template`.

    Raises:
      RecJaxError: a field that is no column, or braces or brackets that do not match.
    """
    parts = _parse(template or default_template(items.columns), items.columns)
    columns = {name: _strings(items[name]) for name in sorted(_fields(parts))}
    rows = zip(*columns.values(), strict=True)
    return [_render(parts, dict(zip(columns, row, strict=True))) for row in rows]


def _strings(column: pl.Series) -> list[str]:
    """Values as text: null is "", spaces at the ends and repeated ones are dropped, lists are joined with commas."""
    if isinstance(column.dtype, pl.List):
        column = column.cast(pl.List(pl.String)).list.join(", ")
    return column.cast(pl.String).fill_null("").str.replace_all(r"\s+", " ").str.strip_chars().to_list()


def _parse(template: str, columns: Sequence[str]) -> tuple[Any, ...]:
    """Template -> parts: text, _Field or _Group; raises RecJaxError as `render` does."""
    place = f"config.data.text.template={template!r}"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as e:
        raise RecJaxError(f"{place}: {e}; write fields as {{title}}, and a brace as {{{{ or }}}}") from None
    stack: list[tuple[str, list[Any]]] = [("", [])]  # open bracket, and the parts since

    def add_text(characters: str) -> None:
        parts = stack[-1][1]
        if parts and isinstance(parts[-1], str):
            characters = parts.pop() + characters
        parts.append(characters)

    for literal, field, spec, conversion in pieces:
        for character in literal:
            if character in BRACKETS:
                stack.append((character, []))
            elif character in BRACKETS.values():
                bracket, inner = stack.pop()
                if BRACKETS.get(bracket) != character:
                    raise RecJaxError(f"{place}: the bracket {character!r} closes none")
                if _fields(inner):
                    stack[-1][1].append(_Group(bracket, tuple(inner), character))
                else:
                    add_text(bracket + "".join(inner) + character)
            else:
                add_text(character)
        if field is None:
            continue
        if field not in columns or spec or conversion:
            raise RecJaxError(f"{place}: no column {field + (':' + spec if spec else '')!r}; the items have: {', '.join(columns)}")
        stack[-1][1].append(_Field(field))
    if len(stack) > 1:
        raise RecJaxError(f"{place}: the bracket {stack[-1][0]!r} is never closed")
    parts = tuple(stack[0][1])
    if not _fields(parts):
        raise RecJaxError(f"{place} names no column; the items have: {', '.join(columns)}")
    return parts


def _fields(parts: Sequence[Any]) -> set[str]:
    inner = (_fields(part.parts) for part in parts if isinstance(part, _Group))
    return {part.name for part in parts if isinstance(part, _Field)}.union(*inner)


def _render(parts: Sequence[Any], row: Mapping[str, str]) -> str:
    out, between = "", ""
    for part in parts:
        if isinstance(part, str):
            between = part
            continue
        value = row[part.name] if isinstance(part, _Field) else _render(part.parts, row)
        if value and isinstance(part, _Group):
            value = part.open + value + part.close
        if value:
            out = _join(out, between) + value if out else between[SEPARATOR.match(between).end() :] + value  # type: ignore[union-attr]
        between = ""
    return _join(out, between).strip() if out else ""


def _join(text: str, between: str) -> str:
    return text + (between[1:] if between[:1] == "." and text[-1:] in ".!?" else between)


# -- tokens --


def tokenizer_file(path: str) -> Path:
    """A model's folder, "package:NAME" or hub id -> its tokenizer.json, or else vocab.txt.

    Raises:
      RecJaxError: neither is there.
    """
    folder = model_folder(path)
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(p.name for p in folder.iterdir()))
    raise RecJaxError(f"{folder} holds no tokenizer.json or vocab.txt (only: {there or 'nothing'}); set config.data.text.tokenizer")


def load_tokenizer(path: str) -> tokenizers.Tokenizer:
    """A model's folder, "package:NAME" or hub id -> its tokenizer, which neither cuts nor pads.

    Its threads are off unless the variable TOKENIZERS_PARALLELISM says otherwise: processes forked after they ran may hang.

    Raises:
      RecJaxError: no tokenizer there, a broken file, or one that does not wrap texts as [CLS] ... [SEP].
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = tokenizer_file(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file)) if file.name == "tokenizer.json" else _from_vocabulary(file)
    except Exception as e:  # the library raises bare Exception
        raise RecJaxError(f"{file}: this is no tokenizer that can be read: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    wrapping = tokenizer.encode("").tokens
    if len(wrapping) != 2:
        raise RecJaxError(f"{file}: an empty text becomes {wrapping}; expected two tokens, as BERT's ['[CLS]', '[SEP]']")
    return tokenizer


def _from_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """BERT's WordPiece from vocab.txt; lower case and the like as tokenizer_config.json beside it says."""
    settings_file = file.with_name("tokenizer_config.json")
    settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    special = {k: settings.get(f"{k}_token", f"[{k.upper()}]") for k in ("pad", "unk", "cls", "sep", "mask")}
    names = {k: token["content"] if isinstance(token, dict) else token for k, token in special.items()}
    tokenizer = tokenizers.Tokenizer(models.WordPiece.from_file(str(file), unk_token=names["unk"]))
    missing = [token for token in names.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise RecJaxError(f"{file} has no line {', '.join(missing)}")
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(*((names[k], ids[names[k]]) for k in ("sep", "cls")))
    tokenizer.add_special_tokens(list(names.values()))
    return tokenizer


def tokenize(texts: Iterable[str], tokenizer: tokenizers.Tokenizer, max_tokens: int) -> tuple[Ragged, int]:
    """texts [N] -> (token ids of each, [CLS] ... [SEP], int32; number of texts cut to `max_tokens`, the two included).

    Raises:
      RecJaxError: max_tokens below 3, which leaves no room for a text.
    """
    rows, cut = _Rows(), 0
    for ids in _encoded(texts, tokenizer, max_tokens):
        if len(ids) > max_tokens:
            ids, cut = [*ids[: max_tokens - 1], ids[-1]], cut + 1
        rows.add(ids)
    return rows.ragged(), cut


def tokenize_in_pieces(texts: Iterable[str], tokenizer: tokenizers.Tokenizer, max_tokens: int) -> tuple[Ragged, int]:
    """texts [N] -> (token ids of pieces, [CLS] ... [SEP], int32, in order; number of texts without any token, which give no piece).

    A text of more than `max_tokens`, the two included, goes on in further pieces: no token is lost and none comes twice.

    Raises:
      RecJaxError: max_tokens below 3, which leaves no room for a text.
    """
    rows, empty, room = _Rows(), 0, max_tokens - 2
    for ids in _encoded(texts, tokenizer, max_tokens):
        empty += len(ids) == 2
        for start in range(1, len(ids) - 1, room):
            rows.add([ids[0], *ids[start : min(start + room, len(ids) - 1)], ids[-1]])
    return rows.ragged(), empty


def _encoded(texts: Iterable[str], tokenizer: tokenizers.Tokenizer, max_tokens: int) -> Iterator[list[int]]:
    """Ids of each text, [CLS] ... [SEP], however long; the texts are asked for a few thousand at a time."""
    if max_tokens < 3:
        raise RecJaxError(f"config.data.text.max_tokens={max_tokens}: [CLS] and [SEP] take two; set at least 3")
    waiting = iter(texts)
    while some := list(itertools.islice(waiting, TEXTS_AT_ONCE)):
        for encoding in tokenizer.encode_batch_fast(some):
            yield encoding.ids


class _Rows:
    """Rows of a Ragged as they come, without an array object for each."""

    def __init__(self) -> None:
        self._ids, self._lengths = array.array("i"), array.array("q")

    def add(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self._lengths.append(len(ids))

    def ragged(self) -> Ragged:
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(np.asarray(self._lengths, np.int64), out=offsets[1:])
        return Ragged(np.asarray(self._ids, np.int32), offsets)


def item_tokens(prepared: Prepared, model: str, max_tokens: int) -> Ragged:
    """Token ids of each catalogue item's text [N rows] int32; made once, then read from the prepared folder.

    `model` is a folder, "package:NAME" or hub id that has the tokenizer; a text of more than `max_tokens` is cut.
    """

    def make() -> Ragged:
        tokens, cut = tokenize(prepared.texts(), load_tokenizer(model), max_tokens)
        if cut:
            print(f"{cut:,} of {len(tokens):,} item texts are longer than {max_tokens} tokens and were cut", file=sys.stderr, flush=True)
        return tokens

    return kept_tokens(epath.Path(prepared.local), model, max_tokens, make, rows=prepared.n_items)


def kept_tokens(folder: epath.Path, model: str, max_tokens: int, make: Callable[[], Ragged], *, rows: int | None = None) -> Ragged:
    """What `make` tokenizes, made once, then read from the folder, which belongs to the texts.

    The file's name holds the hash of the tokenizer and `max_tokens`, so that another setting never reads it.

    Args:
      folder: where the file is kept; it is there.
      model: the folder, "package:NAME" or hub id that has the tokenizer.
      max_tokens: what `make` cuts texts to.
      make: the tokens.
      rows: how many rows there must be, where that is known; a file with others is made again.
    """
    file = tokenizer_file(model)
    digest = hashlib.sha256(file.name.encode() + file.read_bytes())
    if file.name == "vocab.txt" and file.with_name("tokenizer_config.json").is_file():
        digest.update(file.with_name("tokenizer_config.json").read_bytes())
    cache = folder / f"tokens-{digest.hexdigest()[:12]}-{max_tokens}.npz"
    if cache.exists():
        try:
            return _read_tokens(cache, rows)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
            print(f"{cache} is broken ({e}); making it again", file=sys.stderr, flush=True)
    tokens = make()
    unfinished = folder / f"{cache.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with unfinished.open("wb") as f:
        np.savez(f, flat=tokens.flat, offsets=tokens.offsets)
    unfinished.replace(cache)
    return tokens


def _read_tokens(cache: epath.Path, rows: int | None) -> Ragged:
    """Raises ValueError, KeyError, OSError, EOFError or BadZipFile where the file is not what `kept_tokens` wrote."""
    with cache.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        flat, offsets = arrays["flat"], arrays["offsets"]
    whole = offsets.ndim == 1 and len(offsets) and offsets[0] == 0 and offsets[-1] == len(flat) and (np.diff(offsets) >= 2).all()
    if not whole or flat.dtype != np.int32 or len(offsets) != (len(offsets) if rows is None else rows + 1):
        expected = "each other" if rows is None else f"{rows:,} items"
        raise ValueError(f"it holds {len(offsets) - 1:,} texts and {len(flat):,} tokens, which do not fit {expected}")
    return Ragged(flat, offsets)
