"""InfoNCE of users and items, with every kind of candidate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.losses import Candidates, weighted_info_nce
from rec_jax.losses.contrastive import FORMS
from rec_jax.losses.matryoshka import cut
from rec_jax.mesh import on_cpu
from rec_jax.train.objectives import base
from rec_jax.types import Batch, Context, Outputs, RecJaxError


@dataclasses.dataclass(frozen=True)
class InfoNCESpec:
    """Keys of `config.objectives.info_nce`."""

    candidates: str
    temperature: float
    learn_temperature: bool
    log_q: float
    mask_equal: bool
    symmetric: bool
    label_smoothing: float
    min_temperature: float = 0.01
    max_temperature: float = 1.0
    positives: int = 1
    queue: int = 0
    momentum: float = 0.0
    uniform: int = 0
    hard: bool = False
    form: str = "standard"
    positive_prior: float = 0.0
    matryoshka: tuple[int, ...] = ()
    shard_catalogue: bool = False
    neighbour_share: float = 0.0
    neighbours: int = 16
    neighbour_items: int = 2
    neighbour_decay: float = 0.5
    places: int = 0
    popularity_prior: float = 0.0
    mask_history: bool = False

    def __post_init__(self) -> None:
        place = "info_nce"
        base.check_range(f"{place}.temperature", self.temperature, above=0)
        base.check_range(f"{place}.min_temperature", self.min_temperature, above=0)
        base.check_range(f"{place}.label_smoothing", self.label_smoothing, least=0, below=1)
        base.check_range(f"{place}.momentum", self.momentum, least=0, below=1)
        base.check_range(f"{place}.positive_prior", self.positive_prior, least=0, below=1)
        base.check_range(f"{place}.positives", self.positives, least=1)
        base.check_range(f"{place}.queue", self.queue, least=0)
        base.check_range(f"{place}.uniform", self.uniform, least=0)
        base.check_range(f"{place}.places", self.places, least=0)
        base.check_range(f"{place}.popularity_prior", self.popularity_prior, least=0)
        base.check_range(f"{place}.neighbour_share", self.neighbour_share, least=0, below=1)
        base.check_range(f"{place}.neighbours", self.neighbours, least=1)
        base.check_range(f"{place}.neighbour_items", self.neighbour_items, least=1)
        base.check_range(f"{place}.neighbour_decay", self.neighbour_decay, above=0)
        place = f"config.objectives.{place}"
        if self.learn_temperature and not self.min_temperature <= self.temperature <= self.max_temperature:
            raise RecJaxError(
                f"{place}.temperature={self.temperature} is outside of its bounds min_temperature={self.min_temperature} and "
                f"max_temperature={self.max_temperature}"
            )
        if self.form not in FORMS:
            raise RecJaxError(f"{place}.form={self.form!r}: expected one of {', '.join(FORMS)}")
        if self.positive_prior and self.form != "debiased":
            raise RecJaxError(f"{place}.positive_prior={self.positive_prior} acts with form='debiased' only; form is {self.form!r}")
        if self.candidates == "catalogue":
            for key in ("symmetric", "queue", "momentum", "uniform", "hard"):
                value = dataclasses.asdict(self)[key]
                if value:
                    raise RecJaxError(f"{place}.{key}={value} needs batch candidates: set candidates='batch', or leave {key} off")
        if self.shard_catalogue and self.candidates != "catalogue":
            raise RecJaxError(f"{place}.shard_catalogue=True needs candidates='catalogue'; candidates is {self.candidates!r}")
        if self.positives > 1 and self.symmetric:
            raise RecJaxError(f"{place}.symmetric=True needs positives=1: an item seeks one query of its own; positives={self.positives}")
        if self.places and (self.candidates != "catalogue" or self.neighbour_share):
            raise RecJaxError(f"{place}.places={self.places} goes with candidates='catalogue' and neighbour_share=0: set places to 0")
        if self.mask_history and (self.candidates != "catalogue" or self.shard_catalogue):
            raise RecJaxError(f"{place}.mask_history=True goes with candidates='catalogue' that every device holds whole: set it to False")
        if self.popularity_prior and (self.candidates != "catalogue" or self.positives > 1):
            raise RecJaxError(
                f"{place}.popularity_prior={self.popularity_prior} goes with candidates='catalogue' and positives=1: set it to 0"
            )
        if self.neighbour_share:
            self._check_neighbours(f"{place}.neighbour_share={self.neighbour_share}")
        if self.label_smoothing and (self.positives > 1 or self.form != "standard"):
            raise RecJaxError(f"{place}.label_smoothing={self.label_smoothing} goes with positives=1 and form='standard' only")

    def _check_neighbours(self, key: str) -> None:
        if self.candidates != "catalogue" or self.shard_catalogue:
            raise RecJaxError(
                f"{key} makes items of the whole catalogue targets: set it to 0, or candidates='catalogue' without shard_catalogue"
            )
        if self.positives > 1 or self.form != "standard":
            raise RecJaxError(f"{key} goes with positives=1 and form='standard' only")
        if self.label_smoothing + self.neighbour_share >= 1:
            raise RecJaxError(
                f"{key} and label_smoothing={self.label_smoothing} leave the target itself no weight: their sum must be below 1"
            )


def temperature(scalars: Mapping[str, jax.Array], spec: InfoNCESpec) -> jax.Array | float:
    """The temperature in use, learned within its bounds or fixed."""
    if not spec.learn_temperature:
        return spec.temperature
    return base.bounded(jnp.exp(scalars[base.TEMPERATURE]), spec.min_temperature, spec.max_temperature)


def next_places(batch: Batch, positives: int) -> jax.Array:
    """Places [G, Q, K] among a shard's queries whose targets are the next K items after each query; -1 where the history ends before.

    The target of a place is the item after it, so the second next item is the target of the next place, while that is of the same history.
    """
    shards, rows, length = batch.history_segments.shape
    segments = jnp.pad(jnp.asarray(batch.history_segments), ((0, 0), (0, 0), (0, positives - 1)))
    place = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length)
    columns = []
    for k in range(positives):
        same = (segments[:, :, k : k + length] == segments[:, :, :length]) & (segments[:, :, :length] > 0)
        columns.append(jnp.where(same, place + k, -1))
    return jnp.stack(columns, axis=-1).reshape(shards, rows * length, positives)


def histories(batch: Batch) -> jax.Array:
    """Items of the history up to each place, that of the place included [G, Q, S] int32; -1 for what it does not see."""
    segments = jnp.asarray(batch.history_segments)
    shards, rows, length = segments.shape
    items = base.lookup(batch.item_ids, batch.history).reshape(shards, rows, 1, length)
    place = jnp.arange(length)
    seen = (segments[..., :, None] == segments[..., None, :]) & (segments[..., :, None] > 0) & (place[:, None] >= place)
    return jnp.where(seen, items, -1).reshape(shards, rows * length, length)


def drawn_places(key: jax.Array, weights: jax.Array, places: int) -> jax.Array:
    """weights [G, Q] -> [G, min(places, Q)] int32, places of each shard drawn uniformly, without replacement, from those with a weight.

    Where a shard has fewer, the others follow, whose weight is 0. The draw is the same on any number of devices.
    """
    there = jnp.asarray(weights) > 0
    draw = jnp.where(there, jax.random.uniform(key, there.shape), -1.0)
    return jax.lax.top_k(draw, min(places, there.shape[1]))[1].astype(jnp.int32)


def weights_of(batch: Batch, spec: InfoNCESpec) -> tuple[Any, jax.Array | None]:
    """-> (weights of the queries [G, Q]; of their positives [G, Q, K], None unless there are several and their events differ in weight).

    Several positives give their query the mean of their weights, so that with the weighted mean of their losses each has a K-th of its own.
    """
    if batch.event_weights is None:
        return batch.weights, None
    if spec.positives == 1:
        return batch.weights * batch.event_weights, None
    following = next_places(batch, spec.positives)
    there = following >= 0
    of_positives = jnp.where(there, base.lookup(batch.event_weights, following), 0)
    return batch.weights * of_positives.sum(-1) / jnp.maximum(there.sum(-1), 1), of_positives


def info_nce(outputs: Outputs, batch: Batch, context: Context, spec: InfoNCESpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of every query against the targets of the global batch and what joins them, or the whole catalogue -> (loss, metrics).

    With a momentum encoder, it makes the candidates, which get no gradient; a symmetric loss seeks its queries as well. The queue holds
    the candidates of earlier batches.

    Reference: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), section 2.3; log Q after
    Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations" (2019), section 3; queue after He et al.,
    "Momentum Contrast for Unsupervised Visual Representation Learning" (2020), section 3.2, and, without momentum, Wang et al.,
    "Cross-Batch Memory for Embedding Learning" (2020), section 3; uniform negatives after Yang et al., "Mixed Negative Sampling" (2020);
    prefixes after Kusupati et al., "Matryoshka Representation Learning" (2022), section 3; the popularity prior after Menon et al.,
    "Long-Tail Learning via Logit Adjustment" (2021), the logit adjusted softmax cross-entropy.
    """
    tau, places = temperature(context.scalars, spec), None
    weights, of_positives = weights_of(batch, spec)
    if spec.places:
        places = drawn_places(context.rng, batch.weights, spec.places)
        weights = base.lookup(weights, places)
    weights = base.shares(weights)
    catalogue = spec.candidates == "catalogue"
    made = _catalogue(outputs, batch, context, spec, places) if catalogue else _batch(outputs, batch, context, spec)
    if of_positives is not None:
        of_positives = of_positives if places is None else base.lookup(of_positives, places)
        made = [{**problem, "positive_weights": base.flat(of_positives)} for problem in made]
    # A catalogue that every device holds whole needs no ring: queries are split over the devices, and gradients are summed.
    ring = spec.candidates == "batch" or spec.shard_catalogue
    mesh, axes = (context.mesh, context.axes) if ring else (None, None)
    losses = []
    for width in (*spec.matryoshka, None):
        problems = [_cut(problem, width, context.normalize) for problem in made]
        parts = [weighted_info_nce(**p, temperature=tau, weights=weights, mesh=mesh, axis=axes) for p in problems]
        losses.append(sum(parts[1:], parts[0]) / len(parts))
        if spec.neighbour_share:
            losses[-1] += spec.neighbour_share * _to_neighbours(problems[0], batch, context, spec, weights) / tau
    loss = sum(losses[1:], losses[0]) / len(losses)
    return loss, {"info_nce": loss, "temperature": jnp.asarray(tau)}


