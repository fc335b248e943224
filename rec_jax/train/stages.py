"""What a stage trains with: its step, batches, parameters and durations, from its config and what the stages before it left."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax.data import event_weights, negatives
from rec_jax.data.augment import Corruption
from rec_jax.data.draft import BatchSpec
from rec_jax.data.impression_batches import ImpressionBatches, ImpressionSpec
from rec_jax.data.neighbours import nearest
from rec_jax.data.packing import pack_texts
from rec_jax.data.pair_batches import PairBatches, PairSpec
from rec_jax.data.pipeline import Batches
from rec_jax.data.prepare import Prepared
from rec_jax.data.text_batches import TextBatches, text_spec
from rec_jax.data.windows import Replay
from rec_jax.towers import heads, ids, interactions, pretraining, two_tower
from rec_jax.towers.dropout import fold
from rec_jax.train import carry, loop, objectives
from rec_jax.train.forwards import Constants, StepSpec
from rec_jax.train.optimizer import OptimizerSpec
from rec_jax.train.step import init_scalars, log_frequencies, make_spec
from rec_jax.types import Params, Ragged, RecJaxError

CATALOGUE_ROWS = 512  # packed rows of a block while the whole catalogue is packed


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a stage is made from, beside its config.

    Attributes:
      prepared: the data.
      tokens: of each catalogue item.
      towers: spec of both towers.
      text_params: weights of the encoder as the stage finds it.
      table: text vectors of the catalogue [N, D_text], or None.
      last: parameters that the stages before have left, or None.
      teacher: spec of the teacher's towers, or None.
      teacher_arrays: {"params", "table", "features", "of_users"} of the teacher, or None.
      corpus: tokens of the corpus, the rows to train on, the rows held out; only for batches of texts.
      corruption: what is hidden or deleted in them.
      start: what another workdir has left, in the first stage of a run that goes on from it; then `last` is None.
      replay: what is new against that workdir's data, and how much of the rest comes.
      features: of the catalogue's items, kind -> name -> [N, ...], where the towers read some.
      of_users: features of users, kind -> name -> [U, ...], likewise.
    """

    prepared: Prepared
    tokens: Ragged
    towers: two_tower.TwoTowerSpec
    text_params: Params
    table: np.ndarray | None = None
    last: Params | None = None
    teacher: two_tower.TwoTowerSpec | None = None
    teacher_arrays: dict[str, Any] | None = None
    corpus: tuple[Ragged, np.ndarray, np.ndarray] | None = None
    corruption: Corruption | None = None
    start: carry.Carried | None = None
    replay: Replay | None = None
    features: Any = None
    of_users: Any = None


def make_step(
    config: Any, towers: two_tower.TwoTowerSpec, batch: Any, *, teacher: two_tower.TwoTowerSpec | None = None, labels: int = 0
) -> StepSpec:
    """The step that a stage's config describes, on batches of these budgets; `labels` is how many the impressions have.

    Raises:
      RecJaxError: an objective that towers, teacher or batches do not fit.
    """
    made = objectives.make_objectives(config.objectives.to_dict(), labels=labels)
    if config.batch.kind == "pairs" and config.batch.row_tokens > towers.text.max_positions:
        raise RecJaxError(
            f"pairs of config.batch.row_tokens={config.batch.row_tokens} tokens need an encoder of as many positions; it has "
            f"{towers.text.max_positions}"
        )
    options = {"chunk_rows": config.batch.chunk_rows, "kind": config.batch.kind, "rows": config.optimizer.rows}
    return make_spec(towers, made, shards=batch.shards, queries=batch.queries, teacher=teacher, **options)


def step_of(config: Any, inputs: Inputs) -> StepSpec:
    """`make_step` on what a stage is made from."""
    labels = len(inputs.prepared.impressions("train").tasks) if config.batch.kind == "impressions" else 0
    return make_step(config, inputs.towers, batch_spec(config), teacher=inputs.teacher, labels=labels)


def check(
    config: Any,
    towers: two_tower.TwoTowerSpec,
    text_params: Params,
    mesh: jax.sharding.Mesh,
    *,
    teacher: two_tower.TwoTowerSpec | None = None,
    labels: int = 0,
    start: carry.Carried | None = None,
) -> None:
    """Finds out, before anything is compiled, whether a stage's batch and parameters fit the mesh and what the stage starts from.

    Raises:
      RecJaxError: shards that the devices do not divide, a parameter without a rule, or one that its rule does not divide; towers that
        are not those of the workdir to go on from.
    """
    mesh_lib.check_shards(config.batch.shards, mesh)
    spec = make_step(config, towers, batch_spec(config), teacher=teacher, labels=labels)
    shapes = jax.eval_shape(lambda t: fresh(config, spec, t, None), text_params)
    mesh_lib.shardings(shapes, mesh_lib.rules_of(config.mesh.layout, config.mesh.rules), mesh)
    if start is not None:
        carry.check(start, shapes)


