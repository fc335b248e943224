"""What one session compiles is there for the next: whole, bounded, of this processor."""

import os
import subprocess
import sys
from pathlib import Path

import compiled

PROGRAM = """
import jax
jax.config.update("jax_compilation_cache_dir", {folder!r})
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3)).block_until_ready()
print(sum("cache_hits" in name for name in hits), sum("cache_misses" in name for name in hits))
"""


def hits_and_misses(folder):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(folder=str(folder))], capture_output=True, text=True, check=True)
    return [int(x) for x in done.stdout.split()]


def test_the_next_session_compiles_nothing_again(tmp_path):
    first, kept, second = tmp_path / "first", tmp_path / "kept", tmp_path / "second"
    hits, misses = hits_and_misses(first)
    assert (hits, misses > 0) == (0, True)
    compiled.keep(first, kept)
    compiled.bring(kept, second)
    assert hits_and_misses(second) == [misses, 0]


def test_what_is_kept_is_whole_and_bounded(tmp_path):
    here, kept = tmp_path / "here", tmp_path / "kept"
    compiled.bring(kept, here)  # nothing is kept yet
    (here / f"a{compiled.ENDING}").write_bytes(b"program")
    (here / "a-atime").write_bytes(b"1")
    compiled.keep(here, kept)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == {f"a{compiled.ENDING}": b"program"}
    (here / f"b{compiled.ENDING}").write_bytes(b"another")
    compiled.keep(here, kept, most=7)
    assert len(list(kept.iterdir())) == 2
    (here / f"a{compiled.ENDING}").unlink()
    compiled.keep(here, kept, most=7)
    assert [file.name for file in kept.iterdir()] == [f"b{compiled.ENDING}"]


def test_it_lies_below_the_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = compiled.place()
    assert place.parent == tmp_path / "rec_jax_tests"
    assert place == compiled.place()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled.place().parent.parent == Path(os.path.expanduser("~/.cache"))
