"""python -m rec_jax.train --config=configs/x.py[:preset] --workdir=DIR [--stages=A,B] [--config.a.b=value ...]

Prepares the data where needed, trains each stage from what the ones before have left, evaluates on the test split, prints the tables and
sample recommendations. The same command goes on where it was stopped, and does nothing again that is done. --stages runs a part: of
these stages, those whose config or inputs have changed are run again.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import config_flags, processes
from rec_jax import mesh as mesh_lib
from rec_jax.cli import main_of
from rec_jax.data import corpus, describe, event_features, feature_codes, text, text_batches, user_features, vocabulary
from rec_jax.data import start as start_lib
from rec_jax.data.augment import Corruption, Deletion, Masking
from rec_jax.data.prepare import Prepared, prepare
from rec_jax.data.windows import Replay, Windows
from rec_jax.eval import continual, cross, final, fusion, labelled, teacher
from rec_jax.eval import encoder as encoder_lib
from rec_jax.eval import model as model_lib
from rec_jax.eval.workdir import best_params, mark_of
from rec_jax.serve.recommend import Recommender, as_text
from rec_jax.towers import save_hf, two_tower
from rec_jax.train import carry, chain, held_out, loop, objectives, plan, stages
from rec_jax.train.adapt import adapted, as_wide_as, widened, without_texts
from rec_jax.train.log import Clock
from rec_jax.types import Params, Ragged, RecJaxError


def main(argv: Sequence[str]) -> int:
    """Runs the whole job -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m rec_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config(arg), and a preset after a colon")
    parser.add_argument("--workdir", required=True, help="a folder; the same one resumes")
    parser.add_argument("--stages", help="names with commas between them: of the config's stages, those to run, also again; default: all")
    args, overrides = config_flags.parse_args(parser, argv)
    config, workdir = config_lib.load(args.config, overrides), epath.Path(args.workdir)
    mesh_lib.rules_of(config.mesh.layout, config.mesh.rules)  # bad ones are said before anything else is done
    config = as_wide_as(config, start_lib.start_of(config).config) if config.start.path else config
    start_lib.check(config)
    fusion.check(config)
    chosen = None if args.stages is None else [name.strip() for name in args.stages.split(",") if name.strip()]
    on_disk = chain.Stages(workdir, config.stages, chosen)
    processes.start()
    with processes.together():
        try:
            run = _Run(config, workdir, mesh_lib.make_mesh({a: config.mesh[a] for a in mesh_lib.AXES}), on_disk)
            run.all_stages()
            run.report()
        except loop.Interrupted:  # in all processes, after the same step
            if jax.process_index() == 0:
                raise
            return 130
    return 0


