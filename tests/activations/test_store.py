"""A store gives back what was written, or is refused with BadInput that names the file."""

import errno
import json
import random
import re
import shutil
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_sae.activations import store
from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.arrays import Rows, sha256
from jax_sae.activations.store import check_new_directory, read_manifest, write_store
from jax_sae.errors import BadInput, RunFailed

WRITTEN_BY_TORCH = Path(__file__).parents[1] / "data" / "torch_save"
D = 6


def make_stories(lengths=(5, 1, 12, 3, 9, 2), dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(length, D)).astype(dtype) for length in lengths]


@pytest.fixture
def small_shards(monkeypatch):
    """A shard is full at 10 rows of float32, or at 20 of float16."""
    monkeypatch.setattr(store, "SHARD_BYTES", 10 * D * 4)


@pytest.fixture
def three_shards(tmp_path, small_shards):
    """A store of 32 rows in three shards."""
    directory = tmp_path / "acts"
    write_store(directory, make_stories(), model="a/b", layer=2)
    assert len(list(directory.glob("*.npy"))) == 3
    return directory


def change_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(path, *parts):
    """Opening it raises BadInput on one line that has all `parts` in it."""
    with pytest.raises(BadInput) as error:
        open_activations(str(path))[0]
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert str(part) in message, message


# What was written is read


@pytest.mark.parametrize(("dtype", "n_shards"), [("float32", 3), ("float16", 2)])
def test_stories_come_back_in_order_whatever_the_shards(tmp_path, small_shards, dtype, n_shards):
    stories = make_stories()
    manifest = write_store(tmp_path / "acts", iter(stories), model="a/b", layer=2, dtype=dtype, text="c/d")
    assert read_manifest(tmp_path / "acts") == manifest
    assert len(manifest["shards"]) == n_shards
    assert {name: manifest[name] for name in ("model", "layer", "dtype", "width", "rows", "text")} == {
        "model": "a/b", "layer": 2, "dtype": dtype, "width": D, "rows": 32, "text": "c/d",
    }  # fmt: skip
    rows = open_activations(str(tmp_path / "acts"))[0]
    assert (len(rows), rows.width) == (32, D)
    read = rows.read(0, 32)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.concatenate(stories).astype(dtype))


@pytest.mark.parametrize("written", ["float16", "bfloat16", "float32", "float64"])
def test_a_story_may_be_of_any_floating_point_type(tmp_path, written):
    stories = make_stories(dtype=np.dtype(written))
    write_store(tmp_path / "acts", stories, model="a/b", layer=2)
    expected = np.concatenate(stories).astype(np.float32)
    np.testing.assert_array_equal(open_activations(str(tmp_path / "acts"))[0].read(0, 32), expected)


def test_stories_without_tokens_add_no_rows(tmp_path, small_shards):
    stories = make_stories((0, 10, 0, 3, 0))
    manifest = write_store(tmp_path / "acts", stories, model="a/b", layer=2)
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 3]
    np.testing.assert_array_equal(open_activations(str(tmp_path / "acts"))[0].read(0, 13), np.concatenate(stories))


def test_a_range_of_rows_equals_that_of_the_concatenation():
    arrays = tuple(make_stories((3, 1, 7, 2, 5)))
    rows, whole = Rows(arrays, "rows"), np.concatenate(arrays)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            read = rows.read(start, stop)
            assert read.shape == (stop - start, D)
            np.testing.assert_array_equal(read, whole[start:stop])
    read[:] = 0
    np.testing.assert_array_equal(rows.read(0, len(whole)), whole)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (2, 1), (0, 19), (19, 19)])
def test_rows_that_are_not_there_cannot_be_read(start, stop):
    with pytest.raises(IndexError, match=f"rows {start} to {stop} of 18"):
        Rows(tuple(make_stories((3, 1, 7, 2, 5))), "rows").read(start, stop)


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


# What is not whole, or not true, is refused


