"""The chain of stages on disk: which stage is done and from what, what may be run again, what each has cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from rec_jax import config as config_lib
from rec_jax.config_features import FEATURE_KEYS, USER_KEYS, has_features, has_user_features
from rec_jax.config_places import OFF
from rec_jax.types import RecJaxError

# Keys that another machine may set otherwise without making it another run: they change no result.
FREE_KEYS = (
    "mesh", "data.cache", "train.prefetch", "eval.users_per_block", "eval.examples", "eval.baselines", "eval.ease_max_items", "eval.fuse",
    "eval.ease_regularisation", "eval.ease_popularity_power", "eval.top_n",
)  # fmt: skip
# Keys at values at which a stage is what it was before there were these keys.
OFF_KEYS = {
    "towers.text.refresh": "", "towers.item.id_shrinkage": 0.0, "objectives.info_nce.mask_history": False, "optimizer.average": 0.0,
    "optimizer.muon": (), "data.event_features": (), "data.filter.unseen_items": False, "batch.event_weight": "",
    "towers.item.gates": False, "towers.item.text_dropout": 0.0,
    **{f"towers.user.{name}": off for name, off in OFF.items()},
}  # fmt: skip
FILE = "stage.json"


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


def fingerprint(config: Any, *inputs: str) -> str:
    """A stage's config and what says what it starts from (data, the stage before, ...) -> a text that only the same ones have."""
    kept = json.loads(config_lib.to_json(config))
    # What was trained before there was a key stays what it is: a key that is off does not count.
    absent: tuple[str, ...] = () if config.start.path else ("start",)
    absent += (() if has_features(config) else FEATURE_KEYS) + (() if has_user_features(config) else USER_KEYS)
    for key in (*FREE_KEYS, *absent, *(key for key, off in OFF_KEYS.items() if config_lib.get(config, key) == off)):
        group, _, name = key.rpartition(".")
        (config_lib.get(kept, group) if group else kept).pop(name)
    return hashlib.sha256(json.dumps([kept, *inputs], sort_keys=True).encode()).hexdigest()[:16]


def check_config(config: Any, workdir: epath.Path) -> None:
    """Checks the `config.json` of a run without stages, where there is one.

    Raises:
      RecJaxError: the workdir belongs to another config; names the keys that differ.
    """
    changed = _changed(config, workdir)
    if changed:
        raise RecJaxError(f"{workdir} was begun with another config ({'; '.join(changed[:5])}); use another --workdir")


def write_config(config: Any, folder: epath.Path) -> None:
    """Writes `config.json`, by process 0 alone."""
    _write(folder / "config.json", config_lib.to_json(config))


class Stages:
    """The stages of a workdir: which are done, and which may be run again.

    Args:
      workdir: of the run.
      names: of all stages, in order.
      chosen: of those that may be run, also again; None = all, but none again.

    Raises:
      RecJaxError: a chosen name that is no stage.
    """

    def __init__(self, workdir: epath.Path, names: Sequence[str], chosen: Sequence[str] | None):
        unknown = [name for name in chosen or () if name not in names]
        if unknown:
            raise RecJaxError(f"--stages={','.join(chosen or ())}: no stage {unknown[0]!r}; the config has {', '.join(names) or 'none'}")
        self._workdir, self._names, self._chosen = workdir, tuple(names), None if chosen is None else set(chosen)

    def check(self, planned: Sequence[tuple[str, Any, str]]) -> None:
        """Finds out whether all stages, each (name, config, fingerprint), may be run as they are asked for. Nothing is written.

        A stage whose config or inputs have changed may be begun anew only if it was chosen, and with it all that started from it.

        Raises:
          RecJaxError: a stage was made otherwise and was not chosen, or is not done and others were chosen.
        """
        again: list[str] = []
        for n, (name, config, mark) in enumerate(planned):
            kept, chosen = self._read(name), self._chosen is not None and name in self._chosen
            if kept is None and self._chosen is not None and not chosen:
                raise RecJaxError(f"stage {name!r} is not done in {self._workdir}: run it first, or add it to --stages")
            if kept is None or kept["fingerprint"] == mark:
                continue
            if not chosen:
                changed = _changed(config, self._workdir / name) or [f"it started from another {' and '.join(again) or 'input'}"]
                rest = ",".join([*again, *self._names[n:]])
                raise RecJaxError(
                    f"{self._workdir / name} was made otherwise ({'; '.join(changed[:5])}); to make it again: --stages={rest}, "
                    "or use another --workdir"
                )
            again.append(name)

    def begin(self, name: str, config: Any, mark: str) -> bool:
        """Whether a stage is to be trained, or gone on with; False: it is done, from the same config and inputs. `mark`: its fingerprint.

        What a stage has left that was made otherwise is taken away first: `check` has seen to it that this was asked for.
        """
        kept, folder = self._read(name), self._workdir / name
        if kept is not None and kept["fingerprint"] != mark:
            if jax.process_index() == 0:
                print(f"{name}: begun anew ({'; '.join(_changed(config, folder)[:3]) or 'its inputs have changed'})", flush=True)
                folder.rmtree()
            kept = None
        if kept is None:
            write_config(config, folder)
            _write(folder / FILE, json.dumps({"fingerprint": mark, "done": False}) + "\n")
            return True
        return not kept["done"]

    def done(self, name: str, mark: str, cost: dict[str, float]) -> None:
        """Notes that a stage is done, and what it cost."""
        _write(self._workdir / name / FILE, json.dumps({"fingerprint": mark, "done": True, "cost": cost}, indent=1) + "\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self._workdir / name / FILE
        return json.loads(file.read_text()) if file.exists() else None


def _changed(config: Any, folder: epath.Path) -> list[str]:
    file = folder / "config.json"
    return differences(config_lib.from_json(file.read_text()), config) if file.exists() else []


def _write(file: epath.Path, text: str) -> None:
    """Writes a file whole or not at all, by process 0 alone."""
    if jax.process_index() != 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / (file.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)
