"""Texts to pre-train an encoder on: those of a prepared data set's items, or plain text in files; and the share that is held out."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from rec_jax.data import text
from rec_jax.data.folders import is_local
from rec_jax.data.readers import files, json_lines
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, bad_input
from rec_jax.types import Ragged, RecJaxError

if TYPE_CHECKING:
    from rec_jax.data.prepare import Prepared

FORMAT = 1  # of the kept tokens of plain text; raise it when the same files give others
STRICT = {"bad_row": "error", "bad_encoding": "error"}
PARQUET_ROWS = 4096  # read at a time


class Corpus(Protocol):
    """Texts that can be gone through as often as needed.

    Attributes:
      name: for people and folders.
      fingerprint: of the texts: the same ones have the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[str]: ...

    def tokens(self, model: str, max_tokens: int) -> Ragged:
        """Token ids [CLS] ... [SEP] by the tokenizer of `model` (a folder, "package:NAME" or hub id), at most `max_tokens` a row; kept."""


class ItemTexts:
    """The item texts of a prepared data set; row i of the tokens is catalogue item i, and a longer text is cut."""

    name = "items"

    def __init__(self, prepared: Prepared):
        self._prepared = prepared

    @property
    def fingerprint(self) -> str:
        return self._prepared.meta["fingerprint"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._prepared.texts())

    def tokens(self, model: str, max_tokens: int) -> Ragged:
        """See `Corpus`; the file is the same that training reads."""
        return text.item_tokens(self._prepared, model, max_tokens)


class TextFiles:
    """Plain text: a file, or a folder with files at any depth, in the order of their paths; .gz too.

    .txt has a text a line (blank lines are passed over), .jsonl an object a line with the text in a field, .parquet the texts in a
    column. Rows whose text is empty are left out and counted. A long text goes on in further pieces, each a row of the tokens.

    Args:
      path: the file or folder, maybe on gs://.
      cache: folder that the tokens are kept in.
      column: field or column with the text.
      on_bad: `config.data.on_bad`, of which bad_row and bad_encoding count here.
      key: where the path comes from, for messages.

    Raises:
      RecJaxError: nothing there, or no file that can be read.
    """

    def __init__(
        self,
        path: str,
        *,
        cache: epath.PathLike,
        column: str = "text",
        on_bad: Mapping[str, str] = STRICT,
        key: str = "config.data.path",
    ):
        self._root, self._column, self._on_bad, self._key = files.resolve(path, key), column, on_bad, key
        self._cache = epath.Path(cache)
        self.files = list(_files(self._root, key))
        self.report, self.empty, self.texts = Report(), 0, 0  # of the last time that all texts were read

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "_", self._root.name).strip(".") or "corpus"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of names and contents of the files (of remote ones the time of the last change) and the column."""
        settings = {"column": self._column, "on_bad": {kind: self._on_bad[kind] for kind in STRICT}}
        whole = {"format": FORMAT, "files": [_identity(f, self._root) for f in self.files], **settings}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def __iter__(self) -> Iterator[str]:
        """The texts that are not empty, with spaces at their ends dropped.

        Raises:
          RecJaxError: a broken file, a row without the field, bad input whose policy is "error"; names file and line. No text at all.
        """
        self.report, self.empty, self.texts = Report(), 0, 0
        for file in self.files:
            for value in KINDS[_suffix(file.name)](file, self._column, self._on_bad, self.report):
                stripped = value.strip()
                if stripped:
                    self.texts += 1
                    yield stripped
                else:
                    self.empty += 1
        if not self.texts:
            raise RecJaxError(f"{self._key}={str(self._root)!r}: no text in {len(self.files)} files ({self.empty} rows are empty)")

    def tokens(self, model: str, max_tokens: int) -> Ragged:
        """See `Corpus`."""

        def make() -> Ragged:
            pieces, without = text.tokenize_in_pieces(self, text.load_tokenizer(model), max_tokens)
            left_out = self.empty + without
            _say(
                f"{self._root}: {self.texts - without:,} texts of {len(self.files):,} files ({left_out:,} empty ones left out) "
                f"in {len(pieces):,} pieces of at most {max_tokens} tokens, {len(pieces.flat):,} tokens"
            )
            for line in self.report.lines():
                _say(line)
            return pieces

        folder = self._cache / f"corpus-{self.name}-{self.fingerprint[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        return text.kept_tokens(folder, model, max_tokens, make)


def split(tokens: Ragged, *, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of texts [N rows] -> (rows to train on, rows held out), ascending int64; at least one text on either side.

    A text's side depends on its tokens and the seed alone: equal texts are on the same side, and a corpus that grows keeps its held-out
    texts. Pieces of one long text count as texts of their own.

    Args:
      share: of the texts to hold out, about.
      seed: of the choice.

    Raises:
      RecJaxError: a share that is none, or fewer than two different texts.
    """
    if not 0.0 < share < 1.0:
        raise RecJaxError(f"held-out share={share}: must lie between 0 and 1, both excluded")
    salt = seed.to_bytes(8, "little", signed=True)
    hashes = [hashlib.blake2b(tokens[i].tobytes(), digest_size=8, salt=salt).digest() for i in range(len(tokens))]
    draw = np.frombuffer(b"".join(hashes), "<u8")
    if len(np.unique(draw)) < 2:
        raise RecJaxError(f"the corpus has {len(tokens)} texts, of which {len(np.unique(draw))} differ: too few to hold one out")
    held_out = draw < np.uint64(share * 2.0**64)
    if not held_out.any():
        held_out = draw == draw.min()
    elif held_out.all():
        held_out = draw != draw.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