def test_every_flipped_bit_of_a_shard_is_noticed(three_shards):
    shard = three_shards / "shard-00001.npy"
    content = shard.read_bytes()
    rng = random.Random(0)
    for place in [*range(0, 128, 3), *(rng.randrange(128, len(content)) for _ in range(40))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        shard.write_bytes(damaged)
        refused(three_shards, shard, "sha256")
    shard.write_bytes(content)
    open_activations(str(three_shards))[0]


@pytest.mark.parametrize("kept", [0, 60, 128, 150, -1])
def test_a_truncated_shard_is_noticed(three_shards, kept):
    shard = three_shards / "shard-00002.npy"
    shard.write_bytes(shard.read_bytes()[:kept])
    refused(three_shards, shard)


def test_a_missing_shard_is_noticed(three_shards):
    (three_shards / "shard-00001.npy").unlink()
    refused(three_shards, three_shards, "shard-00001.npy", "missing")


def test_exchanged_shards_are_noticed(three_shards):
    a, b = three_shards / "shard-00000.npy", three_shards / "shard-00001.npy"
    a.rename(three_shards / "c.npy")
    b.rename(a)
    (three_shards / "c.npy").rename(b)
    refused(three_shards, a)


MANIFESTS_THAT_LIE = {
    "rows in all": lambda m: m.update(rows=31),
    "rows of a shard": lambda m: (m["shards"][1].update(rows=11), m.update(rows=m["rows"] + 11 - 12)),
    "rows between two shards": lambda m: (m["shards"][0].update(rows=17), m["shards"][1].update(rows=13)),
    "width": lambda m: m.update(width=D + 1),
    "dtype": lambda m: m.update(dtype="float16"),
    "digest": lambda m: m["shards"][0].update(sha256="0" * 64),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "a shard less": lambda m: m["shards"].pop(),
}


@pytest.mark.parametrize("lie", MANIFESTS_THAT_LIE)
def test_a_manifest_that_lies_is_noticed(three_shards, lie):
    change_manifest(three_shards, MANIFESTS_THAT_LIE[lie])
    refused(three_shards, three_shards)


WRONG = [None, True, 0, -1, 1.5, 10**400, "", "x", [], [1], {}, {"a": {}}, "x" * 10_000]


@pytest.mark.parametrize("key", ["format", "dtype", "width", "rows", "shards"])
def test_a_manifest_with_a_missing_entry_or_one_of_a_wrong_type_is_refused(three_shards, key):
    manifest = (three_shards / "manifest.json").read_text()
    for wrong in WRONG:
        change_manifest(three_shards, lambda m, wrong=wrong: m.update({key: wrong}))
        refused(three_shards, three_shards / "manifest.json")
    change_manifest(three_shards, lambda m: m.pop(key))
    refused(three_shards, three_shards / "manifest.json", key)
    (three_shards / "manifest.json").write_text(manifest)
    open_activations(str(three_shards))[0]


@pytest.mark.parametrize("key", ["file", "rows", "sha256"])
def test_so_is_one_of_a_shard(three_shards, key):
    for wrong in WRONG:
        change_manifest(three_shards, lambda m, wrong=wrong: m["shards"][1].update({key: wrong}))
        refused(three_shards, three_shards / "manifest.json", "shard 1", key)
    change_manifest(three_shards, lambda m: m["shards"][1].pop(key))
    refused(three_shards, three_shards / "manifest.json", "shard 1", key, "missing")
    for wrong in WRONG[:-3]:
        change_manifest(three_shards, lambda m, wrong=wrong: m["shards"].__setitem__(1, wrong))
        refused(three_shards, three_shards / "manifest.json", "shard 1")


NAMES = [
    "../other/shard-00000.npy",
    "/etc/x.npy",
    "/x.npy",
    ".x.npy",
    "sub/../shard-00000.npy",
    "a\\b.npy",
    "..",
    ".npy",
    "manifest.json",
]
ODD_NAMES = ["a\0.npy", "a\n.npy", "shard-00000.npy\n", "é.npy", "\ud800.npy"]


@pytest.mark.parametrize("name", NAMES + ODD_NAMES)
def test_a_shard_is_a_plain_file_beside_the_manifest(three_shards, name):
    shutil.copytree(three_shards, three_shards.parent / "other")
    change_manifest(three_shards, lambda m: m["shards"][0].update(file=name))
    refused(three_shards, three_shards / "manifest.json", "shard 0", "the plain name")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": "other 1"}', b'{"rows": NaN}'],
)
def test_a_manifest_that_is_none_is_refused(three_shards, content):
    (three_shards / "manifest.json").write_bytes(content)
    refused(three_shards, three_shards / "manifest.json")


