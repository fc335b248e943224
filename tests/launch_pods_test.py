"""launch/{tpu,gke,slurm}.sh: the exact commands of a dry run, and what is refused; all scripts are sound."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "launch"
SCRIPTS = sorted(file.name for file in (ROOT / "launch").glob("*.sh"))

PLACE = "--project=my-project --zone=us-west4-a"
TRAIN = "--config=configs/movielens.py:smoke --config.train.duration='2 epochs' --workdir=gs://bucket/bert"
TPU, GKE, SLURM = f"--name=bert {PLACE}", f"--cluster=pods {PLACE}", "--name=bert"
# golden -> command lines, each run with --dry_run
CASES = {
    "tpu.create": [
        f"tpu.sh create {TPU} --type=v5litepod-256",
        f"tpu.sh create {TPU} --type=v6e-256 --spot",
        f"tpu.sh create {TPU} --type=v5p-128 --reserved",
        f"tpu.sh create {TPU} --type=v4-8 --version=tpu-ubuntu2204-base --reservation=ours -- --network=mtu9k --internal-ips",
    ],
    "tpu.setup": [f"tpu.sh setup {TPU}", f"tpu.sh setup {TPU} --worker=3"],
    "tpu.train": [
        f"tpu.sh train {TPU} --type=v5litepod-256 {TRAIN}",
        f"tpu.sh train {TPU} --type=v5litepod-8 --config=configs/movielens.py --workdir=runs/one_host",
    ],
    "tpu.look": [f"tpu.sh logs {TPU}", f"tpu.sh logs {TPU} --worker=all --lines=5", f"tpu.sh status {TPU}"],
    "tpu.end": [f"tpu.sh stop {TPU}", f"tpu.sh stop {TPU} --grace=900", f"tpu.sh delete {TPU}"],
    "gke.create": [
        f"gke.sh create {GKE} --type=v5litepod-256 --slices=2",
        f"gke.sh create {GKE} --type=tpu7x-4x4x4 --reservation=ours -- --num-cubes=1",
    ],
    "gke.train": [f"gke.sh train {GKE} --name=bert --type=v5litepod-256 --slices=2 {TRAIN} -- --use-vertex-tensorboard"],
    "gke.look": [f"gke.sh logs {GKE} --name=bert", f"gke.sh logs {GKE} --name=bert --worker=all", f"gke.sh status {GKE} --name=bert"],
    "gke.end": [f"gke.sh stop {GKE} --name=bert", f"gke.sh delete {GKE}"],
    "slurm.submit": [
        f"slurm.sh submit {SLURM} --nodes=4 {TRAIN}",
        f"slurm.sh submit {SLURM} --nodes=2 --gpus=4 --tasks=gpu --time=2-12 --partition=gpu --account=us {TRAIN} -- --constraint=h100",
    ],
    "slurm.look": [f"slurm.sh logs {SLURM}", f"slurm.sh status {SLURM}"],
    "slurm.end": [f"slurm.sh stop {SLURM}"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A git checkout with the scripts and a config, in a folder whose name must be quoted; beside it a bin folder."""
    folder = tmp_path_factory.mktemp("pods")
    root = folder / "it's here"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "configs").mkdir()
    (root / "configs" / "movielens.py").write_text("")
    (folder / "bin").mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(root)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "begin"]):
        subprocess.run([*git, *command], check=True)
    return root


