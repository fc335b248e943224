"""A model with its data: vectors of the catalogue and of users, rankings of a split, and loading from a workdir."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax import processes, towers
from rec_jax.checkpoint import Checkpoints
from rec_jax.data import draft, packing, text
from rec_jax.data.prepare import Prepared, prepare
from rec_jax.eval import rankings
from rec_jax.towers import two_tower
from rec_jax.types import EvalSet, Params, Ragged, RecJaxError

BLOCK_TOKENS = 4096  # tokens of one forward pass over packed texts
Say = Callable[[str], None]


def load_encoder(config: Any) -> tuple[Params, towers.BertSpec]:
    """The pretrained text encoder that the config names -> (params, spec)."""
    return towers.load_hf(config.towers.text.path)


def text_blocks(tokens: Ragged, row_tokens: int) -> Any:
    """The catalogue's texts in packed blocks of about BLOCK_TOKENS tokens."""
    return packing.pack_texts(tokens, rows=max(1, BLOCK_TOKENS // row_tokens), row_tokens=row_tokens)


def text_vectors(tokens: Ragged, text_params: Params, spec: towers.BertSpec, row_tokens: int, *, shared: bool = False) -> np.ndarray:
    """Texts [N] -> their vectors [N, D_text]; where it is `shared`, each process encodes its part, and all have the whole."""
    index, count = processes.place_of() if shared else (0, 1)
    blocks = itertools.islice(text_blocks(tokens, row_tokens), index, None, count)
    mine = two_tower.encode_blocks(text_params, spec, blocks, len(tokens))
    return processes.total(mine) if shared else mine


def text_table(config: Any, tokens: Ragged, text_params: Params, spec: towers.BertSpec, say: Say, *, shared: bool = False) -> np.ndarray:
    """Text vectors of the catalogue [N, D_text], made once for these texts, weights and settings, and kept in the cache.

    Args:
      config: where the cache is, and the row length.
      tokens: of each item.
      text_params, spec: the encoder; pooling and compute dtype are the spec's.
      say: told whether they are made or found.
      shared: every process of the run calls this at the same place, and each encodes its part.

    Raises:
      RecJaxError: the kept file has another shape than its name says.
    """
    digest = hashlib.sha256(json.dumps([spec.pooling, spec.dtype, spec.normalize, config.batch.row_tokens, 1]).encode())
    digest.update(np.ascontiguousarray(tokens.flat).tobytes() + tokens.offsets.tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(text_params):
        digest.update(mesh_lib.path_name(path).encode() + np.asarray(leaf).tobytes())
    file = config_lib.cache_dir(config) / f"text-vectors-{digest.hexdigest()[:16]}.npy"
    if all(processes.gather(file.exists())) if shared else file.exists():
        with file.open("rb") as f:
            table = np.load(f, allow_pickle=False)
        if table.shape != (len(tokens), spec.width):
            raise RecJaxError(f"{file} has shape {table.shape}, expected {(len(tokens), spec.width)}; remove it")
        say(f"text vectors: found {file}")
        return table
    table = text_vectors(tokens, text_params, spec, config.batch.row_tokens, shared=shared)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.parent / f"{file.name}.{os.getpid()}.tmp"
        with temporary.open("wb") as f:
            np.save(f, table)
        temporary.replace(file)
    say(f"text vectors: {len(tokens):,} texts encoded, kept at {file}")
    return table


class Model:
    """Turns parameters into vectors and rankings; holds the data and the specs, not the parameters.

    Args:
      config: of one stage (no stages of its own).
      prepared: the data.
      tokens: of each catalogue item.
      spec: of the towers.
      table: text vectors of the catalogue [N, D_text]; None where nothing needs them.
      shared: every process of the run calls `item_vectors`, `user_vectors`, `rank` and `validate` at the same places; each encodes its
        part, on its first device, and all get the whole.
    """

    def __init__(
        self,
        config: Any,
        prepared: Prepared,
        tokens: Ragged,
        spec: two_tower.TwoTowerSpec,
        table: np.ndarray | None,
        *,
        shared: bool = False,
    ):
        self.shared = shared
        self.config, self.prepared, self.tokens, self.spec, self.table = config, prepared, tokens, spec, table
        self.validated: tuple[int, np.ndarray] | None = None  # step and catalogue vectors of the last validation
        self._items = jax.jit(lambda p, t: two_tower.item_vectors(p, spec, t))
        self._users = jax.jit(lambda p, v, h: two_tower.user_vectors(p, spec, v, h))
        self._text_users = jax.jit(
            lambda p, t, s: two_tower.text_item_vectors(
                p, spec, two_tower.packed_text_vectors(p["text"], spec.text, t, s, texts_per_row=spec.texts_per_row)
            )
        )

    def item_vectors(self, params: Params, *, step: int | None = None) -> np.ndarray:
        """Vectors of the whole catalogue [N, D]; encodes every text where the encoder is part of the parameters.

        At step 0 of a stage the table, where there is one, holds what the encoder would make: it is taken instead. The vectors of the last
        validation are taken too, where they are of this step.
        """
        if step is not None and self.validated is not None and self.validated[0] == step:
            return self.validated[1]
        table = self.table
        if self.spec.encode and (step != 0 or table is None):
            table = text_vectors(self.tokens, params["text"], self.spec.text, self.config.batch.row_tokens, shared=self.shared)
        return np.asarray(self._items(params, table))

    def user_vectors(self, params: Params, items: np.ndarray, histories: Ragged) -> np.ndarray:
        """Histories (catalogue indices, oldest first) -> user vectors [U, D]; `items` are `item_vectors`. Only the newest places count."""
        if self.spec.history is None:
            return self._written_out(params, histories)
        size, block = self.config.eval.history_length or self.config.batch.history_length, self.config.eval.users_per_block
        out = np.zeros((len(histories), self.spec.dim), np.float32)
        for first in self._parts(range(0, len(histories), block)):
            rows = np.full((block, size), -1, np.int32)
            for n, row in enumerate(range(first, min(first + block, len(histories)))):
                newest = histories[row][-size:]
                rows[n, : len(newest)] = newest
            out[first : first + block] = np.asarray(self._users(params, items, rows))[: len(histories) - first]
        return processes.total(out) if self.shared else out

    def _parts(self, blocks: Iterable[Any]) -> Iterable[Any]:
        """Those of the blocks that this process works on."""
        index, count = processes.place_of() if self.shared else (0, 1)
        return itertools.islice(blocks, index, None, count)

    def _written_out(self, params: Params, histories: Ragged) -> np.ndarray:
        batch = self.config.batch
        texts = Ragged.from_rows(
            [draft.history_text(self.tokens, histories[n][-batch.user_history :], batch.row_tokens) for n in range(len(histories))]
        )
        out = np.zeros((len(histories), self.spec.dim), np.float32)
        for block in self._parts(text_blocks(texts, batch.row_tokens)):
            vectors = np.asarray(self._text_users(params, block.tokens, block.segment_ids))
            out[block.texts] = vectors.reshape(-1, self.spec.dim)[block.places]
        return processes.total(out) if self.shared else out

    def rank(self, params: Params, eval_set: EvalSet, *, name: str, items: np.ndarray | None = None) -> rankings.Rankings:
        """Ranks an evaluation set over the whole catalogue; `items` are `item_vectors`, where they are there already."""
        items = self.item_vectors(params) if items is None else items
        users = self.user_vectors(params, items, eval_set.history)
        e = self.config.eval
        return rankings.evaluate_vectors(
            users, items, eval_set, ks=tuple(e.k), name=name, users_per_block=e.users_per_block, items_per_block=e.items_per_block
        )

    def validate(self, params: Params, *, step: int) -> dict[str, float]:
        """Metrics of the validation split, as training watches them (of at most eval.max_users users, drawn once)."""
        items = self.item_vectors(params, step=step)
        self.validated = step, items
        return self.rank(params, self._valid_set(), name="valid", items=items).metrics

    def _valid_set(self) -> EvalSet:
        whole, most = self.prepared.eval_set("valid"), self.config.eval.max_users
        if not most or len(whole.users) <= most:
            return whole
        chosen = np.sort(np.random.default_rng(self.config.seed).choice(len(whole.users), most, replace=False))
        pick = lambda ragged: Ragged.from_rows([ragged[int(n)] for n in chosen])
        return EvalSet(whole.users[chosen], pick(whole.history), pick(whole.targets), whole.n_items)


def towers_of(config: Any, prepared: Prepared, bert: towers.BertSpec) -> two_tower.TwoTowerSpec:
    """The towers that a stage's config describes, on this data and with this encoder."""
    return two_tower.make_spec(config.towers, bert, texts_per_row=packing.texts_per_row(config.batch.row_tokens), n_items=prepared.n_items)


def make_model(
    config: Any,
    prepared: Prepared,
    tokens: Ragged,
    bert: tuple[Params, towers.BertSpec],
    say: Say,
    *,
    candidates: bool = False,
    shared: bool = False,
) -> Model:
    """The model that a stage's config describes; see `Model` for `shared`.

    It has a table of text vectors, made by the encoder as it is given here, where the encoder is frozen, or where the whole catalogue are
    `candidates` while it is trained: then histories are encoded in the step, and the candidates are those of the stage's start.
    """
    spec = towers_of(config, prepared, bert[1])
    table = text_table(config, tokens, bert[0], spec.text, say, shared=shared) if candidates or not spec.encode else None
    return Model(config, prepared, tokens, spec, table, shared=shared)


def read_config(workdir: epath.PathLike) -> Any:
    """The config that a workdir keeps.

    Raises:
      RecJaxError: no such workdir.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise RecJaxError(
            f"{workdir} is no workdir: it has no config.json; train first: python -m rec_jax.train --config=... --workdir={workdir}"
        )
    return config_lib.from_json(file.read_text())


def best_params(folder: epath.PathLike) -> tuple[Params, int]:
    """Parameters of the best checkpoint of a stage folder, on the host, and its step.

    Raises:
      RecJaxError: no checkpoint there.
    """
    checkpoints = Checkpoints(epath.Path(folder) / "checkpoints", read_only=True)
    try:
        latest = checkpoints.latest_step()
        if latest is None:
            raise RecJaxError(f"no whole checkpoint at {checkpoints.folder}")
        best = checkpoints.place(latest)["progress"]["best_step"]
        best = latest if best is None else best
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like: dict[str, Any] = {}
        for name, (shape, dtype) in checkpoints.arrays(best).items():
            if name.startswith("params/"):
                node = like
                *parents, last = name.split("/")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return jax.device_get(checkpoints.restore(best, like, part=True)["params"]), best
    finally:
        checkpoints.close()


def item_vectors(folder: epath.PathLike, step: int, model: Model, params: Params) -> np.ndarray:
    """Catalogue vectors of a stage's best checkpoint [N, D]: made once, kept in the stage's folder under the step's number."""
    file = epath.Path(folder) / f"item_vectors-{step}.npy"
    if file.exists():
        with file.open("rb") as f:
            return np.load(f, allow_pickle=False)
    items = model.item_vectors(params)
    keep_item_vectors(folder, step, items)
    return items


def keep_item_vectors(folder: epath.PathLike, step: int, items: np.ndarray) -> None:
    """Writes the catalogue vectors of a step's checkpoint, whole or not at all; those of other steps go."""
    if jax.process_index() != 0:
        return
    for old in epath.Path(folder).glob("item_vectors-*.npy"):
        old.unlink()
    file = epath.Path(folder) / f"item_vectors-{step}.npy"
    temporary = file.parent / (file.name + ".tmp")
    with temporary.open("wb") as f:
        np.save(f, items)
    temporary.replace(file)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained stage: its model, the best checkpoint's parameters and step, and the vectors of the catalogue [N, D]."""

    model: Model
    params: Params
    step: int
    items: np.ndarray


def _encoder_of(whole: Any, workdir: epath.Path, name: str | None) -> tuple[Params, towers.BertSpec]:
    """The encoder that a stage begins with: that of the last stage before it that trained one, else the pretrained one."""
    pretrained = load_encoder(whole)
    before = whole.stages[: whole.stages.index(name)] if name else ()
    for stage in reversed(before):
        if config_lib.for_stage(whole, stage).towers.text.source == "tokens":
            return best_params(workdir / stage)[0]["text"], pretrained[1]
    return pretrained


def load(workdir: epath.PathLike, stage: str | None = None, *, say: Say = print) -> Trained:
    """The trained model of a workdir: the best checkpoint of a stage, the last one by default.

    Raises:
      RecJaxError: no workdir, an unknown stage, or nothing trained in it yet.
    """
    whole = read_config(workdir)
    name = stage or (whole.stages[-1] if whole.stages else None)
    if name is not None and name not in whole.stages:
        raise RecJaxError(f"{workdir} has no stage {name!r}; it has {', '.join(whole.stages) or 'none'}")
    config = config_lib.for_stage(whole, name) if name else whole
    folder = epath.Path(workdir) / name if name else epath.Path(workdir)
    params, step = best_params(folder)
    prepared = prepare(config)
    encoder = _encoder_of(whole, epath.Path(workdir), name)
    model = make_model(config, prepared, text.catalogue_tokens(config, prepared), encoder, say)
    return Trained(model, params, step, item_vectors(folder, step, model, params))
