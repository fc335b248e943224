"""The file of mined negatives: of each user K catalogue items that the model ranks high and the user did not take.

An npz without pickle: `items` [U, K] int32 by row of the users table, -1 where there are fewer; `scores` [U, K] float32; `settings`, JSON
text that names the prepared data by its fingerprint. `rec_jax.eval.mine` writes it, `config.data.negatives` names it for training.
"""

from __future__ import annotations

import json
import os
import zipfile
from typing import Any

import numpy as np
from etils import epath

from rec_jax.types import RecJaxError

FORMAT = 1


def write(file: epath.PathLike, items: np.ndarray, scores: np.ndarray, settings: dict[str, Any], *, fingerprint: str) -> None:
    """items [U, K] int32, scores [U, K] float32 -> the file, whole or not at all."""
    file = epath.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "fingerprint": fingerprint, **settings}, sort_keys=True)
    temporary = file.parent / f"{file.name}.{os.getpid()}.tmp"
    with temporary.open("wb") as f:
        np.savez(f, items=items.astype(np.int32), scores=scores.astype(np.float32), settings=np.asarray(text))
    temporary.replace(file)


def read(file: epath.PathLike, *, fingerprint: str, users: int, items: int) -> np.ndarray:
    """The file that `config.data.negatives` names -> items [U, K] int32.

    Args:
      fingerprint: of the prepared data that it must have been mined on.
      users, items: U and N of that data.

    Raises:
      RecJaxError: no such file, no file of negatives, one of other data.
    """
    file = epath.Path(file).expanduser()
    mine = "python -m rec_jax.eval.mine --workdir=W --out=FILE.npz"
    if not file.exists():
        raise RecJaxError(f"config.data.negatives={str(file)!r}: no such file; make one: {mine}")
    try:
        with file.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
            table, settings = arrays["items"], json.loads(str(arrays["settings"]))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as e:
        raise RecJaxError(f"config.data.negatives={str(file)!r} is no file of negatives ({type(e).__name__}: {e}); make one: {mine}") from e
    if settings.get("format") != FORMAT:
        raise RecJaxError(f"config.data.negatives={str(file)!r} has format {settings.get('format')}, this version reads {FORMAT}; {mine}")
    if settings["fingerprint"] != fingerprint:
        raise RecJaxError(
            f"config.data.negatives={str(file)!r} was mined on other data (fingerprint {settings['fingerprint'][:12]}, "
            f"this data has {fingerprint[:12]}): its rows are other users. Mine again on a workdir of this data: {mine}"
        )
    if table.dtype != np.int32 or table.ndim != 2 or table.shape[0] != users or not table.shape[1]:
        raise RecJaxError(f"config.data.negatives={str(file)!r}: items are {table.shape} {table.dtype}, expected [{users}, K] int32")
    if table.min() < -1 or table.max() >= items:
        raise RecJaxError(f"config.data.negatives={str(file)!r} names item {table.max()}, but there are {items} items")
    return table
