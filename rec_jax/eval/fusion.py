"""Neighbours' scores beside the model's: one ranking of both, the neighbours' weight chosen on validation.

    score(user, item) = model(user, item) / spread of the user's + weight * neighbours(user, item) / spread of the user's

Where there are several kinds of neighbours, each joins what the model and those before it make together.

A spread is the standard deviation of the user's scores over the catalogue, so that a weight means the same for every user and for scores of
any scale. A user without neighbours is ranked by the model alone. Both scores of a block of users are made once and shared by all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rec_jax import config as config_lib
from rec_jax.data.prepare import Prepared
from rec_jax.eval import baselines, metrics, rankings
from rec_jax.eval.baselines import Scorer
from rec_jax.topk.fold import ranked_dense
from rec_jax.types import EvalSet, RecJaxError

# Scores that are 0 for all but few items have a small spread, which makes these few large: sequence_knn wants .06 or so, a dense one 1.
WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
FOLDER = "fused"  # of the workdir, with the figures of both together
CHOSEN_BY = 10  # the weight is that of the highest NDCG at this place


def check(config: Any) -> None:
    """Finds out before anything is trained whether `config.eval.fuse` can be done at the end of the last stage.

    Raises:
      RecJaxError: the last stage ranks no catalogue, or its folder would be the fusion's.
    """
    if not config.eval.fuse:
        return
    last = config_lib.for_stage(config, config.stages[-1]) if config.stages else config
    if last.batch.kind != "histories":
        raise RecJaxError(
            f"config.eval.fuse={config.eval.fuse!r} is for a last stage that ranks items for histories; this one has "
            f"config.batch.kind={last.batch.kind!r}: set config.eval.fuse=''"
        )
    if FOLDER in config.stages:
        raise RecJaxError(f"config.stages names {FOLDER!r}, the folder that config.eval.fuse writes to: rename the stage")


def scaled(scores: np.ndarray) -> np.ndarray:
    """scores [q, N] -> [q, N] float32, each row over its standard deviation; a row of equal scores becomes 0, which ranks nothing."""
    spread = scores.std(axis=1, keepdims=True)
    flat = np.ptp(scores, axis=1, keepdims=True) == 0  # rounding may give it a spread
    return np.where(flat, 0, scores / np.where(flat, 1, spread)).astype(np.float32)


def mix(model: np.ndarray, neighbours: np.ndarray, weight: float) -> np.ndarray:
    """model [q, N], neighbours [q, N], both `scaled` -> scores of both together [q, N] float32."""
    return model + np.float32(weight) * neighbours


def together(model: Scorer, neighbours: Scorer, weight: float) -> Scorer:
    """The scorer of both."""
    return lambda histories: mix(scaled(model(histories)), scaled(neighbours(histories)), weight)


def ndcg_of_weights(
    model: Scorer,
    neighbours: Scorer,
    eval_set: EvalSet,
    weights: Sequence[float] = WEIGHTS,
    *,
    k: int = CHOSEN_BY,
    users_per_block: int = 256,
) -> dict[float, float]:
    """Two scorers [q] -> [q, N] -> {weight: mean NDCG at k of the users of `eval_set`, items of the history removed}.

    Memory: a few times users_per_block x N x 4 bytes.

    Raises:
      RecJaxError: no users, a NaN score.
    """
    sums = np.zeros(len(weights))
    for block in rankings.blocks(eval_set, users_per_block):
        parts = scaled(model(block.histories)), scaled(neighbours(block.histories))
        ranks, nan = jax.device_get(_ranks(*parts, np.asarray(weights, np.float32), block.target, block.exclude))
        if nan.any():
            raise RecJaxError(f"user {eval_set.users[block.rows[int(np.argmax(nan))]]} has a NaN score; look for NaN in the vectors")
        sums += [metrics.ndcg(of_weight, k=k).sum() for of_weight in ranks]
    return dict(zip(weights, (sums / len(eval_set.users)).tolist(), strict=True))


@jax.jit
def _ranks(
    model: jax.Array, neighbours: jax.Array, weights: jax.Array, target: jax.Array, exclude: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores [q, N] twice, weights [W], target [q, Tg] -> (ranks [W, q, Tg], rows [q] with a NaN score); one weight at a time."""
    one = lambda weight: ranked_dense(model + weight * neighbours, target, exclude, k=0)
    ranked, nan = jax.lax.map(one, weights)
    return ranked.ranks, nan.any(0)


def fused(
    config: Any,
    prepared: Prepared,
    model: Scorer,
    name: str,
    split: str,
    say: Callable[[str], None],
    *,
    table: Callable[[], np.ndarray],
) -> tuple[rankings.Rankings, dict[str, float]]:
    """Ranks `split` by the model and the baselines of `config.eval.fuse` together -> (Rankings, their weights, chosen on validation).

    Validation is of the users that training watched, at most `config.eval.max_users`.

    A baseline is fitted on the train events, as for its own row, so that neither knows the validation items when the weight is chosen;
    on test both have them in their histories.

    Args:
      config: of the last stage.
      model: its scores of histories.
      name: of the model, to be said.
      table: makes the text vectors of the catalogue, for those that read them. Where no item has a text, they are left out.

    Raises:
      RecJaxError: no validation users.
    """
    e = config.eval
    valid = rankings.some_users(prepared.eval_set("valid"), e.max_users, seed=config.seed)
    if not len(valid.users):
        raise RecJaxError(f"config.eval.fuse={e.fuse!r} chooses its weight on validation, and this split has no validation users")
    both, weights = model, dict[str, float]()
    for part in config_lib.fused(config):
        if part == baselines.TEXT_KNN and prepared.texts() == prepared.item_ids():
            say(f"  {part} is left out: no item has a text")
            continue
        neighbours = baselines.of_config(part, config, prepared, table)
        found = ndcg_of_weights(both, neighbours, valid, users_per_block=e.users_per_block)
        weights[part] = max(found, key=lambda w: (found[w], -w))
        grid = ", ".join(f"{w:g}: {value:.4f}" for w, value in found.items())
        name = f"{name} + {part}"
        say(f"  {name}: weight {weights[part]:g} by validation's ndcg@{CHOSEN_BY} ({grid})")
        both = together(both, neighbours, weights[part])
    return rankings.evaluate_scores(both, prepared.eval_set(split), ks=tuple(e.k), name=split, users_per_block=e.users_per_block), weights
