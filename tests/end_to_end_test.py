"""The commands as a user types them: train, kill and go on, evaluate, recommend."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rec_jax.data import describe

# One device, as a user has it, not the eight of the other tests.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
TITLES = [f"{color} {thing}" for color in ("Red", "Green", "Blue", "Black") for thing in ("Car", "House", "Bird", "Tree", "Boat", "Shoe")]
FLAGS = [
    "--config.batch.history_length=16",
    "--config.towers.dim=16",
    "--config.towers.user.layers=1",
    "--config.train.duration=12 steps",
    "--config.train.eval_every=3 steps",
    "--config.train.checkpoint_every=3 steps",
    "--config.train.log_every=1 steps",
    "--config.eval.k=(5,10)",
    "--config.eval.baselines=('popularity','sequence_knn')",
    "--config.eval.fuse=sequence_knn",
]


def command(*words):
    return [sys.executable, "-m", *words]


def run(*words, code=0):
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=240, check=False, env=ENVIRONMENT)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random, lines = np.random.default_rng(0), []
    for user in range(60):
        items = (random.integers(24) + np.cumsum(random.choice([1, 1, 5], random.integers(6, 14)))) % 24
        lines.append(" ".join(map(str, [user, *(items + 1)])))
    lines[7] += " 1 3" * 8  # a history that is longer than FLAGS take at once
    lines.append("few 1 2")
    (folder / "events.txt").write_text("\n".join(lines) + "\n")
    (folder / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{n}\t{t}\n" for n, t in enumerate(TITLES, 1)))
    return folder


def train(data, workdir):
    words = ["rec_jax.train", "--config=configs/sequences.py", f"--config.data.path={data}/events.txt", f"--workdir={workdir}"]
    return [*words, f"--config.data.items={data}/items.tsv", "--config.data.on_bad.duplicate_event=keep", *FLAGS]


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    out = run(*train(data, folder)).stdout
    assert "sequence_knn" in out
    told = out[out.index(" users, ") : out.index("GFLOP/s")].splitlines()[1:-1]
    assert told[:2] == ["  left out 1 users with fewer events than filter.min_user_events (short_user)", f"  {describe.MORE}"]
    assert [line.split(":")[:2] for line in told[2:4]] == [
        ["  histories in the test", " 1 of 60 have more than 16 events (the longest 24)"],
        ["  histories in training", " 1 of 60 have more than 17 events (the longest 23)"],
    ]
    assert "sorted by time" not in out  # the sequences have no times
    assert "test: items of the history removed" in out
    assert "\nmodel + sequence_knn " in out
    return folder


def test_the_workdir_has_everything(workdir):
    figures = json.loads((workdir / "eval" / "test.json").read_text())
    assert {"test/ndcg@10", "test_all/hr@10", "popularity/ndcg@10", "sequence_knn/hr@10"} <= set(figures)
    assert figures["test_cold/users"] > 0
    assert all(0 <= v <= 1 for name, v in figures.items() if not name.endswith("cold/users"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in lines if "valid/ndcg@10" in row] == [3, 6, 9, 12]


def test_killed_and_started_again_it_ends_with_the_same_figures(data, workdir, tmp_path):
    process = subprocess.Popen(command(*train(data, tmp_path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and '"step": 7' in metrics.read_text()):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "eval" / "test.json").exists()
    assert "going on from step" in run(*train(data, tmp_path)).stdout
    assert (tmp_path / "eval" / "test.json").read_bytes() == (workdir / "eval" / "test.json").read_bytes()


def test_evaluating_again_gives_the_same_file(workdir):
    before = (workdir / "eval" / "test.json").read_bytes()
    out = run("rec_jax.eval", f"--workdir={workdir}").stdout
    assert "popularity" in out
    assert (workdir / "eval" / "test.json").read_bytes() == before


def test_neighbours_beside_the_model_have_figures_of_their_own(workdir):
    figures = json.loads((workdir / "eval" / "test.json").read_text())
    alone = json.loads((workdir / "fused" / "eval" / "test.json").read_text())
    assert figures["fused/ndcg@10"] == alone["test/ndcg@10"]
    assert figures["fused/test_all/hr@10"] == alone["test_all/hr@10"]
    assert figures["fused/weight/sequence_knn"] == alone["weight/sequence_knn"]
    out = run("rec_jax.eval.compare", f"--a={workdir}", f"--b=both={workdir}/fused").stdout
    assert "test ndcg@10: 60 users" in out
    refused = run("rec_jax.eval", f"--workdir={workdir}", "--config.towers.dim=8", code=2).stderr
    assert "--config.towers.dim=8: an evaluation takes eval.baselines, eval.fuse, eval.ease_max_items" in refused


def test_another_evaluation_of_the_same_workdir(workdir):
    before = (workdir / "eval" / "test.json").read_bytes()
    more = ["--config.eval.baselines=('recent_popularity','ials','bpr')", "--config.eval.fuse=ials"]
    out = run("rec_jax.eval", f"--workdir={workdir}", *more).stdout
    assert "\nmodel + ials " in out
    figures = json.loads((workdir / "eval" / "test.json").read_text())
    assert {"recent_popularity/ndcg@10", "ials/hr@10", "bpr/ndcg@10"} <= set(figures)
    assert "popularity/ndcg@10" not in figures
    run("rec_jax.eval", f"--workdir={workdir}")
    assert (workdir / "eval" / "test.json").read_bytes() == before


def test_recommends_by_title_and_as_json(workdir):
    words = ["rec_jax.serve", "recommend", f"--model={workdir}", "--history=Red Car", "--history=blue bird", "--k=4"]
    out = run(*words).stdout
    assert "after Red Car, blue bird:" in out
    answer = json.loads(run(*words, "--json").stdout)
    names = [item["name"] for item in answer["items"]]
    assert len(names) == 4
    assert set(names) <= set(TITLES) - {"Red Car", "Blue Bird"}
    assert all(name in out for name in names)
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)


def test_bad_words_get_one_clear_message(data, workdir, tmp_path):
    wrong = run("rec_jax.serve", "recommend", f"--model={workdir}", "--history=Red Cart", code=2)
    assert "no item is called 'Red Cart'. Nearest: Red Car" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    other = run(*train(data, workdir), "--config.seed=1", code=2)
    assert "config.seed: 0 there, 1 now" in other.stderr
    assert "no workdir" in run("rec_jax.eval", f"--workdir={tmp_path}/none", code=2).stderr
    missing = run("rec_jax.train", "--config=configs/nothing.py", f"--workdir={tmp_path}", code=2)
    assert "config file 'configs/nothing.py' does not exist" in missing.stderr


CHAIN = '''
from ml_collections import ConfigDict
from rec_jax.defaults import defaults

def get_config(arg=None):
    """Histories written out as text train the encoder; a history tower goes on from it, frozen."""
    c = defaults()
    c.data.reader = "sequences"
    c.data.on_bad.duplicate_event = "keep"
    c.towers.dim = 16
    c.train.update({"duration": "2 steps", "log_every": "1 steps", "eval_every": "1 steps", "checkpoint_every": "1 steps"})
    c.batch.update({"shards": 2, "text_rows": 2, "user_rows": 2, "history_length": 8})
    c.eval.baselines = ("popularity",)
    c.optimizer.learning_rate = 1e-3
    c.stages = ("written", "history")
    c.stage.written = ConfigDict({
        "towers": {"user": {"kind": "text"}, "text": {"source": "tokens"}},
        "objectives": {"info_nce": {"candidates": "batch"}},
        "train": {"eval_every": "2 steps"},  # its last step is its best, which has moved
    })
    c.stage.history = ConfigDict({"train": {"duration": "4 steps"}})
    return c
'''


@pytest.mark.slow
def test_a_frozen_stage_goes_on_from_the_encoder_that_the_last_one_trained(data, tmp_path):
    (tmp_path / "chain.py").write_text(CHAIN)
    workdir = tmp_path / "work"
    words = [f"--config={tmp_path}/chain.py", f"--workdir={workdir}", f"--config.data.path={data}/events.txt"]
    out = run("rec_jax.train", *words, f"--config.data.items={data}/items.tsv").stdout
    assert out.index("written: 2 steps") < out.index("history: 4 steps") < out.index("test: items of the history removed")
    lines = [json.loads(line) for line in (workdir / "history" / "metrics.jsonl").read_text().splitlines()]
    watched = [row["valid/ndcg@10"] for row in lines if "valid/ndcg@10" in row]
    assert len(watched) == 5, "the start of a later stage is validated too"
    (kept,) = (workdir / "history").glob("item_vectors-*.npy")
    vectors = np.load(kept)
    kept.unlink()
    run("rec_jax.eval", f"--workdir={workdir}", "--split=valid")
    again = json.loads((workdir / "eval" / "valid.json").read_text())
    assert again["valid/ndcg@10"] == pytest.approx(max(watched), abs=1e-6)
    # Loading finds the trained encoder again: with the pretrained one, the vectors that it makes anew would be others.
    np.testing.assert_allclose(np.load(kept), vectors, atol=1e-5)
    texts = {file.name for file in (workdir / "history" / "eval").iterdir()}
    assert texts == {"test.json", "valid.json"}


FOUR = [
    "--config.data.on_bad.duplicate_event=keep",
    "--config.towers.dim=16",
    "--config.towers.user.layers=1",
    "--config.batch.history_length=16",
    "--config.towers.text.scratch.words=80",
    "--config.towers.text.scratch.width=16",
    "--config.train.duration=8 steps",
    "--config.stage.pretrain.train.duration=4 steps",
    "--config.stage.task.train.duration=6 steps",
    "--config.stage.distill.train.duration=6 steps",
    "--config.train.eval_every=3 steps",
    "--config.train.checkpoint_every=2 steps",
]
STAGES = ("pretrain", "contrastive", "task", "distill")


def four_stages(data, workdir, *more):
    words = ["rec_jax.train", "--config=configs/beauty_chain.py:smoke", f"--config.data.path={data}/events.txt", f"--workdir={workdir}"]
    return [*words, f"--config.data.items={data}/items.tsv", *FOUR, *more]


def test_the_four_stages_are_a_chain_that_goes_on_where_it_was_killed_and_is_rerun_in_part(data, tmp_path):
    process = subprocess.Popen(command(*four_stages(data, tmp_path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    metrics, deadline = tmp_path / "task" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    out = run(*four_stages(data, tmp_path)).stdout
    assert "pretrain: done before" in out
    assert "contrastive: done before" in out
    assert "what each stage cost, and what it left" in out
    assert "pretrain: texts alone" in out
    kept = {name: json.loads((tmp_path / name / "eval" / "test.json").read_text()) for name in STAGES}
    whole = json.loads((tmp_path / "eval" / "test.json").read_text())
    assert whole["test/ndcg@10"] == kept["distill"]["test/ndcg@10"]
    assert {"test/hr@10", "popularity/ndcg@10", "texts_alone/ndcg@10"} <= set(whole)
    assert (tmp_path / "pretrain" / "encoder" / "model.safetensors").exists()
    assert len(np.load(tmp_path / "eval" / "test_users.npz")["ndcg@10"]) == 60

    config = (tmp_path / "config.json").read_bytes()
    changed = "--config.stage.distill.optimizer.learning_rate=0.0005"
    refused = run(*four_stages(data, tmp_path, changed), code=2).stderr
    assert "config.optimizer.learning_rate: 0.0002 there, 0.0005 now" in refused
    assert "--stages=distill" in refused
    assert (tmp_path / "config.json").read_bytes() == config, "what was refused is not kept"
    again = run(*four_stages(data, tmp_path, changed, "--stages=distill")).stdout
    assert "task: done before" in again
    assert "distill: begun anew" in again
    assert json.loads((tmp_path / "task" / "eval" / "test.json").read_text()) == kept["task"]
