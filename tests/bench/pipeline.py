"""The input pipeline alone: batches of packed histories a second, read from memory and from the records on disk.

    python tests/bench/pipeline.py --data=FILE [--items=TSV] [--config=configs/sequences.py] [--batches 200]

In one run, each twice in turn. The floor is one copy of as many train events in the order of the users. An accelerator waits for batches
where this takes longer than its step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rec_jax import config as config_lib
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.data.prepare import prepare
from rec_jax.train.adapt import adapted

WARM_UP = 5  # batches that do not count


def measured(batches: Batches, count: int) -> tuple[float, float]:
    """-> (seconds a batch, targets a batch)."""
    iterator, targets = iter(batches), 0
    for _ in range(WARM_UP):
        next(iterator)
    began = time.perf_counter()
    for _ in range(count):
        targets += int((next(iterator).targets >= 0).sum())
    return (time.perf_counter() - began) / count, targets / count


def floor(events: np.ndarray, count: int, size: int) -> float:
    """Seconds of copying `size` events, `count` times from other places."""
    starts = np.random.default_rng(0).integers(0, max(1, len(events) - size), count)
    began = time.perf_counter()
    for start in starts:
        events[start : start + size].copy()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file of sequences")
    parser.add_argument("--items", default="")
    parser.add_argument("--config", default="configs/sequences.py")
    parser.add_argument("--batches", type=int, default=200)
    arguments = parser.parse_args()
    config = config_lib.load(arguments.config, [("data.path", arguments.data), ("data.items", arguments.items)])
    prepared = prepare(config)
    config = adapted(config, prepared.train_lengths(), prepared.n_items)
    spec, histories = BatchSpec.from_config(config), prepared.train_histories()
    make: Callable[[Any], Batches] = lambda source: Batches(source, prepared.train_lengths(), spec, seed=0)
    places = spec.shards * spec.history_rows * spec.history_length
    print(f"{places:,} places a batch, {prepared.n_users:,} users, drop_events {spec.drop_events}")
    seconds: dict[str, list[float]] = {}
    for _ in range(2):
        for name, source in (("memory", histories), ("records on disk", prepared.source())):
            a_batch, targets = measured(make(source), arguments.batches)
            seconds.setdefault(name, []).append(a_batch)
            print(f"{name:16}{a_batch * 1e3:8.2f} ms a batch{targets / a_batch:14,.0f} targets/s", flush=True)
    least = floor(histories.flat, arguments.batches, places)
    print(f"floor{'':11}{least * 1e3:8.4f} ms; memory {min(seconds['memory']) / least:,.0f} x the floor")
    print(f"records on disk / memory {min(seconds['records on disk']) / min(seconds['memory']):.1f}")


if __name__ == "__main__":
    main()
