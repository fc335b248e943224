"""Hugging Face BERT folders (config.json, safetensors) <-> (params, spec)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.towers.bert import BertSpec, init
from rec_jax.towers.pretraining import init_mlm
from rec_jax.types import Params, RecJaxError

# Their name, our name, whether the matrix is stored transposed. Placeholders are numbers or words, the same on both sides.
NAMES = (
    ("embeddings.word_embeddings.weight", "embeddings/word/embedding", False),
    ("embeddings.position_embeddings.weight", "embeddings/position/embedding", False),
    ("embeddings.token_type_embeddings.weight", "embeddings/token_type/embedding", False),
    ("embeddings.LayerNorm.weight", "embeddings/norm/scale", False),
    ("embeddings.LayerNorm.bias", "embeddings/norm/bias", False),
    ("encoder.layer.{n}.attention.self.{role}.weight", "layer_{n}/attention/{role}/kernel", True),
    ("encoder.layer.{n}.attention.self.{role}.bias", "layer_{n}/attention/{role}/bias", False),
    ("encoder.layer.{n}.attention.output.dense.weight", "layer_{n}/attention/out/kernel", True),
    ("encoder.layer.{n}.attention.output.dense.bias", "layer_{n}/attention/out/bias", False),
    ("encoder.layer.{n}.attention.output.LayerNorm.weight", "layer_{n}/attention_norm/scale", False),
    ("encoder.layer.{n}.attention.output.LayerNorm.bias", "layer_{n}/attention_norm/bias", False),
    ("encoder.layer.{n}.intermediate.dense.weight", "layer_{n}/mlp/up/kernel", True),
    ("encoder.layer.{n}.intermediate.dense.bias", "layer_{n}/mlp/up/bias", False),
    ("encoder.layer.{n}.output.dense.weight", "layer_{n}/mlp/down/kernel", True),
    ("encoder.layer.{n}.output.dense.bias", "layer_{n}/mlp/down/bias", False),
    ("encoder.layer.{n}.output.LayerNorm.weight", "layer_{n}/mlp_norm/scale", False),
    ("encoder.layer.{n}.output.LayerNorm.bias", "layer_{n}/mlp_norm/bias", False),
)
# The same of the masked language model's head; its product with the word table is tied to the encoder's.
MLM_NAMES = (
    ("cls.predictions.transform.dense.weight", "transform/kernel", True),
    ("cls.predictions.transform.dense.bias", "transform/bias", False),
    ("cls.predictions.transform.LayerNorm.weight", "norm/scale", False),
    ("cls.predictions.transform.LayerNorm.bias", "norm/bias", False),
    ("cls.predictions.bias", "bias", False),
)
MLM_TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
# Tensors that a BERT folder may hold and the encoder has no use for: heads on top, and a constant 0..max_positions-1.
IGNORED = (r"pooler\..*", r"cls\..*", r"classifier\..*", r"embeddings\.position_ids")
# The names of the layer norm's parameters before 2019, still in some folders.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# Their key in config.json, ours, and the value that an absent key means there; None: must be present.
CONFIG: tuple[tuple[str, str, Any], ...] = (
    ("vocab_size", "vocab_size", None),
    ("hidden_size", "width", None),
    ("num_hidden_layers", "layers", None),
    ("num_attention_heads", "heads", None),
    ("intermediate_size", "mlp_width", None),
    ("max_position_embeddings", "max_positions", 512),
    ("type_vocab_size", "type_vocab", 2),
    ("layer_norm_eps", "layer_norm_eps", 1e-12),
    ("hidden_act", "activation", "gelu"),
    ("hidden_dropout_prob", "dropout", 0.1),
    ("attention_probs_dropout_prob", "attention_dropout", 0.1),
    ("pad_token_id", "pad_id", 0),
)
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu": "relu"}
POOLING_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
MODULE_TYPES = ("Transformer", "Pooling", "Normalize")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")
SPECIAL_TOKENS = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def load_hf(path: str) -> tuple[Params, BertSpec]:
    """A Hugging Face BERT -> (params as plain nested dict of float32 arrays, spec).

    Where the folder is one of sentence-transformers (modules.json, 1_Pooling), spec.pooling and spec.normalize are its own; elsewhere
    they are "mean" and False.

    Args:
      path: a folder, "package:NAME" or a hub id, as `rec_jax.config.model_folder` takes it.

    Raises:
      RecJaxError: no such folder, another kind of model, pickled weights, tensors that are missing, left over or of another shape.
    """
    from rec_jax.config import model_folder

    folder = model_folder(str(path))
    spec = _read_spec(folder)
    expected = jax.eval_shape(lambda: init(jax.random.key(0), spec))
    return _to_params(_read_tensors(folder, IGNORED), expected, f"the BERT of its config.json ({spec.layers} layers)", folder), spec


def load_mlm(path: str) -> Params | None:
    """A Hugging Face BERT -> its masked language model's head, as from `pretraining.init_mlm`; None where the folder has none.

    Args:
      path: as of `load_hf`.

    Raises:
      RecJaxError: what `load_hf` raises, and a head that is there in part, or whose word table is not the encoder's.
    """
    from rec_jax.config import model_folder

    folder = model_folder(str(path))
    spec = _read_spec(folder)
    tensors = _read_tensors(folder, [pattern for pattern in IGNORED if not pattern.startswith("cls")])
    head = {name: value for name, value in tensors.items() if name.startswith("cls.predictions.")}
    if not head:
        return None
    tied = {name: head.pop(name) for name in MLM_TIED if name in head}
    pairs = zip(MLM_TIED, (tensors.get(NAMES[0][0]), head.get("cls.predictions.bias")), strict=True)
    for name, twin in pairs:
        if name in tied and twin is not None and not np.array_equal(tied[name], twin):
            raise RecJaxError(f"{folder}: {name} is a table of its own; only a head tied to the encoder's word table can be loaded")
    expected = jax.eval_shape(lambda: init_mlm(jax.random.key(0), spec))
    return _to_params(head, expected, "its masked language model's head", folder)


def save_hf(
    params: Params, spec: BertSpec, folder: Any, *, mlm: Params | None = None, tokenizer: str | None = None, max_tokens: int = 0
) -> None:
    """Writes a model's folder, which `load_hf` reads back bit for bit and, with a tokenizer, transformers and sentence-transformers open.

    Those are config.json and model.safetensors, what sentence-transformers needs to pool as the spec says (modules.json,
    1_Pooling, 2_Normalize, sentence_bert_config.json), and copies of the tokenizer's files. dtype, remat and scan are choices of a run,
    not of the model, and are not kept.

    Args:
      params: as from `init` or `load_hf`.
      spec: the model's; 0 layers are a model there too.
      folder: made if absent; may be gs://...
      mlm: the masked language model's head, as from `pretraining.init_mlm`; the folder is then that of a BertForMaskedLM.
      tokenizer: the folder, "package:NAME" or hub id that the tokenizer's files are copied from.
      max_tokens: where sentence-transformers cuts a text; 0 = spec.max_positions.

    Raises:
      RecJaxError: no tokenizer there, or parameters that are not those of a BERT.
    """
    from etils import epath
    from safetensors.numpy import save

    prefix = "" if mlm is None else "bert."
    tensors = {prefix + name: value for name, value in _to_tensors(params).items()} | _to_tensors(mlm or {})
    kind = "BertModel" if mlm is None else "BertForMaskedLM"
    config: dict[str, Any] = {"architectures": [kind], "model_type": "bert", "position_embedding_type": "absolute"}
    config |= {theirs: getattr(spec, ours) for theirs, ours, _ in CONFIG}
    pooling: dict[str, Any] = {"word_embedding_dimension": spec.width}
    pooling |= {key: kind == spec.pooling for key, kind in POOLING_KEYS.items()}
    kinds = MODULE_TYPES if spec.normalize else MODULE_TYPES[:2]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    cut = {"max_seq_length": max_tokens or spec.max_positions, "do_lower_case": False}
    files = {"config.json": config, "1_Pooling/config.json": pooling, "modules.json": modules, "sentence_bert_config.json": cut}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    if tokenizer is not None:
        texts |= _tokenizer_texts(tokenizer, cut["max_seq_length"])
    folder = epath.Path(folder)
    for name in ["1_Pooling", *(["2_Normalize"] if spec.normalize else [])]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _tokenizer_texts(path: str, max_tokens: int) -> dict[str, str]:
    """A tokenizer's files, name -> content; beside a lone tokenizer.json the tokenizer_config.json that transformers needs."""
    from rec_jax.config import model_folder

    source = model_folder(path)
    texts = {name: (source / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES if (source / name).is_file()}
    if "tokenizer.json" not in texts and "vocab.txt" not in texts:
        raise RecJaxError(f"{source} holds no tokenizer.json or vocab.txt to save beside the model")
    if "tokenizer.json" in texts and "tokenizer_config.json" not in texts:
        words = _read_json(source / "tokenizer.json")["model"]["vocab"]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens}
        config |= {role: token for role, token in SPECIAL_TOKENS.items() if token in words}
        texts["tokenizer_config.json"] = json.dumps(config, indent=2) + "\n"
    return texts


