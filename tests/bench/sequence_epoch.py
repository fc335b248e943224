"""One training epoch of SASRec with the full softmax on MovieLens-100K: ours against RecBole 1.2.1's.

    python tests/bench/sequence_epoch.py --data=DIR [--peer_python=PYTHON] [--epochs=5] [--peer_epochs=1]

DIR holds ml-100k (u.data and the rest). PYTHON is an interpreter with recbole 1.2.1, torch and what these need; without it only our own
row is measured. Both sides: 2 layers of width 64 (inner 256, 2 heads), dropout 0.5, histories of at most 50 items, Adam at 1e-3,
cross-entropy over the whole catalogue on dot products of ID vectors, about 2,000 targets a batch, fp32, the same THREADS cores; the last
two events of each user are left out. RecBole makes a training row of every prefix of a history, padded to 50 places, and predicts one
item of it; ours packs whole histories, cut into windows of 50, and predicts the next item at every place. So each side sees each event but
a user's first as a target once an epoch, and ours encodes it once, theirs up to 50 times. At the first places of a long history's later
windows ours sees less of the past than theirs.

The clock runs over batches and steps; data are read and programs are compiled before. Our epoch is the median of some, scaled from the
targets that it took to those that the data have; the floor is its step's matrix products alone at the speed of a large one. Exits 1 where
our epoch is not at least 40 x as fast. Measure on a quiet machine: the sides run one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
TARGET = 40.0
LAYERS, WIDTH, INNER, HEADS, LENGTH, DROPOUT, RATE = 2, 64, 256, 2, 50, 0.5, 1e-3
PEER_BATCH = 2048  # prefixes
SHARDS, ROWS = 8, 5  # of our batch: 2,000 places
FORMAT = "{:8}{:>10}{:>12}{:>10}{:>14}{:>12}"


def two_threads() -> None:
    """Holds this process, and what it starts, to THREADS of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def peak_memory() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# -- the peer's process: torch and RecBole, nothing of ours --


def serve_peer(order: dict[str, Any]) -> None:
    """{folder of ml-100k/ml-100k.inter, epochs} -> a JSON line {seconds: one an epoch, targets, loss: of the first epoch, memory}."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    two_threads()
    torch.set_num_threads(THREADS)
    answer, sys.stdout = sys.stdout, sys.stderr
    sys.argv = sys.argv[:1]  # RecBole reads it
    settings = {
        "data_path": order["folder"],
        "checkpoint_dir": order["folder"],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_size": WIDTH,
        "inner_size": INNER,
        "hidden_dropout_prob": DROPOUT,
        "attn_dropout_prob": DROPOUT,
        "learning_rate": RATE,
        "train_batch_size": PEER_BATCH,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "use_gpu": False,
        "show_progress": False,
    }
    config = Config(model="SASRec", dataset="ml-100k", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train, _, _ = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    seconds, losses = [], []
    for epoch in range(order["epochs"]):
        began = time.perf_counter()
        losses.append(trainer._train_epoch(train, epoch) / len(train))
        seconds.append(time.perf_counter() - began)
    out = {"seconds": seconds, "targets": len(train.dataset), "loss": losses[0], "memory": peak_memory()}
    print(json.dumps(out), file=answer, flush=True)


def run_peer(python: str, data: Path, epochs: int) -> dict[str, Any]:
    """What `serve_peer` says of the data in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ml-100k"
        place.mkdir()
        rows = [line.split("\t") for line in (data / "ml-100k" / "u.data").read_text().splitlines()]
        lines = ["user_id:token\titem_id:token\ttimestamp:float", *(f"{user}\t{item}\t{when}" for user, item, _, when in rows)]
        (place / "ml-100k.inter").write_text("\n".join(lines) + "\n")
        order = json.dumps({"folder": folder, "epochs": epochs})
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run(
            [python, str(Path(__file__).resolve()), f"--serve_peer={order}"],
            stdout=subprocess.PIPE, text=True, check=False, env=environment, cwd=folder,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the peer's process ended with code {done.returncode}; its words stand above")
    return json.loads(done.stdout.splitlines()[-1])


# -- ours --


def run_ours(data: Path, cache: str, epochs: int) -> dict[str, Any]:
    """The same of our train step, with {compile: seconds, floor: seconds an epoch, speed: FLOP/s, steps}."""
    import jax
    import jax.numpy as jnp
    from etils import epath

    from rec_jax import config as config_lib
    from rec_jax import mesh as mesh_lib
    from rec_jax.data import prepare
    from rec_jax.data.pipeline import prefetched
    from rec_jax.eval.model import towers_of
    from rec_jax.towers import BertSpec
    from rec_jax.train import loop, plan, stages
    from rec_jax.train import optimizer as optimizer_lib
    from rec_jax.train.step import make_train_step
    from rec_jax.types import Ragged

    values = {
        "data.reader": "movielens", "data.path": str(data / "ml-100k"), "data.cache": cache, "data.on_bad.empty_text": "keep",
        "towers.dim": WIDTH, "towers.user.layers": LAYERS, "towers.user.heads": HEADS, "towers.user.mlp": INNER,
        "towers.user.dropout": DROPOUT, "batch.shards": SHARDS, "batch.history_rows": ROWS, "batch.history_length": LENGTH,
        "optimizer.learning_rate": RATE, "train.duration": "1 epochs",
    }  # fmt: skip
    config = config_lib.load("configs/sequences.py:sasrec_ce", [(key, str(value)) for key, value in values.items()])
    prepared = prepare.prepare(config)
    mesh = mesh_lib.make_mesh({"data": 1}, devices=jax.devices()[:1])
    inputs = stages.Inputs(prepared, Ragged.from_rows([]), towers_of(config, prepared, BertSpec()), {})
    batches = stages.make_batches(config, inputs, mesh)
    task = stages.make_task(config, "", epath.Path(cache), inputs, batches, mesh, lambda params, *, step: {})
    tx = optimizer_lib.make_optimizer(task.optimizer)
    _, shardings = loop.state_shardings(task, mesh)
    create = jax.jit(lambda p: loop.create_state(task, jax.tree.map(jnp.copy, p), tx), out_shardings=shardings)
    state, constants = create(mesh_lib.put(task.params, shardings.params)), mesh_lib.put(task.constants, mesh_lib.replicated(mesh))
    iterator = prefetched(batches, config.train.prefetch)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        first = mesh_lib.to_global(next(iter(batches)), mesh)
        step = make_train_step(task.spec, tx, mesh, shardings).lower(state, first, constants).compile()
    compiling = time.perf_counter() - began

    lengths = prepared.train_lengths()
    targets, steps, speed = int(np.maximum(lengths - 1, 0).sum()), task.loop.total, 0.0
    seconds, losses = list[float](), list[float]()
    for _ in range(epochs):
        taken, found = 0, []
        began = time.perf_counter()
        for _ in range(steps):
            batch = next(iterator)
            taken += int((batch.weights > 0).sum())
            state, metrics = step(state, mesh_lib.to_global(batch, mesh), constants)
            found.append(metrics["loss"])
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - began) * targets / taken)
        losses.append(float(np.mean(jax.device_get(found))))
        speed = max(speed, plan.machine_speed())
    iterator.close()  # type: ignore[attr-defined]
    memory = peak_memory()
    floor = steps * plan.step_flops(task.spec, batches.spec, n_items=prepared.n_items) / speed
    out = {"seconds": seconds, "targets": targets, "loss": losses[0], "memory": memory}
    return {**out, "compile": compiling, "floor": floor, "speed": speed, "steps": steps}


