"""Learning curve of a workdir as SVG: python tests/bench/learning_curve.py --workdir=runs/movielens --out=colabs/learning_curve.svg"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metric", default="valid/ndcg@10")
    args = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "rec_jax"  # the same file for the same curve
    figure, (loss, metric) = plt.subplots(1, 2, figsize=(9, 3))
    before = 0
    stages = json.loads((args.workdir / "config.json").read_text())["stages"] or [""]
    for stage in stages:
        rows = [json.loads(line) for line in (args.workdir / stage / "metrics.jsonl").read_text().splitlines()]
        for axes, name in ((loss, "train/loss"), (metric, args.metric)):
            points = [(before + row["step"], row[name]) for row in rows if name in row]
            if points:  # pre-training has no rankings
                axes.plot(*zip(*points, strict=True), marker=".", label=stage or "training")
            axes.set(xlabel="step", title=name)
        before += rows[-1]["step"]
    metric.legend()
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
