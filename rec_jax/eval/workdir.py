"""What a workdir keeps: its config, and the parameters of the best checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from rec_jax import config as config_lib
from rec_jax.checkpoint import Checkpoints
from rec_jax.types import Params, RecJaxError


def read_config(workdir: epath.PathLike, overrides: Sequence[tuple[str, str]] = ()) -> Any:
    """The config that a workdir keeps, with (dotted key, text) overrides laid over it.

    Raises:
      RecJaxError: no such workdir, an unknown key, a bad value.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise RecJaxError(
            f"{workdir} is no workdir: it has no config.json; train first: python -m rec_jax.train --config=... --workdir={workdir}"
        )
    config = config_lib.from_json(file.read_text())
    with config.unlocked():
        for key, text in overrides:
            config_lib.override(config, key, text)
    config_lib.check(config)
    return config


def best_params(folder: epath.PathLike) -> tuple[Params, int]:
    """Parameters of the best checkpoint of a stage folder, on the host, and its step.

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
        for name, (shape, dtype) in checkpoints.arrays(best).items():
            if name.startswith("params/"):
                node = like
                *parents, last = name.split("/")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return jax.device_get(checkpoints.restore(best, like, part=True)["params"]), best
    finally:
        checkpoints.close()
