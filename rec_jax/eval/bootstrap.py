"""Is a difference between models more than the luck of the users? A paired bootstrap over users, and the file of per-user values it reads.

`DIR/eval/SPLIT_users.npz` (no pickle) holds "users" [U], their ids, and one array [U] per metric, such as "ndcg@10"; "fingerprint", where
there is one, names the prepared data. DIR is a workdir or a stage's folder of one.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rec_jax.eval import metrics, report
from rec_jax.types import Array, RecJaxError

RESERVED = ("users", "fingerprint")  # arrays of the file that are no metrics


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One metric of two models for the same users.

    Attributes:
      a, b: mean over users, and over seeds where there are several.
      spread_a, spread_b: standard deviation of the seeds' means; None for one seed.
      difference: a - b.
      low, high: of the interval of the difference over users; seeds are not drawn.
      p: two-sided.
    """

    a: float
    b: float
    spread_a: float | None
    spread_b: float | None
    difference: float
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True)
class PerUser:
    """What a file of per-user values holds, in ascending order of the ids: users [U], values {metric: [U] float64}, fingerprint or ""."""

    users: np.ndarray
    values: dict[str, np.ndarray]
    fingerprint: str


def over_seeds(values: Array) -> np.ndarray:
    """values [U] of one seed or [seeds, U] -> [U] float64, each user's mean over the seeds.

    Raises:
      RecJaxError: another shape, a value that is not finite.
    """
    return _seeds(values).mean(0)