def test_a_directory_without_a_manifest_is_not_a_whole_store(three_shards):
    (three_shards / "manifest.json").unlink()
    refused(three_shards, three_shards, "manifest.json")


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
    refused(path, path)
    shard = {"file": "x.npy", "rows": 3, "sha256": sha256(path)}
    manifest = {"format": store.FORMAT, "dtype": "float32", "width": 4, "rows": 3, "shards": [shard]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    refused(tmp_path, path)


@pytest.mark.parametrize(
    "array",
    [np.zeros(12), np.zeros((2, 2, 3, 1)), np.zeros(()), np.zeros((0, 4)), np.zeros((3, 0)), np.zeros((3, 0, 4))],
)
def test_an_array_that_has_one_or_four_dimensions_or_is_empty_is_refused(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    refused(tmp_path / "x.npy", tmp_path / "x.npy")
    save_file({"x": array}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_an_array_that_is_not_of_floats_is_refused(tmp_path, dtype):
    np.save(tmp_path / "x.npy", X.astype(dtype))
    refused(tmp_path / "x.npy", tmp_path / "x.npy", np.dtype(dtype), "floating-point")
    save_file({"x": X.astype(dtype)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", tmp_path / "x.safetensors", np.dtype(dtype), "floating-point")


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
        refused(tmp_path / name, tmp_path / name)
    for path in [*tmp_path.glob("empty.*"), *tmp_path.glob("text.*")]:
        refused(path, path)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_a_torch_file_of_another_shape_or_type_is_refused(tmp_path, dtype):
    path = tmp_path / "x.pt"
    if dtype == np.int64:
        write_torch_file(path, kind=b"Long", dtype="<i8")
    else:
        write_torch_file(path, shape=b"K\x0c\x85", stride=b"K\x01\x85")
    refused(path, path)


def test_a_file_with_several_arrays_is_refused(tmp_path):
    save_file({"a": X, "b": X}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", tmp_path / "x.safetensors", "2 arrays (a, b)")
    write_torch_file(tmp_path / "x.pt", ("a", "b"))
    refused(tmp_path / "x.pt", tmp_path / "x.pt", "2 arrays (a, b)")
    save_file({}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", "0 arrays")


def test_a_name_without_a_file_or_of_an_unknown_kind_is_refused(tmp_path):
    refused(tmp_path / "absent.npy", tmp_path / "absent.npy", "no such file")
    (tmp_path / "x.csv").write_text("1,2")
    refused(tmp_path / "x.csv", tmp_path / "x.csv", "'.csv'", ".npy, .safetensors or .pt")
    (tmp_path / "x").write_text("1,2")
    refused(tmp_path / "x", tmp_path / "x", ".npy, .safetensors or .pt")


def test_a_float64_beyond_float32_is_read_as_infinite_without_a_warning(tmp_path):
    """Whoever reads it refuses it: see `blocks.finite_activations`."""
    np.save(tmp_path / "x.npy", np.array([[1e300, 1.0]]))
    np.testing.assert_array_equal(open_activations(str(tmp_path / "x.npy"))[0].read(0, 1), [[np.inf, 1.0]])


# What cannot be written is refused


def refused_on_writing(directory, stories, message, error=BadInput, **settings):
    """With a message that names the directory; afterwards there is what was there before."""
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(error, match=f"{re.escape(str(directory))}.*{message}"):
        write_store(directory, stories, **{"model": "a/b", "layer": 2} | settings)
    assert sorted(directory.parent.rglob("*")) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_activation_that_is_not_finite_is_refused_on_writing(tmp_path, small_shards, bad, dtype):
    stories = make_stories()
    stories[4][8, 5] = bad
    refused_on_writing(tmp_path / "acts", stories, f"not finite in {dtype}$", dtype=dtype)


def test_one_beyond_the_type_on_disk_is_refused_on_writing(tmp_path):
    stories = make_stories(dtype=np.float64)
    stories[1][0, 0] = 65519
    assert write_store(tmp_path / "fits", stories, model="a/b", layer=2, dtype="float16")["rows"] == 32
    stories[1][0, 0] = 65520
    refused_on_writing(tmp_path / "a", stories, "float16.*use float32", dtype="float16")
    stories[1][0, 0] = 1e39
    refused_on_writing(tmp_path / "b", stories, "not finite in float32$")


@pytest.mark.parametrize(
    "story", [np.zeros(D), np.zeros((2, 3, D)), np.zeros(()), np.zeros((2, D), int), np.zeros((2, D), bool)]
)
def test_arrays_that_are_not_two_dimensional_floats_are_refused_on_writing(tmp_path, story):
    refused_on_writing(tmp_path / "acts", [*make_stories(), story], "was expected|were expected")


def test_stories_of_two_widths_are_refused_on_writing(tmp_path):
    refused_on_writing(tmp_path / "acts", [np.zeros((2, D)), np.zeros((2, D + 1))], "width 7, those before it 6")


def test_a_text_without_tokens_is_refused_on_writing(tmp_path):
    refused_on_writing(tmp_path / "acts", [], "no activations")
    refused_on_writing(tmp_path / "acts", [np.zeros((0, D))], "no activations .* or all of it excluded")


def test_a_directory_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "notes.txt").write_text("mine")
    refused_on_writing(tmp_path / "acts", make_stories(), "not empty")
    refused_on_writing(tmp_path / "acts" / "notes.txt", make_stories(), "cannot be made a directory")
    refused_on_writing(tmp_path / "acts" / "notes.txt" / "below", make_stories(), "cannot be made a directory")
    assert [path.name for path in (tmp_path / "acts").iterdir()] == ["notes.txt"]


def test_an_unknown_type_on_disk_is_refused(tmp_path):
    with pytest.raises(BadInput, match="dtype is 'int4'; a store holds float32 or float16"):
        write_store(tmp_path / "acts", make_stories(), model="a/b", layer=2, dtype="int4")
    assert not (tmp_path / "acts").exists()


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("problem", [NO_SPACE, OSError("60 requested and 20 written")], ids=["none left", "too little"])
@pytest.mark.parametrize("file", ["shard-00000.npy", "shard-00002.npy", "manifest.json"])
def test_a_disk_that_becomes_full_ends_the_writing_and_nothing_of_the_store_stays(
    file, problem, was_there, tmp_path, small_shards, monkeypatch
):
    """Neither the file that is cut off nor those before it, nor the directory, unless it was there before."""
    save, write_text = np.save, Path.write_text

    def cut_off(path, content):
        path.write_bytes(b"half of it")
        raise problem

    monkeypatch.setattr(np, "save", lambda path, x: cut_off(path, x) if path.name == file else save(path, x))
    monkeypatch.setattr(Path, "write_text", lambda p, x: cut_off(p, x) if p.name.startswith(file) else write_text(p, x))
    if was_there:
        (tmp_path / "acts").mkdir()
    message = rf"could not be written \({problem.strerror or problem}\), [\d,.]+ MB are left there; .* make room"
    refused_on_writing(tmp_path / "acts", make_stories(), message, RunFailed)


def test_a_store_that_is_broken_off_leaves_nothing(tmp_path, small_shards):
    """By Ctrl-C, after two shards."""

    def broken_off():
        yield from make_stories((10, 10))
        assert len(list((tmp_path / "acts").iterdir())) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "acts", broken_off(), model="a/b", layer=2)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_another_process_makes_at_the_same_time_is_left_alone(tmp_path, monkeypatch):
    """It comes between looking and making."""
    monkeypatch.setattr(store, "check_new_directory", lambda directory: None)
    exists, directory = Path.exists, tmp_path / "acts"
    directory.mkdir()
    monkeypatch.setattr(Path, "exists", lambda path: path != directory and exists(path))
    with pytest.raises(BadInput, match=r"cannot be made a directory .*File exists"):
        write_store(directory, make_stories(), model="a/b", layer=2)
    assert directory.is_dir() and not list(directory.iterdir())


def test_looking_whether_a_directory_can_be_made_makes_none(tmp_path, monkeypatch):
    """And says so where it cannot: read-only, below a file, or with a name that is too long."""
    check_new_directory(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below", "x" * 300):
        with pytest.raises(BadInput, match=f"{name} cannot be made a directory .*; give the store another"):
            check_new_directory(tmp_path / name)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(BadInput, match=rf"b cannot be made a directory \({re.escape(str(tmp_path))} is read-only\)"):
        check_new_directory(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_facts_do_not_stand_in_for_what_was_written(tmp_path):
    manifest = write_store(tmp_path / "acts", make_stories(), model="a/b", layer=2, rows=5, width=1, shards=[])
    assert (manifest["rows"], manifest["width"], len(manifest["shards"])) == (32, D, 1)
    open_activations(str(tmp_path / "acts"))[0]
