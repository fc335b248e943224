"""The text encoder of a stage, and text vectors by it: pretrained, from scratch, as an earlier stage left it, or a student of that."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax import processes, towers
from rec_jax.data import packing, text, vocabulary
from rec_jax.data.prepare import Prepared
from rec_jax.data.start import kept, start_of
from rec_jax.eval.workdir import best_params, mark_of
from rec_jax.towers import lora, student
from rec_jax.towers.bert import init as init_text
from rec_jax.towers.packed_texts import encode_blocks
from rec_jax.types import Params, Ragged, RecJaxError

BLOCK_TOKENS = 4096  # tokens of one forward pass over packed texts
_said: set[str] = set()  # files of text vectors that a person was told of
Say = Callable[[str], None]
Encoder = tuple[Params, towers.BertSpec]


def load_encoder(config: Any, prepared: Prepared) -> Encoder:
    """The encoder that the config names: pretrained, of random weights for the words of its corpus, or as `config.start` has left it."""
    t = config.towers.text
    if config.start.path:
        start = start_of(config)
        data = start.prepared if t.path == "scratch" else prepared  # only words made of a corpus depend on the data
        encoder = encoder_of(start.whole, start.workdir, start.stage, data)
        if start.config.towers.text.source == "tokens":
            encoder = trained_text(start.config, best_params(start.folder)[0]), encoder[1]
        return encoder
    if t.path != "scratch":
        return towers.load_hf(t.path)
    words = text.load_tokenizer(vocabulary.tokenizer_of(config, prepared)).get_vocab_size()
    s = t.scratch
    spec = towers.BertSpec(vocab_size=words, width=s.width, layers=s.layers, heads=s.heads, mlp_width=4 * s.width)
    return init_text(jax.random.key(config.seed), spec), spec


def student_of(config: Any, encoder: Encoder, prepared: Prepared) -> Encoder:
    """The encoder as a stage's config makes it smaller (`config.towers.text.layers`, `width`, `static`), else as it is."""
    t, (params, spec) = config.towers.text, encoder
    if t.static:
        if t.layers > 0:
            raise RecJaxError(f"config.towers.text.static=True has no layers, but config.towers.text.layers={t.layers}: set it to 0")
        tokenizer = text.load_tokenizer(vocabulary.tokenizer_of(config, prepared))
        ends = [token for token in (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")) if token is not None]
        table = student.static_table(params, spec, before=ends[:1], after=ends[1:])
        return student.from_table(table, spec, width=t.width)
    if t.layers < 0 and not t.width:
        return encoder
    layers = spec.layers if t.layers < 0 else t.layers
    return student.shrink(params, spec, layers=layers, width=t.width, key=jax.random.key(config.seed))


def sizes_of_student(config: Any, encoder: Encoder) -> Encoder:
    """An encoder of the sizes that a stage's student has, for checks: its weights are made when the stage begins."""
    t, (params, spec) = config.towers.text, encoder
    if not config_lib.is_student(config):
        return encoder
    layers = 0 if t.static else spec.layers if t.layers < 0 else t.layers
    return student.shrink(params, spec, layers=layers, width=t.width, key=jax.random.key(0))


def encoder_of(whole: Any, workdir: epath.Path, name: str | None, prepared: Prepared) -> Encoder:
    """The encoder that a stage begins with, as the stages before it have left it and its own config makes it smaller.

    Raises:
      RecJaxError: the workdir went on from another one (`config.start`), which has been trained again since.
    """
    if whole.start.path:
        start = start_of(whole)
        if kept(workdir).get("start") != mark_of(start.folder):
            raise RecJaxError(
                f"{workdir} goes on from {start.folder}, which has been trained again since: bring back its checkpoints, or train "
                "this one again"
            )
    encoder = load_encoder(whole, prepared)
    if name is None:
        return student_of(whole, encoder, prepared)
    for stage in whole.stages[: whole.stages.index(name)]:
        config = config_lib.for_stage(whole, stage)
        encoder = student_of(config, encoder, prepared)
        if config.towers.text.source == "tokens":
            encoder = trained_text(config, best_params(workdir / stage)[0]), encoder[1]
    return student_of(config_lib.for_stage(whole, name), encoder, prepared)


def trained_text(config: Any, params: Params) -> Params:
    """A stage's parameters -> its encoder's, with its adapters, where it has any, in the kernels."""
    if "lora" not in params:
        return params["text"]
    whole = lora.merge({k: v for k, v in params.items() if k != "lora"}, params["lora"], alpha=config.towers.text.lora.alpha)
    return whole["text"]


def text_blocks(tokens: Ragged, row_tokens: int) -> Any:
    """The catalogue's texts in packed blocks of about BLOCK_TOKENS tokens."""
    return packing.pack_texts(tokens, rows=max(1, BLOCK_TOKENS // row_tokens), row_tokens=row_tokens)


def text_vectors(tokens: Ragged, text_params: Params, spec: towers.BertSpec, row_tokens: int, *, shared: bool = False) -> np.ndarray:
    """Texts [N] -> their vectors [N, D_text]; where it is `shared`, each process encodes its part, and all have the whole."""
    index, count = processes.place_of() if shared else (0, 1)
    blocks = itertools.islice(text_blocks(tokens, row_tokens), index, None, count)
    mine = encode_blocks(text_params, spec, blocks, len(tokens))
    return processes.total(mine) if shared else mine


def text_table(config: Any, tokens: Ragged, text_params: Params, spec: towers.BertSpec, say: Say, *, shared: bool = False) -> np.ndarray:
    """Text vectors of the catalogue [N, D_text], made once for these texts, weights and settings, and kept in the cache.

    Args:
      config: where the cache is, and the row length.
      tokens: of each item.
      text_params, spec: the encoder; pooling and compute dtype are the spec's.
      say: told whether they are made or found.
      shared: every process of the run calls this at the same place, and each encodes its part.

    Raises:
      RecJaxError: the kept file has another shape than its name says.
    """
    digest = hashlib.sha256(json.dumps([spec.pooling, spec.dtype, spec.normalize, config.batch.row_tokens, 1]).encode())
    digest.update(np.ascontiguousarray(tokens.flat).tobytes() + tokens.offsets.tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(text_params):
        digest.update(mesh_lib.path_name(path).encode() + np.asarray(leaf).tobytes())
    file = config_lib.cache_dir(config) / f"text-vectors-{digest.hexdigest()[:16]}.npy"
    if all(processes.gather(file.exists())) if shared else file.exists():
        with file.open("rb") as f:
            table = np.load(f, allow_pickle=False)
        if table.shape != (len(tokens), spec.width):
            raise RecJaxError(f"{file} has shape {table.shape}, expected {(len(tokens), spec.width)}; remove it")
        if str(file) not in _said:
            say(f"text vectors: found {file}")
        _said.add(str(file))
        return table
    table = text_vectors(tokens, text_params, spec, config.batch.row_tokens, shared=shared)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.parent / f"{file.name}.{os.getpid()}.tmp"
        with temporary.open("wb") as f:
            np.save(f, table)
        temporary.replace(file)
    say(f"text vectors: {len(tokens):,} texts encoded, kept at {file}")
    _said.add(str(file))
    return table
