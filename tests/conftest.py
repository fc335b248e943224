"""What holds for every test: eight simulated CPU devices, no network, caches of its own. Set before anything imports jax."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import compiled
import pytest

DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
# Half of the tests' time would be XLA optimising programs that run for milliseconds. A level that is set already stays.
if "--xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and a fork would deadlock

_cache = ""  # this session's $REC_JAX_CACHE, where this process made it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update_goldens", action="store_true", help="write golden texts anew instead of comparing; read the diff")


def pytest_configure(config: pytest.Config) -> None:
    """One cache for the session: pytest-xdist's workers and commands inherit it, and share what is prepared and compiled in it.

    What is compiled stays for the sessions after it (tests/compiled.py).
    """
    global _cache
    if not hasattr(config, "workerinput"):
        _cache = os.environ["REC_JAX_CACHE"] = tempfile.mkdtemp(prefix="rec_jax_test_cache_")
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a folder that is set already stays
            compiled.bring(compiled.place(), Path(_cache) / "compiled")
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(_cache) / "compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # else a program's name depends on its folder's
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    here = Path(_cache) / "compiled"
    if _cache and here.exists() and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # not one that was interrupted
        try:
            compiled.keep(here, compiled.place())
        except OSError as e:
            print(f"\nwhat was compiled is not kept for the next session: {e}", file=sys.stderr)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cache:
        shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, named by $REC_JAX_DATA; without it the test is skipped."""
    place = os.environ.get("REC_JAX_DATA", "")
    if not place:
        pytest.skip("REC_JAX_DATA is not set: it names the folder of real data sets (ml-1m, amazon-beauty, ...)")
    if not Path(place).is_dir():
        pytest.fail(f"REC_JAX_DATA={place} is no folder")
    return Path(place)


@pytest.fixture
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """True where golden texts are to be written anew (--update_goldens)."""
    return bool(request.config.getoption("--update_goldens"))