# -- files --


def _lines(file: File, column: str, on_bad: Mapping[str, str], report: Report) -> Iterator[str]:
    for number, line in file.lines():
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as e:
            wrong = line[max(0, e.start - 10) : e.end + 10]
            bad_input(report, on_bad, "bad_encoding", f"{file}:{number}", f"{wrong!r} is not UTF-8")


def _fields(file: File, column: str, on_bad: Mapping[str, str], report: Report) -> Iterator[str]:
    for number, row in json_lines.objects(file, on_bad, report):
        value = row.get(column, row)  # null is an empty text, a missing field is none
        if value is None or isinstance(value, str):
            yield value or ""
        elif value is row:
            bad_input(report, on_bad, "bad_row", f"{file}:{number}", f"no field {column!r}; fields: {', '.join(row)}")
        else:
            bad_input(report, on_bad, "bad_row", f"{file}:{number}", f"field {column!r} is no text: {str(value)[:60]!r}")


def _cells(file: File, column: str, on_bad: Mapping[str, str], report: Report) -> Iterator[str]:
    try:
        with file.open() as f:
            table = pq.ParquetFile(f)
            if column not in table.schema_arrow.names:
                raise RecJaxError(f"{file}: no column {column!r}; columns there: {', '.join(table.schema_arrow.names)}")
            kind = table.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise RecJaxError(f"{file}: column {column!r} is {kind}; expected text")
            for rows in table.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                yield from (value or "" for value in rows.column(0).to_pylist())
    except (pa.ArrowException, OSError, *files.BROKEN) as e:
        raise RecJaxError(f"{file}: this is no Parquet file that can be read: {e}") from e


KINDS: dict[str, Callable[[File, str, Mapping[str, str], Report], Iterator[str]]] = {".txt": _lines, ".jsonl": _fields, ".parquet": _cells}


def _suffix(name: str) -> str:
    """The kind of file that a name, without .gz, ends in; "" where it is none."""
    return next((suffix for suffix in KINDS if name.endswith(suffix)), "")


def _files(root: epath.Path, key: str) -> Iterator[File]:
    """The files with texts under a path; hidden ones and other kinds are passed over."""
    kinds = ", ".join(KINDS)
    if not root.exists():
        raise RecJaxError(f"{key}={str(root)!r}: no such file or folder; expected a {kinds} file or a folder of them")
    paths = list(_below(root)) if root.is_dir() else [root]
    found = [File(path, name) for path in paths if _suffix(name := path.name.removesuffix(".gz"))]
    if not found:
        there = ", ".join(path.name for path in paths[:10]) or "nothing"
        raise RecJaxError(f"{key}={str(root)!r} holds no {kinds} file; there is: {there}")
    yield from found


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _identity(file: File, root: epath.Path) -> dict[str, Any]:
    """Name below the root, size, and content of a file, or the time of its last change if it is remote."""
    stat = file.path.stat()
    name = str(file.path).removeprefix(str(root)).lstrip("/") or root.name
    if not is_local(file.path):
        return {"name": name, "size": stat.length, "changed": stat.mtime}
    with open(file.path, "rb") as f:
        return {"name": name, "size": stat.length, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