def main() -> int:
    """Prints the table -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds ml-100k")
    parser.add_argument("--peer_python", default="", help="interpreter with recbole 1.2.1 and torch")
    parser.add_argument("--epochs", type=int, default=5, help="ours; the median counts")
    parser.add_argument("--peer_epochs", type=int, default=1)
    parser.add_argument("--serve_peer", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_peer:
        serve_peer(json.loads(args.serve_peer))
        return 0
    if args.data is None:
        parser.error("--data=DIR is needed: the folder that holds ml-100k")
    two_threads()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    with tempfile.TemporaryDirectory() as cache:
        sides = {"ours": run_ours(args.data, cache, args.epochs)}
    ours = sides["ours"]
    if args.peer_python:
        sides["recbole"] = run_peer(args.peer_python, args.data, args.peer_epochs)
    print(f"jax {jax.__version__}, {THREADS} threads, fp32; {ours['steps']} steps an epoch, compiled in {ours['compile']:.1f} s")
    print(FORMAT.format("side", "epoch s", "targets", "events/s", "first loss", "peak GB"))
    for name, side in sides.items():
        seconds = float(np.median(side["seconds"]))
        rate = f"{side['targets'] / seconds:,.0f}"
        print(FORMAT.format(name, f"{seconds:.2f}", f"{side['targets']:,}", rate, f"{side['loss']:.3f}", f"{side['memory']:.2f}"))
    epoch = float(np.median(ours["seconds"]))
    print(f"matrix products alone, at {ours['speed'] / 1e9:.0f} GFLOP/s: {ours['floor']:.2f} s an epoch; ", end="")
    print(f"ours / floor = {epoch / ours['floor']:.2f}")
    if "recbole" not in sides:
        return 0
    if sides["recbole"]["targets"] != ours["targets"]:
        print(f"missed: the sides have other targets, {ours['targets']} and {sides['recbole']['targets']}")
        return 1
    ratio = float(np.median(sides["recbole"]["seconds"])) / epoch
    print(f"recbole / ours = {ratio:.1f} x (target {TARGET:.0f})" + ("" if ratio >= TARGET else ", missed"))
    return int(ratio < TARGET)


if __name__ == "__main__":
    sys.exit(main())
