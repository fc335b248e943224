"""Text vectors of the catalogue that a stage has made anew, in files of its folder, so that a resume has those that the run had."""

from __future__ import annotations

import numpy as np
from etils import epath

from rec_jax.types import RecJaxError


def _file(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"text_vectors-{step}.npy"


def keep(folder: epath.Path, step: int, table: np.ndarray, *, first: int) -> None:
    """Writes the text vectors [N, D_text] of a step, whole or not at all; those before step `first`, which no resume asks for, go."""
    temporary = folder / "text_vectors.tmp"
    with temporary.open("wb") as f:
        np.save(f, table)
    temporary.replace(_file(folder, step))
    for old in folder.glob("text_vectors-*.npy"):
        if int(old.stem.partition("-")[2]) < first:
            old.unlink()


def read(folder: epath.Path, step: int) -> np.ndarray:
    """The text vectors of a step.

    Raises:
      RecJaxError: they are not there.
    """
    file = _file(folder, step)
    if not file.exists():
        raise RecJaxError(f"{file} is missing, and without it the run cannot go on as it was: bring it back, or begin in another workdir")
    with file.open("rb") as f:
        return np.load(f, allow_pickle=False)