def compare(a: Array, b: Array, *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Comparison:
    """a [U] or [seeds, U], b [U] or [seeds, U], one metric of two models for the same users -> Comparison of a against b.

    Several seeds of a model are averaged per user first, so that a user is one draw however many seeds there are; the models may have
    different numbers of them.

    Args:
      seed: of the draws.
      draws: how often the users are drawn anew; the smallest p is 2 / (draws + 1).
      level: share of repetitions in which the interval should hold the true difference.

    Raises:
      RecJaxError: shapes that do not fit, a value that is not finite.

    Reference: Efron and Tibshirani 1993, An introduction to the bootstrap, sections 13.3 and 15.
    """
    of_a, of_b = _seeds(a), _seeds(b)
    if of_a.shape[1] != of_b.shape[1]:
        raise RecJaxError(f"a has values of {of_a.shape[1]} users, b of {of_b.shape[1]}: a paired test needs the same users")
    drawn = metrics.paired_bootstrap(of_a.mean(0), of_b.mean(0), seed=seed, n=draws, level=level)
    return Comparison(float(of_a.mean()), float(of_b.mean()), _spread(of_a), _spread(of_b), **drawn)


def table(comparisons: Mapping[str, Comparison], *, name: str = "whole") -> str:
    """{variant: Comparison of it against the whole} -> plain text, the whole's row first, then a row a variant.

    Args:
      comparisons: `compare(variant, whole)` of one metric for each variant.
      name: of the whole's row.

    Raises:
      RecJaxError: no variant.
    """
    if not comparisons:
        raise RecJaxError("nothing to compare with: name at least one variant")
    first = next(iter(comparisons.values()))
    rows: dict[str, dict[str, float | None]] = {name: {"mean": first.b, "over seeds +-": first.spread_b}}
    for variant, c in comparisons.items():
        rows[variant] = {"mean": c.a, "over seeds +-": c.spread_a, "difference": c.difference, "low": c.low, "high": c.high, "p": c.p}
    shown = {row: {column: v for column, v in cells.items() if v is not None} for row, cells in rows.items()}
    columns = ("mean", "over seeds +-", "difference", "low", "high", "p")
    return report.table(shown, [c for c in columns if any(c in cells for cells in shown.values())], best=False)


def users_file(folder: epath.PathLike, split: str) -> epath.Path:
    """Where the per-user values of a workdir, or of a stage's folder, are."""
    return epath.Path(folder) / "eval" / f"{split}_users.npz"


def write_users(folder: epath.PathLike, split: str, users: Array, per_user: Mapping[str, Array], *, fingerprint: str = "") -> None:
    """users [U], {metric: [U]} -> `folder/eval/SPLIT_users.npz`, whole or not at all; the same bytes for the same values.

    Args:
      folder: a workdir or a stage's folder.
      split: "test"; a metric's name loses the prefix "test/", as in `Rankings.per_user`.
      users: ids, the same in every run that is to be compared.
      per_user: values by metric.
      fingerprint: of the prepared data.

    Raises:
      RecJaxError: sizes that do not fit, an id twice, a value that is not finite.
    """
    arrays: dict[str, Any] = {name.removeprefix(f"{split}/"): np.asarray(values) for name, values in per_user.items()}
    for name in RESERVED:
        if name in arrays:
            raise RecJaxError(f"a metric cannot be called {name!r}: the file of per-user values has an array of that name")
    file = users_file(folder, split)
    _checked(np.asarray(users), arrays, fingerprint, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / f"{file.name}.{os.getpid()}.tmp"
    with temporary.open("wb") as f:
        np.savez_compressed(f, users=np.asarray(users), fingerprint=np.asarray(fingerprint), **arrays)
    temporary.replace(file)


def read_users(folder: epath.PathLike, split: str = "test") -> PerUser:
    """`folder/eval/SPLIT_users.npz` -> PerUser.

    Raises:
      RecJaxError: no such file, or no file of per-user values.
    """
    file = users_file(folder, split)
    again = f"write it: python -m rec_jax.eval --workdir=W --split={split}"
    if not file.exists():
        raise RecJaxError(f"{file}: no such file of per-user values; {again}")
    try:
        with file.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        users, fingerprint = found.pop("users"), str(found.pop("fingerprint", ""))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, AttributeError) as e:
        raise RecJaxError(f"{file} is no file of per-user values ({type(e).__name__}: {e}); {again}") from e
    return _checked(users, found, fingerprint, file)


def require_same_users(a: PerUser, b: PerUser, names: Sequence[str]) -> None:
    """Raises RecJaxError unless both hold the same users of the same data; `names` are said in the message."""
    first, second = names
    if a.fingerprint and b.fingerprint and a.fingerprint != b.fingerprint:
        raise RecJaxError(
            f"{first} and {second} were tested on different data (fingerprints {a.fingerprint[:12]} and {b.fingerprint[:12]}): "
            "their users are not the same; compare runs of one config.data"
        )
    if not np.array_equal(a.users, b.users):
        only_a, only_b = np.setdiff1d(a.users, b.users), np.setdiff1d(b.users, a.users)
        raise RecJaxError(
            f"{first} has {len(a.users):,} users, {second} {len(b.users):,}; {len(only_a):,} only in the first{_few(only_a)}, "
            f"{len(only_b):,} only in the second{_few(only_b)}: a paired test needs the same users; test both on one split of one data set"
        )


def _few(ids: np.ndarray) -> str:
    return f" ({', '.join(map(str, ids[:3]))}{', ...' if len(ids) > 3 else ''})" if len(ids) else ""


def _checked(users: np.ndarray, arrays: Mapping[str, np.ndarray], fingerprint: str, file: epath.Path) -> PerUser:
    if users.ndim != 1 or not len(users):
        raise RecJaxError(f"{file}: users has shape {users.shape}; expected ids [U], at least one")
    ids, order = np.unique(users, return_index=True)
    if len(ids) != len(users):
        raise RecJaxError(f"{file}: {len(users) - len(ids)} of {len(users)} user ids are there twice")
    values = {}
    for name, column in arrays.items():
        if column.shape != users.shape or column.dtype.kind not in "fiub" or not np.isfinite(column).all():
            raise RecJaxError(
                f"{file}: {name!r} has shape {column.shape}, {column.dtype}; expected a finite number for each of {len(users)} users"
            )
        values[name] = column[order].astype(np.float64)
    if not values:
        raise RecJaxError(f"{file} has users, but no metric")
    return PerUser(ids, values, fingerprint)


def _seeds(values: Array) -> np.ndarray:
    """[U] or [seeds, U] -> [seeds, U] float64, checked."""
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or not values.size:
        raise RecJaxError(f"per-user values have shape {values.shape}; expected [U], or [seeds, U] for several seeds of a model")
    if not np.isfinite(values).all():
        raise RecJaxError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} per-user values are not finite; leave such users out of both models"
        )
    return np.atleast_2d(values)


def _spread(values: np.ndarray) -> float | None:
    return float(values.mean(1).std(ddof=1)) if len(values) > 1 else None
