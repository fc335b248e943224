"""The teacher of a distillation: a stage of a workdir, or a text encoder alone."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from rec_jax import config as config_lib
from rec_jax import towers
from rec_jax.data import event_features, packing
from rec_jax.eval import workdir as workdir_lib
from rec_jax.eval.encoder import Say, encoder_of, text_table
from rec_jax.eval.model import load
from rec_jax.eval.workdir import read_config
from rec_jax.towers import two_tower
from rec_jax.types import Params, Ragged, RecJaxError


def teacher_of(
    config: Any, workdir: epath.Path, before: str | None, tokens: Ragged, say: Say, *, meta: Mapping[str, Any]
) -> tuple[two_tower.TwoTowerSpec, dict[str, Any]]:
    """The teacher that `config.teacher` names -> (its towers, {"params", "table" [N, D_text], "features"?, "of_users"?}).

    Args:
      config: of the student's stage.
      workdir: of the run.
      before: the stage before the student's, its teacher where the config names none.
      tokens: of each catalogue item.
      say: told about text vectors.
      meta: what meta.json says of the student's data, whose batches the teacher sees.

    Raises:
      RecJaxError: no teacher, or one of another catalogue, or one that knows features of events by other numbers.
    """
    path, params, read = config.teacher.path, dict[str, Any](), dict[str, Any]()
    if path and _is_encoder(path):
        text_params, bert = towers.load_hf(path)
        spec = towers_of_encoder(config, bert)
    else:
        stage = config.teacher.stage or (None if path else before)
        spec, params, text_params, read = _trained(epath.Path(path or workdir), stage, path, tokens, say, meta)
    spec = dataclasses.replace(two_tower.with_encoder(spec, config.teacher.source == "online"), task=None)
    table = text_table(config, tokens, text_params, spec.text, say, shared=True) if spec.item_text else None
    return spec, {"params": {**params, "text": text_params} if spec.encode else params, "table": table, **read}


def _trained(
    workdir: epath.Path, stage: str | None, path: str, tokens: Ragged, say: Say, meta: Mapping[str, Any]
) -> tuple[two_tower.TwoTowerSpec, dict[str, Any], Params, dict[str, Any]]:
    """A stage of a workdir -> its towers, their parameters without encoder and task head, the encoder's, and the features they read."""
    if not path and stage is None:
        raise RecJaxError("a teacher is asked for, but no stage comes before: set config.teacher.path to a workdir or a model's folder")
    trained, whole = load(workdir, stage, say=say), read_config(workdir)
    n_items = trained.model.prepared.n_items
    if n_items != len(tokens):
        raise RecJaxError(f"the teacher {workdir} knows {n_items:,} items, the student {len(tokens):,}: both must learn from the same data")
    for feature, _ in trained.model.spec.history.events if trained.model.spec.history is not None else ():
        of_teacher, of_student = (event_features.categories_of(m).get(feature) for m in (trained.model.prepared.meta, meta))
        if of_student != of_teacher:
            raise RecJaxError(
                f"the teacher {workdir} and the student number the categories of {feature!r} (config.data.event_features) otherwise: both "
                "must learn from the same data, with the same split"
            )
    text_params = trained.params.get("text")
    if text_params is None:
        name = stage or (whole.stages[-1] if whole.stages else None)
        text_params = encoder_of(whole, workdir, name, trained.model.prepared)[0]
    ranked = two_tower.as_ranked(trained.params, trained.model.spec, trained.model.prepared.item_counts())
    others = {k: v for k, v in ranked.items() if k not in ("task", "text")}
    return trained.model.spec, others, text_params, {"features": trained.model.features, "of_users": trained.model.of_users}


def mark_of(config: Any) -> str:
    """A text that says which weights the teacher of `config.teacher.path` has: another training there gives another one."""
    path = config.teacher.path
    if _is_encoder(path):
        return hashlib.sha256((config_lib.model_folder(path) / "model.safetensors").read_bytes()).hexdigest()
    whole = read_config(path)
    stage = config.teacher.stage or (whole.stages[-1] if whole.stages else "")
    return workdir_lib.mark_of(epath.Path(path) / stage if stage else epath.Path(path))


def towers_of_encoder(config: Any, bert: towers.BertSpec) -> two_tower.TwoTowerSpec:
    """Towers that are no more than an encoder: they make text vectors alone."""
    t, k = config.towers, packing.texts_per_row(config.batch.row_tokens)
    none = dict.fromkeys(t.user.inputs, 1)  # the history tower, and its tables, go
    made = two_tower.make_spec(t, bert, texts_per_row=k, n_items=0, events=none)
    return dataclasses.replace(made, user="none", n_ids=0, item_text=True, history=None)


def _is_encoder(path: str) -> bool:
    """Whether a path is a model's folder, and no workdir."""
    folder = epath.Path(path)
    if path.startswith("package:") or not folder.exists():
        return True
    return not (folder / "config.json").exists() or "model_type" in (folder / "config.json").read_text()
