"""A model with its data: vectors of the catalogue and of users, rankings of a split, and loading from a workdir."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import processes, towers
from rec_jax.config_features import has_features, has_user_features
from rec_jax.config_places import said
from rec_jax.data import draft, feature_codes, packing, places, user_features, vocabulary
from rec_jax.data.augment import HistoryViews
from rec_jax.data.feature_codes import Coding
from rec_jax.data.lengths import ranked_places
from rec_jax.data.prepare import Prepared, prepare
from rec_jax.eval import rankings
from rec_jax.eval.baselines import Scorer
from rec_jax.eval.encoder import Encoder, Say, encoder_of, text_blocks, text_table, text_vectors
from rec_jax.eval.workdir import best_params, read_config
from rec_jax.towers import interactions, interests, two_tower
from rec_jax.towers.packed_texts import packed_text_vectors
from rec_jax.types import EvalSet, Params, Ragged, RecJaxError

SHORTEST = 16  # places of the shortest histories that are encoded together


class Model:
    """Turns parameters into vectors and rankings; holds the data and the specs, not the parameters.

    Args:
      config: of one stage (no stages of its own).
      prepared: the data.
      tokens: of each catalogue item.
      spec: of the towers.
      table: text vectors of the catalogue [N, D_text]; None where nothing needs them.
      features: of the catalogue's items, kind -> name -> [N, ...]; None where the towers read none.
      of_users: features of users, kind -> name -> [U, ...]; None where the history tower reads none.
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
        features: feature_codes.Arrays | None = None,
        of_users: feature_codes.Arrays | None = None,
        shared: bool = False,
    ):
        self.shared, self.features, self.of_users = shared, features, of_users
        self.config, self.prepared, self.tokens, self.spec, self.table = config, prepared, tokens, spec, table
        self.validated: tuple[int, np.ndarray] | None = None  # step and catalogue vectors of the last validation
        self._counts = prepared.item_counts() if spec.id_shrinkage else None
        self._items = jax.jit(lambda p, t, f, counts: two_tower.item_vectors(two_tower.as_ranked(p, spec, counts), spec, t, f))
        self._users = jax.jit(lambda p, v, h, columns, of_users: two_tower.user_vectors(p, spec, v, h, columns, of_users))
        self._products = jax.jit(interests.scores)
        head = spec.task
        self._scores = None if head is None else jax.jit(lambda p, u, v: interactions.score_all(p["task"], head, u, v))
        self._text_users = jax.jit(
            lambda p, t, s: two_tower.text_item_vectors(
                p, spec, packed_text_vectors(p["text"], spec.text, t, s, texts_per_row=spec.texts_per_row)
            )
        )

    def item_vectors(self, params: Params, *, step: int | None = None) -> np.ndarray:
        """Vectors of the whole catalogue [N, D]; encodes every text where the encoder is part of the parameters.

        At step 0 of a stage the table, where there is one, holds what the encoder would make: it is taken instead. The vectors of the last
        validation are taken too, where they are of this step.
        """
        if step is not None and self.validated is not None and self.validated[0] == step:
            return self.validated[1]
        params, table = two_tower.merged(params, self.spec), self.table
        if self.spec.item_text and self.spec.encode and (step != 0 or table is None):
            table = self.text_table(params)
        return np.asarray(self._items(params, table, self.features, self._counts))

    def text_table(self, params: Params) -> np.ndarray:
        """Text vectors of the catalogue [N, D_text] by the encoder in the parameters."""
        text = two_tower.merged(params, self.spec)["text"]
        return text_vectors(self.tokens, text, self.spec.text, self.config.batch.row_tokens, shared=self.shared)

    def user_vectors(self, params: Params, items: np.ndarray, histories: Ragged) -> np.ndarray:
        """Histories (catalogue indices, oldest first) -> user vectors [U, D], or [U, K, D] of several interests.

        `items` are `item_vectors`. Only the newest places count; one of them is hidden where the tower is not causal. Where the tower reads
        times, ratings, features of events or of users, those, or whose an event is, are in the histories' columns; without these they are
        unknown.
        """
        if self.spec.user == "id":
            raise RecJaxError("config.towers.user.kind='id' has vectors of users, not of histories: it is measured on impressions")
        if self.spec.history is None:
            return self._written_out(two_tower.merged(params, self.spec), histories)
        size, block = ranked_places(self.config), self.config.eval.users_per_block
        tower = self.spec.history
        read = {name: histories.columns[name] for name in tower.columns if name in histories.columns}
        hidden = int(not tower.causal)
        shape = (self.spec.dim,) if tower.interests == 1 else (tower.interests, self.spec.dim)
        out = np.zeros((len(histories), *shape), np.float32)
        for users, length in self._parts(by_length(np.minimum(histories.lengths() + hidden, size), size, block)):
            rows = np.full((block, length), -1, np.int32)
            columns = {name: np.full(rows.shape, places.empty(name), places.empty(name).dtype) for name in read}
            for n, user in enumerate(users):
                newest = histories[int(user)][hidden - length :]
                rows[n, : len(newest)] = newest
                stop = histories.offsets[user + 1]
                known = {name: column[stop - len(newest) : stop] for name, column in read.items()}
                for name, values in places.of_places(known).items():
                    columns[name][n, : len(newest)] = values
            out[users] = np.asarray(self._users(params, items, rows, columns, self.of_users))[: len(users)]
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

    def rank(
        self,
        params: Params,
        eval_set: EvalSet,
        *,
        name: str,
        items: np.ndarray | None = None,
        ks: tuple[int, ...] = (),
        exclude: Ragged | None = None,
    ) -> rankings.Rankings:
        """Ranks an evaluation set over the whole catalogue; `items` are `item_vectors`, where they are there already.

        `ks` are list lengths, by default those of config.eval.k; `exclude` is that of `rankings.evaluate_vectors`.

        Raises:
          RecJaxError: the history tower reads a column that the set's histories do not have.
        """
        wanted = self.spec.history.columns if self.spec.history is not None else ()
        if missing := [column for column in wanted if column not in eval_set.history.columns]:
            raise RecJaxError(
                f"the history tower reads {said(missing[:1])} of events (config.towers.user), and the histories of {name!r} come without: "
                "open the data by `prepare` with that config"
            )
        items = self.item_vectors(params) if items is None else items
        e = self.config.eval
        options: dict[str, Any] = {"ks": ks or tuple(e.k), "name": name, "users_per_block": e.users_per_block, "exclude": exclude}
        if e.rank_by == "task":
            return self._rank_by_task(params, eval_set, items, options)
        users = self.user_vectors(params, items, eval_set.history)
        return rankings.evaluate_vectors(users, items, eval_set, items_per_block=e.items_per_block, **options)

    def _rank_by_task(self, params: Params, eval_set: EvalSet, items: np.ndarray, options: dict[str, Any]) -> rankings.Rankings:
        return rankings.evaluate_scores(self.scorer(params, items), eval_set, **options)

    def scorer(self, params: Params, items: np.ndarray) -> Scorer:
        """items [N, D], as `item_vectors` -> function of at most eval.users_per_block histories [q] to the scores that rank [q, N]."""
        e, by_task = self.config.eval, self._scores if self.config.eval.rank_by == "task" else None
        assert (by_task is None) == (e.rank_by != "task")  # eval.rank_by='task' gives the towers a head

        def scores(histories: Ragged) -> np.ndarray:
            users = self.user_vectors(params, items, histories)
            filled = np.zeros((e.users_per_block, *users.shape[1:]), np.float32)  # one shape: it compiles once
            filled[: len(users)] = users
            found = self._products(filled, items) if by_task is None else by_task(params, filled, items)
            return np.asarray(found)[: len(users)]

        return scores

    def validate(self, params: Params, *, step: int) -> dict[str, float]:
        """Metrics of the validation split, as training watches them (of at most eval.max_users users, drawn once)."""
        items = self.item_vectors(params, step=step)
        self.validated = step, items
        some = rankings.some_users(self.prepared.eval_set("valid"), self.config.eval.max_users, seed=self.config.seed)
        return self.rank(params, some, name="valid", items=items).metrics


