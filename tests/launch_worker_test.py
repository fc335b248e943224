"""launch/worker.sh, what each host of a pod runs: real runs on this one."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands in for .venv/bin/python -u -m rec_jax.train FLAGS; it saves its state at SIGTERM, as the loop does.
TRAINING = r"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit; fi
echo "flags $*; $JAX_PLATFORMS ${JAX_PROCESS_ID:-} of ${JAX_NUM_PROCESSES:-} at ${JAX_COORDINATOR_ADDRESS:-}"
if [[ $* == *--config=bad* ]]; then echo "error: bad config"; exit 2; fi
if [[ $* == *--config=stuck* ]]; then trap '' TERM; fi
if [[ $* == *--config=good* ]]; then trap 'echo "state saved"; exit 130' TERM; fi
while true; do sleep 0.05; done
"""


class Host:
    """A host with a home folder of its own, where ~/rec_jax is set up."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.root = folder / "rec_jax"
        (self.root / ".venv" / "bin").mkdir(parents=True)
        (self.root / ".venv" / "ready").write_text("")
        (self.root / "launch").mkdir()
        shutil.copy(ROOT / "launch" / "worker.sh", self.root / "launch")
        python = self.root / ".venv" / "bin" / "python"
        python.write_text(TRAINING)
        python.chmod(0o755)
        self.env = {**os.environ, "HOME": str(folder), "JAX_PLATFORMS": "cpu", "REC_JAX_WATCH_SECONDS": "1"}

    def run(self, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [self.root / "launch" / "worker.sh", *flags]
        return subprocess.run(command, env={**self.env, **env}, cwd="/", capture_output=True, text=True, timeout=60, check=False)

    @property
    def log(self) -> str:
        return (self.home / "rec_jax_run" / "train.log").read_text()

    def kill(self) -> None:
        pid = self.home / "rec_jax_run" / "pid"
        if pid.exists() and "is training" in self.run("status").stdout:
            os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def worker(tmp_path):
    made = Host(tmp_path)
    yield made
    made.kill()


def test_worker_starts_detached_shows_stops_and_goes_on(worker):
    assert "not running" in worker.run("status").stdout
    started = worker.run("start", "--config=good", "--config.a=2 epochs")  # returns though the run goes on
    assert started.returncode == 0, started.stderr
    assert "is training" in worker.run("status").stdout
    assert "is training already" in worker.run("start", "--config=good").stderr
    assert "is training; stop it first" in worker.run("install").stderr

    follow = subprocess.Popen([worker.root / "launch" / "worker.sh", "logs"], env=worker.env, stdout=subprocess.PIPE, text=True)
    try:
        stopped = worker.run("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert "state saved" in stopped.stdout
        seen, _ = follow.communicate(timeout=20)  # ends because the run has ended
    finally:
        follow.kill()
    assert "flags -u -m rec_jax.train --config=good --config.a=2 epochs; cpu" in seen
    assert "state saved" in seen

    assert worker.run("stop").returncode == 0  # nothing to do
    assert worker.run("start", "--config=good").returncode == 0
    assert worker.log.count("state saved") == 1  # the log goes on
    assert worker.log.count("UTC: python -m rec_jax.train") == 2


def test_worker_says_at_once_that_a_run_died(worker):
    started = worker.run("start", "--config=bad")
    assert started.returncode == 1
    assert "error: bad config" in started.stderr
    assert "ended at once" in started.stderr
    assert "not running" in worker.run("status").stdout


def test_worker_does_not_kill_what_does_not_stop(worker):
    worker.run("start", "--config=stuck")
    stopped = worker.run("stop", "1")
    assert stopped.returncode == 1
    assert "still runs 1 s after SIGTERM" in stopped.stderr
    assert "is training" in worker.run("status").stdout


def test_worker_that_is_not_set_up(worker):
    (worker.root / ".venv" / "ready").unlink()
    assert "is not set up" in worker.run("start", "--config=good").stderr


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ("a:8470:10.0.0.2,b:8470:10.0.0.3,c:8470:10.0.0.4", "1 of 3 at 10.0.0.2:8482"),
        ("host-0,host-1", "1 of 2 at host-0:8482"),
        ("a:8470:10.0.0.2", " of  at "),
    ],
)
def test_worker_joins_the_hosts_of_a_slice(worker, endpoints, expected):
    """From the metadata server, where jax's own detection looks too, since no environment variable of a TPU VM names the hosts."""
    answers = {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.removeprefix("/computeMetadata/v1/instance/attributes/")].encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"127.0.0.1:{server.server_port}"
        started = worker.run("start", "--config=good", JAX_PLATFORMS="tpu,cpu", GCE_METADATA_IP=place, no_proxy="127.0.0.1")
    finally:
        server.shutdown()
        server.server_close()
    assert started.returncode == 0, started.stderr
    assert f"tpu,cpu {expected}\n" in worker.log


