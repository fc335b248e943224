"""The baselines without a network against outside implementations of them, on the same events, all items ranked.

    python tests/bench/baselines.py --data=Beauty.txt --peer_python=PYTHON [--only=ease,bpr] [--seed=0]
    python tests/bench/baselines.py --data=DIR --peer_python=PYTHON

FILE has one user a line (user item item ...): the last event is the test's target, the one before it validation's, and both sides know it
when they rank. DIR holds Last.fm HetRec's user_artists.dat: 8:1:1 at random by user, users known by their train events, those of the
validation not ranked. PYTHON is an interpreter with implicit 0.7.3 and cornac 3.0.1 (no torch):

    uv venv DIR2 --python 3.11 && uv pip install --python DIR2/bin/python implicit==0.7.3 cornac==3.0.1

Both sides get the same train events and the same hyper-parameters; each ranks with code of its own, known items removed, ties never for the
target, scores rounded to float32. Recall@10 of one target is HR@10. Seconds are those of fitting on one core, the peer's with its imports.
Exits 1 where a line differs by more than its bound, the largest relative difference of a figure.

How one side's words are put into the other's:

- popularity: cornac's MostPop.
- item_knn: implicit's CosineRecommender with K one more, for it counts an item among its own neighbours. Its `recommend` sums over the
  history's items of which the scored one is a neighbour, ours over those that are neighbours of the scored one (Sarwar et al.; RecBole
  does the same), so its matrix is taken transposed. With all neighbours kept the two are one, and it is taken as it is.
- ease: cornac's EASE(lamb=regularisation, posB=False), its B times the histories.
- ials: implicit's AlternatingLeastSquares(use_cg=False) minimises the sum over all pairs of c (seen - w.h)^2, c = alpha where seen and 1
  elsewhere, plus its `regularization` x all squares. With frequency = 0 ours is that for vectors sqrt(1 + unobserved) times as long, alpha
  = 1 + 1 / unobserved and regularization = regularisation x alpha. It has no other `frequency`. Once both begin at the same item vectors.
- bpr: cornac's BPR, the same objective, a triple a step where ours takes AdaGrad on 4,096. It has vectors of known users alone: on a FILE
  both sides are fitted on all events before the test's. implicit's BPR draws the other item by popularity, another objective.

Published: S3-Rec's README has popularity on Beauty, every item ranked. Its figures are those of counting the whole file, the test's events
too, and this is what that row does. RecBole-GNN's BPR on Last.fm is of another draw of the split, without biases, stopped by validation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

ROWS = 256  # users ranked at a time
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SAME = 1e-3  # a pair without chance: largest difference of a figure, relative
FORMAT = "{:38}{:>10}{:>9}{:>7}{:>10}{:>9}{:>7}{:>9}{:>8}"
Score = Callable[[np.ndarray], Any]  # rows [q] of the test -> scores [q, N]


# -- the peer's process: implicit and cornac, nothing of ours --


@dataclasses.dataclass
class Given:
    """What a peer is fitted on and told: binary [U, N] of the train events, [q, N] of the histories known in the test and whose they are
    [q], first item vectors [N, D]."""

    train: scipy.sparse.csr_matrix
    history: scipy.sparse.csr_matrix
    users: np.ndarray
    start: np.ndarray
    seed: int

    def cornac(self) -> Any:
        """The train events as a cornac data set, with our numbers of users and items."""
        from cornac.data import Dataset

        events = self.train.tocoo()
        users, items = (OrderedDict((i, i) for i in range(n)) for n in self.train.shape)
        triples = list(zip(events.row.tolist(), events.col.tolist(), [1.0] * events.nnz, strict=True))
        return Dataset.build(triples, global_uid_map=users, global_iid_map=items)


def peer_popularity(given: Given) -> Score:
    from cornac.models import MostPop

    model = MostPop().fit(given.cornac())
    return lambda rows: np.tile(model.item_pop, (len(rows), 1))


def peer_item_knn(given: Given, *, neighbours: int) -> Score:
    from implicit.nearest_neighbours import CosineRecommender

    everyone = int((given.train.T @ given.train).getnnz(1).max())
    model = CosineRecommender(K=(neighbours or everyone) + 1, num_threads=1)
    model.fit(given.train, show_progress=False)
    similarity = model.similarity.T.tocsr() if neighbours else model.similarity
    return lambda rows: (given.history[rows] @ similarity).toarray()


def peer_ease(given: Given, *, regularisation: float) -> Score:
    from cornac.models import EASE

    model = EASE(lamb=regularisation, posB=False, verbose=False).fit(given.cornac())
    return lambda rows: given.history[rows] @ model.B


def peer_ials(given: Given, *, dim: int, unobserved: float, regularisation: float, epochs: int, same_start: bool) -> Score:
    from implicit.cpu.als import AlternatingLeastSquares

    alpha = 1 + 1 / unobserved
    words = {"factors": dim, "alpha": alpha, "regularization": regularisation * alpha, "iterations": epochs}
    model = AlternatingLeastSquares(**words, use_cg=False, num_threads=1, random_state=given.seed)
    if same_start:
        model.item_factors = given.start * np.float32(np.sqrt(1 + unobserved))
    model.fit(given.train, show_progress=False)
    return lambda rows: model.recalculate_user(rows, given.history[rows]) @ model.item_factors.T


def peer_bpr(given: Given, *, dim: int, regularisation: float, epochs: int, learning_rate: float) -> Score:
    from cornac.models import BPR

    words = {"k": dim, "max_iter": epochs, "learning_rate": learning_rate, "lambda_reg": regularisation}
    model = BPR(**words, seed=given.seed).fit(given.cornac())
    return lambda rows: model.u_factors[given.users[rows]] @ model.i_factors.T + model.i_biases


PEERS: dict[str, Callable[..., Score]] = {
    "popularity": peer_popularity,
    "item_knn": peer_item_knn,
    "ease": peer_ease,
    "ials": peer_ials,
    "bpr": peer_bpr,
}


def binary(offsets: np.ndarray, flat: np.ndarray, n_items: int) -> scipy.sparse.csr_matrix:
    """Rows of items -> [rows, N] of ones."""
    out = scipy.sparse.csr_matrix((np.ones(len(flat), np.float32), flat, offsets), shape=(len(offsets) - 1, n_items))
    out.sum_duplicates()
    out.data[:] = 1
    return out


def serve_peer(order: dict[str, Any]) -> None:
    """{peer, options, seed, data: file of arrays, ranks: file to write} -> a JSON line {seconds}; ranks [U, Tg], 0 = none."""
    answer, sys.stdout = sys.stdout, sys.stderr
    data = np.load(order["data"])
    n_items = int(data["n_items"])
    train, history, removed, target = (
        binary(data[f"{name}_offsets"], data[f"{name}_flat"], n_items) for name in ("train", "history", "removed", "targets")
    )
    began = time.perf_counter()
    score = PEERS[order["peer"]](Given(train, history, data["users"], data["start"], order["seed"]), **order["options"])
    seconds = time.perf_counter() - began
    ranks = np.zeros((target.shape[0], int(target.getnnz(1).max())), np.int32)
    for at in range(0, len(ranks), ROWS):
        rows = np.arange(at, min(at + ROWS, len(ranks)))
        scores = np.array(score(rows), np.float32)
        scores[removed[rows].nonzero()] = -np.inf
        for row, its in zip(rows, scores, strict=True):
            own = target.indices[target.indptr[row] : target.indptr[row + 1]]
            found = np.sort(its[own])[::-1]
            its[own] = -np.inf  # of two targets one is above the other, tied or not
            ranks[row, : len(own)] = (its >= found[:, None]).sum(1) + 1 + np.arange(len(own))
    np.save(order["ranks"], ranks)
    print(json.dumps({"seconds": seconds}), file=answer, flush=True)


def run_peer(python: str, order: dict[str, Any]) -> dict[str, Any]:
    """What `serve_peer` says, in a process of its own on one core, with its figures."""
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), f"--serve_peer={json.dumps(order)}"],
        stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the peer's process ended with code {done.returncode}; its words stand above")
    return {**json.loads(done.stdout.splitlines()[-1]), **figures(np.load(order["ranks"]))}


# -- ours --


@dataclasses.dataclass
class Case:
    """Rows of items: of each user to fit on; of each user of the test known when ranked, not ranked, to be found; who these users are.

    `before` is all before the test and `whole` the test's events too, where a peer was fitted on them.
    """

    train: Any
    before: Any
    whole: Any
    history: Any
    removed: Any
    targets: Any
    users: np.ndarray
    n_items: int

    def save(self, path: Path, train: Any, start: np.ndarray) -> None:
        """The arrays that `serve_peer` reads."""
        rows = {"train": train, "history": self.history, "removed": self.removed, "targets": self.targets}
        flat = {f"{name}_{part}": getattr(x, part) for name, x in rows.items() for part in ("flat", "offsets")}
        np.savez(path, **flat, users=self.users, n_items=self.n_items, start=start)


def read(path: Path, seed: int) -> Case:
    """A file of sequences, or a folder with user_artists.dat, as the docstring has them."""
    from rec_jax.data import split
    from rec_jax.types import Ragged

    if path.is_file():
        rows = [np.array(line.split()[1:], np.int64) - 1 for line in path.read_text().splitlines()]
        train, history, targets = (Ragged.from_rows([row[part] for row in rows]) for part in (slice(-2), slice(-1), slice(-1, None)))
        return Case(
            train, history, Ragged.from_rows(rows), history, history, targets, np.arange(len(rows)), max(int(row.max()) for row in rows) + 1
        )
    events = np.loadtxt(path / "user_artists.dat", skiprows=1, dtype=np.int64)
    (users, user), (items, item) = (np.unique(events[:, column], return_inverse=True) for column in (0, 1))
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    part = split.random(user, item, np.arange(len(user)), n_users=len(users), valid=0.1, test=0.1, seed=seed)

    def of(*parts: int) -> Any:
        return Ragged.from_rows([item[np.isin(part, parts) & (user == one)] for one in range(len(users))])

    train, tested = of(split.TRAIN), np.unique(user[part == split.TEST])
    removed, targets = (of(*parts).take(tested) for parts in ((split.TRAIN, split.VALID), (split.TEST,)))
    return Case(train, train, of(split.TRAIN, split.VALID, split.TEST), train.take(tested), removed, targets, tested, len(items))


def figures(ranks: np.ndarray) -> dict[str, float]:
    """ranks [U, Tg] -> {recall, ndcg}, both at 10."""
    from rec_jax.eval import metrics

    found = metrics.per_user(ranks, ks=(10,), names=("recall", "ndcg"))
    return {name: float(found[f"{name}@10"].mean()) for name in ("recall", "ndcg")}


def run_ours(name: str, train: Any, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """{recall, ndcg, seconds: of fitting} of one of our baselines."""
    from rec_jax.eval import baselines, rankings
    from rec_jax.types import EvalSet

    began = time.perf_counter()
    scorer = baselines.fit(name, train, case.n_items, **options)
    seconds = time.perf_counter() - began
    test = EvalSet(np.arange(len(case.targets)), case.history, case.targets, case.n_items, removed=case.removed)
    return {"seconds": seconds, **figures(rankings.evaluate_scores(scorer, test, ks=(10,), users_per_block=ROWS).ranks)}


# -- the table --


@dataclasses.dataclass(frozen=True)
class Pair:
    """One line: our baseline with its options, the peer's or published figures, and how far the two may be apart.

    `fit`: the part of the Case that both are fitted on.
    """

    title: str
    name: str
    ours: dict[str, Any]
    peer: dict[str, Any] | tuple[float, float]
    bound: float
    fit: str = "train"


ALS = {"dim": 64, "unobserved": 0.1, "regularisation": 4.0, "epochs": 16}
BPR = {"dim": 64, "regularisation": 0.03}
PAIRS = (
    Pair("popularity", "popularity", {}, {}, SAME),
    # Of items equally near at the border the two sides keep others.
    Pair("item_knn, 100 neighbours", "item_knn", {"neighbours": 100}, {"neighbours": 100}, 5 * SAME),
    Pair("item_knn, all neighbours", "item_knn", {"neighbours": 1 << 30}, {"neighbours": 0}, SAME),
    Pair("ease, regularisation 100", "ease", {"regularisation": 100.0}, {"regularisation": 100.0}, SAME),
    Pair("ials, frequency 0, same start", "ials", {**ALS, "frequency": 0.0}, {**ALS, "same_start": True}, 10 * SAME),
    Pair("ials, frequency 0, own starts", "ials", {**ALS, "frequency": 0.0}, {**ALS, "same_start": False}, 0.05),
    # Each side with the steps that it takes to come near its best: plain ascent is slower than AdaGrad.
    Pair("bpr, 100 epochs; 400", "bpr", {**BPR, "epochs": 100}, {**BPR, "epochs": 400, "learning_rate": 0.05}, 0.1, "before"),
)
PUBLISHED = {  # by users and items of the data
    (22363, 12101): (Pair("popularity of the whole file; S3-Rec's", "popularity", {}, (0.0152, 0.0068), 0.01, "whole"),),
    (1892, 17632): (Pair("bpr; RecBole-GNN's", "bpr", BPR, (0.1761, 0.1674), 0.1, "before"),),
}


def compared(pair: Pair, case: Case, python: str, seed: int) -> list[dict[str, Any]]:
    """[ours, the peer's] of a pair."""
    train, drawn = getattr(case, pair.fit), {"seed": seed} if pair.name in ("ials", "bpr") else {}
    ours = run_ours(pair.name, train, case, {**pair.ours, **drawn})
    if isinstance(pair.peer, tuple):
        return [ours, {"recall": pair.peer[0], "ndcg": pair.peer[1], "seconds": np.nan}]
    dim = pair.ours.get("dim", 1)
    start = (np.random.default_rng(seed).normal(size=(case.n_items, dim)) * 0.1 / np.sqrt(dim)).astype(np.float32)  # as `ials` begins
    with tempfile.TemporaryDirectory() as folder:
        case.save(Path(folder) / "data.npz", train, start)
        files = {"data": str(Path(folder) / "data.npz"), "ranks": str(Path(folder) / "ranks.npy")}
        return [ours, run_peer(python, {"peer": pair.name, "options": pair.peer, "seed": seed, **files})]


def main() -> int:
    """Prints the table -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="one user a line: user item item ..., ids from 1; or a folder with user_artists.dat")
    parser.add_argument("--peer_python", help="interpreter with implicit and cornac")
    parser.add_argument("--only", default="", help="names of baselines, joined by commas; none: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve_peer", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_peer:
        serve_peer(json.loads(args.serve_peer))
        return 0
    if args.data is None or args.peer_python is None:
        parser.error("--data=FILE or DIR and --peer_python=PYTHON are needed")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    os.environ["JAX_PLATFORMS"] = "cpu"
    case, missed = read(args.data, args.seed), []
    print(f"{len(case.users):,} users, {case.n_items:,} items, {len(case.train.flat):,} train events")
    print(FORMAT.format("ours, then the peer's", *("Recall@10", "NDCG@10", "s") * 2, "differ", "bound"))
    for pair in (*PAIRS, *PUBLISHED.get((len(case.train), case.n_items), ())):
        if args.only and pair.name not in args.only.split(","):
            continue
        sides = compared(pair, case, args.peer_python, args.seed)
        line = [x for side in sides for x in (f"{side['recall']:.4f}", f"{side['ndcg']:.4f}", f"{side['seconds']:.1f}")]
        apart = max(abs(sides[0][key] / sides[-1][key] - 1) for key in ("recall", "ndcg"))
        print(FORMAT.format(pair.title, *line, f"{apart:.4f}", f"{pair.bound:.3f}").replace("nan", "  -"), flush=True)
        if apart > pair.bound:
            missed.append(pair.title)
    if missed:
        print(f"missed: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
