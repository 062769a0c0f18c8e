"""A file with one array, written by NumPy, safetensors or torch, is read, or refused with BadInput that names it."""

import json
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from refusals import refused_file
from safetensors.numpy import save_file

from jax_sae.activations import store
from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.arrays import sha256

WRITTEN_BY_TORCH = Path(__file__).parents[1] / "data" / "torch_save"
X = (np.arange(12).reshape(3, 4) - 5) / 4


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_is_read(tmp_path, dtype, order):
    np.save(tmp_path / "x.npy", np.asarray(X, dtype, order=order))
    read = open_activations(str(tmp_path / "x.npy"))[0].read(0, 3)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, X)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_safetensors_file_with_one_array_is_read(tmp_path, dtype):
    save_file({"any name": X.astype(dtype)}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(open_activations(str(tmp_path / "x.safetensors"))[0].read(0, 3), X)


def write_torch_file(
    path, tensor_names=(), kind=b"Float", dtype="<f4", shape=b"K\x03K\x04\x86", stride=b"K\x04K\x01\x86"
):
    """What `torch.save` writes: a tensor over X, or with names a dictionary of them."""
    storage = b"(X\x07\0\0\0storagectorch\n" + kind + b"Storage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x0ctQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"\x89}tR"
    entries = b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + tensor for name in tensor_names)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + (b"}(" + entries + b"u" if tensor_names else tensor) + b".")
        archive.writestr("x/data/0", X.astype(dtype).tobytes())


@pytest.mark.parametrize("names", [(), ("acts",)])
@pytest.mark.parametrize(("kind", "dtype"), [(b"Half", "<f2"), (b"Float", "<f4"), (b"Double", "<f8")])
def test_a_torch_file_with_one_tensor_is_read(tmp_path, names, kind, dtype):
    write_torch_file(tmp_path / "x.pt", names, kind, dtype)
    np.testing.assert_array_equal(open_activations(str(tmp_path / "x.pt"))[0].read(0, 3), X)


def test_a_file_that_torch_wrote_is_read():
    rows = open_activations(str(WRITTEN_BY_TORCH / "tensor.pt"))[0]
    np.testing.assert_array_equal(rows.read(1, 3), np.arange(4, 12).reshape(2, 4) / 2)


# What cannot be used is refused


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }"


@pytest.mark.parametrize(
    "header",
    ["", "{", "{" * 100, "(((", "3", "{'descr': '<,4', 'fortran_order': False, 'shape': (3, 4), }"]
    + [HEADER.replace("<f4", descr) for descr in ("O", "<f4,<f4", "<U0", "S0", "|V4", "|b1", "<c8")]
    + [
        HEADER.replace("(3, 4)", s)
        for s in ("(3, -4)", "(-3, -4)", "(4, 4)", "(12,)", "()", "3", "(3, 2, 2, 1)", "(3.0, 4)")
    ]
    + [HEADER.replace("3", str(huge)) for huge in (2**62, 2**62 + 1, 2**63 - 1, 2**64, 10**30)]
    + [HEADER.replace("False", "0"), HEADER.replace(" 'sh", "b'sh"), HEADER.replace("'descr'", "'a'")],
)
def test_an_npy_file_with_a_header_that_cannot_be_is_refused(tmp_path, header):
    """Also in a shard, where the manifest vouches for the file's bytes."""
    path = tmp_path / "x.npy"
    padded = header.ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + bytes(48))
    refused_file(path, path)
    shard = {"file": "x.npy", "rows": 3, "sha256": sha256(path)}
    manifest = {"format": store.FORMAT, "dtype": "float32", "width": 4, "rows": 3, "shards": [shard]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    refused_file(tmp_path, path)


@pytest.mark.parametrize(
    "array",
    [np.zeros(12), np.zeros((2, 2, 3, 1)), np.zeros(()), np.zeros((0, 4)), np.zeros((3, 0)), np.zeros((3, 0, 4))],
)
def test_an_array_that_has_one_or_four_dimensions_or_is_empty_is_refused(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    refused_file(tmp_path / "x.npy", tmp_path / "x.npy")
    save_file({"x": array}, tmp_path / "x.safetensors")
    refused_file(tmp_path / "x.safetensors", tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_an_array_that_is_not_of_floats_is_refused(tmp_path, dtype):
    np.save(tmp_path / "x.npy", X.astype(dtype))
    refused_file(tmp_path / "x.npy", tmp_path / "x.npy", np.dtype(dtype), "floating-point")
    save_file({"x": X.astype(dtype)}, tmp_path / "x.safetensors")
    refused_file(tmp_path / "x.safetensors", tmp_path / "x.safetensors", np.dtype(dtype), "floating-point")


def test_files_that_are_not_what_their_names_say_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", X)
    (tmp_path / "x.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    whole = tmp_path / "whole.npy"
    np.save(whole, X)
    (tmp_path / "short.npy").write_bytes(whole.read_bytes()[:-1])
    save_file({"x": X}, tmp_path / "whole.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [3, 4], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "float8.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    for suffix in ("npy", "safetensors", "pt"):
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
        (tmp_path / f"text.{suffix}").write_text("0 1 2\n" * 40)
    for name in ("archive.npy", "pickle.npy", "short.npy", "short.safetensors", "float8.safetensors"):
        refused_file(tmp_path / name, tmp_path / name)
    for path in [*tmp_path.glob("empty.*"), *tmp_path.glob("text.*")]:
        refused_file(path, path)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_a_torch_file_of_another_shape_or_type_is_refused(tmp_path, dtype):
    path = tmp_path / "x.pt"
    if dtype == np.int64:
        write_torch_file(path, kind=b"Long", dtype="<i8")
    else:
        write_torch_file(path, shape=b"K\x0c\x85", stride=b"K\x01\x85")
    refused_file(path, path)


def test_a_file_with_several_arrays_is_refused(tmp_path):
    save_file({"a": X, "b": X}, tmp_path / "x.safetensors")
    refused_file(tmp_path / "x.safetensors", tmp_path / "x.safetensors", "2 arrays (a, b)")
    write_torch_file(tmp_path / "x.pt", ("a", "b"))
    refused_file(tmp_path / "x.pt", tmp_path / "x.pt", "2 arrays (a, b)")
    save_file({}, tmp_path / "none.safetensors")
    refused_file(tmp_path / "none.safetensors", "0 arrays")


def test_a_name_without_a_file_or_of_an_unknown_kind_is_refused(tmp_path):
    refused_file(tmp_path / "absent.npy", tmp_path / "absent.npy", "no such file")
    (tmp_path / "x.csv").write_text("1,2")
    refused_file(tmp_path / "x.csv", tmp_path / "x.csv", "'.csv'", ".npy, .safetensors or .pt")
    (tmp_path / "x").write_text("1,2")
    refused_file(tmp_path / "x", tmp_path / "x", ".npy, .safetensors or .pt")


def test_a_float64_beyond_float32_is_read_as_infinite_without_a_warning(tmp_path):
    """Whoever reads it refuses it: see `blocks.finite_activations`."""
    np.save(tmp_path / "x.npy", np.array([[1e300, 1.0]]))
    np.testing.assert_array_equal(open_activations(str(tmp_path / "x.npy"))[0].read(0, 1), [[np.inf, 1.0]])
