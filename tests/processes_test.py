"""Two processes of two devices against one of four: batches, losses, stop, failure. This file is also what the processes run."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax import processes
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.train import loop
from rec_jax.types import RecJaxError

CONFIG = {
    "towers.item.ids": True,
    "mesh.layout": "sharded",
    "train.duration": "8 steps",
    "train.log_every": "1 steps",
    "train.eval_every": "2 steps",
    "train.checkpoint_every": "2 steps",
}
DEVICES = "--xla_force_host_platform_device_count"


class Recorded(list):
    """Records that note which of them are read."""

    def __init__(self, records):
        super().__init__(records)
        self.read: list[int] = []

    def __getitem__(self, user):
        self.read.append(int(user))
        return super().__getitem__(user)


def batches_of(c, shards):
    """The batches of some shards, and the records that they read."""
    world = tiny.World()
    records = Recorded(world.source())
    lengths = world.train_lengths()
    return Batches(records, lengths, BatchSpec.from_config(c), seed=c.seed, texts=tiny.tokens(), shards=shards), records


def seen(c, shards):
    """Digests of the first five batches, by shard, and the users read for them."""
    batches, records = batches_of(c, shards)
    iterator, digests = iter(batches), {}
    for n in range(5):
        batch = next(iterator)
        for place, shard in enumerate(shards):
            parts = b"".join(np.ascontiguousarray(leaf[place]).tobytes() for leaf in jax.tree.leaves(batch))
            digests[f"{n}/{shard}"] = hashlib.sha256(parts).hexdigest()
    return {"digests": digests, "read": records.read}


def train(folder, mesh, evaluate):
    c = tiny.config(**CONFIG)
    task = tiny.task(c, folder, mesh=mesh, evaluate=evaluate)
    batches, _ = batches_of(c, mesh_lib.local_shards(c.batch.shards, mesh))
    return loop.train(dataclasses.replace(task, batches=batches), mesh)


def worker(folder: Path, kind: str) -> None:
    """One of the processes."""
    processes.STUCK_SECONDS, processes.POLL_SECONDS = 3.0, 0.5
    processes.start()
    index, count = processes.place_of()
    assert count == jax.process_count() == 2

    def evaluate(params, *, step):
        assert all(x.is_fully_addressable and len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))
        if step == 4 and index == 1:
            if kind == "stop":
                signal.raise_signal(signal.SIGTERM)
            elif kind == "fail":
                raise RecJaxError("the disk of process 1 is full")
            elif kind == "die":
                time.sleep(8)  # first it only keeps the others waiting
                os._exit(7)
        return {"valid/ndcg@10": 0.1 * step + index}

    with processes.together():
        mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2})
        out = seen(tiny.config(**CONFIG), mesh_lib.local_shards(8, mesh))
        out["total"] = processes.total(np.asarray([1.0 + index, 2.0])).tolist()
        out["gathered"] = processes.gather({"index": index})
        kept: list[int] = []
        out["first"] = processes.first(lambda: kept.append(index) or index)
        try:
            train(folder / "work", mesh, evaluate)
        except loop.Interrupted as e:
            out["stopped"] = str(e)
        (folder / f"out-{index}.json").write_text(json.dumps(out))


def start(folder, kind):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = " ".join(word for word in os.environ["XLA_FLAGS"].split() if not word.startswith(DEVICES))
    started = []
    for index in range(2):
        places = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        env = {**os.environ, **places, "XLA_FLAGS": f"{flags} {DEVICES}=2"}
        with (folder / f"err-{index}").open("w") as err, (folder / f"log-{index}").open("w") as log:
            command = [sys.executable, __file__, str(folder), kind]
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=err))
    return started


def ended(folder, started, seconds=200):
    """Exit codes and error texts."""
    try:
        codes = [p.wait(timeout=seconds) for p in started]
    finally:
        for p in started:
            p.kill()
    return codes, [(folder / f"err-{index}").read_text() for index in range(2)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Two processes, one of which was asked to stop at step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    codes, texts = ended(folder, start(folder, "stop"))
    assert codes == [0, 0], texts[0][-2000:] + texts[1][-2000:]
    return folder, [json.loads((folder / f"out-{index}.json").read_text()) for index in range(2)]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_each_process_makes_and_reads_its_share(stopped):
    _, outs = stopped
    whole = seen(tiny.config(**CONFIG), range(8))
    assert outs[0]["digests"] | outs[1]["digests"] == whole["digests"], "the batches are those of one process"
    assert not outs[0]["digests"].keys() & outs[1]["digests"].keys()
    counts = [collections.Counter(out["read"]) for out in outs]
    assert counts[0] + counts[1] == collections.Counter(whole["read"]), "no record is read twice for what one process reads once"
    for out in outs:
        assert 0.3 < len(out["read"]) / len(whole["read"]) < 0.7


def test_what_processes_tell_each_other(stopped):
    _, outs = stopped
    for index, out in enumerate(outs):
        assert out["total"] == [3.0, 4.0]
        assert out["gathered"] == [{"index": 0}, {"index": 1}]
        assert out["first"] == index


def test_a_stop_asked_of_one_stops_all_and_one_process_goes_on(stopped, tmp_path):
    folder, outs = stopped
    assert outs[0]["stopped"] == outs[1]["stopped"]
    assert outs[0]["stopped"].startswith("stopped at step "), "and not at the end"
    four = mesh_lib.make_mesh({"data": 2, "fsdp": 2}, devices=jax.devices()[:4])
    train(tmp_path, four, lambda params, *, step: {"valid/ndcg@10": 0.1 * step})
    expected = losses(tmp_path)
    two = losses(folder / "work")
    assert 4 < len(two) < 8
    np.testing.assert_allclose(two, expected[: len(two)], rtol=1e-4)
    one = mesh_lib.make_mesh({"data": 1}, devices=jax.devices()[:1])
    progress = train(folder / "work", one, lambda params, *, step: {"valid/ndcg@10": 0.1 * step})
    assert progress.best_step == 8, "process 0's figures counted, not the higher ones of process 1"
    np.testing.assert_allclose(losses(folder / "work"), expected, rtol=1e-4)


@pytest.mark.slow
def test_one_that_fails_is_named_by_the_others(tmp_path):
    codes, texts = ended(tmp_path, start(tmp_path, "fail"), seconds=120)
    assert codes == [1, 1]
    assert "error: process 1 of 2 stops: process 1: RecJaxError: the disk of process 1 is full" in texts[1]
    assert "error: process 0 of 2 stops: process 1: RecJaxError: the disk of process 1 is full" in texts[0]
    assert "The same command goes on from the last checkpoint." in texts[0]


@pytest.mark.slow
def test_one_that_is_stuck_is_named_and_one_that_dies_ends_the_others(tmp_path):
    started = start(tmp_path, "die")
    assert started[1].wait(timeout=120) == 7
    gone = time.monotonic()
    codes, texts = ended(tmp_path, started, seconds=processes.HEARTBEAT_SECONDS + 20)
    assert time.monotonic() - gone < processes.HEARTBEAT_SECONDS + 20
    assert codes[0] not in (0, None)
    assert "nothing has gone on for 3 s. process 0: step 4, validation; process 1: step 4, validation" in texts[0]
    assert "process 0 of 2 stops" in texts[0] or "another task died" in texts[0]


def test_processes_need_all_three_variables(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(RecJaxError, match="only JAX_NUM_PROCESSES set"):
        processes.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(RecJaxError, match="expected 0 <= id < number"):
        processes.start()


def test_one_process_alone():
    assert processes.place_of() == (0, 1)
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.first(lambda: 3) == 3
    np.testing.assert_array_equal(processes.total(np.ones(2)), np.ones(2))
    with pytest.raises(RecJaxError, match="bad"), processes.together():
        raise RecJaxError("bad")


@pytest.mark.slow
def test_the_main_job_in_two_processes_is_that_of_one(tmp_path):
    """The command line, all stages of configs/movielens.py:smoke on eight devices, some minutes."""
    words = [sys.executable, "-m", "rec_jax.train", "--config=configs/movielens.py:smoke", "--config.mesh.fsdp=2"]
    words += ["--config.mesh.layout=sharded"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    two, one = tmp_path / "two", tmp_path / "one"
    started = []
    for index in range(2):
        env = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        started.append(subprocess.Popen([*words, f"--workdir={two}"], env={**env, "XLA_FLAGS": f"{DEVICES}=4"}, stdout=subprocess.PIPE))
    outs = [p.communicate(timeout=1200)[0].decode() for p in started]
    assert [p.returncode for p in started] == [0, 0]
    assert "test: items of the history removed" in outs[0]
    assert not [line for line in outs[1].splitlines() if "[Gloo]" not in line], "only process 0 speaks"
    subprocess.run([*words, f"--workdir={one}"], env={**os.environ, "XLA_FLAGS": f"{DEVICES}=8"}, check=True, timeout=1200)
    for stage in config_lib.read_config(one).stages:
        np.testing.assert_allclose(losses(two / stage), losses(one / stage), rtol=1e-4)
    figures = [json.loads((folder / "eval" / "test.json").read_text()) for folder in (one, two)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