def _catalogue(outputs: Outputs, batch: Batch, context: Context, spec: InfoNCESpec, places: jax.Array | None) -> list[dict[str, Any]]:
    """Every item of the catalogue is a candidate, of the queries at `places` [G, P], or of all."""
    taken = lambda x: base.flat(x if places is None else base.lookup(x, places))
    ids, items = taken(base.target_ids(batch)), outputs.catalogue
    options: dict[str, Any] = {"target": ids, "label_smoothing": spec.label_smoothing}
    if spec.positives > 1:
        following = next_places(batch, spec.positives)
        ids = taken(jnp.where(following >= 0, base.lookup(base.target_ids(batch), following), -1))
        options = {"target": ids, "positive": jnp.take(items, jnp.maximum(ids, 0), axis=0)}
    if spec.mask_history:
        options["left_out"] = taken(histories(batch))
    if spec.popularity_prior:
        options |= {"log_q": -context.log_q, "log_q_strength": spec.popularity_prior}
    if context.mesh is not None and spec.shard_catalogue:
        # The devices hold equal shares of the candidates.
        left = -len(items) % math.prod(context.mesh.shape[a] for a in context.axes or ())
        options["item_mask"] = jnp.arange(len(items) + left) < len(items)
        items = jnp.pad(items, ((0, left), (0, 0)))
        if spec.popularity_prior:
            options["log_q"] = jnp.pad(options["log_q"], (0, left))
    return [{"query": taken(outputs.user), "item": items, **_forms(spec), **options}]


