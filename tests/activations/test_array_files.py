"""Files of arrays that other programs wrote are read where they lie, or refused with BadInput that names them."""

import json
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, Dataset, DatasetDict, Features, List, Value
from safetensors.numpy import save_file

from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.arrays import Rows, StoryArrays
from jax_sae.activations.store import write_store
from jax_sae.errors import BadInput

WRITTEN_BY_TORCH = Path(__file__).parents[1] / "data" / "torch_save"
N, T, D = 5, 6, 4
STORIES = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float16).astype(np.float32)
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1] * 6, [0] * 6, [0, 1, 0, 1, 0, 1]])
TOKENS = [x[m == 1].tolist() for x, m in zip(STORIES, MASK, strict=True)]


def tokens_of(path: Path, array: str = "", mask: str = "") -> list[list[list[float]]]:
    """Each story's activations."""
    found, _ = open_activations(str(path), array, mask)
    assert isinstance(found, StoryArrays)
    return [found.read(i).tolist() for i in range(len(found))]


WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray]], Any]] = {
    "x.npz": lambda path, arrays: np.savez(path, **arrays),
    "x.safetensors": lambda path, arrays: save_file(arrays, path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_stories_and_their_mask_are_read_by_their_usual_names(tmp_path: Path, name: str, dtype: Any) -> None:
    """Beside token ids, which are not of floats; whatever the activations are called where they alone are."""
    ids, x = np.zeros((N, T), np.int64), STORIES.astype(dtype)
    expected = [x.astype(np.float32)[i][MASK[i] == 1].tolist() for i in range(N)]
    for array, mask in (("activations", "attention_mask"), ("blocks.0.hook_resid_post", "mask")):
        WRITERS[name](tmp_path / name, {"input_ids": ids, array: x, mask: MASK})
        assert tokens_of(tmp_path / name) == expected
        _, notes = open_activations(str(tmp_path / name))
        assert f"note          {tmp_path / name}: the array '{array}' of 3, with the mask '{mask}'" in notes
        assert len(notes) == 1 + (name == "x.npz" and dtype == ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", WRITERS)
def test_an_array_of_several_is_chosen_by_its_name(tmp_path: Path, name: str) -> None:
    """One that is there; where it is not clear which is meant, the names are listed."""
    WRITERS[name](tmp_path / name, {"a": STORIES, "b": STORIES[0], "keep": MASK})
    path = tmp_path / name
    assert tokens_of(path, "a", "keep") == TOKENS and tokens_of(path, "a") == STORIES.tolist()
    rows, _ = open_activations(str(path), "b")
    assert isinstance(rows, Rows) and np.array_equal(rows.read(0, T), STORIES[0])
    for array, mask, message in [
        ("", "", r"holds 3 arrays \(a, b, keep\); one array \[N, D\] .*: name one of them by activations.array"),
        ("c", "", r"holds no array 'c' \(there are a, b, keep\)"),
        ("a", "c", "activations.mask is 'c', but there is neither an array nor a file of that name"),
        ("b", "keep", "here they are rows"),
        ("keep", "", "the array is of int64"),
    ]:
        with pytest.raises(BadInput, match=message):
            open_activations(str(path), array, mask)


def test_the_mask_of_an_npy_file_is_another_one(tmp_path: Path) -> None:
    """Its content is part of what a run remembers."""
    np.save(tmp_path / "x.npy", STORIES)
    np.save(tmp_path / "m.npy", MASK.astype(bool))
    assert tokens_of(tmp_path / "x.npy", mask=str(tmp_path / "m.npy")) == TOKENS
    with_mask, _ = open_activations(str(tmp_path / "x.npy"), mask=str(tmp_path / "m.npy"))
    without, _ = open_activations(str(tmp_path / "x.npy"))
    np.save(tmp_path / "m.npy", MASK == 0)
    another, _ = open_activations(str(tmp_path / "x.npy"), mask=str(tmp_path / "m.npy"))
    assert len({with_mask.digest, without.digest, another.digest}) == 3
    np.savez(tmp_path / "two.npz", MASK, MASK)
    for mask, message in (("two.npz", "holds 2 arrays; one, the mask"), ("no.npy", "neither an array nor a file")):
        with pytest.raises(BadInput, match=message):
            open_activations(str(tmp_path / "x.npy"), mask=str(tmp_path / mask))
    with pytest.raises(BadInput, match=r"holds no array 'a' \(there are one without a name\)"):
        open_activations(str(tmp_path / "x.npy"), "a")


def test_bfloat16_by_numpy_is_read_and_said(tmp_path: Path) -> None:
    """In an .npy file and in a store; float8 has lost its name too, and is refused."""
    x = STORIES[0].astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    rows, notes = open_activations(str(tmp_path / "x.npy"))
    assert isinstance(rows, Rows) and np.array_equal(rows.read(0, T), x.astype(np.float32))
    assert len(notes) == 1 and f"{tmp_path / 'x.npy'}: numbers of type |V2" in notes[0]
    write_store(tmp_path / "store", [STORIES[0]], model="a", layer=1, dtype="bfloat16")
    rows, notes = open_activations(str(tmp_path / "store"))
    assert isinstance(rows, Rows) and np.array_equal(rows.read(0, T), x.astype(np.float32)) and notes == []
    np.save(tmp_path / "x.npy", STORIES[0].astype(ml_dtypes.float8_e4m3fn))
    with pytest.raises(BadInput, match=r"x.npy: its numbers have the type \|V1, as np.save leaves of float8"):
        open_activations(str(tmp_path / "x.npy"))


def test_files_that_torch_wrote_are_read() -> None:
    """Stories with a mask, in bfloat16; a list of stories of two types; lists of batches under names."""
    base = (np.arange(24).reshape(2, 4, 3) - 11) / 2
    padded = [base[0, 2:].tolist(), base[1, :3].tolist()]
    assert tokens_of(WRITTEN_BY_TORCH / "stories.pt") == padded
    assert tokens_of(WRITTEN_BY_TORCH / "stories.pt", mask="attention_mask") == padded
    assert tokens_of(WRITTEN_BY_TORCH / "list.pt") == padded
    assert tokens_of(WRITTEN_BY_TORCH / "batches.pt") == [*padded, base[0, :2].tolist()]


# Folders that save_to_disk wrote


@pytest.mark.parametrize("ragged", [False, True])
def test_a_folder_by_save_to_disk_is_read_where_it_lies(tmp_path: Path, ragged: bool) -> None:
    """As SAELens writes it; or with stories of several lengths; or with a vector a row."""
    if ragged:
        Dataset.from_dict({"x": TOKENS[:3]}).save_to_disk(tmp_path / "x")
        assert tokens_of(tmp_path / "x") == TOKENS[:3]
    else:
        features = Features({"hook": Array2D((T, D), "float32"), "token_ids": List(Value("int32"), length=T)})
        rows = Dataset.from_dict({"hook": STORIES, "token_ids": np.zeros((N, T), int)}, features=features)
        rows.save_to_disk(tmp_path / "x", num_shards=2)
        assert tokens_of(tmp_path / "x") == STORIES.tolist()
        found, notes = open_activations(str(tmp_path / "x"))
        assert len(found.arrays) == 2 and "the array 'hook' of 2" in notes[0]
        before = pa.total_allocated_bytes()
        for array in found.arrays:
            assert not array.flags.writeable and not array.flags.owndata
        assert pa.total_allocated_bytes() == before
        rows.add_column("attention_mask", MASK.tolist()).save_to_disk(tmp_path / "masked", num_shards=2)
        assert tokens_of(tmp_path / "masked") == TOKENS
    Dataset.from_dict({"v": STORIES[0].tolist(), "n": [1] * T}).save_to_disk(tmp_path / "rows")
    vectors, _ = open_activations(str(tmp_path / "rows"))
    assert isinstance(vectors, Rows) and np.array_equal(vectors.read(0, T), STORIES[0])


def test_folders_without_one_array_are_refused(tmp_path: Path) -> None:
    """Several splits, no vectors, vectors of several widths, a name for a store."""
    vectors = Dataset.from_dict({"v": [[1.0], [1.0, 2.0]]})
    DatasetDict(a=vectors, b=vectors).save_to_disk(tmp_path / "splits")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    vectors.save_to_disk(tmp_path / "widths")
    write_store(tmp_path / "store", [STORIES[0]], model="a", layer=1)
    for name, array, message in [
        ("splits", "", "has the splits a, b; give the folder of one of them"),
        ("text", "", r"not one of its columns \(text\) has vectors of numbers"),
        ("widths", "", "column 'v': vectors of 1 to 2 numbers, or null; one D was expected"),
        ("store", "x", "is a store, which holds rows alone, but activations.array is given"),
    ]:
        with pytest.raises(BadInput, match=message):
            open_activations(str(tmp_path / name), array)


# What is damaged, or would fill memory


def test_an_npz_file_that_cannot_be_read_in_parts_or_is_damaged_is_refused(tmp_path: Path) -> None:
    """A compressed one could be of any size; every entry has a checksum."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=STORIES)
    with pytest.raises(BadInput, match=r"x.npz is compressed, .*; write it again by np.savez"):
        open_activations(str(path))
    np.savez(path, x=STORIES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"x.npz: cannot be read \(BadZipFile: Bad CRC"):
        open_activations(str(path))
    path.write_bytes(content[:-30])
    with pytest.raises(BadInput, match=r"x.npz is not a whole .npz file"):
        open_activations(str(path))
    for header in (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99, 4), }",
        "{'descr': '|O', 'shape': (1,)}",
        "(",
    ):
        padded = (header.ljust(117) + "\n").encode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + bytes(48))
        with pytest.raises(BadInput, match=r"x.npz: x.npy is not a whole array of numbers") as error:
            open_activations(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process's memory so")
def test_no_file_is_copied_into_memory(tmp_path: Path) -> None:
    """One of 64 MB of each kind is opened and read in part with little more memory than before."""
    x = np.zeros((16, 1024, 1024), np.float32)
    ids = np.zeros((16, 1024), np.int64)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, attention_mask=ids + 1)
    save_file({"x": x, "attention_mask": ids + 1}, tmp_path / "x.safetensors")
    write_zip_of_torch(tmp_path / "x.pt", x)
    del x

    def resident() -> int:
        parts = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * int(next(line for line in parts if line.startswith("Anonymous:")).split()[1])

    before = resident()
    for name in ("x.npy", "x.npz", "x.safetensors", "x.pt"):
        found, _ = open_activations(str(tmp_path / name))
        assert len(found) == 16 and found.digest
        assert resident() - before < 24 << 20, name


def write_zip_of_torch(path: Path, x: np.ndarray) -> None:
    """What `torch.save` writes of a float32 tensor, sizes as four-byte numbers."""
    numbers = [b"J" + struct.pack("<i", n) for n in (x.size, *x.shape, *(step // 4 for step in x.strides))]
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + numbers[0] + b"tQ"
    shape, stride = b"".join(numbers[1:4]) + b"\x87", b"".join(numbers[4:]) + b"\x87"
    pickle = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"\x89}tR."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle)
        archive.writestr("x/data/0", x.tobytes())


def test_a_safetensors_file_of_another_type_names_it(tmp_path: Path) -> None:
    """float8, say."""
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [3, 4], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(
        BadInput, match=r"x.safetensors: the array 'x' is of F8_E4M3; float16, bfloat16, float32, float64"
    ):
        open_activations(str(tmp_path / "x.safetensors"))
