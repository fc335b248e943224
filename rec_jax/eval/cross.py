"""A trained cross-encoder: on a user's target beside drawn items, and ranking anew the best of another ranking."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax.data import packing, pair_batches
from rec_jax.data.prepare import Prepared
from rec_jax.eval import baselines, rankings
from rec_jax.eval.encoder import BLOCK_TOKENS, Say
from rec_jax.eval.model import load
from rec_jax.towers import interactions, two_tower
from rec_jax.types import EvalSet, Params, Ragged, RecJaxError

CODES = {"valid": 1, "test": 2}  # of the random numbers by which a split's items are drawn


class CrossEncoder:
    """Scores pairs of a history and an item; holds the data and the specs, not the parameters.

    Args:
      config: of one stage.
      prepared: the data.
      tokens: of each catalogue item.
      spec: of the towers, of which the encoder counts.

    Raises:
      RecJaxError: pairs that no row holds.
    """

    def __init__(self, config: Any, prepared: Prepared, tokens: Ragged, spec: two_tower.TwoTowerSpec):
        self.config, self._prepared, self._tokens = config, prepared, tokens
        self._room = pair_batches.user_room(tokens, config.batch.row_tokens)

        def scores(params: Params, tokens: Any, segments: Any, types: Any) -> jax.Array:
            k = spec.texts_per_row
            return interactions.cross_scores(params["cross"], params["text"], spec.text, tokens, segments, types=types, texts_per_row=k)

        self._scores = jax.jit(scores)

    def scores(self, params: Params, histories: Sequence[np.ndarray], candidates: np.ndarray) -> np.ndarray:
        """Histories (oldest first) of U users, candidates [U, C] int32 -> logits [U, C] float32, -inf for a candidate of -1."""
        batch, size = self.config.batch, self.config.eval.users_per_block
        out = np.full(candidates.shape, -np.inf, np.float32)
        for start in range(0, len(candidates), size):
            rows, columns = np.nonzero(candidates[start : start + size] >= 0)
            texts = [pair_batches.written_out(self._tokens, h, batch.user_history, self._room) for h in histories[start : start + size]]
            items = candidates[start : start + size][rows, columns]
            pairs = [pair_batches.pair_text(texts[row], self._tokens[int(item)]) for row, item in zip(rows, items, strict=True)]
            out[start + rows, columns] = self._of_pairs(params, pairs)
        return out

    def _of_pairs(self, params: Params, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Tokens and types of P pairs -> logits [P]."""
        size = self.config.batch.row_tokens
        # Types are packed as if they were tokens: of the same lengths, they come to stand in the same places.
        both = [Ragged.from_rows([pair[n] for pair in pairs]) for n in range(2)]
        blocks = (packing.pack_texts(part, rows=max(1, BLOCK_TOKENS // size), row_tokens=size) for part in both)
        out = np.zeros(len(pairs), np.float32)
        for tokens, types in zip(*blocks, strict=True):
            made = np.asarray(self._scores(params, tokens.tokens, tokens.segment_ids, types.tokens))
            out[tokens.texts] = made.reshape(-1)[tokens.places]
        return out

    def validate(self, params: Params, *, step: int) -> dict[str, float]:
        """Metrics of the validation split, as training watches them (of at most eval.max_users users, drawn once)."""
        del step
        return self.measure(params, "valid", most=self.config.eval.max_users)

    def measure(self, params: Params, split: str, *, most: int = 0) -> dict[str, float]:
        """Each user's first target among itself and K drawn items -> SPLIT/pair_mrr and SPLIT/pair_accuracy (the share that is first).

        The items are drawn by the seed and the user, once for all, from those that are neither in the history nor targets. Ties never
        count for the target.

        Args:
          params: {"text", "cross"}.
          split: "valid" or "test".
          most: users that are measured, drawn by the seed; 0 = all.
        """
        whole, seed, k = self._prepared.eval_set(split), self.config.seed, self.config.batch.pair_negatives
        chosen = np.arange(len(whole.users))
        if 0 < most < len(chosen):
            chosen = np.sort(np.random.default_rng(seed).choice(len(chosen), most, replace=False))
        histories, candidates = [whole.history[int(n)] for n in chosen], np.zeros((len(chosen), 1 + k), np.int32)
        for row, n in enumerate(chosen.tolist()):
            targets, random = whole.targets[n], np.random.default_rng((seed, CODES[split], int(whole.users[n])))
            known = np.unique(np.concatenate([histories[row], targets]))
            if len(known) + k > whole.n_items:
                raise RecJaxError(f"a user knows {len(known)} of {whole.n_items} items: lower batch.pair_negatives={k}")
            candidates[row] = [targets[0], *pair_batches.other_items(random, k, known, whole.n_items)]
        scores = self.scores(params, histories, candidates)
        ranks = 1 + (scores[:, 1:] >= scores[:, :1]).sum(1)
        return {f"{split}/pair_mrr": float((1 / ranks).mean()), f"{split}/pair_accuracy": float((ranks == 1).mean())}

    def rerank(self, params: Params, first: First, split: str) -> rankings.Rankings:
        """The best `config.eval.rerank` of each user's first ranking in the order of this encoder's scores, the others behind as they are.

        Args:
          params: {"text", "cross"}.
          first: the rankings of the split's users.
          split: "valid" or "test".
        """
        whole, ks, n = self._prepared.eval_set(split), tuple(self.config.eval.k), self.config.eval.rerank
        histories = [whole.history[row] for row in range(len(whole.users))]
        made = [self._anew(params, histories, whole, ranked, n) for ranked in (first.removed, first.all)]
        (ids, ranks), (_, ranks_all) = made
        return rankings.of_ranks(ids[:, : max(ks)], ranks, ranks_all, ks=ks, name=split, n_items=whole.n_items)

    def _anew(
        self, params: Params, histories: list[np.ndarray], eval_set: EvalSet, ranked: rankings.Rankings, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A ranking of ids [U, C], ranks [U, Tg] -> both, the first n ids in a new order."""
        ids, ranks = ranked.ids.copy(), ranked.ranks.copy()
        scores = self.scores(params, histories, ids[:, :n])
        order = np.argsort(-scores, axis=1, kind="stable")
        ids[:, :n] = np.take_along_axis(ids[:, :n], order, axis=1)
        for user in range(len(ids)):
            ranks[user] = new_ranks(ranked.ids[user, :n], scores[user], eval_set.targets[user], ranks[user])
        return ids, ranks


@dataclasses.dataclass(frozen=True)
class First:
    """What is ranked anew: rankings with the items of the history removed, and with nothing removed; each in `ids` and `ranks`."""

    removed: rankings.Rankings
    all: rankings.Rankings


def first_rankings(config: Any, prepared: Prepared, workdir: epath.Path, before: str | None, split: str, say: Say) -> First:
    """The rankings by a stage, or by popularity, of which a stage of pairs ranks the best anew; a target is never removed.

    Args:
      config: of the stage of pairs.
      prepared: the data.
      workdir: of the run.
      before: the stage that ranks first; None = popularity.
      split: "valid" or "test".
      say: told what ranks first.
    """
    e, eval_set, by = config.eval, prepared.eval_set(split), before or "popularity"
    say(f"{split}: the best {e.rerank} by {by} are ranked anew")
    users = range(len(eval_set.users))
    removed = [eval_set.history[n][~np.isin(eval_set.history[n], eval_set.targets[n])] for n in users]
    excluded = Ragged.from_rows(removed), Ragged.from_rows([[] for _ in users])
    ks = (max(e.rerank, *e.k),)
    if before is None:
        scorer = baselines.fit("popularity", prepared.train_histories(), prepared.n_items)
        options = {"ks": ks, "name": split, "users_per_block": e.users_per_block}
        return First(*(rankings.evaluate_scores(scorer, eval_set, exclude=x, **options) for x in excluded))
    t = load(workdir, before, say=say)
    eval_set = t.model.prepared.eval_set(split)  # with what its own towers read of the histories
    return First(*(t.model.rank(t.params, eval_set, name=split, items=t.items, ks=ks, exclude=x) for x in excluded))


def new_ranks(ids: np.ndarray, scores: np.ndarray, targets: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Best ids [n], their new scores [n], a user's targets, their ranks [Tg] (0 = none) -> [Tg] ranks with those of the ids by score.

    As everywhere, another item that scores as high counts against a target, and of two targets the first goes first.
    """
    out, place = ranks.copy(), {int(item): n for n, item in enumerate(ids) if item >= 0}
    mine = {place[int(item)]: number for number, item in enumerate(targets) if ranks[number] > 0 and int(item) in place}
    for at, number in mine.items():
        rivals = [n for n in place.values() if n != at]
        above = sum(scores[n] > scores[at] or (scores[n] == scores[at] and mine.get(n, -1) < number) for n in rivals)
        out[number] = 1 + above
    return out
