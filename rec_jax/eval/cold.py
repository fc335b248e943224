"""Rankings of cold targets alone: the items that training saw least."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rec_jax.eval import metrics
from rec_jax.types import EvalSet

SHARE = 0.1  # of the catalogue
NAMES = ("ndcg", "hr", "mrr")


def most_seen(counts: np.ndarray, share: float = SHARE) -> int:
    """Train events of each item [N] -> the highest count at which an item is cold.

    Cold is the `share` of the catalogue that training saw least, and with it every item that was seen as often as one of those.
    """
    return int(np.sort(counts)[max(0, math.ceil(share * len(counts)) - 1)])


def measure(ranks: np.ndarray, eval_set: EvalSet, counts: np.ndarray, *, ks: Sequence[int], name: str) -> dict[str, float]:
    """Metrics of the users who have a cold target, by their cold targets alone.

    Args:
      ranks: [U, Tg] of the targets in the order of the set's, 0 = none, as `Rankings` has them.
      eval_set: whose they are.
      counts: [N] train events of each item.
      ks: list lengths.
      name: of the split.

    Returns:
      "NAME_cold/ndcg@10" and so on, and "NAME_cold/users", how many they are; that alone where there is none.
    """
    targets, most = eval_set.targets, most_seen(counts)
    kept = np.zeros_like(ranks)
    lengths = targets.lengths()
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    cold = counts[targets.flat] <= most
    kept[row[cold], column[cold]] = ranks[row[cold], column[cold]]
    kept = kept[(kept > 0).any(1)]
    found: dict[str, float] = {f"{name}_cold/users": len(kept)}
    if len(kept):
        found |= {f"{name}_cold/{key}": float(v.mean()) for key, v in metrics.per_user(kept, ks=tuple(ks), names=NAMES).items()}
    return found
