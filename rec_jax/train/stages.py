"""The stages of a run: each has its folder, starts from the last one's weights, and is left alone once it is done."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax.data import negatives
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.data.prepare import Prepared
from rec_jax.towers import two_tower
from rec_jax.train import loop, objectives
from rec_jax.train.optimizer import OptimizerSpec
from rec_jax.train.step import Constants, StepSpec, init_scalars, log_frequencies, make_spec
from rec_jax.types import Params, Ragged, RecJaxError

# Keys that another machine may set otherwise without making it another run: they change no result.
FREE_KEYS = ("mesh", "data.cache", "train.prefetch", "eval.users_per_block", "eval.examples", "eval.baselines", "eval.ease_max_items")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys, with both values, in which two configs differ beyond FREE_KEYS."""
    out = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        a, b = old.get(key, "nothing"), new.get(key, "nothing")
        if name in FREE_KEYS or a == b:
            continue
        if hasattr(a, "keys") and hasattr(b, "keys"):
            out += differences(a, b, name + ".")
        else:
            out.append(f"config.{name}: {a!r} there, {b!r} now")
    return out


def keep_config(config: Any, workdir: epath.Path) -> None:
    """Writes `config.json`, or checks the one that is there.

    Raises:
      RecJaxError: the workdir belongs to another config; names the keys that differ.
    """
    file = workdir / "config.json"
    if file.exists():
        changed = differences(config_lib.from_json(file.read_text()), config)
        if changed:
            raise RecJaxError(f"{workdir} was begun with another config ({'; '.join(changed[:5])}); use another --workdir")
        return
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / "config.json.tmp"
        temporary.write_text(config_lib.to_json(config))
        temporary.replace(file)


def check(config: Any, towers: two_tower.TwoTowerSpec, text_params: Params, mesh: jax.sharding.Mesh) -> None:
    """Finds out, before anything is compiled, whether a stage's batch and parameters fit the mesh.

    Raises:
      RecJaxError: shards that the devices do not divide, a parameter without a rule, or one that its rule does not divide.
    """
    mesh_lib.check_shards(config.batch.shards, mesh)
    learned = init_scalars(make_step(config, towers, BatchSpec.from_config(config)).objectives)
    shapes = jax.eval_shape(lambda k, t: {**two_tower.init(k, towers, text_params=t), "scalars": learned}, jax.random.key(0), text_params)
    mesh_lib.shardings(shapes, mesh_lib.rules_of(config.mesh.layout, config.mesh.rules), mesh)


def make_step(config: Any, towers: two_tower.TwoTowerSpec, batch: BatchSpec) -> StepSpec:
    """The step that a stage's config describes.

    Raises:
      RecJaxError: an objective that towers or batches do not fit.
    """
    made = objectives.make_objectives(config.objectives.to_dict())
    return make_spec(towers, made, shards=batch.shards, queries=batch.queries, chunk_rows=config.batch.chunk_rows)


def make_batches(config: Any, prepared: Prepared, tokens: Ragged, mesh: jax.sharding.Mesh) -> Batches:
    """This process's part of the batches that a stage's config describes."""
    mesh_lib.check_shards(config.batch.shards, mesh)
    shards = mesh_lib.local_shards(config.batch.shards, mesh)
    spec, mined, file = BatchSpec.from_config(config), None, config.data.negatives
    if file:
        mined = negatives.read(file, fingerprint=prepared.meta["fingerprint"], users=prepared.n_users, items=prepared.n_items)
    lengths = prepared.train_lengths()
    return Batches(prepared.source(), lengths, spec, seed=config.seed, texts=tokens, negatives=mined, shards=shards)


def make_params(config: Any, spec: StepSpec, *, text_params: Params, table: np.ndarray | None, last: Params | None) -> dict[str, Any]:
    """Initial parameters of a stage: fresh ones, with those of the last stage laid over them where name and shape agree.

    Raises:
      RecJaxError: the last stage has a parameter of the same name and another shape.
    """
    key = jax.random.key(config.seed)
    start = table if config.towers.item.whiten else None
    params = two_tower.init(key, spec.towers, text_params=text_params, table=start)
    params["scalars"] = init_scalars(spec.objectives)
    if last is None:
        return params
    old = {mesh_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(last)}

    def take(path: Any, new: Any) -> Any:
        name = mesh_lib.path_name(path)
        if name in old and old[name].shape != new.shape:
            raise RecJaxError(f"{name} is {old[name].shape} in the last stage and {new.shape} in this one; the stages must agree on towers")
        return old.get(name, new)

    return jax.tree_util.tree_map_with_path(take, params)


def make_task(
    config: Any,
    name: str,
    folder: epath.Path,
    *,
    prepared: Prepared,
    towers: two_tower.TwoTowerSpec,
    table: np.ndarray | None,
    text_params: Params,
    batches: Batches,
    last: Params | None,
    evaluate: loop.Evaluate,
) -> loop.Task:
    """Everything that a stage trains with, durations turned into steps."""
    spec = make_step(config, towers, batches.spec)
    per_step = batches.examples_per_step()
    per_epoch = batches.examples_per_epoch / per_step
    train, opt = config.train, config.optimizer

    def steps(key: str, total: int) -> int:
        return config_lib.steps(
            config_lib.get(config, key), f"config.{key}", steps_per_epoch=per_epoch, examples_per_step=per_step, total=total
        )

    total = steps("train.duration", 0)
    if total < 1:
        raise RecJaxError(f"config.train.duration={train.duration!r} is no step at all")
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
        scale=tuple(tuple(pair) for pair in opt.scale),
        clip=opt.clip,
        accumulate=opt.accumulate,
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
    )
    constants = Constants(table=table, log_q=np.asarray(log_frequencies(prepared.item_counts())))
    rules = mesh_lib.rules_of(config.mesh.layout, config.mesh.rules)
    params = make_params(config, spec, text_params=text_params, table=table, last=last)
    return loop.Task(name, folder, spec, loop_spec, optimizer, params, batches, constants, rules, evaluate, last is not None)
