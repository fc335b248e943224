"""What a run says: metrics.jsonl, TensorBoard events, and progress for a person."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import tensorboardX
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rec_jax.types import RecJaxError


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 05 s" or "2 h 07 min"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


class Clock:
    """Says how long each part of a run took, from its start; silent in all processes but the first."""

    def __init__(self, active: bool):
        self._began, self._active = time.perf_counter(), active

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._active:
            print(message, flush=True)

    def part(self, title: str, expected: float | None = None) -> None:
        """The title of a part that begins; `expected`: seconds that it may take."""
        about = f" (about {duration(expected)})" if expected and expected >= 1 else ""
        self.say(f"[{duration(time.perf_counter() - self._began):>12}] {title}{about}")


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of one stage folder.

    A line is one JSON object with `step`, `stage` and names such as `train/loss`. Going on from a step drops the lines after it, so
    that a run that was killed leaves the same file as one that was not. Object stores cannot append: there the file is written anew
    at each flush, and TensorBoard events are left out, which is said once.

    Args:
      folder: where the files are.
      stage: written into each line; "" for a run without stages.
      step: the step that the run goes on from; None starts a new file.
      active: False in all processes but the first: nothing is written.
    """

    def __init__(self, folder: epath.PathLike, *, stage: str, step: int | None, active: bool = True):
        self._path = epath.Path(folder) / "metrics.jsonl"
        self._stage, self._active = stage, active
        self._remote = "://" in str(folder)
        self._lines: list[str] = []
        self._board = None
        if not active:
            return
        if step is not None and self._path.exists():
            self._lines = [line for line in self._path.read_text().splitlines() if _step_of(line, self._path) <= step]
        self._rewrite()
        if not self._remote:
            self._board = tensorboardX.SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=None if step is None else step + 1)

    def _rewrite(self) -> None:
        temporary = self._path.parent / "metrics.jsonl.tmp"
        temporary.write_text("".join(line + "\n" for line in self._lines))
        temporary.replace(self._path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, and one TensorBoard point a metric."""
        if not self._active:
            return
        bad = [k for k, v in metrics.items() if not math.isfinite(v)]
        if bad:
            raise RecJaxError(f"step {step}: {bad[0]} is {metrics[bad[0]]}, not a number that can be reported")
        line = json.dumps({"step": step, "stage": self._stage, **metrics})
        self._lines.append(line)
        if self._remote:
            self._rewrite()
        else:
            with self._path.open("a") as f:
                f.write(line + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._board is not None:
            self._board.close()


def _step_of(line: str, path: epath.Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        # A kill can cut the last line short; it is after any checkpoint, so leaving it out loses nothing.
        print(f"{path}: left out a broken line: {line[:80]!r}", file=sys.stderr)
        return sys.maxsize


class Display:
    """Progress: a bar on a terminal, plain lines elsewhere.

    Args:
      title: what is trained.
      start, total: steps.
      active: False in all processes but the first.
    """

    def __init__(self, title: str, *, start: int, total: int, active: bool = True):
        self._active, self._total, self._start = active, total, start
        self._began: float | None = None
        self._began_step = start
        self._paused = 0.0
        self._bar: Progress | None = None
        console = Console()
        if active and console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=console)
            self._task = self._bar.add_task(title, total=total, completed=start, text="compiling ...")
            self._bar.start()
        elif active and total > start:
            print(f"{title}: steps {start} to {total} (the first one compiles)", flush=True)

    def until(self, total: int) -> None:
        """The run ends at another step than was planned."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def tick(self, step: int) -> None:
        """A step is done; the clock starts after the first, which compiles."""
        if self._began is None:
            self._began, self._began_step = time.perf_counter(), step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def rate(self, step: int) -> float:
        """Steps a second since the first one, without pauses; 0 at the beginning."""
        if self._began is None or step <= self._began_step:
            return 0.0
        return (step - self._began_step) / max(time.perf_counter() - self._began - self._paused, 1e-9)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of training metrics: loss, speed, time left."""
        if not self._active:
            return
        rate = self.rate(step)
        speed = "".join(
            f"  {metrics[f'train/{n}'] * rate:,.0f} {n}/s" for n in ("examples", "targets", "tokens") if metrics.get(f"train/{n}")
        )
        left = f"  left {duration((self._total - step) / rate)}" if rate else ""
        text = f"step {step}/{self._total}  loss {metrics['train/loss']:.4f}{speed if rate else ''}{left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            print("  " + text, flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def pause(self, seconds: float) -> None:
        """Time that was not training (evaluation): it counts in no rate."""
        if self._began is not None:
            self._paused += seconds

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


def check_finite(step: int, metrics: Mapping[str, Any], examples: Any, reproduce: str) -> None:
    """Raises RecJaxError if the loss or the gradient is not finite, with the step, the batch's users and how to get there again."""
    for name in ("loss", "grad_norm"):
        value = float(metrics[name])
        if not math.isfinite(value):
            users = sorted({int(u) for u in examples.reshape(-1) if u >= 0})
            shown = ", ".join(map(str, users[:20])) + (" ..." if len(users) > 20 else "")
            raise RecJaxError(
                f"step {step}: {name} is {value}. Users of the batch (rows of users.parquet): {shown}. Nothing of this step was saved. "
                f"{reproduce}. Try a lower optimizer.learning_rate, optimizer.clip, or a higher temperature."
            )
