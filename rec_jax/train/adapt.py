"""What a config leaves to the data: how long histories are trained on and how fast, how wide the towers are, and how much is done against
learning histories by heart.

All go by how often an epoch predicts an item, on average, and the length by how many steps an epoch has too. Where items are seldom a
target, their own vectors soon know whose histories they follow: few epochs, neighbours as targets, smoothed labels and left-out events
help. Where each is a target often, a tower goes on learning, and the same means hold it back. There the mean of its weights over the newest
part of the run is better than they are; Muon comes as far in two thirds of the steps (MovieLens-1M by time, validation NDCG@10 after 2,906
of 14,531 steps .182, with Adam .172, and .187 after 4,359; on Amazon Beauty both end at .086); and wider towers find more
(.169 after 1,453 steps, where .162 was).

The laws are flat for sparse data (Beauty, 10.86 times, and Amazon Games, 17.9, want the same) and go through what was found on MovieLens-1M
(265 and 290 times); that smoothed labels go by the same law as the others is taken over from these. On little data a run is as long as a
tower needs. And whether items have texts at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rec_jax.config import AUTO, get

SPARSE = 30.0  # times an item is predicted: up to there strengths and rate are those of the config
SPARSE_EPOCHS, MOST = 7.0, 30.0
# Times from which on Muon moves the tower's kernels and vectors are wider, by what factor, and with which share of the epochs. On
# MovieLens-100K, 57.8 times, Muon brings nothing: validation NDCG@10 .1338, with Adam .1339.
DENSE, WIDER, FEWER = 100.0, 1.5, 0.587
# A tower that begins near its items still has to learn: on a fifth of Beauty's users 7 epochs, 147 steps, had a validation NDCG@10 of
# .0617 (test .0563), 235 steps .0647 (.0615), 359 steps .0677 (.0629).
LEAST_STEPS = 380.0
CHOSEN = (
    "train.duration", "optimizer.learning_rate", "towers.user.dropout", "batch.drop_events", "objectives.info_nce.neighbour_share",
    "objectives.info_nce.label_smoothing", "optimizer.average",
)  # fmt: skip


def times_predicted(train_lengths: np.ndarray, n_items: int) -> float:
    """Train events of each user [U] -> how often an epoch of histories predicts an item, on average: all but each user's first event."""
    return float(np.maximum(np.asarray(train_lengths, np.int64) - 1, 0).sum()) / n_items


def epochs(times: float, steps: float = math.inf, *, wide: bool = False) -> float:
    """How many epochs of so many steps are trained: 7 up to 30 times, 16 at 290; on little data as make LEAST_STEPS; at most 30.

    Wider towers, and Muon alone, know as much after fewer, and a step of wider ones costs more: their run is about as long in time.
    """
    found = SPARSE_EPOCHS * max(1.0, times / SPARSE) ** 0.36 * (FEWER if wide else 1.0)
    return min(MOST, max(found, LEAST_STEPS / steps))


def strength(times: float) -> float:
    """Which share of the config's strengths is used: all up to 30 times, .3 at 290."""
    return max(1.0, times / SPARSE) ** -0.538


def haste(times: float) -> float:
    """By what the config's learning rate is multiplied: 1 up to 30 times, 2.3 at 290."""
    return max(1.0, times / SPARSE) ** 0.362


def without_texts(config: Any, texts: Sequence[str], ids: Sequence[str]) -> Any:
    """A run's config for items by their IDs alone where it has `train.adapt`, items have vectors of their own, and no item has a text.

    An item without text is named by its id, and a text vector of that says nothing, but takes part: on Amazon Beauty without its titles
    NDCG@10 was .051 with such texts, .058 without. There items of a history stay candidates, for own vectors alone learn histories by
    heart sooner without them (.055). A config that asks for what texts alone can do comes back as it is, and so does one with stages, or
    with an encoder that is trained.

    Args:
      config: of the run.
      texts, ids: of the catalogue's items [N].
    """
    item = config.towers.item
    wanted = _plain(config) and config.towers.text.source == "frozen" and item.ids and item.text
    if not wanted or item.id_dropout or item.text_dropout or item.gates or list(texts) != list(ids):
        return config
    out = config.copy_and_resolve_references()
    with out.unlocked():
        out.towers.item.text, out.towers.item.words = False, 0
        out.towers.item.text_length, out.towers.item.id_shrinkage = 0.0, 0.0
        out.objectives.info_nce.mask_history = False
    return out


