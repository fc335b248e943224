"""Features of items as the towers see them: numbers by a coding that a workdir keeps, so that whatever goes on from it uses the same.

Categories are numbered from 1 in alphabetical order; 0 is none, or one that the coding does not know. Numbers are put into ranges that hold
as many items each, or measured in standard deviations from the mean; given vectors are centred, and scaled to a mean squared length of 1.
All that is learned from the catalogue. A run that goes on from another workdir (config.start) keeps that one's coding, and puts categories
that are new behind the old ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from etils import epath

from rec_jax.config_features import has_columns, has_features
from rec_jax.data import features, words
from rec_jax.data import vectors as vectors_lib
from rec_jax.data.prepare import Prepared
from rec_jax.data.start import start_of
from rec_jax.types import RecJaxError

FILE = "features.json"  # of a workdir
Arrays = dict[str, dict[str, np.ndarray]]  # kind -> name -> one row an item


@dataclasses.dataclass(frozen=True)
class Coding:
    """What each feature's numbers mean; names in the order of the config.

    Attributes:
      categorical, multi_hot: name -> categories; the first one has the number 1.
      numeric: name -> {"kind": "buckets", "buckets": as the config has it, "edges": lowest value of each range but the first, ascending},
        or {"kind": "periodic", "mean", "scale": a standard deviation}.
      vectors: name -> {"mean": [D_v], "scale": root mean squared length of the centred vectors}.
      words: {"text": {"most": words of an item that count, "known": the words of `words.known`, commonest first}}, or empty.
    """

    categorical: dict[str, list[str]]
    multi_hot: dict[str, list[str]]
    numeric: dict[str, dict[str, Any]]
    vectors: dict[str, dict[str, Any]]
    words: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def sizes(self) -> dict[str, dict[str, int]]:
        """Kind -> name -> rows of its table, the first for none; 0 for a number that is periodic, the width D_v for given vectors."""
        rows = lambda c: len(c["edges"]) + 2 if c["kind"] == "buckets" else 0
        return {
            "categorical": {name: len(values) + 1 for name, values in self.categorical.items()},
            "multi_hot": {name: len(values) + 1 for name, values in self.multi_hot.items()},
            "numeric": {name: rows(c) for name, c in self.numeric.items()},
            "vectors": {name: len(c["mean"]) for name, c in self.vectors.items()},
            "words": {name: len(c["known"]) + 1 for name, c in self.words.items()},
        }

    def arrays(self, prepared: Prepared) -> Arrays:
        """The features of a catalogue: categorical [N] int32, multi_hot [N, K] int32 (0 = no more), numeric [N] int32 ranges, 0 = none, or
        [N] float32, NaN = none, vectors [N, D_v] float32, zero = none, words [N, K] int32 (0 = no more).

        Raises:
          RecJaxError: given vectors of another width than the coding's.
        """
        out = self.of_columns(features.read_columns(prepared.local)) if self.categorical or self.multi_hot or self.numeric else {}
        out["vectors"] = {name: _scaled(features.read_vectors(prepared.local, name), c, name) for name, c in self.vectors.items()}
        if self.words:
            out["words"] = {name: words.numbers(prepared.texts(), c["known"], most=c["most"]) for name, c in self.words.items()}
        return {kind: {} for kind in features.COLUMNS} | out

    def of_columns(self, columns: Mapping[str, Mapping[str, pl.Series]]) -> Arrays:
        """Kind -> name -> values [N] -> the arrays of categorical, multi-hot and numeric features; see `arrays`."""
        out = dict[str, dict[str, np.ndarray]]()
        out["categorical"] = {name: _numbers(columns["categorical"][name], values) for name, values in self.categorical.items()}
        out["multi_hot"] = {name: _padded(columns["multi_hot"][name], values) for name, values in self.multi_hot.items()}
        out["numeric"] = {name: _numeric(columns["numeric"][name].to_numpy(), c) for name, c in self.numeric.items()}
        return out


def learn(config: Any, prepared: Prepared) -> Coding:
    """The coding of a prepared catalogue, by `config.towers.item.features`.

    Raises:
      RecJaxError: numbers that are all the same.
    """
    most = config.towers.item.words
    of_texts = {"text": {"most": most, "known": words.known(prepared.texts())}} if most else {}
    if not has_columns(config):
        return Coding({}, {}, {}, {}, of_texts)
    f = config.data.features
    given = {name: _centre(features.read_vectors(prepared.local, name)) for name in vectors_lib.sources(f.vectors)}
    of_columns = learn_columns(features.read_columns(prepared.local), f, "config.data.features", config.towers.item.features)
    return dataclasses.replace(of_columns, vectors=given, words=of_texts)


def learn_columns(columns: Mapping[str, Mapping[str, pl.Series]], names: Any, key: str, settings: Any) -> Coding:
    """Kind -> name -> values [N] -> the coding of those that a group of config.data, `key`, names; `settings` say how numbers are coded."""
    categories = lambda kind: {name: _categories(columns[kind][name]) for name in names[kind]}
    numbers = {name: _coded(columns["numeric"][name].drop_nulls().to_numpy(), settings, name, key) for name in names.numeric}
    return Coding(categories("categorical"), categories("multi_hot"), numbers, {})


def extended(old: Coding, new: Coding, place: str) -> Coding:
    """The coding of a run that goes on: the old one's, with the new categories behind, and with the features that only the new one has.

    Args:
      old: of the workdir that the run goes on from.
      new: what `learn` makes of its data.
      place: that workdir, for messages.

    Raises:
      RecJaxError: numbers that the config puts into other ranges than the old workdir's.
    """
    for name, coded in new.numeric.items():
        for key in ("kind", "buckets"):
            before = old.numeric.get(name, coded)
            if before.get(key) != coded.get(key):
                where = "numeric" if key == "kind" else "buckets"
                raise RecJaxError(
                    f"config.towers.item.features.{where} is {before.get(key)!r} in {place} and {coded.get(key)!r} here, and {name!r} "
                    "has been learned by the former; set it as it is there"
                )
    joined = lambda a, b: {name: [*a.get(name, ()), *(v for v in values if v not in set(a.get(name, ())))] for name, values in b.items()}
    kept = lambda a, b: {name: a.get(name, c) for name, c in b.items()}
    known = joined(*({name: c["known"] for name, c in coding.words.items()} for coding in (old, new)))
    return Coding(
        joined(old.categorical, new.categorical),
        joined(old.multi_hot, new.multi_hot),
        kept(old.numeric, new.numeric),
        kept(old.vectors, new.vectors),
        {name: {**c, "known": known[name]} for name, c in new.words.items()},
    )


def of_run(config: Any, prepared: Prepared) -> Coding | None:
    """The coding that a run begins with; None where no feature is named.

    Raises:
      RecJaxError: as `learn` and `extended` do.
    """
    if not has_features(config):
        return None
    made = learn(config, prepared)
    if config.start.path:
        start = start_of(config)
        if has_features(start.config):
            return extended(kept(start.workdir), made, str(start.workdir))
    return made


def keep(workdir: epath.Path, coding: Coding | None, *, write: bool = True, name: str = FILE) -> None:
    """Writes the coding into a workdir, whole or not at all. `write`: this process does."""
    if coding is not None and write:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / (name + ".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(coding), ensure_ascii=False) + "\n")
        temporary.replace(workdir / name)


def kept(workdir: epath.PathLike, name: str = FILE) -> Coding:
    """The coding that `keep` has written.

    Raises:
      RecJaxError: there is none.
    """
    file = epath.Path(workdir) / name
    if not file.exists():
        raise RecJaxError(f"{workdir} has features and no {name} that says what their numbers mean: run its training command again")
    return Coding(**json.loads(file.read_text()))


def _categories(values: pl.Series) -> list[str]:
    flat = values.explode(empty_as_null=True) if isinstance(values.dtype, pl.List) else values
    return sorted(flat.drop_nulls().unique().to_list())


def _numbers(values: pl.Series, categories: list[str]) -> np.ndarray:
    """Values [n] -> number of each among the categories [n] int32, 0 = none or unknown."""
    known = pl.DataFrame({"value": pl.Series(categories, dtype=pl.String), "number": np.arange(1, len(categories) + 1, dtype=np.int32)})
    joined = values.alias("value").to_frame().join(known, on="value", how="left", maintain_order="left")
    return joined["number"].fill_null(0).to_numpy()


def _padded(values: pl.Series, categories: list[str]) -> np.ndarray:
    """Lists of values [N] -> numbers of those that are known [N, K] int32, in their order, then 0; K is the longest row's, at least 1."""
    lengths = values.list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = _numbers(values.drop_nulls().explode(empty_as_null=True), categories)
    rows, known = np.repeat(np.arange(len(values)), lengths), flat > 0
    rows, flat = rows[known], flat[known]
    counts = np.bincount(rows, minlength=len(values))
    out = np.zeros((len(values), max(1, int(counts.max(initial=0)))), np.int32)
    out[rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)] = flat
    return out


