"""Top-n with context: each positive of labelled impressions against the whole catalogue, for its user and under its circumstances.

`NAME/...` leaves out of a ranking what the user has positively, in the very same context, in the parts before: train for validation, train
and validation for the test. In another context it stays: people use the same things again. `NAME_all/...` removes nothing. A positive is
never left out of its own ranking, ties never count for it, and others of the same user and context are its rivals. The metrics are means
over positives, so that with one target each recall is hr, and map is mrr.

A case is a pair of user and context. Items are scored once for a case, however many positives it has, a block of cases at a time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse

from rec_jax import topk
from rec_jax.data import impressions as impressions_lib
from rec_jax.data.impressions import Impressions
from rec_jax.data.prepare import Prepared
from rec_jax.eval import rankings
from rec_jax.eval.ctr_baselines import ClickModel
from rec_jax.eval.encoder import Say
from rec_jax.eval.logged import OF_ITEM
from rec_jax.towers import ids, interactions
from rec_jax.towers.bert import unit_length
from rec_jax.towers.two_tower import TwoTowerSpec
from rec_jax.types import Array, Params, Ragged, RecJaxError

EARLIER = {"valid": ("train",), "test": ("train", "valid")}
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]  # user [q], context [q, C] -> scores [q, N] float32
Ranker = Callable[[Scorer, str], dict[str, float]]  # a scorer and its name -> metrics by name


@dataclasses.dataclass(frozen=True)
class Positives:
    """Positives [E] of a part, by the K cases that they are of.

    Attributes:
      user, context: [K] and [K, C], of each case.
      case: [E], ascending.
      item: [E], the targets.
      removed: [K] rows, what `NAME/...` leaves out for each case.
      n_items: N.
    """

    user: np.ndarray
    context: np.ndarray
    case: np.ndarray
    item: np.ndarray
    removed: Ragged
    n_items: int


def positives(prepared: Prepared, split: str, *, most: int = -1, seed: int = 0) -> Positives:
    """The positives of a part, "valid" or "test", by the first label; at most `most` of them, drawn by seed, -1 = all.

    Raises:
      RecJaxError: another part, no positive, a first label that is not 0 or 1, a context field that tells of the item that was shown.
    """
    if split not in EARLIER:
        raise RecJaxError(f"split {split!r}: expected {' or '.join(EARLIER)}")
    parts = [_positive(prepared.impressions(name), name) for name in (split, *EARLIER[split])]
    here, sizes = parts[0], parts[0].sizes
    if of_item := [field for field in here.fields if field in OF_ITEM]:
        raise RecJaxError(
            f"context field {of_item[0]!r} tells of the item that was shown, and of the others nobody knows it: no catalogue can be ranked "
            "by it; set config.eval.top_n=0"
        )
    if not len(here):
        raise RecJaxError(f"the {split} part has no positive of the label {here.tasks[0]!r} to rank; set config.eval.top_n=0")
    user, item, context = (np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "item", "context"))
    everywhere = impressions_lib.cases(user, context, sizes)
    rows = np.arange(len(here))
    if 0 <= most < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    rows = rows[np.argsort(everywhere[rows], kind="stable")]
    known, first, case = np.unique(everywhere[rows], return_index=True, return_inverse=True)
    before = np.unique(np.stack([everywhere[len(here) :], item[len(here) :]]), axis=1)
    before = before[:, np.isin(before[0], known)]
    offsets = np.append(np.searchsorted(before[0], known), before.shape[1])
    removed = Ragged(before[1].astype(np.int32), offsets.astype(np.int64))
    return Positives(user[rows[first]], context[rows[first]], case, item[rows], removed, prepared.n_items)


def _positive(part: Impressions, name: str) -> Impressions:
    labels = np.asarray(part.labels[:, 0])
    other = ~np.isnan(labels) & (labels != 0) & (labels != 1)
    if other.any():
        raise RecJaxError(
            f"the {name} part has {labels[np.argmax(other)]:g} as a label {part.tasks[0]!r}: what is a positive is known of labels of 0 "
            "and 1 alone; set config.eval.top_n=0"
        )
    return part[np.flatnonzero(labels == 1)]


def ranker(config: Any, prepared: Prepared, split: str, say: Say) -> Ranker | None:
    """What ranks the positives of a part with a scorer, as a stage's config asks for it -> metrics by name; None where it does not."""
    e = config.eval
    if not e.top_n:
        return None
    found = positives(prepared, split, most=e.top_n, seed=config.seed)
    options: dict[str, Any] = {"ks": tuple(e.k), "name": split, "users_per_block": e.users_per_block}

    def measure(scorer: Scorer, name: str) -> dict[str, float]:
        began = time.perf_counter()
        metrics = rank(scorer, found, **options).metrics
        seconds = time.perf_counter() - began
        say(f"  {name}: {len(found.item):,} positives in {len(found.user):,} pairs of user and context, top-n: {seconds:.0f} s")
        return metrics

    return measure


