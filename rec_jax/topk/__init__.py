"""Exact top-k and exact ranks over a catalogue that is read in blocks of items, on one device or sharded over a mesh axis.

One fold serves all (`fold.py`): a block of items is scored by one matmul, and what is kept of it is a running top-k, the scores of named
items, or counts. Ties are decided once, there: in a top-k the lower id comes first; in a rank a tie never favours the target.

Exactness. A named item's score is read out of the same matmul that scores its rivals, so identical items tie exactly. Blocks are
multiples of 128 items and queries are padded to a multiple of 8: for such shapes the CPU's matmul gives the same bits whatever the
block size, the number of queries or the number of devices (tests/topk_test.py). On GPU and TPU the order of summation may depend on
the shape, so there results are reproducible for one block size and device count.
"""

from rec_jax.topk.fold import BLOCK, GROUP, Ranked
from rec_jax.topk.search import (
    rank_and_top_k,
    rank_and_top_k_of_scores,
    ranks_from_scores,
    target_ranks,
    top_k,
    top_k_with_scores_of,
)

__all__ = [
    "BLOCK",
    "GROUP",
    "Ranked",
    "rank_and_top_k",
    "rank_and_top_k_of_scores",
    "ranks_from_scores",
    "target_ranks",
    "top_k",
    "top_k_with_scores_of",
]