def by_length(lengths: np.ndarray, longest: int, block: int) -> list[tuple[np.ndarray, int]]:
    """Lengths of histories [U], at most `longest` -> (at most `block` users, places) of each block: those of a block are about as long.

    Places are SHORTEST, twice that, ... and `longest`, so that few shapes are compiled. Of all but the first less than half is
    empty.
    """
    out, places, rest = [], min(SHORTEST, longest), np.arange(len(lengths))
    while len(rest):
        fits = lengths[rest] <= places
        users, rest = rest[fits], rest[~fits]
        out += [(users[n : n + block], places) for n in range(0, len(users), block)]
        places = min(2 * places, longest)
    return out


def towers_of(
    config: Any, prepared: Prepared, bert: towers.BertSpec, coding: Coding | None = None, user_coding: Coding | None = None
) -> two_tower.TwoTowerSpec:
    """The towers that a stage's config describes, on this data and with this encoder; the codings are of items' and users' features, if
    they have any."""
    tasks = int(config.objectives.task.weight > 0 or config.eval.rank_by == "task")
    context: tuple[int, ...] = ()
    views = HistoryViews.from_config(config)
    if config.batch.kind == "impressions":
        impressions = prepared.impressions("train")
        tasks, context = len(impressions.tasks), impressions.sizes
    return two_tower.make_spec(
        config.towers,
        bert,
        texts_per_row=packing.texts_per_row(config.batch.row_tokens),
        n_items=prepared.n_items,
        n_users=prepared.n_users,
        tasks=tasks,
        context=context,
        mask=views is not None and views.hides,
        causal=not config.batch.cloze,
        features=None if coding is None else coding.sizes(),
        of_users=None if user_coding is None else user_coding.sizes(),
        ratings=places.rating_edges(config, prepared),
        events=places.event_rows(config, prepared),
    )


