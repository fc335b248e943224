"""python -m rec_jax.train --config=configs/x.py[:preset] --workdir=DIR [--config.a.b=value ...]

Prepares the data where needed, trains each stage, evaluates on the test split, prints the table and sample recommendations.
The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax import processes
from rec_jax.cli import main_of
from rec_jax.data import text
from rec_jax.data.prepare import Prepared, prepare
from rec_jax.eval import final
from rec_jax.eval import model as model_lib
from rec_jax.serve.recommend import Recommender, as_text
from rec_jax.train import loop, objectives, plan, stages
from rec_jax.train.log import duration
from rec_jax.types import Params, Ragged


class _Clock:
    """Says how long each part took, from the start of the run."""

    def __init__(self, active: bool):
        self._began, self._active = time.perf_counter(), active

    def say(self, message: str) -> None:
        if self._active:
            print(message, flush=True)

    def part(self, title: str, expected: float | None = None) -> None:
        about = f" (about {duration(expected)})" if expected and expected >= 1 else ""
        self.say(f"[{duration(time.perf_counter() - self._began):>12}] {title}{about}")


def main(argv: Sequence[str]) -> int:
    """Runs the whole job -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m rec_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config(arg), and a preset after a colon")
    parser.add_argument("--workdir", required=True, help="a folder; the same one resumes")
    args, overrides = config_lib.parse_args(parser, argv)
    config, workdir = config_lib.load(args.config, overrides), epath.Path(args.workdir)
    mesh_lib.rules_of(config.mesh.layout, config.mesh.rules)  # bad ones are said before anything else is done
    processes.start()
    with processes.together():
        try:
            _run(config, workdir, mesh_lib.make_mesh({a: config.mesh[a] for a in mesh_lib.AXES}))
        except loop.Interrupted:  # in all processes, after the same step
            if jax.process_index() == 0:
                raise
            return 130
    return 0


def _run(config: Any, workdir: epath.Path, mesh: jax.sharding.Mesh) -> None:
    """The whole job, in each process of the run."""
    clock = _Clock(jax.process_index() == 0)
    stages.keep_config(config, workdir)
    clock.part("data")
    prepared = prepare(config)
    clock.say(f"  {prepared.n_users:,} users, {prepared.n_items:,} items, {prepared.meta['events']:,} events at {prepared.folder}")
    tokens = processes.first(lambda: text.catalogue_tokens(config, prepared))
    bert = model_lib.load_encoder(config)
    for name in config.stages or ("",):
        stage = config_lib.for_stage(config, name) if name else config
        stages.check(stage, model_lib.towers_of(stage, prepared, bert[1]), bert[0], mesh)
    speed = plan.machine_speed()
    several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    clock.say(f"  {jax.device_count()} x {jax.devices()[0].device_kind}{several}, {speed / 1e9:,.0f} GFLOP/s in a large fp32 matmul")

    last: Params | None = None
    for name in config.stages or ("",):
        stage = config_lib.for_stage(config, name) if name else config
        folder = workdir / name if name else workdir
        last = _stage(stage, name, folder, prepared, tokens, bert, last, mesh, speed, clock)
        bert = (last.get("text", bert[0]), bert[1])  # an encoder that a stage trained is the next stages'

    processes.at("the end: process 0 tests alone")
    if jax.process_index() == 0:
        ease = "ease" in config.eval.baselines and prepared.n_items <= config.eval.ease_max_items
        expected = 10 + plan.test_flops(prepared.n_items, ease=ease) / speed / plan.STEP_SHARE
        clock.part("test: the model and its baselines, every user against the whole catalogue", expected)
        final.run(workdir, say=clock.say)
        _examples(config, workdir, clock)
        clock.part("done")
        curves = [str((workdir / name if name else workdir) / "metrics.jsonl") for name in config.stages or ("",)]
        clock.say(f"  figures {workdir / 'eval' / 'test.json'}, curves {', '.join(curves)}")
        clock.say(f'  recommend: python -m rec_jax.serve recommend --model={workdir} --history="TITLE" --k=10')


def _stage(
    config: Any,
    name: str,
    folder: epath.Path,
    prepared: Prepared,
    tokens: Ragged,
    bert: Any,
    last: Params | None,
    mesh: jax.sharding.Mesh,
    speed: float,
    clock: _Clock,
) -> Params:
    """Trains one stage -> parameters of its best checkpoint."""
    if name:
        stages.keep_config(config, folder)
    catalogue = any(o.table for o in objectives.make_objectives(config.objectives.to_dict()))
    encoding = (
        plan.text_flops(bert[1], int(tokens.lengths().sum()), row_tokens=config.batch.row_tokens, train=False) / speed / plan.TEXT_SHARE
    )
    clock.part(f"{name or 'model'}: text vectors, if they are not kept yet", encoding)
    model = model_lib.make_model(config, prepared, tokens, bert, clock.say, candidates=catalogue, shared=True)
    batches = stages.make_batches(config, prepared, tokens, mesh)
    task = stages.make_task(
        config,
        name,
        folder,
        prepared=prepared,
        towers=model.spec,
        table=model.table,
        text_params=bert[0],
        batches=batches,
        last=last,
        evaluate=model.validate,
    )
    flops = plan.step_flops(task.spec, batches.spec, n_items=prepared.n_items)
    parameters = sum(int(np.size(x)) for x in jax.tree.leaves(task.params))
    share = plan.TEXT_SHARE if model.spec.encode else plan.STEP_SHARE
    expected = task.loop.total * flops / speed / share + (encoding * task.loop.total / task.loop.eval_every if model.spec.encode else 0)
    clock.part(f"{name or 'model'}: {task.loop.total} steps, {parameters:,} parameters, validation", expected)
    loop.train(task, mesh)
    processes.barrier("trained")  # the last checkpoint is whole
    params, step = model_lib.best_params(folder)
    if model.validated is not None:  # else it was trained before, and its vectors are kept already or are made when they are asked for
        model_lib.keep_item_vectors(folder, step, model.item_vectors(params, step=step))
    return params


def _examples(config: Any, workdir: epath.Path, clock: _Clock) -> None:
    if not config.eval.examples:
        return
    recommender = Recommender(model_lib.load(workdir, say=lambda _: None))
    for history in config.eval.examples:
        clock.say("\n" + as_text(history, recommender.recommend(history, k=10)))
    clock.say("")


if __name__ == "__main__":
    main_of(main)