def _to_tensors(params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> their tensors."""
    tensors = {}
    for name, value in _flatten(params).items():
        theirs, transposed = _translate(name)
        value = np.asarray(value, np.float32)
        tensors[theirs] = np.ascontiguousarray(value.T if transposed else value)
    return tensors


def _translate(name: str) -> tuple[str, bool]:
    """Our name -> theirs, and whether it is stored transposed there."""
    for theirs, ours, transposed in (*NAMES, *MLM_NAMES):
        pattern = re.escape(ours).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{role\}", "(?P<role>query|key|value)")
        if match := re.fullmatch(pattern, name):
            return theirs.format(**match.groupdict()), transposed
    raise RecJaxError(f"parameter {name!r} has no counterpart in the tables of rec_jax.towers.hf (NAMES, MLM_NAMES)")


def _flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise RecJaxError(f"{file} is no JSON: {e}; fetch it again") from e


def _read_spec(folder: Path) -> BertSpec:
    file = folder / "config.json"
    if not file.is_file():
        raise RecJaxError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    config = _read_json(file)
    required = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
    for key, expected in required.items():
        found = config.get(key, None if key == "model_type" else expected)
        if found != expected:
            raise RecJaxError(f"{file}: {key}={found!r}: only {expected!r} can be loaded; take a BERT encoder")
    fields: dict[str, Any] = {}
    for theirs, ours, absent in CONFIG:
        value = config.get(theirs, absent)
        if value is None:
            raise RecJaxError(f"{file} has no key {theirs!r}")
        fields[ours] = value
    if fields["activation"] not in ACTIVATIONS:
        raise RecJaxError(f"{file}: hidden_act={fields['activation']!r}: expected one of {', '.join(ACTIVATIONS)}")
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    return BertSpec(**fields, **_read_pooling(folder))


def _read_pooling(folder: Path) -> dict[str, Any]:
    """What sentence-transformers keeps beside the model: {"pooling": ..., "normalize": ...}, as far as it is there."""
    out: dict[str, Any] = {}
    pooling_file = folder / "1_Pooling" / "config.json"
    modules_file = folder / "modules.json"
    if modules_file.is_file():
        modules = {str(m["type"]).rpartition(".")[2]: m["path"] for m in _read_json(modules_file)}
        if unknown := [kind for kind in modules if kind not in MODULE_TYPES]:
            raise RecJaxError(
                f"{modules_file}: module {unknown[0]!r} changes the vectors and cannot be loaded; known: {', '.join(MODULE_TYPES)}"
            )
        out["normalize"] = "Normalize" in modules
        if "Pooling" in modules:
            pooling_file = folder / modules["Pooling"] / "config.json"
            if not pooling_file.is_file():
                raise RecJaxError(f"{modules_file} names {modules['Pooling']}, but {pooling_file} does not exist; fetch the folder again")
    if pooling_file.is_file():
        config = _read_json(pooling_file)
        on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        if len(on) != 1 or on[0] not in POOLING_KEYS:
            raise RecJaxError(f"{pooling_file} turns on {', '.join(on) or 'nothing'}: expected exactly one of {', '.join(POOLING_KEYS)}")
        out["pooling"] = POOLING_KEYS[on[0]]
    return out


def _read_tensors(folder: Path, ignored: Iterable[str]) -> dict[str, np.ndarray]:
    """All tensors of the folder under their own names, without the prefix "bert.", but those that a pattern of `ignored` matches."""
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
        if absent := [file.name for file in files if not file.is_file()]:
            raise RecJaxError(f"{index} names files that do not exist: {', '.join(absent)}; fetch the folder again")
    else:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(pattern))
        if pickles:
            raise RecJaxError(
                f"{folder} has its weights only as pickles ({', '.join(pickles)}), and loading a pickle runs any code in it; "
                "convert them where you trust them, with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        raise RecJaxError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="flax") as opened:
                for name in opened.keys():  # noqa: SIM118 (the file is no mapping and cannot be iterated)
                    short = name.removeprefix("bert.")
                    for old, new in OLD_NAMES.items():
                        short = short.replace(old, new)
                    if any(re.fullmatch(pattern, short) for pattern in ignored):
                        continue
                    if short in tensors:
                        raise RecJaxError(f"{file}: tensor {name!r} is there twice (with and without 'bert.', or in two files)")
                    tensors[short] = np.asarray(opened.get_tensor(name), np.float32)
        except SafetensorError as e:
            raise RecJaxError(f"{file} is broken: {e}; fetch it again") from e
    return tensors


def _to_params(tensors: Mapping[str, np.ndarray], shapes: Params, what: str, folder: Path) -> Params:
    """Tensors under their names -> nested params, checked against the shapes that `what` needs."""
    expected = {name: leaf.shape for name, leaf in _flatten(shapes).items()}
    theirs = {name: _translate(name) for name in expected}
    missing = [their for their, _ in theirs.values() if their not in tensors]
    left_over = sorted(set(tensors) - {their for their, _ in theirs.values()})
    if missing or left_over:
        parts = [f"{does} {len(names)} ({_some(names)})" for does, names in (("lack", missing), ("leave over", left_over)) if names]
        raise RecJaxError(f"{folder}: the tensors {' and '.join(parts)} for {what}")
    params: dict[str, Any] = {}
    for name, (their, transposed) in theirs.items():
        value = tensors[their].T if transposed else tensors[their]
        if value.shape != expected[name]:
            need = expected[name][::-1] if transposed else expected[name]
            raise RecJaxError(f"{folder}: tensor {their!r} has shape {tensors[their].shape}, but config.json makes it {need}")
        node = params
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(np.ascontiguousarray(value))
    return params


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