def make_model(
    config: Any,
    prepared: Prepared,
    tokens: Ragged,
    bert: Encoder,
    say: Say,
    *,
    coding: Coding | None = None,
    user_coding: Coding | None = None,
    candidates: bool = False,
    shared: bool = False,
) -> Model:
    """The model that a stage's config describes; the codings are as for `towers_of`, and see `Model` for `shared`.

    It has a table of text vectors, made by the encoder as it is given here, where the encoder is frozen, or where the whole catalogue are
    `candidates` while it is trained: then histories are encoded in the step, and the candidates are those of the stage's start. It has
    none where items have no text.
    """
    spec = towers_of(config, prepared, bert[1], coding, user_coding)
    wanted = spec.item_text and (candidates or not spec.encode)
    table = text_table(config, tokens, bert[0], spec.text, say, shared=shared) if wanted else None
    features = None if coding is None else coding.arrays(prepared)
    of_users = None if user_coding is None else user_features.arrays(user_coding, prepared)
    return Model(config, prepared, tokens, spec, table, features=features, of_users=of_users, shared=shared)


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


def load(workdir: epath.PathLike, stage: str | None = None, *, say: Say = print) -> Trained:
    """The trained model of a workdir: the best checkpoint of a stage, the last one by default.

    Raises:
      RecJaxError: no workdir, an unknown stage, one that trained no towers, or nothing trained in it yet.
    """
    whole = read_config(workdir)
    name, config = config_lib.stage_with_towers(whole, stage, workdir)
    folder = epath.Path(workdir) / name if name else epath.Path(workdir)
    params, step = best_params(folder)
    prepared = prepare(config)
    encoder = encoder_of(whole, epath.Path(workdir), name, prepared)
    coding = feature_codes.kept(workdir) if has_features(config) else None
    user_coding = feature_codes.kept(workdir, user_features.CODES) if has_user_features(config) else None
    tokens = vocabulary.catalogue_tokens(config, prepared)
    model = make_model(config, prepared, tokens, encoder, say, coding=coding, user_coding=user_coding)
    params = two_tower.merged(params, model.spec)
    items = item_vectors(folder, step, model, params)
    return Trained(model, params, step, items)