class _Run:
    """The whole job, in each process of the run."""

    def __init__(self, config: Any, workdir: epath.Path, mesh: jax.sharding.Mesh, on_disk: chain.Stages):
        self.workdir, self.mesh, self.on_disk = workdir, mesh, on_disk
        self.clock = Clock(jax.process_index() == 0)
        self.model: model_lib.Model | None = None  # of the stage that is trained
        self.clock.part("data")
        self.prepared: Prepared = prepare(config)
        given, config = config, without_texts(config, self.prepared.texts(), self.prepared.item_ids())
        if config is not given:
            self.clock.say("  no item has a text: items are known by their IDs alone (config.towers.item.text=False)")
        counts = self.prepared
        self.clock.say(f"  {counts.n_users:,} users, {counts.n_items:,} items, {counts.meta['events']:,} events at {counts.folder}")
        for line in describe.notes(config, counts) if jax.process_index() == 0 else ():
            self.clock.say(f"  {line}")
        self.tokens: Ragged = processes.first(lambda: vocabulary.catalogue_tokens(config, self.prepared))
        self.encoder = encoder_lib.load_encoder(config, self.prepared)
        most = config.towers.text.width or self.encoder[1].width
        config = widened(config, counts.train_lengths(), counts.n_items, text_width=most, say=self.clock.say)
        self.config = config
        if not config.stages:
            chain.check_config(config, workdir)
        self.last: Params | None = None
        self.start: carry.Carried | None = None  # of the first stage
        self.start_mark = ""
        self.replay: Replay | None = None
        self.difference: start_lib.Difference | None = None
        if config.start.path:
            self._go_on()
        self.coding = feature_codes.of_run(config, self.prepared)
        self.user_coding = user_features.coding_of_run(config, self.prepared)
        for name in config.stages or ("",):
            self._check(self._config_of(name), name)
        self.planned = self._plan()
        if config.stages:
            on_disk.check(self.planned)
        else:
            start_lib.check_kept(workdir, self.prepared, start=self.start_mark)
        chain.write_config(config, workdir)
        start_lib.keep(workdir, self.prepared, start=self.start_mark, write=jax.process_index() == 0)
        feature_codes.keep(workdir, self.coding, write=jax.process_index() == 0)
        feature_codes.keep(workdir, self.user_coding, write=jax.process_index() == 0, name=user_features.CODES)
        self.speed = plan.machine_speed()
        self.encoding = plan.encoding_seconds(self.encoder[1], self.tokens, row_tokens=config.batch.row_tokens, speed=self.speed)
        several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        kind = jax.devices()[0].device_kind
        self.clock.say(f"  {jax.device_count()} x {kind}{several}, {self.speed / 1e9:,.0f} GFLOP/s in a large fp32 matmul")

    def _go_on(self) -> None:
        """Reads the workdir that the run goes on from, and finds out what is new."""
        start, share = start_lib.start_of(self.config), self.config.start.replay
        if stages.untrained(self.config):  # nothing is replayed, and nothing new is needed
            share = 1.0
        start_lib.check_ratings(start, self._config_of((self.config.stages or ("",))[0]), self.prepared)
        self.difference = new = start_lib.difference(self.prepared, start.prepared)
        rows = {"items": new.items, "users": new.users, **event_features.rows_in(start.prepared.meta, self.prepared.meta)}
        self.start = carry.Carried(continual.params_of(start), rows, str(start.workdir), start.config.towers.item.id_buckets > 0)
        self.start_mark, self.replay = mark_of(start.folder), Replay(share, new.events)
        lengths = self.prepared.train_lengths()
        self.replay.turns(Windows.of(lengths, None), lengths)  # finds out now whether there is anything new
        counts = f"{(new.items < 0).sum():,} items, {(new.users < 0).sum():,} users, {new.events.sum():,} train events"
        trained = "nothing is trained" if stages.untrained(self.config) else f"{share:.0%} of the other windows come again"
        self.clock.say(f"  going on from {start.folder}; new: {counts}; {trained}")

    def _config_of(self, name: str, say: Callable[[str], None] | None = None) -> Any:
        """The config of a stage, with what it leaves to the data."""
        config = config_lib.for_stage(self.config, name) if name else self.config
        return adapted(config, self.prepared.train_lengths(), self.prepared.n_items, say)

    def _check(self, config: Any, name: str) -> None:
        """Finds out before any stage runs what can be wrong with this one."""
        student = encoder_lib.sizes_of_student(config, self.encoder)
        towers = model_lib.towers_of(config, self.prepared, student[1], self.coding, self.user_coding)
        made = objectives.make_objectives(config.objectives.to_dict(), labels=self._labels(config))
        taught = None
        if any(o.teacher for o in made):
            if not config.teacher.path and name == (self.config.stages or ("",))[0]:
                raise RecJaxError(f"stage {name!r} asks for a teacher, and none comes before it: set config.teacher.path")
            self._check_temperature(config, name)
            taught = model_lib.towers_of(config, self.prepared, self.encoder[1], self.coding, self.user_coding)
            taught = two_tower.with_encoder(taught, config.teacher.source == "online")
        start = self.start if name == (self.config.stages or ("",))[0] else None
        stages.check(config, towers, student[0], self.mesh, teacher=taught, labels=self._labels(config), start=start)
        if config.batch.kind == "pairs":  # whether they fit depends on the texts
            stages.make_batches(config, stages.Inputs(self.prepared, self.tokens, towers, student[0]), self.mesh)

    def _check_temperature(self, config: Any, name: str) -> None:
        """The teacher's scores are over the temperature that it has learned, where the config gives none."""
        if config.objectives.distill_kl.weight > 0 and not config.objectives.distill_kl.scale and not config.teacher.path:
            names = self.config.stages
            before = self._config_of(names[names.index(name) - 1]).objectives.info_nce
            if not (before.weight > 0 and before.learn_temperature):
                raise RecJaxError(
                    f"config.objectives.distill_kl.scale=0 takes the temperature that the teacher has learned, but the stage before "
                    f"{name!r} learns none: set config.objectives.distill_kl.scale, e.g. to 14"
                )

    def _plan(self) -> list[tuple[str, Any, str]]:
        """Name, config and fingerprint of each stage: of its config, the data, the stages before it, and the files that it reads."""
        out, mark = [], self.prepared.meta["fingerprint"]
        if self.config.start.path:
            start = start_lib.start_of(self.config)
            mark = hashlib.sha256(f"{mark} {self.start_mark} {start.prepared.meta['fingerprint']}".encode()).hexdigest()
        for name in self.config.stages or ("",):
            config = self._config_of(name, self.clock.say)
            inputs = []
            if config.data.corpus.path and (config.batch.kind == "texts" or config.towers.text.path == "scratch"):
                inputs.append(vocabulary.corpus_of(config, self.prepared).fingerprint)
            if config.data.negatives:
                inputs.append(hashlib.sha256(epath.Path(config.data.negatives).expanduser().read_bytes()).hexdigest())
            if config.teacher.path:
                inputs.append(teacher.mark_of(config))
            mark = chain.fingerprint(config, mark, *inputs)
            out.append((name, config, mark))
        return out

    def _labels(self, config: Any) -> int:
        return len(self.prepared.impressions("train").tasks) if config.batch.kind == "impressions" else 0

    def all_stages(self) -> None:
        """Each stage of the config, in order."""
        before = None
        for name, config, mark in self.planned:
            folder, title = self.workdir / name if name else self.workdir, name or "model"
            if name and not self.on_disk.begin(name, config, mark):
                self.clock.part(f"{title}: done before, from the same config and inputs")
                self.encoder = encoder_lib.student_of(config, self.encoder, self.prepared)
                self._follow(config, best_params(folder)[0])
                before = name
                continue
            processes.barrier(f"{title} begins")
            began = time.perf_counter()
            self.encoder = encoder_lib.student_of(config, self.encoder, self.prepared)
            task = self._task(config, name, folder, before)
            progress = loop.train(task, self.mesh)
            processes.barrier("trained")  # the last checkpoint is whole
            params, step = best_params(folder)
            self._keep(config, folder, params, step)
            self._follow(config, params)
            before = name
            if name:
                size = float(sum(int(np.size(x)) for x in jax.tree.leaves(task.params)))
                steps = float(progress.end(task.loop.total))
                self.on_disk.done(name, mark, {"seconds": time.perf_counter() - began, "parameters": size, "steps": steps})

    def _follow(self, config: Any, params: Params) -> None:
        """What a stage has trained is what the next ones start from."""
        if config.towers.text.source == "tokens":
            self.encoder = encoder_lib.trained_text(config, params), self.encoder[1]
        self.last = {**(self.last or {}), **{k: v for k, v in params.items() if k not in ("text", "lora")}}

    def _keep(self, config: Any, folder: epath.Path, params: Params, step: int) -> None:
        """Catalogue vectors of the best step, or a stage's encoder as a Hugging Face folder."""
        if config.batch.kind == "texts":
            if jax.process_index() == 0:
                spec = model_lib.towers_of(config, self.prepared, self.encoder[1]).text
                tokenizer = vocabulary.tokenizer_of(config, self.prepared)
                save_hf(encoder_lib.trained_text(config, params), spec, folder / "encoder", tokenizer=tokenizer)
                self.clock.say(f"  the encoder as a Hugging Face folder: {folder / 'encoder'}")
            return
        if config.batch.kind in ("impressions", "pairs") or self.model is None or self.model.validated is None:
            return  # trained before: its vectors are kept already, or are made when they are asked for
        model_lib.keep_item_vectors(folder, step, self.model.item_vectors(params, step=step))

    def _task(self, config: Any, name: str, folder: epath.Path, before: str | None) -> loop.Task:
        """A stage, ready to be trained."""
        title, prepared, clock = name or "model", self.prepared, self.clock
        made = objectives.make_objectives(config.objectives.to_dict(), labels=self._labels(config))
        if config.batch.kind == "texts":
            return self._text_task(config, name, folder)
        if config.batch.kind == "pairs":
            return self._pair_task(config, name, folder)
        row = config.batch.row_tokens
        encoding = 0.0
        if config.towers.item.text:
            encoding = plan.encoding_seconds(self.encoder[1], self.tokens, row_tokens=row, speed=self.speed)
            clock.part(f"{title}: text vectors, if they are not kept yet", encoding)
        table = any(o.table for o in made)
        self.model = model = model_lib.make_model(
            config,
            prepared,
            self.tokens,
            self.encoder,
            clock.say,
            coding=self.coding,
            user_coding=self.user_coding,
            candidates=table,
            shared=True,
        )
        taught: Any = (None, None)
        if any(o.teacher for o in made):
            taught = teacher.teacher_of(config, self.workdir, before, self.tokens, clock.say, meta=prepared.meta)
        inputs = stages.Inputs(
            prepared,
            self.tokens,
            model.spec,
            self.encoder[0],
            model.table,
            self.last,
            teacher=taught[0],
            teacher_arrays=taught[1],
            start=self.start if before is None else None,
            replay=self.replay,
            features=model.features,
            of_users=model.of_users,
        )
        batches = stages.make_batches(config, inputs, self.mesh)
        evaluate: loop.Evaluate = model.validate
        if config.batch.kind == "impressions":
            measured = labelled.Labelled(model.spec, prepared, model.features)

            def evaluate(params: Params, *, step: int) -> dict[str, float]:
                texts = model.table
                if texts is None and model.spec.item_text:
                    texts = encoder_lib.text_vectors(self.tokens, params["text"], model.spec.text, row)
                return measured.measure(params, texts, "valid")

        task = stages.make_task(config, name, folder, inputs, batches, self.mesh, evaluate, model.text_table)
        flops = plan.step_flops(task.spec, batches.spec, n_items=prepared.n_items)
        share = plan.TEXT_SHARE if model.spec.encode else plan.STEP_SHARE
        again = encoding * task.loop.total / task.loop.eval_every if model.spec.encode else 0
        self._announce(title, task, task.loop.total * flops / self.speed / share + again)
        return task

    def _text_task(self, config: Any, name: str, folder: epath.Path) -> loop.Task:
        """A stage that trains the encoder on texts alone."""
        texts = vocabulary.corpus_of(config, self.prepared)
        tokenizer = processes.first(lambda: vocabulary.tokenizer_of(config, self.prepared))
        tokens = processes.first(lambda: texts.tokens(tokenizer, config.data.text.max_tokens))
        train, kept = corpus.split(tokens, share=config.data.corpus.held_out, seed=config.seed)
        o = config.objectives
        masking = Masking(o.mlm.rate, whole_words=o.mlm.whole_words) if o.mlm.weight > 0 else None
        deletion = Deletion(o.denoise.rate) if o.denoise.weight > 0 else None
        corruption = Corruption(vocabulary.words_of(text.load_tokenizer(tokenizer)), masking, deletion)
        towers = model_lib.towers_of(config, self.prepared, self.encoder[1])
        inputs = stages.Inputs(
            self.prepared, self.tokens, towers, self.encoder[0], last=self.last, corpus=(tokens, train, kept), corruption=corruption
        )
        spec = stages.step_of(config, inputs)
        make = lambda: text_batches.held_out_batches(tokens, kept, stages.batch_spec(config), seed=config.seed, corruption=corruption)
        batches = stages.make_batches(config, inputs, self.mesh)
        task = stages.make_task(config, name, folder, inputs, batches, self.mesh, held_out.HeldOut(spec, stages.no_constants(), make))
        flops = plan.text_step_flops(task.spec, batches.spec)
        self._announce(name or "model", task, task.loop.total * flops / self.speed / plan.TEXT_SHARE)
        self.clock.say(f"  {len(train):,} texts to train on, {len(kept):,} held out, {int(tokens.lengths().sum()):,} tokens")
        return task

    def _pair_task(self, config: Any, name: str, folder: epath.Path) -> loop.Task:
        """A stage that trains a cross-encoder on pairs of histories and items."""
        towers = model_lib.towers_of(config, self.prepared, self.encoder[1])
        inputs = stages.Inputs(self.prepared, self.tokens, towers, self.encoder[0], last=self.last)
        batches = stages.make_batches(config, inputs, self.mesh)
        measured = cross.CrossEncoder(config, self.prepared, self.tokens, towers)
        task = stages.make_task(config, name, folder, inputs, batches, self.mesh, measured.validate)
        flops = plan.text_step_flops(task.spec, batches.spec)
        self._announce(name or "model", task, task.loop.total * flops / self.speed / plan.TEXT_SHARE)
        return task

    def _announce(self, title: str, task: loop.Task, expected: float) -> None:
        parameters = sum(int(np.size(x)) for x in jax.tree.leaves(task.params))
        self.clock.part(f"{title}: {task.loop.total} steps, {parameters:,} parameters, validation", expected)

    def report(self) -> None:
        """Test figures, costs and examples; process 0's work alone."""
        processes.at("the end: process 0 tests alone")
        if jax.process_index() != 0:
            return
        config, clock, workdir = self.config, self.clock, self.workdir
        smaller = min(self.prepared.n_items, self.prepared.n_users)
        ease = "ease" in config.eval.baselines and smaller <= config.eval.ease_max_items
        kinds = [stage.batch.kind for _, stage, _ in self.planned]
        flops = sum(self._top_n_flops(stage) for _, stage, _ in self.planned if stage.batch.kind == "impressions")
        expected = plan.test_seconds(kinds, smaller, ease=ease, encoding=self.encoding, speed=self.speed, top_n=flops)
        clock.part("test: the model and its baselines, every user against the whole catalogue", expected)
        final.run(workdir, say=clock.say)
        if config.stages:
            final.costs(workdir, say=clock.say)
        last = self.planned[-1][1]
        if self.difference is not None and not stages.untrained(self.config):
            self._compare(self.difference)
        if last.batch.kind == "histories":
            self._examples()
        clock.part("done")
        curves = [str((workdir / name if name else workdir) / "metrics.jsonl") for name in config.stages or ("",)]
        clock.say(f"  figures {workdir / 'eval' / 'test.json'}, curves {', '.join(curves)}")
        if last.batch.kind == "histories":
            clock.say(f'  recommend: python -m rec_jax.serve recommend --model={workdir} --history="TITLE" --k=10')

    def _top_n_flops(self, config: Any) -> float:
        """FLOP of a stage's top-n in the test, were each positive of another user or in another context."""
        towers = model_lib.towers_of(config, self.prepared, self.encoder[1], self.coding, self.user_coding)
        assert towers.task is not None  # a stage of impressions has one
        positives = int((self.prepared.impressions("test").labels[:, 0] == 1).sum())
        ranked = positives if config.eval.top_n < 0 else min(positives, config.eval.top_n)
        return plan.top_n_flops(towers.task, towers.dim, ranked * self.prepared.n_items)

    def _compare(self, difference: start_lib.Difference) -> None:
        """What the run has gained and lost against the towers that it went on from, as they were, on the new catalogue."""
        (_, config, _), (name, last, _) = self.planned[0], self.planned[-1]
        if "impressions" in (config.batch.kind, last.batch.kind) or last.batch.kind == "texts":
            self.clock.say("  what was gained and lost is told of rankings: the first and the last stage must be of histories")
            return
        assert self.start is not None
        say, silent = self.clock.say, lambda _: None
        encoder = encoder_lib.load_encoder(self.config, self.prepared)
        model = model_lib.make_model(config, self.prepared, self.tokens, encoder, say, coding=self.coding, user_coding=self.user_coding)
        table = model.table if config.towers.item.whiten else None
        fresh = two_tower.init(jax.random.key(config.seed), model.spec, text_params=encoder[0], table=table)
        params = two_tower.merged({**fresh, **carry.laid_out(self.start, fresh)}, model.spec)
        trained, eval_set = model_lib.load(self.workdir, name or None, say=silent), self.prepared.eval_set("test")
        before = model.rank(params, eval_set, name="test")
        after = trained.model.rank(trained.params, eval_set, name="test", items=trained.items)
        continual.compare(self.workdir, before, after, eval_set, difference, say=say)

    def _examples(self) -> None:
        if not self.config.eval.examples:
            return
        recommender = Recommender(model_lib.load(self.workdir, say=lambda _: None))
        for history in self.config.eval.examples:
            self.clock.say("\n" + as_text(history, recommender.recommend(history, k=10)))
        self.clock.say("")


if __name__ == "__main__":
    main_of(main)