def _coded(values: np.ndarray, settings: Any, name: str, key: str) -> dict[str, Any]:
    """Numbers [n] -> how they are coded."""
    if values.min() == values.max():
        raise RecJaxError(f"{key}.numeric names {name!r}, which is {values.min():g} wherever it is there; leave it out")
    if settings.numeric == "periodic":
        return {"kind": "periodic", "mean": float(values.mean()), "scale": float(values.std())}
    cuts = np.quantile(values, np.arange(1, settings.buckets) / settings.buckets, method="inverted_cdf")
    edges = np.unique(cuts)
    return {"kind": "buckets", "buckets": settings.buckets, "edges": edges[edges > values.min()].tolist()}


def _numeric(values: np.ndarray, coded: Mapping[str, Any]) -> np.ndarray:
    if coded["kind"] == "periodic":
        return ((values - coded["mean"]) / coded["scale"]).astype(np.float32)
    return np.where(np.isnan(values), 0, np.searchsorted(coded["edges"], values, side="right") + 1).astype(np.int32)


def _centre(vectors: np.ndarray) -> dict[str, Any]:
    there = vectors[~np.isnan(vectors[:, 0])].astype(np.float64)
    mean = there.mean(0)
    return {"mean": mean.tolist(), "scale": float(np.sqrt(np.square(there - mean).sum(1).mean())) or 1.0}


def _scaled(vectors: np.ndarray, coded: Mapping[str, Any], name: str) -> np.ndarray:
    if vectors.shape[1] != len(coded["mean"]):
        raise RecJaxError(
            f"config.data.features.vectors: {name!r} has vectors of {vectors.shape[1]} numbers, and the towers have learned such "
            f"of {len(coded['mean'])}"
        )
    scaled = (vectors - np.asarray(coded["mean"], np.float32)) / np.float32(coded["scale"])
    return np.where(np.isnan(vectors[:, :1]), np.float32(0), scaled)
