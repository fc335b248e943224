"""python -m rec_jax.eval.mine --workdir=W [--stage=S] [--k=8 --skip=0 --window=200 --margin=0.05] [--out=FILE.npz]

Mines hard negatives with a trained workdir: of each user the history is the train events but the last one, which is the positive.
Writes W/negatives.npz, or FILE, for `--config.data.negatives=FILE.npz` of a later training, and prints what a person needs to judge it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax.cli import main_of
from rec_jax.data import negatives
from rec_jax.eval.encoder import Say
from rec_jax.eval.mine import Mined, known_items, mine
from rec_jax.eval.model import Trained, load
from rec_jax.types import Ragged, RecJaxError

EXAMPLES = 3
NEWEST = 5  # items of a history that an example shows


def main(argv: Sequence[str]) -> int:
    """Mines, prints the report, writes the file -> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rec_jax.eval.mine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a training")
    parser.add_argument("--stage", help="whose model; the last one by default")
    parser.add_argument("--out", help="the file; W/negatives.npz by default")
    parser.add_argument("--k", type=int, default=8, help="negatives a user")
    parser.add_argument("--skip", type=int, default=0, help="leave out that many first ranks")
    parser.add_argument("--window", type=int, default=200, help="the last rank looked at")
    parser.add_argument(
        "--margin", type=_or_none(float), default=0.05, help="how far a negative's score is below the positive's; none = off"
    )
    parser.add_argument("--max_share", type=_or_none(float), help="a negative's score as a share of the positive's, at most; none = off")
    parser.add_argument("--known", default="train,valid", help="events that are never negatives: some of train,valid,test")
    parser.add_argument("--seed", type=_or_none(int), help="draw the negatives out of what is left; none = take the highest")
    args = parser.parse_args(argv)
    rules = {name: getattr(args, name) for name in ("k", "skip", "window", "margin", "max_share", "seed")}
    run(args.workdir, args.stage, args.out, known=tuple(args.known.split(",")), rules=rules)
    return 0


def run(
    workdir: epath.PathLike,
    stage: str | None,
    out: epath.PathLike | None,
    *,
    known: Sequence[str],
    rules: dict[str, Any],
    say: Say = print,
) -> np.ndarray:
    """Mines with a stage's model and writes the file -> items [U, K] int32.

    Args:
      stage: None = the last one.
      out: the file; None = W/negatives.npz.
      known: parts whose events are no negatives.
      rules: of `mine`, by name.

    Raises:
      RecJaxError: nothing trained there, an unknown stage or part, bad rules, no user with two train events.
    """
    trained = load(workdir, stage, say=say)
    prepared, train = trained.model.prepared, trained.model.prepared.train_histories()
    users = np.flatnonzero(train.lengths() >= 2)
    if not len(users):
        raise RecJaxError(f"{workdir}: no user has two train events, so there is no positive to mine below")
    histories = train.take(users, without_last=1)
    positive = train.flat[train.offsets[users + 1] - 1]
    vectors = trained.model.user_vectors(trained.params, trained.items, histories)
    all_known = known_items(prepared, known)
    mesh, axis = None, None
    if jax.device_count() > 1:
        mesh, axis = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), "data"
    mined = mine(
        vectors,
        trained.items,
        positive,
        Ragged.from_rows([all_known[int(u)] for u in users]),
        block=trained.model.config.eval.items_per_block,
        queries_per_block=trained.model.config.eval.users_per_block,
        mesh=mesh,
        axis=axis,
        **rules,
    )
    items = np.full((prepared.n_users, rules["k"]), -1, np.int32)
    scores = np.full(items.shape, -np.inf, np.float32)
    items[users], scores[users] = mined.ids, mined.scores
    for line in _report(mined, trained, histories, positive, rules, prepared.n_users):
        say(line)
    file = epath.Path(out) if out else epath.Path(workdir) / "negatives.npz"
    settings = {"stage": stage or "", "step": trained.step, "known": sorted(known), **rules}
    negatives.write(file, items, scores, settings, fingerprint=prepared.meta["fingerprint"])
    say(f"written to {file}; train with --config.data.negatives={file}")
    return items


def _report(mined: Mined, trained: Trained, histories: Ragged, positive: np.ndarray, rules: dict[str, Any], n_users: int) -> list[str]:
    """What a person needs to judge the negatives, line by line."""
    full = mined.ids >= 0
    rows, mean = len(mined.ids), lambda x: f"{x.mean():.3f}" if x.size else "none"
    others = "" if rows == n_users else " (the others have fewer than two train events)"
    lines = [
        f"negatives for {rows:,} of {n_users:,} users{others}, {rules['k']} each, of ranks {rules['skip'] + 1} to {rules['window']}",
        f"  left out: {mined.known.sum():,} known items; {mined.skipped.sum():,} by the window's first rank; "
        f"{mined.too_close.sum():,} too close to the positive (margin {rules['margin']}, max_share {rules['max_share']})",
        f"  mean score: positives {mean(mined.positive)}, negatives {mean(mined.scores[full])}",
        f"  empty places: {1 - full.mean():.1%}",
    ]
    if full.mean() < 0.5:
        lines.append("  more than half of the places are empty: lower the margin, raise the window, or turn a rule off (--margin=none)")
    names = trained.model.prepared.names()
    some = np.flatnonzero(full.any(1))
    for row in some[np.linspace(0, len(some) - 1, min(EXAMPLES, len(some))).astype(int)]:
        newest = histories[int(row)][-NEWEST:]
        found = [f"{names[i]} ({s:.3f})" for i, s in zip(mined.ids[row], mined.scores[row], strict=True) if i >= 0]
        lines += [
            f"  after    {' | '.join(names[i] for i in newest)}",
            f"  positive {names[positive[row]]} ({mined.positive[row]:.3f})",
            f"  mined    {' | '.join(found)}",
        ]
    return lines


def _or_none(kind: type) -> Callable[[str], Any]:
    """A reader of numbers that also takes "none"."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"
    return read


if __name__ == "__main__":
    main_of(main)
