"""Prepares synthetic events from Parquet in a fresh process: events/s, peak memory, size on disk, read-back speed.

    python tests/bench/prepare.py [--events=10000000] [--users=200000] [--items=50000] [--folder=DIR]

Target: ten million events on 2 cores within 3 GB of memory.
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

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 1 << 21  # events made at a time
LIMIT_GB = 3.0


def make(folder: Path, events: int, users: int, items: int, seed: int = 0) -> None:
    """Writes events.parquet (power-law items, 1/rank^0.9; log-normal users; no order) and items.tsv into the folder."""
    rng = np.random.default_rng(seed)
    popularity = np.cumsum(np.arange(1, items + 1) ** -0.9)
    activity = np.cumsum(rng.lognormal(0.0, 1.0, users))
    parts = []
    for start in range(0, events, CHUNK):
        n = min(CHUNK, events - start)
        user, item = (np.searchsorted(c, rng.random(n) * c[-1]) for c in (activity, popularity))
        item = (item * 7919 + 17) % items  # popular items lie anywhere in the table
        rating = rng.integers(1, 11, n) / 2
        parts.append(pl.DataFrame({"user_id": user, "item_id": item, "ts": rng.integers(1_000_000_000, 1_700_000_000, n), "stars": rating}))
        parts[-1].write_parquet(folder / "events" / f"{len(parts):04d}.parquet")
    names = ["The Last Harbour", "Night Train", "A Field of Stones", "Cold Water", "Two Rivers"]
    title = [f"{names[i % len(names)]} {i}" for i in range(items)]
    pl.DataFrame({"item_id": np.arange(items), "title": title}).write_csv(folder / "items.tsv", separator="\t")


def child(folder: Path) -> None:
    """Prepares what `make` wrote and prints one JSON line of figures."""
    from rec_jax import config as config_lib
    from rec_jax.data import prepare

    config = config_lib.defaults()
    config.data.reader = "table"
    config.data.path, config.data.items = str(folder / "events"), str(folder / "items.tsv")
    config.data.columns.update({"user": "user_id", "item": "item_id", "time": "ts", "rating": "stars"})
    config.data.cache = str(folder / "cache")
    imported_gb = _peak_gb()
    begin, cpu = time.perf_counter(), time.process_time()
    prepared = prepare.prepare(config)
    seconds, cpu_seconds, peak_gb = time.perf_counter() - begin, time.process_time() - cpu, _peak_gb()

    begin = time.perf_counter()
    reopened = prepare.prepare(config)
    reopen_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    histories, targets = reopened.train_histories(), reopened.eval_set("test")
    arrays_seconds = time.perf_counter() - begin

    source = prepared.source()
    order = np.random.default_rng(0).permutation(len(source))[:20_000].tolist()
    begin = time.perf_counter()
    read = sum(len(source[user]["items"]) for user in order)
    single = time.perf_counter() - begin
    begin = time.perf_counter()
    again = sum(len(r["items"]) for i in range(0, len(order), 512) for r in source.__getitems__(order[i : i + 512]))
    batched = time.perf_counter() - begin
    assert read == again
    assert len(histories) == prepared.n_users
    figures = {
        "events": prepared.meta["events"],
        "users": prepared.n_users,
        "items": prepared.n_items,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gb": peak_gb,
        "imported_gb": imported_gb,
        "disk": {p.name: _size(p) for p in sorted(prepared.local.iterdir())},
        "reopen_seconds": reopen_seconds,
        "arrays_seconds": arrays_seconds,
        "targets": len(targets.users),
        "records_per_second": len(order) / single,
        "records_per_second_batched": len(order) / batched,
        "events_per_second_read": read / single,
    }
    print(json.dumps(figures))


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def main() -> None:
    """Makes the input, runs the child, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=None, help="where input and output go; a temporary folder by default")
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "events").mkdir()
        begin = time.perf_counter()
        make(folder, args.events, args.users, args.items)
        print(f"made {args.events:,} events in {time.perf_counter() - begin:.0f} s: {_size(folder / 'events') / 1e6:.0f} MB of Parquet")
        command = [sys.executable, __file__, "--child", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    f = json.loads(done.stdout.splitlines()[-1])
    per_second = args.events / f["seconds"]
    print(f"kept {f['events']:,} events of {f['users']:,} users and {f['items']:,} items (the others are repeats or of short users)")
    again = f"again (hashes the input): {f['reopen_seconds']:.2f} s"
    print(f"prepare      {f['seconds']:.1f} s ({f['cpu_seconds']:.1f} s of CPU), {per_second:,.0f} events/s; {again}")
    verdict = "within" if f["peak_gb"] <= LIMIT_GB else "ABOVE"
    print(f"peak memory  {f['peak_gb']:.2f} GB ({f['imported_gb']:.2f} GB of it imports): {verdict} {LIMIT_GB:g} GB")
    print("on disk      " + ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in f["disk"].items()))
    print(f"read back    {f['records_per_second']:,.0f} records/s one by one, {f['records_per_second_batched']:,.0f} in batches of 512")
    print(f"arrays       train histories and {f['targets']:,} test users in {f['arrays_seconds']:.2f} s")


if __name__ == "__main__":
    main()
