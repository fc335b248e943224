"""The training loop of one stage: resume, steps, evaluation on a cadence, best and latest checkpoint, a clean stop."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rec_jax import mesh as mesh_lib
from rec_jax import processes
from rec_jax.checkpoint import Checkpoints
from rec_jax.data.pipeline import Batches, prefetched
from rec_jax.train import optimizer as optimizer_lib
from rec_jax.train import refreshed
from rec_jax.train import state as state_lib
from rec_jax.train.forwards import Constants, StepSpec
from rec_jax.train.log import Display, MetricsLog, check_finite
from rec_jax.train.step import make_train_step
from rec_jax.types import RecJaxError


class Evaluate(Protocol):
    """Parameters of a step -> metrics of the validation split; step 0 is the start of a stage, which has not moved them yet."""

    def __call__(self, params: Any, *, step: int) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """Cadences in steps, and what decides the best checkpoint."""

    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    monitor: str
    patience: int
    prefetch: int
    seed: int
    goal: str = "max"  # what better means of the monitored metric: "max" or "min"
    refresh_every: int = 0  # steps after which the catalogue's text vectors are made anew; 0 = never


@dataclasses.dataclass
class Progress:
    """What the loop remembers across a resume, beside state and iterator: the best evaluation, and training metrics not yet reported."""

    best: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    stopped: bool = False
    cooldown: list[int] | None = None  # steps between which the learning rate goes down; schedule "plateau"
    since_report: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def end(self, total: int) -> int:
        """The last step of a run of at most `total`."""
        return total if self.cooldown is None else self.cooldown[1]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that a stage trains with.

    Attributes:
      name: of the stage, "" if there is only one.
      folder: where checkpoints and metrics go.
      spec, loop, optimizer: specs with durations in steps.
      params: initial parameters (host or device arrays).
      batches: the data of this process.
      constants: host arrays.
      rules: parameter name -> PartitionSpec.
      evaluate: params, whole on one device of this process, -> metrics of the validation split; process 0's count.
      continues: the parameters were trained by a stage before. Then they are validated before the first step too, so that a stage that
        makes nothing better leaves them as they were.
      encode: params, as for `evaluate`, -> text vectors of the catalogue [N, D_text], where they are made anew.
    """

    name: str
    folder: epath.Path
    spec: StepSpec
    loop: LoopSpec
    optimizer: optimizer_lib.OptimizerSpec
    params: Any
    batches: Batches
    constants: Constants
    rules: mesh_lib.Rules
    evaluate: Evaluate
    continues: bool = False
    encode: Callable[[Any], np.ndarray] | None = None


def create_state(task: Task, params: Any, optimizer: Any) -> state_lib.TrainState:
    """Step 0 of a task, traceable."""
    parts = {"plateau": task.optimizer.schedule == "plateau", "average": task.optimizer.average > 0, "momentum": task.spec.momentum > 0}
    return state_lib.create(params, optimizer, seed=task.loop.seed, queue=task.spec.queue, **parts)


