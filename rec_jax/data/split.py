"""Train, validation and test: leave-one-out, temporal, ratio, random, cold-item.

Every split takes events sorted by (user, time) and returns [E] uint8: 0 train, 1 validation, 2 test. In leave-one-out, ratio and
temporal a user's events come in the order train, validation, test, so the history of a target never holds a later event. In
cold-item they interleave: the history of a target is what the user had before it, and cold items are in no training history. In random
they interleave as well, and time says nothing: the history of a target is all that the user has in the earlier parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rec_jax.types import RecJaxError

TRAIN, VALID, TEST = 0, 1, 2


def split(
    user: np.ndarray, item: np.ndarray, time: np.ndarray, n_users: int, n_items: int, spec: Any, *, clock: bool = True, seed: int = 0
) -> np.ndarray:
    """user [E], item [E], time [E] sorted by (user, time) -> split [E] uint8, by `spec` = config.data.split.

    Args:
      clock: whether `time` is a time; "temporal" needs one.
      seed: of "random" and "cold_item".

    Raises:
      RecJaxError: no such split, shares that leave nothing to train on, or "temporal" without times.
    """
    if spec.kind not in SPLITS:
        raise RecJaxError(f"config.data.split.kind={spec.kind!r}: expected one of {', '.join(SPLITS)}")
    if spec.valid < 0 or spec.test < 0 or spec.valid + spec.test >= 1:
        raise RecJaxError(f"config.data.split.valid={spec.valid} and test={spec.test}: expected shares of at least 0 that sum to below 1")
    if spec.kind == "temporal" and not clock:
        raise RecJaxError("config.data.split.kind='temporal' needs times, and this input has only an order; use leave_one_out or ratio")
    out = SPLITS[spec.kind](user, item, time, n_users=n_users, n_items=n_items, valid=spec.valid, test=spec.test, seed=seed)
    if not (out == TRAIN).any():
        n_valid, n_test = int((out == VALID).sum()), int((out == TEST).sum())
        raise RecJaxError(f"config.data.split.kind={spec.kind!r} leaves no training events ({n_valid:,} validation, {n_test:,} test)")
    return out


def leave_one_out(user: np.ndarray, item: np.ndarray, time: np.ndarray, *, n_users: int, **_: Any) -> np.ndarray:
    """user [E] -> [E] uint8: a user's last event is test, the one before it validation.

    Of a user with two events the last is test and the other train; a single event is train. Nothing follows a test event.
    """
    from_end, events = _from_end(user, n_users)
    out = np.zeros(len(user), np.uint8)
    out[(from_end == 1) & (events >= 3)] = VALID
    out[(from_end == 0) & (events >= 2)] = TEST
    return out


def ratio(user: np.ndarray, item: np.ndarray, time: np.ndarray, *, n_users: int, valid: float, test: float, **_: Any) -> np.ndarray:
    """user [E] -> [E] uint8: of each user the last `test` share is test, the `valid` share before it validation.

    Shares are rounded down, but to at least one event each for a user with three or more (a share of 0 stays 0), and one event at
    least is left to train. Users with fewer than three events are train only.
    """
    from_end, events = _from_end(user, n_users)
    n_test = _whole(test, events)
    n_test = np.minimum(n_test, events - (2 if valid > 0 else 1))
    n_valid = np.minimum(_whole(valid, events), events - 1 - n_test)
    enough = events >= 3
    out = np.zeros(len(user), np.uint8)
    out[enough & (from_end < n_test + n_valid)] = VALID
    out[enough & (from_end < n_test)] = TEST
    return out


def temporal(user: np.ndarray, item: np.ndarray, time: np.ndarray, *, valid: float, test: float, **_: Any) -> np.ndarray:
    """time [E] -> [E] uint8: one pair of dates for everybody: test from the date that the last `test` share of all events starts at,
    validation from the date that the last `valid + test` share starts at.

    Events of one time stay together (in the later part), so the shares are reached up to ties. A user may have events in one part only.

    Reference: Campos et al., Time-aware recommender systems, UMUAI 24 (2014): time-dependent, community-centred.
    """
    out = np.zeros(len(time), np.uint8)
    n_test, n_valid = int(_floor(test * len(time))), int(_floor((valid + test) * len(time)))
    cuts = [len(time) - n for n in (n_valid, n_test)]
    ordered = np.partition(time, [c for c in cuts if c < len(time)]) if n_valid else time
    for cut, n, code in ((cuts[0], n_valid, VALID), (cuts[1], n_test, TEST)):
        if n:
            out[time >= ordered[cut]] = code
    return out


def random(
    user: np.ndarray, item: np.ndarray, time: np.ndarray, *, n_users: int, valid: float, test: float, seed: int, **_: Any
) -> np.ndarray:
    """user [E] -> [E] uint8: of each user's events a `test` and a `valid` share, drawn by seed.

    Shares are rounded down, but a share between 0 and 1 event is one, the test's first, as long as more than one event is left to train.

    Reference: RecBole (Zhao et al., 2021), `Dataset.split_by_ratio` with group_by="user" and order "RO".
    """
    place = np.random.RandomState(seed).permutation(len(user))
    order = np.lexsort((place, user))  # user by user, in random order
    from_end, events = _from_end(user, n_users)
    n_test, n_valid = _floor(test * events), _floor(valid * events)
    left = events - n_test - n_valid
    for share, n in ((test, n_test), (valid, n_valid)):
        one = (left > 1) & (n == 0) & (share > 0)
        n += one
        left -= one
    out = np.zeros(len(user), np.uint8)
    out[order[from_end < n_test + n_valid]] = VALID
    out[order[from_end < n_test]] = TEST
    return out


def cold_item(
    user: np.ndarray, item: np.ndarray, time: np.ndarray, *, n_items: int, valid: float, test: float, seed: int, **_: Any
) -> np.ndarray:
    """item [E] -> [E] uint8: a `test` share of items, drawn by seed, has all its events in test, a `valid` share in validation.

    Shares are rounded down, but to at least one item (a share of 0 stays 0). All events of the other items are train.
    """
    n_test, n_valid = (max(1, int(_floor(share * n_items))) if share > 0 else 0 for share in (test, valid))
    order = np.random.RandomState(seed).permutation(n_items)  # RandomState: its streams are fixed across numpy versions
    part = np.zeros(n_items, np.uint8)
    part[order[:n_test]] = TEST
    part[order[n_test : n_test + n_valid]] = VALID
    return part[item]


SPLITS: dict[str, Callable[..., np.ndarray]] = {
    "leave_one_out": leave_one_out,
    "temporal": temporal,
    "ratio": ratio,
    "random": random,
    "cold_item": cold_item,
}


def _from_end(user: np.ndarray, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """user [E] sorted -> (events of the same user after this one [E], events of this user [E])."""
    counts = np.bincount(user, minlength=n_users)
    from_end = np.cumsum(counts)[user]
    from_end -= 1 + np.arange(len(user))
    return from_end.astype(np.int32), counts.astype(np.int32)[user]


def _floor(x: Any) -> Any:
    """Rounds down, past the error of a product such as 0.29 * 100."""
    return np.floor(np.asarray(x) + 1e-9).astype(np.int64)


def _whole(share: float, events: np.ndarray) -> np.ndarray:
    return np.maximum(_floor(share * events), 1) if share > 0 else np.zeros_like(events)
