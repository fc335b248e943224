"""Folders that are complete or not there at all, on this machine or remote (gs://).

A folder counts as complete where its marker file is there. On this machine it is written beside its place and renamed; a remote one,
which cannot be renamed in one go, is written here and copied, its marker last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether the path lies on this machine's file system."""
    return "://" not in str(path)


@contextlib.contextmanager
def new(folder: epath.Path, marker: str) -> Iterator[Path]:
    """Yields an empty local folder to write in, marker file included; it becomes `folder` where the block ends well, and goes else.

    Where another program has completed the folder meanwhile, theirs stays. What a killed program left is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if is_local(folder):
        _remove_leftovers(Path(folder))
        unfinished = Path(folder.parent) / f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        unfinished.mkdir()
    else:
        unfinished = Path(tempfile.mkdtemp(prefix="rec_jax-"))
    try:
        yield unfinished
        if is_local(folder):
            _rename(unfinished, Path(folder), marker)
        else:
            _copy(epath.Path(unfinished), folder, marker)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def local_copy(folder: epath.Path, marker: str) -> Path:
    """A complete folder -> itself, or the copy of a remote one under $REC_JAX_MIRROR or ~/.cache/rec_jax/mirror, made once."""
    if is_local(folder):
        return Path(folder)
    copy = epath.Path(os.environ.get("REC_JAX_MIRROR") or "~/.cache/rec_jax/mirror").expanduser() / folder.name
    if not (copy / marker).exists():
        print(f"copying {folder} to {copy}", file=sys.stderr, flush=True)
        with new(copy, marker) as unfinished:
            _copy(folder, epath.Path(unfinished), marker)
    return Path(copy)


def _rename(unfinished: Path, folder: Path, marker: str) -> None:
    if (folder / marker).exists():
        return
    if folder.exists():
        print(f"{folder} is incomplete: replaced", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / marker).exists():  # else another program was faster, just now
            raise


def _copy(source: epath.Path, target: epath.Path, marker: str) -> None:
    """Copies what is in the folder, the marker last."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == marker):
        if path.is_dir():
            _copy(path, target / path.name, marker)
        else:
            path.copy(target / path.name, overwrite=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed programs on this machine have left of the same folder."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-{socket.gethostname()}-*"):
        pid = int(leftover.name.rsplit("-", 2)[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)  # two programs may clear the same one
        except PermissionError:
            continue  # alive, and another user's