def launch(project: Path, line: str, **env: str) -> subprocess.CompletedProcess[str]:
    script, *flags = shlex.split(line)
    path = f"{project.parent / 'bin'}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CLOUDSDK_")}
    return subprocess.run(
        [project / "launch" / script, *flags],
        env={**kept, "PATH": path, "USER": "me", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c", **env}
        | {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def as_dry_run(line: str) -> str:
    line, *handed_on = line.split(" -- ")
    return " -- ".join([f"{line} --dry_run", *handed_on])


def dry(project: Path, line: str) -> str:
    """What a dry run prints."""
    done = launch(project, as_dry_run(line))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a call that was refused; nothing was printed or run."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert " error: " in line
    return line


def stand_in(project: Path, name: str, text: str) -> None:
    """A command on PATH that only pretends."""
    file = project.parent / "bin" / name
    file.write_text("#!/usr/bin/env bash\n" + text)
    file.chmod(0o755)


@pytest.mark.parametrize("golden", CASES)
def test_dry_run_prints_the_commands(project, golden, update_goldens):
    commit = subprocess.run(["git", "-C", project, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    text = ""
    for line in CASES[golden]:
        printed = dry(project, line)
        for command in printed.splitlines():
            assert shlex.split(command), command  # a shell reads it
        text += f"$ ./launch/{as_dry_run(line)}\n{printed}\n"
    # The folder's name holds a quote, so that paths are seen to be quoted; the golden shows ROOT for it.
    text = text.replace(str(project).replace("'", "'\\''"), "ROOT").replace(commit.stdout.strip(), "COMMIT")
    file = GOLDENS / f"{golden}.txt"
    if update_goldens:
        file.write_text(text)
    assert text == file.read_text(), (
        f"{file.name} differs; if that is meant: pytest {Path(__file__).name} --update_goldens, and read the diff"
    )


def test_no_golden_is_left_over():
    assert {f.stem for f in GOLDENS.iterdir()} == set(CASES)


def test_quoting_survives_two_shells(project):
    """A train flag arrives at the last program as it was typed: through the local shell, and through the remote one."""
    value = """it's "2 epochs" $HOME `x` \\ ;"""
    printed = dry(project, f"tpu.sh train {TPU} {TRAIN} --config.a={shlex.quote(value)}")
    (remote,) = [w.removeprefix("--command=") for w in shlex.split(printed) if w.startswith("--command=")]
    remote = remote.replace("./rec_jax/launch/worker.sh", "printf '%s\\n'")
    seen = subprocess.run(["bash", "-c", remote], capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines() == [
        "start",
        "--config=configs/movielens.py:smoke",
        "--config.train.duration=2 epochs",
        f"--config.a={value}",
        "--workdir=gs://bucket/bert",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tpu.sh fly", "fly is no command; commands are create, setup, train"),
        ("tpu.sh create --name=bert --zone=us-west4-a", "--project= is needed.*CLOUDSDK_CORE_PROJECT"),
        ("tpu.sh create --name=bert --project=my-project", "--zone= is needed.*CLOUDSDK_COMPUTE_ZONE"),
        ("tpu.sh create --name=bert --project='My Project' --zone=us-west4-a", "--project='My Project' is no project ID"),
        ("tpu.sh create --name=bert --project=my-project --zone=us-west4", "--zone=us-west4 is no zone, e.g."),
        (f"tpu.sh create {PLACE}", "--name= is needed"),
        (f"tpu.sh create --name=My_TPU {PLACE}", "--name=My_TPU is no name: a small letter, then"),
        (f"tpu.sh create --name=ends- {PLACE}", "--name=ends- is no name"),
        (f"tpu.sh create --name={'a' * 41} {PLACE}", "at most 40"),
        (f"tpu.sh create {TPU} --type=h100", "--type=h100 is no TPU type"),
        (f"tpu.sh create {TPU} --type=v9-256", "--type=v9-256 is not known; types are v5litepod-N"),
        (f"tpu.sh create {TPU} --spot --reserved", "exclude each other"),
        (f"tpu.sh create {TPU} --zome=x", "there is no flag --zome=; flags with a value are --project=, --zone="),
        (f"tpu.sh create {TPU} --sopt", "there is no flag --sopt; .*without a value --spot"),
        (f"tpu.sh create {TPU} --type", "--type has no value; write --type=VALUE"),
        (f"tpu.sh create {TPU} v5p-128", "v5p-128 is no flag"),
        (f"tpu.sh create {TPU} --config=configs/movielens.py", "goes with train, not with create"),
        (f"tpu.sh train {TPU} {TRAIN} -- --network=x", "flags after -- go with create only"),
        (f"tpu.sh train {TPU} --workdir=gs://b/w", "--config= is needed: what to train"),
        (f"tpu.sh train {TPU} --config.seed=1 --workdir=gs://b/w", "--config= is needed: what to train"),
        (f"tpu.sh train {TPU} --config=configs/nope.py --workdir=gs://b/w", "configs/nope.py is no file of this project"),
        (f"tpu.sh train {TPU} --config=configs/movielens.py", "--workdir= is needed"),
        (f"tpu.sh train {TPU} --config=configs/movielens.py --workdir=runs/w", "--workdir=runs/w .*--type=v5litepod-16 has 4.*gs://BUCKET/NAME"),
        (f"tpu.sh train {TPU} --config=configs/movielens.py --workdir=gs://w", "--workdir=gs://w .*gs://BUCKET/NAME"),
        (f"tpu.sh logs {TPU} --worker=two", "--worker=two is neither a number nor all"),
        (f"tpu.sh logs {TPU} --lines=few", "--lines=few is no whole number"),
        (f"gke.sh train --name=bert {PLACE} {TRAIN}", "--cluster= is needed"),
        (f"gke.sh create {GKE} --name=bert", "--name= is a run's; create takes --cluster= only"),
        (f"gke.sh train {GKE} {TRAIN}", "--name= is needed"),
        (f"gke.sh train {GKE} --name=b --config=configs/movielens.py --workdir=/tmp/w", "--workdir=/tmp/w .*gs://BUCKET/NAME"),
        (f"gke.sh train {GKE} --name=b {TRAIN} --slices=0", "--slices=0 is no whole number of at least 1"),
        (f"gke.sh train {GKE} --name=b {TRAIN} --priority=urgent", "none of very-low, low"),
        (f"slurm.sh submit {SLURM} --nodes=2 --config=configs/movielens.py --workdir=/tmp/w", "--workdir=/tmp/w lies on one host"),
        (f"slurm.sh submit {SLURM} {TRAIN} --tasks=core", "--tasks=core is neither host nor gpu"),
        (f"slurm.sh submit {SLURM} {TRAIN} --time=soon", "--time=soon is no time limit"),
        (f"slurm.sh submit {SLURM} {TRAIN} --gpus=0", "--gpus=0 is no whole number of at least 1"),
        (f"slurm.sh submit {SLURM} {TRAIN} --uncommitted", "the job runs this folder as it is"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(project, line, message):
    done = launch(project, as_dry_run(line))
    assert re.search(message, error_of(done)), done.stderr


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "slurm.sh"])
def test_help_names_every_flag_and_default(project, script):
    done = launch(project, f"{script} --help")
    assert done.returncode == 0
    text = (project / "launch" / script).read_text()
    (known,) = [line for line in text.splitlines() if line.strip().startswith('parse_flags "')]
    flags, switches = shlex.split(known)[1:3]
    for flag in [*flags.split(), "name", "workdir", "config"]:
        assert f"--{flag}=" in done.stdout, flag
    for switch in [*switches.split(), "dry_run"]:
        assert f"--{switch}" in done.stdout, switch
    assert "not set" in launch(project, "tpu.sh --help").stdout
    assert "my-zone" in launch(project, "tpu.sh --help", CLOUDSDK_COMPUTE_ZONE="my-zone").stdout


def test_commands_run_in_order_and_stop_at_the_first_failure(project):
    log = project.parent / "calls"
    log.write_text("")
    stand_in(project, "gcloud", f'echo "$*" >>{shlex.quote(str(log))}\n[[ $* != *" scp "* || -z ${{FAIL:-}} ]]\n')
    done = launch(project, f"tpu.sh setup {TPU}")
    assert done.returncode == 0, done.stderr
    scp, ssh = log.read_text().splitlines()
    assert " scp " in scp
    assert " ssh " in ssh
    sent = project / "build" / "launch" / "bert.tar.gz"
    listed = subprocess.run(["tar", "-tzf", sent], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"launch/worker.sh", "configs/movielens.py"} <= set(listed)

    log.write_text("")
    assert launch(project, f"tpu.sh setup {TPU}", FAIL="1").returncode != 0
    assert len(log.read_text().splitlines()) == 1


def test_changes_that_are_not_committed_are_sent_only_when_asked_for(project):
    stand_in(project, "gcloud", "true\n")
    config = project / "configs" / "movielens.py"
    config.write_text("changed = 1\n")
    try:
        assert "not committed" in error_of(launch(project, f"tpu.sh setup {TPU}"))
        assert launch(project, f"tpu.sh setup {TPU} --uncommitted").returncode == 0
        sent = ["tar", "-xzOf", project / "build" / "launch" / "bert.tar.gz", "configs/movielens.py"]
        assert subprocess.run(sent, capture_output=True, text=True, check=True).stdout == "changed = 1\n"
    finally:
        config.write_text("")


def test_status_asks_the_hosts_only_when_there_are_any(project):
    stand_in(project, "gcloud", 'if [[ $* == *describe* ]]; then echo "$STATE"; else echo "asked"; fi\n')
    assert launch(project, f"tpu.sh status {TPU}", STATE="WAITING_FOR_RESOURCES").stdout == ""
    assert launch(project, f"tpu.sh status {TPU}", STATE="ACTIVE").stdout == "asked\n"


# ---- the scripts themselves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_sound(script):
    file = ROOT / "launch" / script
    assert os.access(file, os.X_OK) == (not script.startswith("_"))
    subprocess.run(["bash", "-n", file], check=True)
    found = shutil.which("shellcheck", path=f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed; it comes with the extra dev")
    checked = subprocess.run([found, file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
