"""python -m rec_jax.serve recommend --model=WORKDIR --history="Toy Story (1995)" --history="Alien (1979)" --k=10 [--json]"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rec_jax.cli import main_of
from rec_jax.eval import model as model_lib
from rec_jax.serve.recommend import Recommender, as_text


def main(argv: Sequence[str]) -> int:
    """Runs one command -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m rec_jax.serve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    recommend = commands.add_parser("recommend", help="best items for a history of titles, by the model alone (eval.fuse has no part)")
    recommend.add_argument("--model", required=True, help="a workdir")
    recommend.add_argument("--history", action="append", default=[], help="a title or id, oldest first; repeat it")
    recommend.add_argument("--k", type=int, default=10)
    recommend.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(argv)
    trained = model_lib.load(args.model, say=lambda text: print(text, file=sys.stderr))
    answer = Recommender(trained).recommend(args.history, k=args.k)
    if args.json:
        print(json.dumps({"history": args.history, "items": [dataclasses.asdict(r) for r in answer]}, ensure_ascii=False))
    else:
        print(as_text(args.history, answer))
    return 0


if __name__ == "__main__":
    main_of(main)