def untrained(config: Any) -> bool:
    """Whether a stage's duration is "0 ...": the towers of config.start.path get the new data, and are not trained on them."""
    return re.fullmatch(r"0+(\.0*)?", str(config.train.duration).partition(" ")[0]) is not None


def batch_spec(config: Any) -> Any:
    """The budgets of a stage's batches."""
    if config.batch.kind == "texts":
        return text_spec(config)
    if config.batch.kind == "pairs":
        return PairSpec.from_config(config)
    if config.batch.kind == "impressions":
        b = config.batch
        return ImpressionSpec(b.shards, b.impressions, config.towers.text.source == "tokens", b.text_rows, b.row_tokens)
    return BatchSpec.from_config(config)


def make_batches(config: Any, inputs: Inputs, mesh: jax.sharding.Mesh) -> Any:
    """This process's part of the batches that a stage's config describes."""
    mesh_lib.check_shards(config.batch.shards, mesh)
    shards, spec, prepared = mesh_lib.local_shards(config.batch.shards, mesh), batch_spec(config), inputs.prepared
    if config.batch.kind == "texts":
        assert inputs.corpus is not None
        tokens, rows, _ = inputs.corpus
        return TextBatches(tokens, rows, spec, seed=config.seed, corruption=inputs.corruption, shards=shards)
    if config.batch.kind == "impressions":
        return ImpressionBatches(prepared.impressions("train"), spec, seed=config.seed, texts=inputs.tokens, shards=shards)
    if config.batch.kind == "pairs":
        return PairBatches(prepared.train_source(), prepared.train_lengths(), spec, seed=config.seed, texts=inputs.tokens, shards=shards)
    mined, file = None, config.data.negatives
    if file:
        mined = negatives.read(file, fingerprint=prepared.meta["fingerprint"], users=prepared.n_users, items=prepared.n_items)
    lengths = prepared.train_lengths()
    texts, replay = inputs.tokens, inputs.replay
    return Batches(
        prepared.train_source(),
        lengths,
        spec,
        seed=config.seed,
        texts=texts,
        negatives=mined,
        replay=replay,
        shards=shards,
        event_weight=event_weights.of_run(config, prepared),
    )


def fresh(config: Any, spec: StepSpec, text_params: Params, table: np.ndarray | None) -> dict[str, Any]:
    """Parameters of a stage that begins with nothing but an encoder."""
    key, text = jax.random.key(config.seed), spec.towers.text
    if spec.kind == "texts":
        params: dict[str, Any] = {"text": text_params}
        for o in spec.objectives:
            if o.masked:
                params["mlm"] = pretraining.init_mlm(fold(key, "mlm"), text)
            if o.denoised:
                params["denoise"] = pretraining.init_decoder(fold(key, "denoise"), text, layers=o.spec.layers)
    elif spec.kind == "pairs":
        params = {"text": text_params, "cross": interactions.init_cross(fold(key, "cross"), text)}
    else:
        params = two_tower.init(key, spec.towers, text_params=text_params, table=table)
    return {**params, "scalars": init_scalars(spec.objectives)}


def make_params(config: Any, spec: StepSpec, inputs: Inputs) -> dict[str, Any]:
    """Initial parameters of a stage: fresh ones, with those of the stages or the workdir before laid over them where names agree.

    The encoder's are `inputs.text_params`. A student's item head begins as the linear map that takes its text vectors nearest to its
    teacher's, for they mean something else than the teacher's; its items' own vectors begin as what that leaves. So it begins with its
    teacher's vectors of the items that are known, and new ones are what their texts say. A hashed table of own vectors takes what is left
    as near as its rows allow (`ids.fitted`).

    Raises:
      RecJaxError: a stage before has a parameter of the same name and another shape, and none of both is a student.
    """
    params = fresh(config, spec, inputs.text_params, inputs.table if config.towers.item.whiten else None)
    last = inputs.last if inputs.start is None else carry.laid_out(inputs.start, params)
    if last is None:
        return params
    student = config_lib.is_student(config)
    skipped = ("text", "lora") + (("item", "gates") if student else ())
    old = {mesh_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(last)}

    def take(path: Any, new: Any) -> Any:
        name = mesh_lib.path_name(path)
        if name not in old or name.partition("/")[0] in skipped:
            return new
        if old[name].shape != new.shape:
            raise RecJaxError(f"{name} is {old[name].shape} in the last stage and {new.shape} in this one; the stages must agree on towers")
        return old[name]

    params = jax.tree_util.tree_map_with_path(take, params)
    if student and inputs.teacher is not None and inputs.teacher_arrays is not None and "item" in params:
        params |= _nearest_to_teacher(params, spec.towers, inputs.teacher, inputs.teacher_arrays, inputs)
    return params


