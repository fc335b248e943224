"""What tests compile, kept from one session to the next: half of a suite's time is XLA compiling programs that it compiled before.

A session works in a folder of its own, which begins with what is kept and gives its new programs back when it ends by itself. So what is
kept is whole, whatever was killed, and sessions beside each other do not meet. A program's name is the hash of all that it is compiled
from (jax's key); another processor has another folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from pathlib import Path

MOST = 500 * 2**20  # bytes; beyond them what is kept is begun anew
ENDING = "-cache"  # of the names of jax's programs


def place() -> Path:
    """The folder for this processor, below $XDG_CACHE_HOME or ~/.cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.machine(), platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}) or lines
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "rec_jax_tests" / hashlib.sha256("\n".join(processor).encode()).hexdigest()[:12]


def bring(kept: Path, here: Path) -> None:
    """Puts what is kept into a session's folder."""
    here.mkdir(parents=True, exist_ok=True)
    for file in kept.glob(f"*{ENDING}"):
        try:
            os.link(file, here / file.name)
        except FileNotFoundError:
            continue  # another session has begun anew
        except OSError:  # another file system
            shutil.copyfile(file, here / file.name)


def keep(here: Path, kept: Path, *, most: int = MOST) -> None:
    """Gives a session's programs to what is kept, each whole or not at all.

    Raises:
      OSError: the folder cannot be written.
    """
    kept.mkdir(parents=True, exist_ok=True)
    if sum(file.stat().st_size for file in kept.iterdir()) > most:
        shutil.rmtree(kept)
        kept.mkdir(exist_ok=True)
    for file in here.glob(f"*{ENDING}"):
        if not (kept / file.name).exists():
            temporary = kept / f"{file.name}.{os.getpid()}"
            shutil.copyfile(file, temporary)
            temporary.replace(kept / file.name)