def titles(split: str) -> dict[str, str]:
    """What the metrics' names begin with -> the title of their table."""
    every = "positives, each against all items in its context"
    return {split: f"{every}: what the user had in it before removed", f"{split}_all": f"{every}: nothing removed"}


def rank(scorer: Scorer, found: Positives, *, ks: Sequence[int], name: str, users_per_block: int) -> rankings.Rankings:
    """Ranks each positive among all items -> Rankings whose rows are the positives [E], with one target each.

    Memory: a few times users_per_block x N x 4 bytes; the scorer gets as many cases at most.

    Raises:
      RecJaxError: scores of another shape or type, a NaN score.
    """
    shape = (len(found.item), max(ks))
    best, ranks, ranks_all = np.full(shape, -1, np.int32), np.zeros((shape[0], 1), np.int32), np.zeros((shape[0], 1), np.int32)
    width = rankings.bucket(int(found.removed.lengths().max()))
    for first in range(0, len(found.user), users_per_block):
        cases = slice(first, first + users_per_block)
        scores = scorer(found.user[cases], found.context[cases])
        expected = (len(found.user[cases]), found.n_items)
        if scores.shape != expected:
            raise RecJaxError(f"the scorer gave scores of shape {scores.shape}, expected {expected}")
        start, stop = np.searchsorted(found.case, (first, first + users_per_block))
        for at in range(start, stop, users_per_block):
            rows = slice(at, min(at + users_per_block, stop))
            case = np.zeros(users_per_block, np.int64)  # the last rows are filled up, so that they compile to nothing new
            case[: rows.stop - at] = found.case[rows]
            target = np.full((users_per_block, 1), -1, np.int32)
            target[: rows.stop - at, 0] = found.item[rows]
            removed = rankings.padded(found.removed, case, width)
            out = topk.rank_and_top_k_of_scores(scores[np.maximum(case - first, 0)], target, k=shape[1], exclude=removed)
            best[rows], ranks[rows], ranks_all[rows] = (x[: rows.stop - at] for x in (out.ids, out.ranks, out.ranks_all))
    return rankings.of_ranks(best, ranks, ranks_all, ks=ks, name=name, n_items=found.n_items)


def of_towers(params: Params, spec: TwoTowerSpec, items: Array, *, users_per_block: int) -> Scorer:
    """Items [N, D] of the towers -> scorer by the task head's first logit."""
    head = spec.task
    assert head is not None and spec.user == "id"  # as every stage of impressions has them

    @jax.jit
    def scores(params: Params, items: Array, user: Array, context: Array | None) -> jax.Array:
        users = ids.look_up(params["users"], user)
        users = unit_length(users) if spec.normalize else users
        return interactions.score_all(params["task"], head, users, items, context, once=True)

    def score(user: np.ndarray, context: np.ndarray) -> np.ndarray:
        few = ((0, users_per_block - len(user)),)  # one shape: it compiles once
        shown = np.pad(context, (*few, (0, 0))) if head.context else None
        return np.asarray(scores(params, items, np.pad(user, few), shown))[: len(user)]

    return score


def of_clicks(model: ClickModel) -> Scorer:
    """A model of the fields user, item and context -> scorer by its logits."""

    def score(user: np.ndarray, context: np.ndarray) -> np.ndarray:
        fields = np.column_stack([user, np.full_like(user, -1), context])
        return model.logits_of_all(fields, 1).astype(np.float32)

    return score


def most_used(prepared: Prepared) -> Scorer:
    """By how many train positives an item has: the same ranking for everybody, everywhere."""
    counts = _counts(_positive(prepared.impressions("train"), "train"), prepared).sum(0).A1.astype(np.float32)
    return lambda user, context: np.tile(counts, (len(user), 1))


def most_used_by_user(prepared: Prepared) -> Scorer:
    """By how many train positives of the user an item has, in whatever context; among equals by how many of all users."""
    counts = _counts(_positive(prepared.impressions("train"), "train"), prepared)
    values, place = np.unique(counts.sum(0).A1, return_inverse=True)
    among_equals = place / len(values)  # below 1, and in steps that float32 can tell beside a count
    return lambda user, context: (counts[user].toarray() + among_equals).astype(np.float32)


def _counts(train: Impressions, prepared: Prepared) -> Any:
    """Positives -> how many each user has of each item [U, N], sparse."""
    shape = (prepared.n_users, prepared.n_items)
    return scipy.sparse.csr_matrix((np.ones(len(train)), (train.user, train.item)), shape=shape)


# Their names differ from those of config.eval.baselines, which a workdir of several stages may have beside them.
COUNTED: dict[str, Callable[[Prepared], Scorer]] = {"most_used": most_used, "most_used_by_user": most_used_by_user}