def _nearest_to_teacher(
    params: Params, towers: two_tower.TwoTowerSpec, teacher: two_tower.TwoTowerSpec, arrays: dict[str, Any], inputs: Inputs
) -> dict[str, Any]:
    """-> {"item", "ids"?, "features"?} of a student that begins with its teacher's vectors, as `make_params` says; nothing where it cannot.

    Features that both read alike are the teacher's; those of the teacher alone go into the items' own vectors.
    """
    taught, table = arrays["params"], arrays["table"]
    if table is None or inputs.table is None or teacher.dim != towers.dim:
        return {}
    teacher, towers = (dataclasses.replace(t, normalize=False) for t in (teacher, towers))
    towers = dataclasses.replace(towers, gates=False)  # a student's begin open
    wanted = np.asarray(two_tower.text_item_vectors(taught, teacher, table))
    out: dict[str, Any] = {"item": heads.fitted(params["item"], inputs.table, wanted)}
    if towers.features is not None and _read_alike(towers, inputs.features, teacher, arrays.get("features")):
        out["features"] = taught["features"]
    if towers.n_ids and teacher.gates:  # which weigh what features add, too
        before = two_tower.item_vectors({**params, **out}, dataclasses.replace(towers, n_ids=0), inputs.table, inputs.features)
        rest = np.asarray(two_tower.item_vectors(taught, teacher, table, arrays.get("features"))) - before
        out["ids"] = {"embedding": ids.fitted(params["ids"]["embedding"], rest, **towers.id_options)}
    elif towers.n_ids:
        if towers.features is not None:  # what they add is added to the student too
            teacher = dataclasses.replace(teacher, features=None)
        whole = np.asarray(two_tower.item_vectors(taught, teacher, table, arrays.get("features")))
        rest = whole - two_tower.text_item_vectors(out, towers, inputs.table)
        out["ids"] = {"embedding": ids.fitted(params["ids"]["embedding"], rest, **towers.id_options)}
    return out


def _read_alike(towers: two_tower.TwoTowerSpec, features: Any, teacher: two_tower.TwoTowerSpec, others: Any) -> bool:
    """Whether two towers read the same features, by the same coding."""
    without_dropout = lambda spec: spec and dataclasses.replace(spec, dropout=0.0)
    if without_dropout(towers.features) != without_dropout(teacher.features):
        return False
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), features, others)))


