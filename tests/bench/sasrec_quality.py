"""SASRec as published: ours (`configs/sequences.py:sasrec`) against SASRec.pytorch's model, on one file, all items ranked.

    python tests/bench/sasrec_quality.py --path=Beauty.txt --peer=DIR --peer_python=PYTHON [--seed=0]

DIR holds `model.py` of the repository pmixer/SASRec.pytorch (its folder `python`); PYTHON is an interpreter with torch. The peer's model
is trained as its own main.py does it: Xavier's normal start, Adam at 1e-3 (.9, .98), binary cross-entropy of the next item and of one drawn
that the user's training history has not, at each place, 128 users a batch, 2 blocks of width 50 with one head, dropout 0.5, windows of 50.
Its main.py ranks a target among 100 drawn items; here it is ranked among all that the history has not, as ours is, on the validation's
events every 5 epochs, and it stops 20 epochs after the best. Each side one process, on the cores that this one may use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

WIDTH, HEADS, BLOCKS, LENGTH, DROPOUT, RATE, USERS = 50, 1, 2, 50, 0.5, 1e-3, 128
EPOCHS, EVERY, PATIENCE = 200, 5, 4


def serve_peer(order: dict[str, Any]) -> None:
    """{path, peer, norm_first, seed} -> a JSON line {hr, ndcg: of the test, epoch: the best, valid: its NDCG, seconds}."""
    import torch

    sys.path.insert(0, order["peer"])
    from model import SASRec

    torch.manual_seed(order["seed"])
    rng = np.random.default_rng(order["seed"])
    histories = [np.array([int(x) for x in line.split()[1:]]) for line in Path(order["path"]).read_text().splitlines()]
    n_items = int(max(h.max() for h in histories))
    sizes = {"hidden_units": WIDTH, "maxlen": LENGTH, "dropout_rate": DROPOUT, "num_blocks": BLOCKS, "num_heads": HEADS}
    model = SASRec(len(histories), n_items, SimpleNamespace(device="cpu", norm_first=order["norm_first"], **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter.data)
    model.pos_emb.weight.data[0], model.item_emb.weight.data[0] = 0, 0
    adam = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    loss_of = torch.nn.BCEWithLogitsLoss()

    train = [h[:-2] for h in histories]
    seen = [set(h.tolist()) for h in train]
    inputs, targets = (np.zeros((len(train), LENGTH), np.int64) for _ in range(2))
    for row, h in enumerate(train):
        if len(h) > 1:
            inputs[row, -len(h[:-1]) :], targets[row, -len(h[1:]) :] = h[:-1][-LENGTH:], h[1:][-LENGTH:]
    users = np.array([row for row, h in enumerate(train) if len(h) > 1])

    def drawn(rows: np.ndarray) -> np.ndarray:
        out = np.where(targets[rows] > 0, rng.integers(1, n_items + 1, (len(rows), LENGTH)), 0)
        for r, c in np.argwhere(out > 0):
            while out[r, c] in seen[rows[r]]:
                out[r, c] = rng.integers(1, n_items + 1)
        return out

    def ranked(left_out: int) -> tuple[float, float]:
        """HR@10 and NDCG@10 of the last event but `left_out` of each user, by the events before it."""
        model.eval()
        ranks = []
        with torch.no_grad():
            for at in range(0, len(histories), 512):
                some = [h[: len(h) - left_out] for h in histories[at : at + 512]]
                past = np.zeros((len(some), LENGTH), np.int64)
                for row, h in enumerate(some):
                    past[row, -len(h[:-1][-LENGTH:]) :] = h[:-1][-LENGTH:]
                scores = model.log2feats(past)[:, -1] @ model.item_emb.weight.T
                scores[:, 0] = -torch.inf
                for row, h in enumerate(some):
                    scores[row, torch.from_numpy(h[:-1][h[:-1] != h[-1]])] = -torch.inf
                own = scores[torch.arange(len(some)), torch.tensor([h[-1] for h in some])]
                ranks.append((scores > own[:, None]).sum(1) + 1)
        model.train()
        rank = torch.cat(ranks).double()
        hit = (rank <= 10).double()
        return hit.mean().item(), (hit / torch.log2(rank + 1)).mean().item()

    best: dict[str, Any] = {"valid": -1.0, "epoch": 0}
    began = time.perf_counter()
    model.train()
    for epoch in range(1, EPOCHS + 1):
        rng.shuffle(users)
        for at in range(0, len(users), USERS):
            rows = users[at : at + USERS]
            positive, negative = model(rows, inputs[rows], targets[rows], drawn(rows))
            there = np.where(targets[rows] > 0)
            adam.zero_grad()
            loss = loss_of(positive[there], torch.ones_like(positive[there])) + loss_of(negative[there], torch.zeros_like(negative[there]))
            loss.backward()
            adam.step()
        if epoch % EVERY == 0:
            valid = ranked(1)[1]
            if valid > best["valid"]:
                hr, ndcg = ranked(0)
                best = {"valid": valid, "epoch": epoch, "hr": hr, "ndcg": ndcg}
            print(f"epoch {epoch}: validation {valid:.4f}, best {best}", file=sys.stderr, flush=True)
            if epoch - best["epoch"] >= EVERY * PATIENCE:
                break
    print(json.dumps({**best, "seconds": time.perf_counter() - began}), flush=True)


def run_ours(path: Path, seed: int) -> dict[str, Any]:
    """The same of our preset."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "rec_jax.train", "--config=configs/sequences.py:sasrec", f"--config.data.path={path}",
                f"--config.seed={seed}", "--config.eval.baselines=()", "--config.eval.max_users=0", f"--workdir={folder}",
            ],
            check=True, stdout=sys.stderr, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        found = json.loads((Path(folder) / "eval" / "test.json").read_text())
    return {"hr": found["test/hr@10"], "ndcg": found["test/ndcg@10"], "seconds": seconds}


def run_peer(python: str, order: dict[str, Any]) -> dict[str, Any]:
    """What `serve_peer` says, in a process of its own."""
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), f"--serve_peer={json.dumps(order)}"],
        stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": threads},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the peer's process ended with code {done.returncode}; its words stand above")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Prints the table -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="one user a line: user item item ..., ids from 1")
    parser.add_argument("--peer", type=Path, help="folder that holds SASRec.pytorch's model.py")
    parser.add_argument("--peer_python", help="interpreter with torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve_peer", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_peer:
        serve_peer(json.loads(args.serve_peer))
        return 0
    if args.path is None or args.peer is None or args.peer_python is None:
        parser.error("--path=FILE, --peer=DIR and --peer_python=PYTHON are needed")
    rows = {"ours": run_ours(args.path, args.seed)}
    for name, first in (("peer, norms after the blocks", False), ("peer, norms before them", True)):
        order = {"path": str(args.path.resolve()), "peer": str(args.peer.resolve()), "norm_first": first, "seed": args.seed}
        rows[name] = run_peer(args.peer_python, order)
    print(f"{'':30}{'HR@10':>8}{'NDCG@10':>9}{'seconds':>9}")
    for name, row in rows.items():
        print(f"{name:30}{row['hr']:8.4f}{row['ndcg']:9.4f}{row['seconds']:9.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
