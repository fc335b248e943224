"""Files of given vectors: three kinds that give the same, and what is wrong with one."""

import json

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save

from rec_jax.data import vectors
from rec_jax.types import RecJaxError

IDS = ["b", "a", "c"]
VALUES = np.arange(6, dtype=np.float32).reshape(3, 2)


def npz(file, ids=IDS, values=VALUES, **more):
    np.savez(file, ids=np.asarray(ids), vectors=values, **more)


def safetensors(file, tensors=None, metadata=None):
    file.write_bytes(save(tensors or {"vectors": VALUES}, metadata=metadata))


def parquet(file, rows=None, key="item_id", ids=IDS):
    pl.DataFrame({key: ids, "vectors": VALUES.tolist() if rows is None else rows}).write_parquet(file)


def read(file):
    (source,) = vectors.sources((str(file),)).values()
    return vectors.read(source)


@pytest.mark.parametrize("kind", ["npz", "metadata", "list", "array", "integers", "half"])
def test_every_kind_of_file_gives_ids_and_vectors(kind, tmp_path):
    file = tmp_path / ("v.npz" if kind in ("npz", "half") else "v.parquet" if kind in ("list", "array") else "v.safetensors")
    ids = IDS
    if kind in ("npz", "half"):
        npz(file, values=VALUES.astype(np.float16 if kind == "half" else np.float32))
    elif kind == "metadata":
        safetensors(file, metadata={"ids": json.dumps(IDS)})
    elif kind == "integers":
        safetensors(file, {"vectors": VALUES, "ids": np.array([7, 5, 6])})
        ids = ["7", "5", "6"]
    else:
        column = pl.Series(VALUES.tolist(), dtype=pl.Array(pl.Float32, 2) if kind == "array" else pl.List(pl.Float64))
        pl.DataFrame({"id": IDS, "image": column}).write_parquet(file)
    names, values = read(file)
    assert names == ids
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, VALUES)


def test_aligned_to_a_catalogue_with_nan_where_there_is_none():
    out = vectors.aligned(IDS, VALUES, ["a", "x", "b"])
    np.testing.assert_array_equal(out, [[2, 3], [np.nan, np.nan], [0, 1]])


def test_names_are_those_of_the_files_or_given(tmp_path):
    npz(tmp_path / "image.npz")
    npz(tmp_path / "x.npz")
    found = vectors.sources((f"{tmp_path}/image.npz", f"sound={tmp_path}/x.npz"))
    assert {name: file.name for name, file in found.items()} == {"image": "image.npz", "sound": "x.npz"}
    with pytest.raises(RecJaxError, match=r"two files named 'image'; give one another name: 'NAME=/.*x.npz'"):
        vectors.sources((f"{tmp_path}/image.npz", f"image={tmp_path}/x.npz"))
    with pytest.raises(RecJaxError, match=r"config.data.features.vectors='.*none.npz': no such file"):
        vectors.sources((f"{tmp_path}/none.npz",))
    (tmp_path / "v.csv").write_text("a")
    with pytest.raises(RecJaxError, match=r"v.csv': expected a file that ends in .npz, .safetensors, .parquet"):
        vectors.sources((f"{tmp_path}/v.csv",))


NAN = np.array([[0, 1], [2, np.nan], [np.inf, 1]], np.float32)
BROKEN = {
    "nan": (lambda f: npz(f, values=NAN), "npz", r"vector of item 'a' \(row 2\) holds nan, as 2 of 3 do; leave out items without"),
    "twice": (lambda f: npz(f, ids=["a", "b", "a"]), "npz", r"item id 'a' has vectors in rows 1 and 3; leave one"),
    "lengths": (lambda f: npz(f, ids=["a"]), "npz", "1 ids and 3 vectors; expected"),
    "flat": (lambda f: npz(f, values=VALUES[:, 0]), "npz", r"has shape \(3,\); expected"),
    "names": (lambda f: np.savez(f, other=VALUES), "npz", "has the arrays other; expected"),
    "objects": (lambda f: npz(f, ids=np.array(["a", "b", None], object)), "npz", "save ids as an array of text"),
    "floats": (lambda f: npz(f, ids=[1.5, 2.5, 3.5]), "npz", r"`ids` has shape \(3,\) and type float64; expected texts or whole numbers"),
    "words": (lambda f: npz(f, values=np.array([["x"]] * 3)), "npz", "`vectors` has the type <U1; expected float32 or float16"),
    "no zip": (lambda f: f.write_bytes(b"hello"), "npz", "this is no .npz that can be read"),
    "no ids": (lambda f: safetensors(f), "safetensors", "has the tensors vectors and the metadata none; expected"),
    "no json": (lambda f: safetensors(f, metadata={"ids": "a b"}), "safetensors", "`ids` in the metadata is no JSON list: "),
    "no list": (lambda f: safetensors(f, metadata={"ids": "{}"}), "safetensors", "no JSON list of texts or whole numbers"),
    "cut": (lambda f: f.write_bytes(b"\x08"), "safetensors", "this is no .safetensors that numpy can read"),
    "width": (
        lambda f: parquet(f, rows=[[1.0, 2.0], [1.0], [3.0, 4.0]]),
        "parquet",
        r"vector of item 'a' \(row 2\) has 1 numbers, and most have 2; mend it",
    ),
    "null": (lambda f: parquet(f, rows=[[1.0, None], [1.0, 1.0], [3.0, 4.0]]), "parquet", r"item 'b' \(row 1\) holds nan"),
    "no key": (lambda f: parquet(f, key="name"), "parquet", r"expected a column item_id or item or id.*columns there: name \(String\)"),
    "null id": (lambda f: parquet(f, ids=["a", None, "b"]), "parquet", "row 2: column item_id is empty"),
    "texts": (lambda f: parquet(f, rows=[["x"], ["y"], ["z"]]), "parquet", "column vectors holds lists of String, expected numbers"),
    "empty": (lambda f: parquet(f, rows=pl.Series([[], [], []], dtype=pl.List(pl.Float32))), "parquet", r"has shape \(3, 0\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_with_its_place(case, tmp_path):
    make, ending, message = BROKEN[case]
    file = tmp_path / f"v.{ending}"
    make(file)
    with pytest.raises(RecJaxError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)
