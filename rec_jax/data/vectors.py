"""Files of given vectors by item id (images, audio, other embeddings): .npz, .safetensors or .parquet.

.npz          arrays `ids` [n] (text or whole numbers) and `vectors` [n, D_v]
.safetensors  a tensor `vectors` [n, D_v]; the ids as a tensor `ids` [n] of whole numbers, or, where they are text, as a JSON list under
              `ids` in the file's metadata
.parquet      a column of ids (item_id, item or id) and one of lists of numbers (`vectors`, or the only one)
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data.readers import files, item_file
from rec_jax.types import RecJaxError

KEY = "config.data.features.vectors"
NAMED = re.compile(r"([\w.-]+)=(.+)")
EXPECTED = "expected `ids` [n] and `vectors` [n, width]"


def sources(paths: Sequence[str]) -> dict[str, files.File]:
    """Entries of `config.data.features.vectors`, "PATH" or "NAME=PATH" -> name -> file; without a name it is that of the file.

    Raises:
      RecJaxError: no such file, one of another kind, two of one name.
    """
    out: dict[str, files.File] = {}
    for entry in paths:
        named = NAMED.fullmatch(entry)
        file = files.single(named[2] if named else entry, KEY)
        name = named[1] if named else file.name.rpartition(".")[0]
        ending = file.name.rpartition(".")[2]
        if ending not in READERS:
            raise RecJaxError(f"{KEY} names {entry!r}: expected a file that ends in {', '.join('.' + end for end in READERS)}")
        if name in out:
            raise RecJaxError(f"{KEY} has two files named {name!r}; give one another name: 'NAME={file}'")
        out[name] = file
    return out


def read(file: files.File) -> tuple[list[str], np.ndarray]:
    """A file of vectors -> (ids as text [n], vectors [n, D_v] float32).

    Raises:
      RecJaxError: a broken file, what is missing or of another shape, an id twice, a vector that is not finite or of another width than
        the others; names the id and the row.
    """
    ids, vectors = READERS[file.name.rpartition(".")[2]](file)
    if vectors.ndim != 2 or not vectors.size:
        raise RecJaxError(f"{file}: `vectors` has shape {vectors.shape}; {EXPECTED}")
    if len(ids) != len(vectors):
        raise RecJaxError(f"{file}: {len(ids):,} ids and {len(vectors):,} vectors; {EXPECTED}")
    vectors = vectors.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        row = int(wrong[0])
        value = vectors[row][~np.isfinite(vectors[row])][0]
        raise RecJaxError(
            f"{file}: the vector of item {ids[row]!r} (row {row + 1}) holds {value}, as {len(wrong):,} of {len(ids):,} do; leave out items "
            "without a vector: they count as none"
        )
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        if rows.setdefault(name, row) != row:
            raise RecJaxError(f"{file}: item id {name!r} has vectors in rows {rows[name] + 1} and {row + 1}; leave one of them")
    return ids, vectors


def aligned(ids: Sequence[str], vectors: np.ndarray, items: Sequence[str]) -> np.ndarray:
    """Ids [n] with vectors [n, D_v], catalogue ids [N] -> vectors [N, D_v]; rows of NaN for items that have none."""
    rows = {name: row for row, name in enumerate(ids)}
    place = np.fromiter((rows.get(name, -1) for name in items), np.int64, len(items))
    return np.where(place[:, None] >= 0, vectors[np.maximum(place, 0)], np.float32(np.nan))


def _npz(file: files.File) -> tuple[list[str], np.ndarray]:
    try:
        with file.open() as f, np.load(f, allow_pickle=False) as arrays:
            if not {"ids", "vectors"} <= set(arrays.files):
                raise RecJaxError(f"{file} has the arrays {', '.join(arrays.files) or 'none'}; {EXPECTED}")
            return _texts(arrays["ids"], file), _numbers(arrays["vectors"], file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        if isinstance(e, RecJaxError):
            raise
        advice = "; save ids as an array of text (np.array(ids, dtype=str)), not of objects" if "pickle" in str(e) else ""
        raise RecJaxError(f"{file}: this is no .npz that can be read: {e}{advice}") from e


def _safetensors(file: files.File) -> tuple[list[str], np.ndarray]:
    import safetensors
    from safetensors.numpy import load

    data = file.read()
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RecJaxError(f"{file}: this is no .safetensors that numpy can read: {type(e).__name__}: {e}; store float32 or float16") from e
    if "vectors" not in tensors or ("ids" not in tensors and "ids" not in metadata):
        raise RecJaxError(
            f"{file} has the tensors {', '.join(tensors) or 'none'} and the metadata {', '.join(metadata) or 'none'}; {EXPECTED}, ids as a "
            "tensor of whole numbers or as a JSON list in the metadata"
        )
    if "ids" in tensors:
        return _texts(tensors["ids"], file), _numbers(tensors["vectors"], file)
    try:
        ids = json.loads(metadata["ids"])
    except json.JSONDecodeError as e:
        raise RecJaxError(f"{file}: `ids` in the metadata is no JSON list: {e}") from e
    if not isinstance(ids, list) or not all(type(i) in (str, int) for i in ids):
        raise RecJaxError(f"{file}: `ids` in the metadata is no JSON list of texts or whole numbers")
    return [str(i) for i in ids], _numbers(tensors["vectors"], file)


def _parquet(file: files.File) -> tuple[list[str], np.ndarray]:
    frame = pl.read_parquet(file.plain() or file.read())
    key = next((c for c in item_file.ID_COLUMNS if c in frame.columns), None)
    lists = [c for c, dtype in frame.schema.items() if isinstance(dtype, (pl.List, pl.Array))]
    column = "vectors" if "vectors" in lists else lists[0] if len(lists) == 1 else None
    if key is None or column is None:
        raise RecJaxError(
            f"{file}: expected a column {' or '.join(item_file.ID_COLUMNS)}, and one of lists named `vectors`, or one alone; "
            f"columns there: {', '.join(f'{c} ({dtype})' for c, dtype in frame.schema.items())}"
        )
    empty = frame[key].is_null()
    if empty.any():
        raise RecJaxError(f"{file}: row {int(empty.arg_true()[0]) + 1}: column {key} is empty")
    ids = _texts(frame[key].to_numpy(), file) if frame.schema[key] != pl.String else frame[key].to_list()
    values = frame[column].cast(pl.List(frame.schema[column].inner))  # type: ignore[attr-defined]
    widths = values.list.len().fill_null(0).to_numpy()
    usual = int(np.bincount(widths).argmax()) if len(widths) else 0
    other = np.flatnonzero(widths != usual)
    if len(other):
        row = int(other[0])
        raise RecJaxError(
            f"{file}: the vector of item {ids[row]!r} (row {row + 1}) has {widths[row]} numbers, and most have {usual}; mend it, or leave "
            "out items without a vector"
        )
    inner = frame.schema[column].inner  # type: ignore[attr-defined]
    if not inner.is_numeric():
        raise RecJaxError(f"{file}: column {column} holds lists of {inner}, expected numbers")
    if not usual:
        return ids, np.zeros((len(ids), 0), np.float32)
    return ids, values.explode(empty_as_null=True).cast(pl.Float32).fill_null(float("nan")).to_numpy().reshape(len(ids), usual)


READERS: dict[str, Callable[[files.File], tuple[list[str], np.ndarray]]] = {
    "npz": _npz,
    "safetensors": _safetensors,
    "parquet": _parquet,
}


def _texts(ids: np.ndarray, file: Any) -> list[str]:
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS":
        raise RecJaxError(f"{file}: `ids` has shape {ids.shape} and type {ids.dtype}; expected texts or whole numbers [n]")
    return [i.decode("utf-8") if isinstance(i, bytes) else str(i) for i in ids.tolist()]


def _numbers(vectors: np.ndarray, file: Any) -> np.ndarray:
    if vectors.dtype.kind not in "fiu":
        raise RecJaxError(f"{file}: `vectors` has the type {vectors.dtype}; expected float32 or float16")
    return vectors
