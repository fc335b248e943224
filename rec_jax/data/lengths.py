"""How much of a long history ranking and training take at once, and how many histories are longer than that."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rec_jax import config as config_lib
from rec_jax.data.draft import BatchSpec
from rec_jax.data.prepare import Prepared

KINDS = ("histories", "pairs")  # values of config.batch.kind whose batches are made of histories


def ranked_places(config: Any) -> int:
    """Places that the history tower has for a history when it ranks, the hidden one of a cloze among them."""
    return config.eval.history_length or config.batch.history_length


def ranked_events(config: Any) -> int:
    """Events of a history, the newest, that rank: the tower's places less the hidden one, or as many as are written out."""
    return config.batch.user_history if _written_out(config) else ranked_places(config) - bool(config.batch.cloze)


def _written_out(config: Any) -> bool:
    return config.batch.kind == "pairs" or config.towers.user.kind == "text"


def long_histories(train: np.ndarray, ranked: np.ndarray, config: Any) -> list[str]:
    """Train events of each user [U], events that each tested user is ranked by [V] -> a line for people about those that are longer than
    ranking takes, and one about those that are longer than an example of training; none where none is.

    Args:
      train, ranked: the lengths.
      config: of one stage.
    """
    if config.batch.kind not in KINDS:
        return []
    batch, most = config.batch, ranked_events(config)
    if _written_out(config):
        window, key = most + 1, f"config.batch.user_history={most}"
        rule = f"the newest {most} are written out to rank, as far as config.batch.row_tokens={batch.row_tokens} goes ({key})"
        taken = f"an epoch predicts one of them, drawn anew, from at most {most} before it ({key})"
    else:
        size, whose = BatchSpec.from_config(config).window, "eval" if config.eval.history_length else "batch"
        assert size is not None  # config.towers.user.kind='id' goes with impressions alone
        window = size + 1
        hidden, following = (", beside a hidden place", "") if batch.cloze else ("", " and the next event")
        rule = f"the newest {most} rank{hidden} (config.{whose}.history_length={ranked_places(config)})"
        dropped = " less config.batch.drop_events" if batch.drop_events else ""
        windows = f"windows of {batch.history_length} places{following}{', each in random order' if batch.shuffle_events else ''}"
        taken = f"all train{dropped}, in {windows} (config.batch.history_length={batch.history_length})"
    return [*_longer(ranked, most, "in the test", rule), *_longer(train, window, "in training", taken)]


def _longer(lengths: np.ndarray, most: int, where: str, rule: str) -> list[str]:
    """Lengths [n] -> how many are above `most`, and by what rule those are cut; none where none is."""
    count = int((lengths > most).sum())
    if not count:
        return []
    return [f"histories {where}: {count:,} of {len(lengths):,} have more than {most:,} events (the longest {lengths.max():,}): {rule}"]


def of_run(config: Any, prepared: Prepared) -> list[str]:
    """`long_histories` of a run's stages, each line once; which stages it is of, where others differ."""
    stages = {name: config_lib.for_stage(config, name) if name else config for name in config.stages or ("",)}
    stages = {name: stage for name, stage in stages.items() if stage.batch.kind in KINDS}
    if not stages:
        return []
    train = prepared.train_lengths()
    ranked = dataclasses.replace(prepared, columns=()).eval_set("test").history.lengths()  # without columns nothing is read from records
    found: dict[str, list[str]] = {}
    for name, stage in stages.items():
        for line in long_histories(train, ranked, stage):
            found.setdefault(line, []).append(name)
    return [line if len(names) == len(stages) else f"{line}, stage {', '.join(names)}" for line, names in found.items()]
