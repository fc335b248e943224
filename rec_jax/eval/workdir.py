"""What a workdir keeps: its config, and the parameters of the best checkpoints."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax.checkpoint import Checkpoints
from rec_jax.config import read_config
from rec_jax.types import Params, RecJaxError

__all__ = ["best_params", "mark_of", "read_config"]


def best_params(folder: epath.PathLike) -> tuple[Params, int]:
    """Parameters of the best checkpoint of a stage folder, on the host, and its step; their running mean where the state has one.

    Raises:
      RecJaxError: no checkpoint there.
    """
    checkpoints = Checkpoints(epath.Path(folder) / "checkpoints", read_only=True)
    try:
        latest = checkpoints.latest_step()
        if latest is None:
            raise RecJaxError(f"no whole checkpoint at {checkpoints.folder}")
        best = checkpoints.place(latest)["progress"]["best_step"]
        best = latest if best is None else best
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like: dict[str, Any] = {}
        arrays = checkpoints.arrays(best)
        part = "average" if any(name.startswith("average/") for name in arrays) else "params"
        for name, (shape, dtype) in arrays.items():
            if name.startswith(f"{part}/"):
                node = like
                *parents, last = name.split("/")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return jax.device_get(checkpoints.restore(best, like, part=True)[part]), best
    finally:
        checkpoints.close()


def mark_of(folder: epath.PathLike) -> str:
    """A text that says which weights a stage folder has: another training there gives another one.

    Raises:
      RecJaxError: no checkpoint there.
    """
    params, step = best_params(folder)
    digest = hashlib.sha256(str(step).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
