"""launch/local_processes.sh: what each process gets, and how all of them end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "local_processes.sh"


def environment(tmp_path: Path, **env: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return {**kept, "TMPDIR": str(tmp_path), **env}


def start(tmp_path: Path, *flags: str, script: Path = SCRIPT, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [script, *flags],
        env=environment(tmp_path, **env),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(tmp_path: Path, *flags: str, script: Path = SCRIPT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    process = start(tmp_path, *flags, script=script, **env)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(flags, process.returncode, out, err)


def log(tmp_path: Path, process: int) -> str:
    (file,) = tmp_path.glob(f"rec_jax_processes.*/process-{process}.log")
    return file.read_text()


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


def runs(pid: str) -> bool:
    """Whether a process runs; one that has ended and is not collected yet does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_each_process_knows_its_number_and_the_first_is_on_the_screen(tmp_path):
    say = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS, $JAX_PLATFORMS, $XLA_FLAGS"'
    flags = "--xla_force_host_platform_device_count=8 --other=1"
    done = run(tmp_path, "3", "--devices_per_process=2", "--", "bash", "-c", say, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    address = re.search(r"127\.0\.0\.1:\d+", done.stdout)[0]
    for process, text in enumerate([done.stdout, log(tmp_path, 1), log(tmp_path, 2)]):
        assert text == f"{process} of 3 at {address}, cpu, --other=1 --xla_force_host_platform_device_count=2\n"
    assert f"3 processes at {address}; logs of 1 to 2: {tmp_path}/rec_jax_processes." in done.stderr


def test_what_the_user_set_stays(tmp_path):
    say = 'echo "$JAX_PLATFORMS $XLA_FLAGS ${JAX_LOCAL_DEVICE_IDS:-}"'
    done = run(tmp_path, "1", "--", "bash", "-c", say, JAX_PLATFORMS="cuda,cpu", XLA_FLAGS="--other=1")
    assert done.stdout == "cuda,cpu --other=1 0\n"  # and a GPU of its own for each process


def test_processes_find_each_other(tmp_path):
    """rec_jax.processes.start() in each, a sum over both, and an end that leaves no thread within jax's client."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, threading\n"
        "import jax\n"
        "import numpy as np\n"
        "from rec_jax import processes\n"
        "atexit.register(lambda: print('threads:', [t.name for t in threading.enumerate() if t.name == 'other processes']))\n"
        "processes.start()\n"
        "print('watched:', any(t.name == 'other processes' for t in threading.enumerate()))\n"
        "with processes.together():\n"
        "    print(jax.process_count(), jax.device_count(), processes.total(np.asarray(jax.process_index() + 1)))\n"
    )
    done = run(tmp_path, "2", "--devices_per_process=2", "--", sys.executable, str(program), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for said in (done.stdout, log(tmp_path, 1)):
        for line in ("watched: True", "2 4 3", "threads: []"):
            assert line in said.splitlines()


def test_one_that_dies_stops_the_others_and_shows_its_last_lines(tmp_path):
    dies = 'if ((JAX_PROCESS_ID == 1)); then for i in {1..99}; do echo "line $i"; done; exit 7; fi; exec sleep 60'
    began = time.monotonic()
    done = run(tmp_path, "3", "--", "bash", "-c", dies)
    assert time.monotonic() - began < 10
    assert done.returncode == 7
    assert "process 1 ended with code 7; stopping the others" in done.stderr
    shown = re.findall(r"^\[p1\] (.*)$", done.stderr, flags=re.MULTILINE)
    assert shown == [f"line {i}" for i in range(80, 100)]


def test_one_that_does_not_stop_is_ended_with_its_children(tmp_path):
    dies = 'if ((JAX_PROCESS_ID)); then sleep 0.5; exit 1; fi; trap "" TERM; sleep 60 & echo $!; sleep 60'
    began = time.monotonic()
    done = run(tmp_path, "2", "--", "bash", "-c", dies)
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert "ending what still runs after 5 s" in done.stderr
    wait_for(lambda: not runs(done.stdout.strip()))


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "INT", 130), (signal.SIGTERM, "TERM", 143)])
def test_a_signal_reaches_all_and_waits_for_them(tmp_path, number, name, code):
    saves = f'trap "sleep 0.5; echo saved; exit 130" {name}; touch ready.$JAX_PROCESS_ID; while true; do sleep 0.05; done'
    process = start(tmp_path, "2", "--", "bash", "-c", saves)
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == 2)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code
    assert "stopping all 2 processes" in err
    assert out == "saved\n"
    assert log(tmp_path, 1) == "saved\n"


def test_a_second_signal_ends_them_at_once(tmp_path):
    process = start(tmp_path, "2", "--", "bash", "-c", 'trap "" INT; echo $$ >ready.$JAX_PROCESS_ID; while true; do sleep 0.05; done')
    try:
        wait_for(lambda: all((tmp_path / f"ready.{i}").exists() and (tmp_path / f"ready.{i}").read_text() for i in (0, 1)))
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None  # the first one waits for the state to be saved
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "ending all at once" in err
    for i in (0, 1):
        assert not runs((tmp_path / f"ready.{i}").read_text().strip())


def test_trains_with_logs_in_the_workdir(tmp_path):
    root = tmp_path / "a project"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "launch").mkdir()
    script = root / "launch" / "local_processes.sh"
    shutil.copy(SCRIPT, script)
    python = root / ".venv" / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    done = run(tmp_path, "2", "--config=c.py", "--config.a=2 epochs", "--workdir=my work", script=script)
    assert done.returncode == 0, done.stderr
    expected = "-m|rec_jax.train|--config=c.py|--config.a=2 epochs|--workdir=my work|"
    assert done.stdout == expected
    assert (tmp_path / "my work" / "process-1.log").read_text() == expected
    assert not (tmp_path / "my work" / "process-0.log").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the first argument is the number of processes"),
        (["--config=c.py"], "the first argument is the number of processes, 1 to 999, not '--config=c.py'"),
        (["0", "--workdir=w"], "not '0'"),
        (["2", "--devices_per_process=none", "--workdir=w"], "--devices_per_process=none is no number"),
        (["2", "--workdir=w", "--devices_per_process=2"], "--devices_per_process=2 must come first"),
        (["2", "--config=c.py"], "--workdir= is needed"),
        (["2", "--"], "there is no command after --"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path, flags, message):
    done = run(tmp_path, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert message in line
