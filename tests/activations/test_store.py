"""A store gives back what was written, or is refused with BadInput that names the file."""

import errno
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusals import refused_file

from jax_sae.activations import store
from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.arrays import Rows
from jax_sae.activations.store import check_new_directory, read_manifest, write_store
from jax_sae.errors import BadInput, RunFailed

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


# What is not whole, or not true, is refused


def test_every_flipped_bit_of_a_shard_is_noticed(three_shards):
    shard = three_shards / "shard-00001.npy"
    content = shard.read_bytes()
    rng = random.Random(0)
    for place in [*range(0, 128, 3), *(rng.randrange(128, len(content)) for _ in range(40))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        shard.write_bytes(damaged)
        refused_file(three_shards, shard, "sha256")
    shard.write_bytes(content)
    open_activations(str(three_shards))[0]


@pytest.mark.parametrize("kept", [0, 60, 128, 150, -1])
def test_a_truncated_shard_is_noticed(three_shards, kept):
    shard = three_shards / "shard-00002.npy"
    shard.write_bytes(shard.read_bytes()[:kept])
    refused_file(three_shards, shard)


def test_a_missing_shard_is_noticed(three_shards):
    (three_shards / "shard-00001.npy").unlink()
    refused_file(three_shards, three_shards, "shard-00001.npy", "missing")


def test_exchanged_shards_are_noticed(three_shards):
    a, b = three_shards / "shard-00000.npy", three_shards / "shard-00001.npy"
    a.rename(three_shards / "c.npy")
    b.rename(a)
    (three_shards / "c.npy").rename(b)
    refused_file(three_shards, a)


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
    refused_file(three_shards, three_shards)


WRONG = [None, True, 0, -1, 1.5, 10**400, "", "x", [], [1], {}, {"a": {}}, "x" * 10_000]


@pytest.mark.parametrize("key", ["format", "dtype", "width", "rows", "shards"])
def test_a_manifest_with_a_missing_entry_or_one_of_a_wrong_type_is_refused(three_shards, key):
    manifest = (three_shards / "manifest.json").read_text()
    for wrong in WRONG:
        change_manifest(three_shards, lambda m, wrong=wrong: m.update({key: wrong}))
        refused_file(three_shards, three_shards / "manifest.json")
    change_manifest(three_shards, lambda m: m.pop(key))
    refused_file(three_shards, three_shards / "manifest.json", key)
    (three_shards / "manifest.json").write_text(manifest)
    open_activations(str(three_shards))[0]


@pytest.mark.parametrize("key", ["file", "rows", "sha256"])
def test_so_is_one_of_a_shard(three_shards, key):
    for wrong in WRONG:
        change_manifest(three_shards, lambda m, wrong=wrong: m["shards"][1].update({key: wrong}))
        refused_file(three_shards, three_shards / "manifest.json", "shard 1", key)
    change_manifest(three_shards, lambda m: m["shards"][1].pop(key))
    refused_file(three_shards, three_shards / "manifest.json", "shard 1", key, "missing")
    for wrong in WRONG[:-3]:
        change_manifest(three_shards, lambda m, wrong=wrong: m["shards"].__setitem__(1, wrong))
        refused_file(three_shards, three_shards / "manifest.json", "shard 1")


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
    refused_file(three_shards, three_shards / "manifest.json", "shard 0", "the plain name")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": "other 1"}', b'{"rows": NaN}'],
)
def test_a_manifest_that_is_none_is_refused(three_shards, content):
    (three_shards / "manifest.json").write_bytes(content)
    refused_file(three_shards, three_shards / "manifest.json")


def test_a_directory_without_a_manifest_is_not_a_whole_store(three_shards):
    (three_shards / "manifest.json").unlink()
    refused_file(three_shards, three_shards, "manifest.json")


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
