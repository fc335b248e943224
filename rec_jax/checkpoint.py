"""Checkpoints of state and place: asynchronous, the latest and the best kept, whole or not there at all.

`place` is JSON: where the data iterator stands, and what the loop remembers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from rec_jax.types import RecJaxError


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `latest` steps, and `best`, which the caller names."""

    def __init__(self, latest: int):
        self.latest, self.best = latest, None  # type: int, int | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = sorted(c.step for c in checkpoints)[-self.latest :]
        return [c.step in newest or c.step == self.best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one folder.

    Args:
      folder: made if it does not exist, unless read_only.
      read_only: neither writes nor deletes; the folder must exist. Each process reads for itself: the others need not.
      latest: how many of the newest are kept.

    Raises:
      RecJaxError: read_only and no such folder.
    """

    def __init__(self, folder: epath.PathLike, *, read_only: bool = False, latest: int = 1):
        self.folder = epath.Path(folder).resolve() if "://" not in str(folder) else epath.Path(folder)
        if read_only and not self.folder.exists():
            raise RecJaxError(f"no checkpoints at {self.folder}: train first, or give another --workdir")
        self._policy = _LatestAndBest(latest)
        processes = ocp.options.MultiprocessingOptions()
        if read_only:
            here = jax.process_index()
            processes = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"{here}")
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=processes),
                "place": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=True,
                save_root_metadata=False,
                multiprocessing_options=processes,
                create=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints that are there, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self.steps()[-1] if self.steps() else None

    def save(self, step: int, state: Any, place: dict[str, Any], best: int | None) -> None:
        """Starts writing; returns when the arrays are copied. `best` is the step that stays beside the newest."""
        self._policy.best = best
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), place=ocp.args.JsonSave(place)), force=True)

    def place(self, step: int) -> dict[str, Any]:
        """The place saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(place=ocp.args.JsonRestore()))["place"]

    def restore(self, step: int, like: Any, *, part: bool = False) -> Any:
        """The state of a step in the shapes, types and shardings of `like` (a tree of ShapeDtypeStructs with shardings).

        Args:
          step: one of `steps()`.
          like: the whole tree; with `part`, some of its branches, and only those are read.

        Raises:
          RecJaxError: no such step, or it holds other names or shapes.
        """
        if step not in self.steps():
            raise RecJaxError(f"no checkpoint of step {step} at {self.folder}; there are {self.steps()}")
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        wanted = _shapes(like)
        _check_same({k: v for k, v in saved.items() if k in wanted} if part else saved, wanted, f"{self.folder}/{step}")
        how = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), like)
        args = ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=part)
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def arrays(self, step: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape, dtype) of the arrays of a step's state."""
        flat = _leaves(self._manager.item_metadata(step)["state"].tree)
        return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in flat.items()}

    def wait(self) -> None:
        """Until everything is written; an error of the writer is raised here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes."""
        self._manager.wait_until_finished()
        self._manager.close()


def _leaves(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _leaves(tree).items()}


def _check_same(saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], place: str) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise RecJaxError(
                f"checkpoint {place}: {name} is {saved.get(name, 'absent')} in it, but the config makes it {wanted.get(name, 'absent')}; "
                "the config's model has changed: use another --workdir"
            )


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON with sorted keys, whole or not at all."""
    path = epath.Path(path)
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    temporary.replace(path)
