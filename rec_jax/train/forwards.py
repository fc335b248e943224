"""Which forwards a step runs, each once, whatever number of objectives asks for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from rec_jax.towers import batches
from rec_jax.towers.dropout import fold
from rec_jax.towers.two_tower import TwoTowerSpec
from rec_jax.train.draws import unseen_items
from rec_jax.train.objectives import Objective
from rec_jax.train.state import QueueSpec, row_keys
from rec_jax.types import Batch, Outputs


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What a step is made of.

    Attributes:
      towers: sizes and kinds of both.
      objectives: the weighted ones.
      queue: sizes of the queue of item vectors, or None.
      chunk_rows: packed text rows of a shard that go through the encoder at a time; 0 = all.
      kind: what batches are made of: "users" (histories or impressions), "texts" or "pairs".
      teacher: towers of the teacher, or None.
      row_tables: groups of parameters whose tables move by the row (`rows.tables_of`).
    """

    towers: TwoTowerSpec
    objectives: tuple[Objective, ...]
    queue: QueueSpec | None = None
    chunk_rows: int = 0
    kind: str = "users"
    teacher: TwoTowerSpec | None = None
    row_tables: tuple[str, ...] = ()

    @property
    def momentum(self) -> float:
        """Decay of the momentum encoder; 0 = none."""
        return max(o.momentum for o in self.objectives)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Constants:
    """Arrays that a run never changes; what no objective needs is None.

    Attributes:
      table: text vectors of the catalogue [N, D_text].
      log_q: log sampling frequency of each item [N].
      teacher: {"params", "table" [N, D_teacher] or None, "features" and "of_users" or None} of the teacher.
      texts: the catalogue's packed texts {"tokens", "segments" [R, T], "places" [N]}, where all are encoded in every step.
      neighbours: (ids [N, M], shares [N, M]) of each item's neighbours.
      features: of the catalogue's items, kind -> name -> [N, ...].
      of_users: features of users, kind -> name -> [U, ...].
    """

    table: Any
    log_q: Any
    teacher: Any = None
    texts: Any = None
    neighbours: Any = None
    features: Any = None
    of_users: Any = None


def outputs(
    params: Any, spec: StepSpec, batch: Batch, constants: Constants, key: jax.Array | None, draw: jax.Array, mesh: Mesh | None
) -> Outputs:
    """What the towers make of a batch for the objectives of `spec`.

    Args:
      params, spec, batch, constants: of the step.
      key: the step's typed key; None = no dropout.
      draw: typed key of the items that are drawn.
      mesh: as for `batches.encode_batch`.
    """
    wants = lambda what: any(vars(o)[what] for o in spec.objectives)
    shards = batch.item_ids.shape[0]
    rows = {"text": batch.item_tokens.shape[1] if batch.item_tokens is not None else 0}
    if wants("views") or wants("denoised"):
        rows["view"] = rows["text"]
    if spec.kind == "texts":
        keys = _keys(key, shards, rows)
        return batches.encode_texts(
            params, spec.towers, batch, keys=keys, masked=wants("masked"), denoised=wants("denoised"), views=wants("views")
        )
    if spec.kind == "pairs":
        return batches.encode_pairs(params, spec.towers, batch, keys=_keys(key, shards, rows))
    users = batch.history if batch.history is not None else batch.user_tokens
    rows |= {"user": 0 if users is None else users.shape[1], "head": 1}
    if wants("history_views"):
        rows["history_view"] = 2 * rows["user"]
    drawn_ids, query_drawn_ids = draws(spec, batch, draw, n_items=len(constants.log_q))
    keys = _keys(key, shards, rows)
    if keys is not None and key is not None:
        keys |= {"ids": fold(key, "ids"), "features": fold(key, "features")}
        keys |= {"texts": fold(key, "texts")} if spec.towers.text_dropout else {}
    return batches.encode_batch(
        params,
        spec.towers,
        batch,
        table=constants.table,
        features=constants.features,
        of_users=constants.of_users,
        catalogue=wants("catalogue"),
        keys=keys,
        views=wants("views"),
        plain=wants("plain"),
        history_views=wants("history_views"),
        drawn_ids=drawn_ids,
        query_drawn_ids=query_drawn_ids,
        texts=constants.texts,
        layers=wants("layers"),
        scores=wants("scores"),
        chunk_rows=spec.chunk_rows,
        mesh=mesh,
    )


def draws(spec: StepSpec, batch: Batch, draw: jax.Array, *, n_items: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Catalogue items that a step draws -> for all queries together [U], for each by itself [G, Q, K]; None where no objective asks."""
    uniform, per_query = max(o.uniform for o in spec.objectives), max(o.per_query for o in spec.objectives)
    return (
        jax.random.randint(fold(draw, "uniform"), (uniform,), 0, n_items) if uniform else None,
        unseen_items(fold(draw, "queries"), batch, n_items=n_items, draws=per_query) if per_query else None,
    )


def _keys(key: jax.Array | None, shards: int, rows: dict[str, int]) -> dict[str, jax.Array] | None:
    return None if key is None else {name: row_keys(fold(key, name), shards, n) for name, n in rows.items()}


def momentum_outputs(momentum: Any, spec: StepSpec, batch: Batch, constants: Constants, mesh: Mesh | None) -> Outputs:
    """The momentum encoder's vectors of the batch, without dropout and without gradient."""
    made = batches.encode_batch(
        momentum,
        spec.towers,
        batch,
        table=constants.table,
        features=constants.features,
        of_users=constants.of_users,
        catalogue=False,
        keys=None,
        chunk_rows=spec.chunk_rows,
        mesh=mesh,
    )
    return jax.lax.stop_gradient(made)


def teacher_outputs(spec: StepSpec, batch: Batch, constants: Constants, drawn_ids: jax.Array | None, mesh: Mesh | None) -> Outputs:
    """What the teacher makes of the batch, without dropout and without gradient; of the catalogue by its table."""
    assert spec.teacher is not None
    teachers = [o for o in spec.objectives if o.teacher]
    made = batches.encode_batch(
        constants.teacher["params"],
        spec.teacher,
        batch,
        table=constants.teacher["table"],
        features=constants.teacher.get("features"),
        of_users=constants.teacher.get("of_users"),
        catalogue=any(o.catalogue for o in teachers),
        keys=None,
        drawn_ids=drawn_ids if constants.teacher["table"] is not None or not spec.teacher.item_text else None,
        layers=any(o.layers for o in teachers),
        chunk_rows=spec.chunk_rows,
        mesh=mesh,
    )
    return jax.lax.stop_gradient(made)
