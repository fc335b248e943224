"""Input files as they are: plain, .gz, a member of a .zip, in a folder, or embedded in the package."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.resources
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

from etils import epath

from rec_jax.types import RecJaxError

BUILTIN = "builtin:"
BLOCK = 1 << 24  # bytes read at a time
BROKEN = (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError)  # what unpacking a damaged archive raises


@dataclasses.dataclass(frozen=True)
class File:
    """One input file; `name` is its base name without .gz, `member` its name inside the archive `path`."""

    path: epath.Path
    name: str
    member: str = ""

    def __str__(self) -> str:
        """How messages name it."""
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    def open(self) -> IO[bytes]:
        """The file's bytes, unpacked."""
        if self.member:
            inner = zipfile.ZipFile(self.path.open("rb")).open(self.member)  # noqa: SIM115 - the member keeps its archive open
            return gzip.GzipFile(fileobj=inner) if self.member.endswith(".gz") else inner  # type: ignore[return-value]
        if self.path.name.endswith(".gz"):
            return gzip.GzipFile(fileobj=self.path.open("rb"))  # type: ignore[return-value]
        return self.path.open("rb")

    def plain(self) -> str:
        """The local path where the file lies unpacked on this machine; "" where it does not."""
        packed = self.member or self.path.name.endswith(".gz")
        return "" if packed or "://" in str(self.path) else os.fspath(self.path)

    def read(self) -> bytes:
        """All bytes, unpacked.

        Raises:
          RecJaxError: a broken archive.
        """
        try:
            with self.open() as f:
                return f.read()
        except BROKEN as e:
            raise RecJaxError(f"{self}: the archive is broken ({e}); fetch it again") from e

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line without its end) of lines that are not blank."""
        for number, raw in enumerate(self.raw_lines(), 1):
            line = raw.rstrip(b"\r\n")
            if line.strip():
                yield number, line

    def raw_lines(self) -> Iterator[bytes]:
        """Every line with its end.

        Raises:
          RecJaxError: a broken archive.
        """
        number = 0
        try:
            with self.open() as f:
                for line in f:
                    number += 1
                    yield line
        except BROKEN as e:
            raise RecJaxError(f"{self}: the archive is broken after line {number} ({e}); fetch it again") from e


def resolve(path: str, key: str = "config.data.path") -> epath.Path:
    """A path from the config -> where it lies; "builtin:NAME" is a data set inside the package.

    Raises:
      RecJaxError: the key is empty, or there is no such data set in the package.
    """
    if not path:
        raise RecJaxError(f"{key} is empty; set it to the file or folder to read, e.g. --{key}=DIR")
    if not path.startswith(BUILTIN):
        return epath.Path(path).expanduser()
    root = epath.Path(os.fspath(importlib.resources.files("rec_jax.data").joinpath("builtin")))  # type: ignore[call-overload]
    names = sorted(p.name for p in root.iterdir() if p.is_dir())
    if path.removeprefix(BUILTIN) not in names:
        raise RecJaxError(f"{key}={path!r}: the package has no such data set; it has: {', '.join(BUILTIN + n for n in names)}")
    return root / path.removeprefix(BUILTIN)


def folder(path: epath.Path) -> dict[str, File]:
    """Files of a folder or a .zip by base name without .gz; of two with one name the one higher up, then the first."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if not p.is_dir())
        found = [File(path / n, n.removesuffix(".gz")) for n in names]
    else:
        found = [File(path, os.path.basename(m).removesuffix(".gz"), m) for m in _members(path)]
    out: dict[str, File] = {}
    for file in found:
        out.setdefault(file.name, file)
    return out


def folder_with(path: str, *names: str, key: str = "config.data.path") -> dict[str, File]:
    """The files of the folder or .zip at a path of the config, by base name; `names` are among them.

    Raises:
      RecJaxError: one of them is not there.
    """
    where = resolve(path, key)
    found = folder(where) if where.is_dir() or where.name.endswith(".zip") else {}
    if not all(name in found for name in names):
        expected = " and ".join((", ".join(names[:-1]), names[-1]))
        raise RecJaxError(f"{key}={path!r}: expected a folder or .zip with {expected}; found {', '.join(sorted(found)) or 'nothing'}")
    return found


def single(path: str, key: str = "config.data.path") -> File:
    """The one file at a path of the config; of a .zip its only member.

    Raises:
      RecJaxError: no such file, a folder, or a .zip of several files.
    """
    where = resolve(path, key)
    if where.is_dir():
        raise RecJaxError(
            f"{key}={path!r} is a folder; this reader takes a file. In it: {', '.join(list(folder(where))[:10]) or 'nothing'}"
        )
    if not where.exists():
        raise RecJaxError(f"{key}={path!r}: no such file")
    if where.name.endswith(".zip"):
        members = _members(where)
        if len(members) != 1:
            raise RecJaxError(f"{key}={path!r} holds {len(members)} files ({', '.join(members[:10])}); unpack it and name one of them")
        return File(where, os.path.basename(members[0]).removesuffix(".gz"), members[0])
    return File(where, where.name.removesuffix(".gz"))


def _members(path: epath.Path) -> list[str]:
    """Files inside a .zip, those higher up first, without what macOS adds."""
    try:
        with path.open("rb") as f:
            names = zipfile.ZipFile(f).namelist()
    except zipfile.BadZipFile as e:
        raise RecJaxError(f"{path}: this is no readable .zip ({e}); fetch it again") from e
    names = [n for n in names if not n.endswith("/") and not n.startswith("__MACOSX/")]
    return sorted(names, key=lambda n: (n.count("/"), n))