def packed_catalogue(tokens: Ragged, row_tokens: int, devices: int) -> dict[str, np.ndarray]:
    """Tokens of each item -> {"tokens", "segments" [R, T], "places" [N]}, in rows that the devices divide."""
    blocks = list(pack_texts(tokens, rows=CATALOGUE_ROWS, row_tokens=row_tokens))
    places = np.zeros(len(tokens), np.int32)
    for n, block in enumerate(blocks):
        places[block.texts] = block.places + n * CATALOGUE_ROWS * block.per_row
    rows = np.concatenate([b.tokens for b in blocks]), np.concatenate([b.segment_ids for b in blocks])
    used = -(-int(np.flatnonzero(np.any(rows[1] > 0, axis=1)).max() + 1) // devices) * devices
    return {"tokens": rows[0][:used], "segments": rows[1][:used], "places": places}


def make_task(
    config: Any,
    name: str,
    folder: epath.Path,
    inputs: Inputs,
    batches: Any,
    mesh: jax.sharding.Mesh,
    evaluate: loop.Evaluate,
    encode: Callable[[Params], np.ndarray] | None = None,
) -> loop.Task:
    """Everything that a stage trains with, durations turned into steps; `encode` makes text vectors of the catalogue, to refresh them."""
    spec = step_of(config, inputs)
    per_step = batches.examples_per_step()
    per_epoch = batches.examples_per_epoch / per_step
    train, opt = config.train, config.optimizer

    def steps(key: str, total: int) -> int:
        return config_lib.steps(
            config_lib.get(config, key), f"config.{key}", steps_per_epoch=per_epoch, examples_per_step=per_step, total=total
        )

    total = steps("train.duration", 0)
    if total < 1 and (inputs.start is None or spec.kind != "users"):
        raise RecJaxError(
            f"config.train.duration={train.duration!r} is no step at all: only a run that goes on from another (config.start.path) may "
            "train none, which gives new items, users and events to the towers as they are"
        )
    optimizer = OptimizerSpec(
        learning_rate=opt.learning_rate,
        schedule=opt.schedule,
        warmup=steps("optimizer.warmup", total),
        total=total,
        final=opt.final,
        beta1=opt.beta1,
        beta2=opt.beta2,
        weight_decay=opt.weight_decay,
        no_decay=tuple(opt.no_decay),
        freeze=tuple(opt.freeze),
        scale=(*(tuple(pair) for pair in opt.scale), *layer_scales(opt.layer_decay, spec.towers.text.layers)),
        clip=opt.clip,
        cooldown=opt.cooldown,
        accumulate=opt.accumulate,
        rows=opt.rows,
        average=opt.average,
        muon=tuple(opt.muon),
    )
    loop_spec = loop.LoopSpec(
        total=total,
        log_every=max(1, steps("train.log_every", total)),
        eval_every=max(1, steps("train.eval_every", total)),
        checkpoint_every=max(1, steps("train.checkpoint_every", total)),
        monitor=train.monitor,
        patience=train.patience,
        prefetch=train.prefetch,
        seed=config.seed,
        goal=train.monitor_goal,
        refresh_every=max(1, steps("towers.text.refresh", total)) if config.towers.text.refresh else 0,
    )
    if loop_spec.refresh_every and inputs.table is None:
        raise RecJaxError(
            f"config.towers.text.refresh={config.towers.text.refresh!r}: no objective of this stage reads vectors of the whole catalogue; "
            "set it to ''"
        )
    every = config.towers.text.catalogue == "step" and spec.towers.encode and any(o.catalogue for o in spec.objectives)
    devices = mesh_lib.devices_along(mesh, mesh_lib.BATCH_AXES)
    constants = Constants(
        table=inputs.table,
        log_q=np.asarray(log_frequencies(_target_counts(config, inputs, batches))),
        teacher=inputs.teacher_arrays if spec.teacher is not None else None,
        texts=packed_catalogue(inputs.tokens, config.batch.row_tokens, devices) if every else None,
        neighbours=_neighbours(spec, inputs.prepared),
        features=inputs.features if spec.towers.features is not None else None,
        of_users=inputs.of_users if spec.kind == "users" else None,
    )
    rules = mesh_lib.rules_of(config.mesh.layout, config.mesh.rules)
    params = make_params(config, spec, inputs)
    continues = (inputs.last is not None or inputs.start is not None) and spec.kind == "users"
    return loop.Task(name, folder, spec, loop_spec, optimizer, params, batches, constants, rules, evaluate, continues, encode)


def _neighbours(spec: StepSpec, prepared: Prepared) -> tuple[np.ndarray, np.ndarray] | None:
    """Neighbours of all items, as many as the objectives want."""
    count = max(o.neighbours for o in spec.objectives)
    if not count:
        return None
    found = nearest(prepared.train_histories(), prepared.n_items, count=count)
    return found.ids, found.weights


def _target_counts(config: Any, inputs: Inputs, batches: Any) -> np.ndarray:
    """How often each item is a training target [N], up to a factor."""
    all_alike = (inputs.replay is None or inputs.replay.share == 1) and not config.batch.cloze
    if all_alike or config.batch.kind != "histories":
        return inputs.prepared.item_counts()
    items = inputs.prepared.train_histories().flat
    return np.bincount(items, weights=batches.times_predicted(), minlength=inputs.prepared.n_items)


def no_constants() -> Constants:
    """What the objectives of texts need: nothing."""
    return Constants(table=None, log_q=np.zeros(1, np.float32))


def layer_scales(decay: float, layers: int) -> tuple[tuple[str, float], ...]:
    """Learning-rate factors of the encoder's layers: 1 for the last, `decay` times that of the one above for each below; embeddings last.

    Raises:
      RecJaxError: a decay that is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise RecJaxError(f"config.optimizer.layer_decay={decay}: must be above 0 and at most 1, which is none")
    if decay == 1:
        return ()
    below = [(rf"text/layer_{n}/.*", decay ** (layers - 1 - n)) for n in range(layers)]
    return (*below, ("text/embeddings/.*", decay**layers))