def test_worker_without_metadata_is_an_error(worker):
    started = worker.run("start", "--config=good", JAX_PLATFORMS="tpu,cpu", GCE_METADATA_IP="127.0.0.1:1", no_proxy="127.0.0.1")
    assert started.returncode == 1
    assert "has no worker-network-endpoints: is it a TPU VM?" in started.stderr
    assert "not running" in worker.run("status").stdout


def test_worker_install_replaces_the_code_and_keeps_the_environment(worker):
    new = worker.home / "rec_jax.new"
    (new / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "worker.sh", new / "launch")
    setup = new / "launch" / "setup.sh"
    setup.write_text('#!/usr/bin/env bash\necho "set up with $EXTRAS at $0"\n')
    setup.chmod(0o755)
    (worker.root / "old.py").write_text("")
    (worker.root / "runs").mkdir()
    command = [new / "launch" / "worker.sh", "install"]
    done = subprocess.run(command, env={**worker.env, "EXTRAS": "tpu"}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"set up with tpu at {worker.root}/launch/setup.sh" in done.stdout
    assert sorted(p.name for p in worker.root.iterdir()) == [".venv", "launch", "runs"]


def test_worker_install_gets_a_python_where_the_image_has_an_old_one(worker):
    """As on TPU VMs, whose Ubuntu has Python 3.10: uv comes from the lock, with its hashes, and brings a Python for setup.sh."""
    tools = worker.home / "bin"
    tools.mkdir()
    for name in ("awk", "bash", "cp", "dirname", "env", "find", "hostname", "mkdir", "ps", "rm", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    calls = worker.home / "calls"
    old = tools / "python3"
    old.write_text(f'#!/usr/bin/env bash\nif [[ $1 == -c ]]; then exit 1; fi\necho "python3 $*" >>{calls}\n')
    uv = worker.home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(f'#!/usr/bin/env bash\necho "uv $*" >>{calls}\nif [[ $2 == find ]]; then echo /their/python3.11; fi\n')
    setup = worker.root / "launch" / "setup.sh"
    setup.write_text('#!/usr/bin/env bash\necho "set up with $PYTHON"\n')
    for file in (old, uv, setup):
        file.chmod(0o755)
    (worker.root / "requirements.lock").write_text("a==1 \\\n    --hash=x\nuv==2 \\\n    --hash=y\nz==3\n")
    (worker.root / ".venv" / "bin" / "python").unlink()

    done = worker.run("install", PATH=str(tools), PYTHON="")
    assert done.returncode == 0, done.stderr
    assert "set up with /their/python3.11" in done.stdout
    lock = worker.home / "rec_jax_run" / "uv.lock"
    assert lock.read_text() == "uv==2 \\\n    --hash=y\n"
    assert calls.read_text().splitlines() == [
        f"python3 -m pip install --quiet --user --no-deps --require-hashes -r {lock}",
        "uv python install --quiet 3.11",
        "uv python find 3.11",
    ]