def state_shardings(task: Task, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Shapes of the state and their shardings.

    Parameters go by the rules. Whatever repeats a parameter, by the end of its name and by its shape (moments, accumulated gradients, the
    running mean, momentum parameters), lies as the parameter does, and what has a number a row of it as its rows; the queue lies over the
    batch axes; the rest is whole on every device.

    Raises:
      RecJaxError: a parameter that no rule matches, or one that a rule does not divide.
    """
    tx = optimizer_lib.make_optimizer(task.optimizer)
    shapes = jax.eval_shape(lambda p: create_state(task, p, tx), task.params)
    params = mesh_lib.shardings(shapes.params, task.rules, mesh)
    shaped = jax.tree_util.tree_leaves_with_path(shapes.params)
    placed = {mesh_lib.path_name(path): (x.shape, s) for (path, x), s in zip(shaped, jax.tree.leaves(params), strict=True)}

    def place(path: Any, leaf: Any) -> Any:
        field, _, name = mesh_lib.path_name(path).partition("/")
        if field == "queue" and len(leaf.shape) > 1:  # [G, slots, ...]
            return mesh_lib.batch_sharding(mesh)
        while name:
            shape, sharding = placed.get(name, (None, None))
            if shape == leaf.shape:
                return sharding
            if shape is not None and shape[:1] == leaf.shape:
                return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
            name = name.partition("/")[2]
        return mesh_lib.replicated(mesh)

    return shapes, jax.tree_util.tree_map_with_path(place, shapes)


def as_tree(state: state_lib.TrainState) -> dict[str, Any]:
    """The state as the dict that checkpoints hold; parts that no objective wants are left out."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if getattr(state, f.name) is not None}


def train(task: Task, mesh: jax.sharding.Mesh) -> Progress:
    """Trains to the end, or goes on from the latest checkpoint of the folder.

    Returns:
      Progress: with the best step; its checkpoint is on disk.

    Raises:
      RecJaxError: a loss that is not finite.
      Interrupted: SIGINT or SIGTERM; the state was saved.
    """
    optimizer_lib.check_patterns(task.params, task.optimizer)
    mesh_lib.check_shards(task.batches.spec.shards, mesh)
    tx = optimizer_lib.make_optimizer(task.optimizer)
    shapes, shardings = state_shardings(task, mesh)
    checkpoints = Checkpoints(task.folder / "checkpoints")
    try:
        progress, start = Progress(), checkpoints.latest_step()
        if start is not None:
            progress = Progress(**checkpoints.place(start)["progress"])
            if start >= progress.end(task.loop.total) or progress.stopped:
                if jax.process_index() == 0:
                    print(f"{task.name or 'training'}: done at step {start}, best {progress.best} at step {progress.best_step}", flush=True)
                return progress
        iterator = prefetched(task.batches, task.loop.prefetch)
        if start is not None:
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
            state = state_lib.TrainState(**checkpoints.restore(start, as_tree(like)))
            iterator.set_state(checkpoints.place(start)["iterator"])  # type: ignore[attr-defined]
        else:
            params = mesh_lib.put(task.params, shardings.params)
            # A donated buffer must belong to the state alone, so the initial parameters are copied, not aliased.
            create = jax.jit(lambda p: create_state(task, jax.tree.map(jnp.copy, p), tx), out_shardings=shardings)
            state = create(params)
        step_fn = make_train_step(task.spec, tx, mesh, shardings, horizon=task.optimizer.horizon)
        run = _Run(task, mesh, checkpoints, iterator, step_fn, state, progress, start)
        return run.to_the_end()
    finally:
        checkpoints.close()
        processes.at("after training")


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, SIGINT and SIGTERM only set a flag, which is asked for between steps."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


class _Run:
    """The state of a running loop."""

    def __init__(
        self,
        task: Task,
        mesh: Any,
        checkpoints: Checkpoints,
        iterator: Any,
        step_fn: Any,
        state: Any,
        progress: Progress,
        start: int | None,
    ):
        self.task, self.mesh, self.checkpoints, self.iterator = task, mesh, checkpoints, iterator
        self.step_fn, self.state, self.progress, self.resumed, self.start = step_fn, state, progress, start is not None, start or 0
        first = jax.process_index() == 0
        self.log = MetricsLog(task.folder, stage=task.name, step=start, active=first)
        self.display = Display(task.name or "training", start=self.start, total=progress.end(task.loop.total), active=first)
        self.learning_rate = optimizer_lib.schedule(task.optimizer)
        self.plateau = task.optimizer.schedule == "plateau"
        self.pending: tuple[int, Any, Any, Any] | None = None
        self.several = jax.process_count() > 1
        self.stop = False  # asked of any process, and known to all
        self.saved = start  # None: nothing is on disk

    def to_the_end(self) -> Progress:
        loop = self.task.loop
        constants = mesh_lib.put(self._constants_at(self.start), mesh_lib.replicated(self.mesh))
        if self.resumed:
            self.display.say(f"going on from step {self.start} of {self.task.folder}")
        step = self.start
        try:
            if self.task.continues and not self.resumed:
                self._evaluate(0)
            with _stop_signals() as stop_asked:
                while not self._finished(step):
                    if loop.refresh_every and step and step % loop.refresh_every == 0:
                        constants = self._refreshed(step, constants)
                    processes.at(f"step {step + 1}, making its batch")
                    batch = next(self.iterator)
                    examples = batch.examples
                    arrays = mesh_lib.to_global(batch, self.mesh)
                    processes.at(f"step {step + 1}")
                    if self.several and step == self.start:
                        self._compile(arrays, constants)
                    asked = processes.any_of(stop_asked()) if self.several else stop_asked()
                    with jax.transfer_guard("disallow"), jax.set_mesh(self.mesh):
                        self.state, metrics = self.step_fn(self.state, arrays, constants)
                    self._collect()
                    step += 1
                    self.pending = (step, metrics, examples, asked)
                    if step % loop.log_every == 0 or self._at_end(step):
                        self._report(step)
                    if self.plateau and step == self._latest():
                        self._cool_down(step)  # before anything is saved of this step: a resume must know it
                    if self._evaluates(step):
                        self._evaluate(step)
                    if step % loop.checkpoint_every == 0 or self._finished(step):
                        self._save(step)
                    self.display.tick(step)
                    if not self.several and stop_asked():
                        self.stop = True
                    if self.stop and not self._finished(step):
                        self._collect()
                        self._save(step)
                        self.checkpoints.wait()
                        self.display.close()
                        end = self.progress.end(loop.total)
                        raise Interrupted(f"stopped at step {step} of {end}; the state is saved: the same command goes on from here")
            self.checkpoints.wait()
        finally:
            self.display.close()
            self.log.close()
            self.iterator.close()
        return self.progress

    def _constants_at(self, step: int) -> Constants:
        """The constants as the step after `step` has them: with the text vectors of the last time before it that they were made."""
        every = self.task.loop.refresh_every
        last = step // every * every if every else 0
        if last in (0, step):  # those of the start, or made anew before the next step
            return self.task.constants
        return dataclasses.replace(self.task.constants, table=refreshed.read(self.task.folder, last))

    def _refreshed(self, step: int, constants: Constants) -> Constants:
        """The constants with text vectors by the parameters of this step, which are kept on disk for a resume."""
        self._collect()
        processes.at(f"step {step}, text vectors")
        assert self.task.encode is not None
        table = self.task.encode(mesh_lib.on_one_device(self.state.params))
        if jax.process_index() == 0:
            every = self.task.loop.refresh_every
            refreshed.keep(self.task.folder, step, table, first=(self.saved or 0) // every * every)
        return dataclasses.replace(constants, table=mesh_lib.put(table, mesh_lib.replicated(self.mesh)))

    def _compile(self, arrays: Any, constants: Any) -> None:
        """Compiles the step, then waits until all have: the CPU's collectives break when one process comes much later than another."""
        with jax.set_mesh(self.mesh):
            self.step_fn = self.step_fn.lower(self.state, arrays, constants).compile()
        processes.barrier("compiled")

    def _finished(self, step: int) -> bool:
        return self._at_end(step) or self.progress.stopped

    def _at_end(self, step: int) -> bool:
        return step >= self.progress.end(self.task.loop.total)

    def _evaluates(self, step: int) -> bool:
        """Every eval_every steps and at the end; just before the end (a twentieth of that interval or less) no more."""
        every, left = self.task.loop.eval_every, self.progress.end(self.task.loop.total) - step
        return left <= 0 or (step % every == 0 and left > every // 20)

    def _latest(self) -> int:
        """The last step at which a cooldown can begin and still end within the duration."""
        return max(1, int(self.task.loop.total / (1 + self.task.optimizer.cooldown)))

    def _cool_down(self, step: int) -> None:
        """From here on the learning rate goes down; at its end the run is over."""
        if self.progress.cooldown is not None:
            return
        end = min(self.task.loop.total, step + max(1, round(step * self.task.optimizer.cooldown)))
        self.progress.cooldown = [step, end]
        self.state.cooldown = mesh_lib.put(np.asarray(self.progress.cooldown, np.int32), mesh_lib.replicated(self.mesh))
        self.display.until(end)
        self.display.say(f"  step {step}: the learning rate goes down from here to step {end}, the last")

    def _collect(self) -> None:
        """Fetches the metrics of the step before, which is done by now, and checks them."""
        if self.pending is None:
            return
        step, metrics, examples, asked = self.pending
        self.pending = None
        self.stop |= bool(asked)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        again = f"To see it again: the same command goes on from step {self.saved}" if self.saved else "To see it again: the same command"
        check_finite(step, values, examples, again)
        for name, value in values.items():
            self.progress.since_report.setdefault(f"train/{name}", []).append(value)

    def _report(self, step: int) -> None:
        self._collect()
        means = {k: float(np.mean(v)) for k, v in self.progress.since_report.items()}
        self.progress.since_report = {}
        rate = float(self.learning_rate(max(0, step - 1) // self.task.optimizer.accumulate))
        if self.progress.cooldown is not None:
            rate *= float(state_lib.cooled(step - 1, self.progress.cooldown))
        means["train/learning_rate"] = rate
        self.log.write(step, means)
        self.display.train(step, means)

    def _evaluate(self, step: int) -> None:
        self._collect()
        began, loop, progress = time.perf_counter(), self.task.loop, self.progress
        processes.at(f"step {step}, validation")
        params = self.state.params if self.state.average is None else self.state.average
        measured = self.task.evaluate(mesh_lib.on_one_device(params), step=step)
        metrics = processes.gather(measured)[0]  # all decide by the same figures, to the last bit
        if loop.monitor not in metrics:
            raise RecJaxError(f"config.train.monitor={loop.monitor!r} is not measured; there are {', '.join(sorted(metrics))}")
        value = metrics[loop.monitor]
        better = progress.best is None or (value < progress.best if loop.goal == "min" else value > progress.best)
        if better:
            progress.best, progress.best_step, progress.bad_evals = value, step, 0
        else:
            progress.bad_evals += 1
            out_of_patience = bool(loop.patience) and progress.bad_evals >= loop.patience
            progress.stopped = out_of_patience and not self.plateau
        self.log.write(step, metrics)
        seconds = time.perf_counter() - began
        self.display.pause(seconds)
        note = "best so far" if better else f"best {progress.best:.4f} at step {progress.best_step}"
        end = f"; stopping: {loop.patience} evaluations without improvement" if progress.stopped else ""
        self.display.say(f"  step {step}: {loop.monitor} {value:.4f} ({note}; {seconds:.1f} s){end}")
        if better:
            self._save(step)
        elif out_of_patience and self.plateau and not self._at_end(step):
            self._cool_down(step)

    def _save(self, step: int) -> None:
        if self.saved == step:
            return
        self._collect()
        processes.at(f"step {step}, saving")
        places = processes.gather(self.iterator.get_state())  # each process has the shards that it makes
        iterator = {"shards": {name: shard for place in places for name, shard in place["shards"].items()}}
        place = {"iterator": iterator, "progress": dataclasses.asdict(self.progress)}
        self.checkpoints.save(step, as_tree(self.state), place, best=self.progress.best_step)
        self.saved = step
