"""python -m rec_jax.eval.compare --a=W1[,W1_SEED2,...] --b=W2[,...] [--b=NAME=W3[,...]] [--metrics=ndcg@10,hr@10] [--split=test]

Compares tested workdirs: of each `--b` the difference to `--a`, its interval and p from a paired bootstrap over users. Workdirs joined by
commas are seeds of one model, averaged per user. Each needs its file of per-user values, W/eval/SPLIT_users.npz, which the final test
writes; a stage's folder (W/STAGE) may stand for a workdir.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from etils import epath

from rec_jax.cli import main_of
from rec_jax.eval.compare import run
from rec_jax.types import RecJaxError


def main(argv: Sequence[str]) -> int:
    """Prints a table per metric -> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rec_jax.eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--a", required=True, help="the model that the others are compared with: [NAME=]WORKDIR,...")
    parser.add_argument("--b", required=True, action="append", help="another model; may be given several times")
    parser.add_argument("--metrics", default="ndcg@10,hr@10", help="names in the files, joined by commas")
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals")
    args = parser.parse_args(argv)
    if not 0 < args.level < 1 or args.draws < 1:
        raise RecJaxError(f"--level={args.level} --draws={args.draws}: expected a level between 0 and 1 and at least one draw")
    name, whole = _model(args.a)
    variants: dict[str, list[str]] = {}
    for text in args.b:
        other, folders = _model(text)
        if other in variants:
            raise RecJaxError(f"two models are called {other!r}; name one of them: --b=NAME={text}")
        variants[other] = folders
    run(
        whole,
        variants,
        name=name,
        metrics=args.metrics.split(","),
        split=args.split,
        seed=args.seed,
        draws=args.draws,
        level=args.level,
    )
    return 0


def _model(text: str) -> tuple[str, list[str]]:
    """ "NAME=W1,W2" or "W1,W2" -> (name, folders); without a name the first folder's."""
    name, equals, folders = text.rpartition("=")
    if not all(folders.split(",")) or (equals and not name):
        raise RecJaxError(f"{text!r} names no workdir; expected WORKDIR, NAME=WORKDIR, or several of a model joined by commas")
    return name or epath.Path(folders.split(",")[0]).name, folders.split(",")


if __name__ == "__main__":
    main_of(main)