def _plain(config: Any) -> bool:
    """Whether a run is one stage of histories, with a tower of them, that leaves its strengths to the data."""
    return config.train.adapt and not config.stages and config.batch.kind == "histories" and config.towers.user.kind == "history"


def widened(config: Any, train_lengths: np.ndarray, n_items: int, *, text_width: int, say: Callable[[str], None] | None = None) -> Any:
    """A run's config with wider towers where it has `train.adapt`, and an epoch predicts an item more than 100 times.

    towers.dim is half as much again. A config with stages comes back as it is, and so does one that goes on from another workdir
    (`as_wide_as`), one whose item head begins as a whitening of fewer numbers, and one whose heads would not divide it.

    Args:
      config: of the run.
      train_lengths: train events of each user [U].
      n_items: N.
      text_width: D_text of the text vectors.
      say: told what is chosen.
    """
    towers, times = config.towers, times_predicted(train_lengths, n_items)
    dim = int(WIDER * towers.dim)
    narrow = towers.item.text and towers.item.whiten and text_width < dim
    if not _plain(config) or config.start.path or times <= DENSE or narrow or dim % towers.user.heads:
        return config
    if say is not None:
        say(f"  an epoch predicts an item {times:.1f} times on average: towers.dim={dim}")
    return _of_width(config, dim)


def as_wide_as(config: Any, start: Any) -> Any:
    """A run's config as wide as the one that it goes on from, `start`, where both leave it to the data and that one was made wider."""
    made_wider = start.towers.dim == int(WIDER * config.towers.dim)
    return _of_width(config, start.towers.dim) if made_wider and _plain(config) and _plain(start) else config


def _of_width(config: Any, dim: int) -> Any:
    out = config.copy_and_resolve_references()
    with out.unlocked():
        out.towers.dim = dim
    return out


def adapted(config: Any, train_lengths: np.ndarray, n_items: int, say: Callable[[str], None] | None = None) -> Any:
    """A stage's config with `train.duration="auto"` as epochs and, with `train.adapt`, the strengths and the rate that this data wants.

    Strengths are neighbour_share and label_smoothing of objectives.info_nce, batch.drop_events and, by its square root, the dropout of a
    history tower; the rate is optimizer.learning_rate. optimizer.average goes the other way: the more the strengths fall, the longer the
    mean of the weights, and where they stay there is none. Up to 100 times optimizer.muon is off. A config that
    leaves nothing to the data comes back as it is.

    Args:
      config: of one stage.
      train_lengths: train events of each user [U].
      n_items: N.
      say: told what is chosen, where that differs from the config and is not that there is none.
    """
    lasts, adapt = config.train.duration == AUTO, config.train.adapt and config.batch.kind == "histories"
    if not (lasts or adapt):
        return config
    times, batch = times_predicted(train_lengths, n_items), config.batch
    steps = times * n_items * (1 - batch.drop_events) / (batch.shards * batch.history_rows * batch.history_length)
    out = config.copy_and_resolve_references()
    with out.unlocked():
        if lasts:
            wide = _plain(config) and times > DENSE
            out.train.duration = f"{epochs(times, steps or math.inf, wide=wide):.2f} epochs"
        if adapt:
            for key in ("neighbour_share", "label_smoothing"):
                out.objectives.info_nce[key] = round(config.objectives.info_nce[key] * strength(times), 4)
            out.batch.drop_events = round(config.batch.drop_events * strength(times), 4)
            out.towers.user.dropout = round(config.towers.user.dropout * strength(times) ** 0.5, 4)
            out.optimizer.average = round(config.optimizer.average * (1 - strength(times)), 4)
            out.optimizer.muon = config.optimizer.muon if times > DENSE and config.towers.user.kind == "history" else ()
            out.optimizer.learning_rate = float(f"{config.optimizer.learning_rate * haste(times):.3g}")
    chosen = [f"{key}={get(out, key)!r}" for key in CHOSEN if get(out, key) not in (get(config, key), 0.0)]
    if say is not None and chosen:
        say(f"  an epoch predicts an item {times:.1f} times on average: {', '.join(chosen)}")
    return out
