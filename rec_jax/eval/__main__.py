"""python -m rec_jax.eval --workdir=W [--split=test] [--show=10] [--config.eval.fuse=sequence_knn] [--config.eval.baselines="('ials',)"]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rec_jax import config_flags
from rec_jax.cli import main_of
from rec_jax.eval import final, predictions


def main(argv: Sequence[str]) -> int:
    """Prints the table of a workdir and writes W/eval/SPLIT.json -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m rec_jax.eval", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--show", type=int, help="also prints that many right and as many wrong predictions, by name")
    args, overrides = config_flags.parse_args(parser, argv)
    final.run(args.workdir, args.split, overrides=overrides)
    print(f"\nwritten to {args.workdir}/eval/{args.split}.json")
    if args.show is not None:
        predictions.say_some(args.workdir, args.split, args.show)
    return 0


if __name__ == "__main__":
    main_of(main)