def _to_neighbours(problem: dict[str, Any], batch: Batch, context: Context, spec: InfoNCESpec, weights: jax.Array) -> jax.Array:
    """What moves the target's weight to the history's neighbours: weighted sum of (target - mean of the neighbours) @ query, over places.

    With s the logits and w the shares, (1 - a) CE(target) + a sum_j w_j CE(j) = CE(target) + a (s_target - sum_j w_j s_j). A place's
    neighbours are those of the newest items of its history, the share of each item `neighbour_decay` times that of the newer one. Where
    none has any, the target keeps its weight. With `mask_history` items of the history are no neighbours.
    """
    ids, shares = context.neighbours
    length = batch.history_segments.shape[-1]
    segments = jnp.asarray(batch.history_segments)
    here = jnp.maximum(base.lookup(batch.item_ids, batch.history), 0)
    neighbours, parts = [], []
    for age in range(spec.neighbour_items):
        older = lambda x, age=age: jnp.pad(x, ((0, 0), (0, 0), (age, 0)))[:, :, :length]
        item = base.flat(older(here).reshape(len(here), -1))
        same = (older(segments) == segments) & (segments > 0)
        neighbours.append(ids[item])
        parts.append(shares[item] * (same.reshape(-1, 1) * spec.neighbour_decay**age))
    # Queries without a target hold anything at all.
    query = jnp.where(weights[:, None] > 0, problem["query"], 0)

    def add(carried: tuple[jax.Array, jax.Array], columns: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        (total, vectors), (near, share) = carried, columns
        if spec.mask_history:
            share = jnp.where((near[:, :, None] == problem["left_out"][:, None, :]).any(-1), 0, share)
        found = jnp.take(problem["item"], near, axis=0)
        return (total + share.sum(1), vectors + (share[:, :, None] * found).sum(1)), None

    # A CPU adds up one neighbour of all places after the other, so that no [Q, M, D] array exists; others all at once.
    count = sum(part.shape[1] for part in parts)
    width = 1 if on_cpu() else count
    split = lambda some: jnp.moveaxis(jnp.concatenate(some, axis=1).reshape(len(query), count // width, width), 1, 0)
    start = jnp.zeros(len(query)), jnp.zeros_like(query)
    (total, vectors), _ = jax.lax.scan(add, start, (split(neighbours), split(parts)))
    mean = vectors / jnp.maximum(total, 1e-6)[:, None]
    target = jnp.take(problem["item"], problem["target"], axis=0)
    return jnp.sum(jnp.where(total > 0, weights, 0) * jnp.sum(query * (target - mean), axis=1))


def _batch(outputs: Outputs, batch: Batch, context: Context, spec: InfoNCESpec) -> list[dict[str, Any]]:
    """The targets of the global batch are candidates, and those of the queue, uniform draws and hard negatives with them."""
    keys = context.momentum if spec.momentum else outputs
    assert keys is not None
    ids, there = base.flat(base.target_ids(batch)), base.flat(batch.weights) > 0
    sets = [Candidates(base.targets(keys, batch), ids, there)]
    if spec.queue:
        queued = context.queue["ids"].reshape(-1)
        sets.append(Candidates(context.queue["vectors"].reshape(-1, outputs.user.shape[-1]), queued, queued >= 0))
    drawn = []
    if spec.uniform:
        drawn.append(Candidates(outputs.drawn[: spec.uniform], outputs.drawn_ids[: spec.uniform], jnp.ones(spec.uniform, bool)))
    if spec.log_q:
        sets, drawn = _with_log_q(sets, drawn, context.log_q)
    if not spec.mask_equal:
        sets, drawn = ([c._replace(ids=None) for c in some] for some in (sets, drawn))
    item, *negatives = [*sets, *drawn]
    options: dict[str, Any] = {
        "query": base.flat(outputs.user),
        "item": item.vectors,
        "log_q": item.log_q,
        "log_q_strength": spec.log_q,
        "query_ids": ids if spec.mask_equal else None,
        "item_ids": item.ids,
        "item_mask": there,
        "negatives": negatives,
        "label_smoothing": spec.label_smoothing,
        **_forms(spec),
    }
    if spec.positives > 1:
        options |= _positives(keys, batch, spec)
    if spec.hard:
        options |= _hard(keys, batch)
    if not spec.symmetric or not spec.momentum:
        return [{**options, "symmetric": spec.symmetric}]
    opposite = {"query": base.targets(outputs, batch), "item": base.flat(keys.user), "item_mask": there, **_forms(spec)}
    return [options, {**opposite, "query_ids": options["query_ids"], "item_ids": options["query_ids"]}]


def _forms(spec: InfoNCESpec) -> dict[str, Any]:
    return {"form": spec.form, "positive_prior": spec.positive_prior}


def _with_log_q(sets: list[Candidates], drawn: list[Candidates], log_q: Any) -> Any:
    """Both lists with log Q: that of the mixture where some candidates are drawn by popularity (`sets`), others uniformly (`drawn`).

    The loss counts all candidates as draws of one distribution: item j is one with probability (n q_j + U / N) / (n + U).
    """
    if not drawn:
        return [c._replace(log_q=jnp.take(log_q, jnp.maximum(c.ids, 0))) for c in sets], []
    popular = jnp.asarray(sum(jnp.sum(c.mask) for c in sets), jnp.float32)
    uniform = sum(len(c.ids) for c in drawn)
    total = jnp.log(popular + uniform)
    share = math.log(uniform / len(log_q))

    def mixture(ids: jax.Array) -> jax.Array:
        return jnp.logaddexp(jnp.take(log_q, jnp.maximum(ids, 0)) + jnp.log(popular), share) - total

    return [[c._replace(log_q=mixture(c.ids)) for c in some] for some in (sets, drawn)]


def _positives(keys: Outputs, batch: Batch, spec: InfoNCESpec) -> dict[str, Any]:
    """The next K items of the history as positives of a query; all are candidates of the batch too."""
    places = next_places(batch, spec.positives)
    shards, queries, _ = places.shape
    vectors = base.lookup(base.lookup(keys.item, batch.targets), places)
    ids = jnp.where(places >= 0, base.lookup(base.target_ids(batch), places), -1)
    rows = jnp.where(places >= 0, places + queries * jnp.arange(shards, dtype=places.dtype)[:, None, None], -1)
    options = {"target": base.flat(rows), "positive": base.flat(vectors)}
    return {**options, "query_ids": base.flat(ids)} if spec.mask_equal else options


def _hard(keys: Outputs, batch: Batch) -> dict[str, Any]:
    if batch.negatives is None:
        raise RecJaxError("config.objectives.info_nce.hard=True, but batches have no mined negatives: set config.data.negatives to a file")
    ids = jnp.where(batch.negatives >= 0, base.lookup(batch.item_ids, batch.negatives), -1)
    return {"hard_negatives": base.flat(base.lookup(keys.item, batch.negatives)), "hard_ids": base.flat(ids)}


VECTORS = ("query", "item", "positive", "hard_negatives")


def _cut(problem: dict[str, Any], width: int | None, normalize: bool) -> dict[str, Any]:
    """The problem with all vectors cut to their first `width` numbers; None = whole."""
    if width is None:
        return problem
    short = {name: cut(problem.get(name), width, normalize=normalize) for name in VECTORS}
    negatives = [c._replace(vectors=cut(c.vectors, width, normalize=normalize)) for c in problem.get("negatives", ())]
    return {**problem, **short, "negatives": negatives}


def make(weight: float, keys: dict[str, Any]) -> base.Objective:
    """`config.objectives.info_nce` -> Objective."""
    spec = InfoNCESpec(**keys)
    return base.Objective(
        name="info_nce",
        weight=weight,
        spec=spec,
        function=info_nce,
        scalars=((base.TEMPERATURE, math.log(spec.temperature)),) if spec.learn_temperature else (),
        catalogue=spec.candidates == "catalogue",
        uniform=spec.uniform,
        queue=spec.queue,
        momentum=spec.momentum,
        positives=spec.positives,
        neighbours=spec.neighbours if spec.neighbour_share else 0,
        masks_history=spec.mask_history,
        matryoshka=spec.matryoshka,
    )
