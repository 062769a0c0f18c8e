"""A file is read correctly, or refused with BadInput that names it. `tests/data/torch_save` was written by torch."""

import pickle
import pickletools
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fuzzing import FUZZ, cuts, flips, loaded_or_refused, splices
from hypothesis import given
from hypothesis import strategies as st

from jax_sae.errors import BadInput
from jax_sae.language_model.torch_file import TensorReference, open_torch_file

WRITTEN_BY_TORCH = Path(__file__).parents[1] / "data" / "torch_save"
DTYPES = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
X = np.arange(12).reshape(3, 4)

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0%sX\x03\0\0\0cpuK\x0ctQ"  # persistent id of 12 floats
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"0" + b"%stR"


def view(offset: bytes = b"K\0", shape: bytes = b"K\x03K\x04\x86", stride: bytes = b"K\x04K\x01\x86") -> bytes:
    """Opcodes that push a tensor over 12 stored floats."""
    return TENSOR % (offset + shape + stride + b"\x89}")


def write_archive(path: Path, description: bytes, data: bytes = X.astype("<f4").tobytes(), **others: bytes) -> Path:
    """A zip archive such as torch.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + description + b".")
        archive.writestr("archive/data/0", data)
        for name, content in others.items():
            archive.writestr(f"archive/{name}", content)
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; a bare one by the name ''."""
    root = open_torch_file(path)
    return {name: t.read() for name, t in ({"": root} if isinstance(root, TensorReference) else root).items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to be written over and over."""
    return tmp_path_factory.mktemp("fuzz") / "x.pt"


def test_every_dtype_and_layout_is_read_as_torch_wrote_it() -> None:
    """What is no tensor is left out."""
    tensors = read_all(WRITTEN_BY_TORCH / "dictionary.pt")
    expected: dict[str, Any] = {name: X.astype(name) for name in DTYPES} | {
        "bfloat16": X.astype(ml_dtypes.bfloat16),
        "transposed": X.T.astype(np.float32),
        "middle": X[1:, 1:3].astype(np.float32),
        "scalar": np.float32(7),
        "empty": np.zeros((0, 4), np.float32),
        "parameter": X.astype(np.float32),
    }  # "step", "note" and "list" are no tensors
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == np.shape(value), name
        np.testing.assert_array_equal(tensors[name], value)


def test_a_bare_tensor_is_read() -> None:
    """As activations may come."""
    root = open_torch_file(WRITTEN_BY_TORCH / "tensor.pt")
    assert isinstance(root, TensorReference) and root.shape == (3, 4) and root.dtype == np.float32
    np.testing.assert_array_equal(root.read(), X / 2)


def test_handmade_archives_are_read_so_that_the_refusals_below_mean_something(tmp_path: Path) -> None:
    """They are altered one at a time."""
    np.testing.assert_array_equal(read_all(write_archive(tmp_path / "x.pt", view()))[""], X)
    np.testing.assert_array_equal(read_all(write_archive(tmp_path / "x.pt", view(), byteorder=b"little"))[""], X)
    transposed = view(shape=b"K\x04K\x03\x86", stride=b"K\x01K\x04\x86")
    np.testing.assert_array_equal(read_all(write_archive(tmp_path / "x.pt", transposed))[""], X.T)


@pytest.mark.parametrize(
    ("name", "message"),
    [("before_1_6.pt", "before 1.6"), ("expanded.pt", r"\.contiguous\(\)"), ("negated.pt", "_rebuild_tensor_v2")],
)
def test_what_is_not_read_is_refused_by_name(name: str, message: str) -> None:
    """Files of torch that would need more than this reader does."""
    with pytest.raises(BadInput, match=f"{name}: .*{message}"):
        open_torch_file(WRITTEN_BY_TORCH / name)


class _Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch hacked",)


HUGE = b"\x8a\x08" + (1 << 62).to_bytes(8, "little")
MINUS_ONE = b"J\xff\xff\xff\xff"
LONG = b"\x8a\xff" + b"\x7f" * 255
NESTED = b"(" * 100_000 + b"t" * 100_000
HOSTILE = {
    "a call of os.system": pickle.dumps(_Shell(), protocol=2)[2:-1],
    "a function that only looks like torch's": TENSOR.replace(b"_v2", b"_v9") % b"K\0K\x01\x85K\x01\x85\x89}",
    "a storage of another kind": view().replace(b"ctorch\nFloat", b"ctorch\nQInt8"),
    "a class in a storage's place": view().replace(b"ctorch\nFloatStorage", b"cos\nsystem"),
    "a missing storage": view().replace(b"X\x01\0\0\x000", b"X\x01\0\0\x001"),
    "more elements than stored": view().replace(b"K\x0ct", HUGE + b"t"),
    "fewer elements than stored": view().replace(b"K\x0ct", b"K\x0bt"),
    "a view beyond the storage": view(offset=b"K\x01"),
    "a stride beyond the storage": view(stride=b"K\x05K\x01\x86"),
    "a huge stride": view(stride=HUGE + b"K\x01\x86"),
    "a huge offset": view(offset=HUGE),
    "a huge size without a step": view(shape=HUGE + b"K\x04\x86", stride=b"K\0K\x01\x86"),
    "huge sizes beside a size of nought": view(shape=b"K\0" + HUGE + HUGE + b"\x87", stride=b"K\x01K\x01K\x01\x87"),
    "a negative stride": view(offset=b"K\x08", stride=MINUS_ONE + b"K\x01\x86"),
    "a negative size": view(shape=MINUS_ONE + b"K\x04\x86"),
    "a negative offset": view(offset=MINUS_ONE),
    "shape and stride of different lengths": view(stride=b"K\x01\x85"),
    "text for a shape": view(shape=b"X\x01\0\0\x00a"),
    "a size that is a float": view(shape=b"G@\x08\0\0\0\0\0\0K\x04\x86"),
    "a thousand axes": view(shape=b"(" + b"K\x01" * 1000 + b"t", stride=b"(" + b"K\x01" * 1000 + b"t"),
    "deeply nested tuples": NESTED,
    "deeply nested tuples as a key": b"}" + NESTED + view() + b"s",
    "deeply nested tuples for an offset": view(offset=NESTED),
    "tuples that double 60 times as a key": b"}K\0" + b"q\0h\0\x86" * 60 + view() + b"s",
    "a memo of 2**31 places": b"]r\xff\xff\xff\x7f",
    "a text that claims 4 GB": b"X\xff\xff\xff\xff",
    "a set": b"c__builtin__\nset\n]\x85R",
    "attributes for a tensor": view() + b"}b",
    "a key without its value": b"}(X\x01\0\0\x00au",
    "an empty stack": b"R",
    "a mark only": b"(",
    "nothing": b"",
    "an unknown opcode": b"\xff",
    "a number": b"K\x05",
    "a list of tensors": b"](" + view() + b"e",
    "a dictionary without tensors": b"}X\x01\0\0\x00aK\x05s",
    "a number for a key": b"}K\x05" + view() + b"s",
    "a key that no message could show": b"}X\x02\0\0\0a\n" + view() + b"s",
    "a key of a megabyte": b"}X\0\0\x10\0" + b"a" * (1 << 20) + view() + b"s",
    "a kind that no message could show": view().replace(b"FloatStorage", b"\x1b[31m" + b"x" * (1 << 20)),
    "a function of a megabyte": b"c" + b"x" * (1 << 20) + b"\nx\n)R",
    "tuples that double 60 times as a function": b")" + b"q\0h\0\x86" * 60 + b")R",
    "deeply nested tuples as a function": NESTED + b")R",
    "numbers of 255 bytes": view(shape=b"(" + LONG * 30 + b"t", stride=b"(" + b"K\1" * 30 + b"t", offset=LONG),
    "a text with a bad escape": b"S'\\d'\n",
    "a hundred thousand lists": b"]" * (1 << 17),
    "a description of 16 MB": b"N" * (16 << 20),
}


@pytest.mark.parametrize("description", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_descriptions_are_refused_without_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, description: bytes
) -> None:
    """No file is made, little memory is taken, and the message is one line."""
    monkeypatch.chdir(tmp_path)
    path = write_archive(tmp_path / "x.pt", description)
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"x.pt") as error:
        read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and len(str(error.value)) < 1000 and str(error.value).isprintable()
    assert [found.name for found in tmp_path.iterdir()] == ["x.pt"]


def test_compressed_entries_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    """200 MB in 200 kB."""
    for name, size in [("data.pkl", 200 << 20), ("data/0", 200 << 20)]:
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + view().replace(b"K\x0ct", b"\x8a\x04\0\0\x20\x03t") + b".")
            with archive.open(zipfile.ZipInfo("a/data/0"), "w") as stream:
                stream.write(X.astype("<f4").tobytes())
        with zipfile.ZipFile(tmp_path / "bomb.pt") as archive:
            kept = {entry: archive.read(entry) for entry in archive.namelist() if not entry.endswith(name)}
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in kept.items():
                archive.writestr(entry, content, zipfile.ZIP_STORED)
            archive.writestr(f"a/{name}", bytes(size))
        tracemalloc.start()
        with pytest.raises(BadInput, match=r"bomb.pt: .*compressed"):
            read_all(tmp_path / "bomb.pt")
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


def test_other_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    """Pointers, other archives, other byte orders."""
    for content, message in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"", "zip archive"),
        (b"hello", "zip archive"),
    ]:
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(BadInput, match=rf"x.pt: .*{message}"):
            open_torch_file(tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"absent.pt: .*No such file"):
        open_torch_file(tmp_path / "absent.pt")
    with pytest.raises(BadInput, match="byte order"):
        open_torch_file(write_archive(tmp_path / "x.pt", view(), byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("letter.txt", "hello")
    with pytest.raises(BadInput, match="did not write this archive"):
        open_torch_file(tmp_path / "x.pt")
    with pytest.raises(BadInput, match="booleans"):
        read_all(write_archive(tmp_path / "x.pt", view().replace(b"Float", b"Bool"), bytes(range(12))))


@pytest.mark.parametrize(
    "names",
    [
        ["a/data.pkl", "a/data/0", "a/data/0"],
        ["a/data.pkl", "a/data/0", "b/data.pkl"],
        ["a/data.pkl", "a/data/0", "a/data.pkl"],
        ["a/b/data.pkl", "a/b/data/0"],
        ["../data.pkl", "../data/0"],
        ["/data.pkl", "/data/0"],
        ["a/data.pkl", "a/data/0", "a/../../x"],
        ["a/data.pkl", "a/data/0", "/etc/x"],
        ["a\n\x1b[31m/data.pkl", "a\n\x1b[31m/data/0"],
        ["a/data.pkl", "a/data/0", "a/" + "b" * 60_000],
    ],
    ids=lambda names: ascii(names)[:60],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_torch_does_not_write_are_refused(path: Path, names: list[str]) -> None:
    """Two of one name, an archive within, and names that lead elsewhere or that no message could show."""
    contents = {"data.pkl": b"\x80\x02" + view() + b".", "0": X.astype("<f4").tobytes()}
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, contents.get(name.rpartition("/")[2], b""))
    with pytest.raises(BadInput, match=r"x.pt: torch.save did not write this archive") as error:
        read_all(path)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    """Else a view could reach beyond the storage."""
    reference = open_torch_file(write_archive(tmp_path / "x.pt", view()))
    assert isinstance(reference, TensorReference)
    write_archive(tmp_path / "x.pt", view(), b"short")
    with pytest.raises(BadInput, match="has changed"):
        reference.read()


# Damage and lies at random

DICTIONARY = (WRITTEN_BY_TORCH / "dictionary.pt").read_bytes()


def lies(content: bytes) -> st.SearchStrategy[bytes]:
    """An archive in whose headers one number is another."""
    headers = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22}  # the mark with which each begins, and its size
    starts = [(match.start(), size) for mark, size in headers.items() for match in re.finditer(mark, content)]
    places = [start + at for start, size in starts for at in range(4, size)]
    numbers = st.sampled_from([0, 1, 8, 99, 2**15, 2**31, 2**32 - 1]) | st.integers(0, len(content))
    values = st.builds(lambda number, size: number.to_bytes(4, "little")[:size], numbers, st.sampled_from([1, 2, 4]))
    return st.builds(lambda at, new: content[:at] + new + content[at + len(new) :], st.sampled_from(places), values)


@FUZZ
@given(content=flips(DICTIONARY) | cuts(DICTIONARY) | splices(DICTIONARY) | lies(DICTIONARY))
def test_a_damaged_file_gives_what_was_saved_or_is_refused(path: Path, content: bytes) -> None:
    """Bits turned round, bytes lost, put in or changed, headers that lie: the checksums cover every value and name."""
    path.write_bytes(content)
    tensors, expected = loaded_or_refused(lambda: read_all(path), "x.pt"), read_all(WRITTEN_BY_TORCH / "dictionary.pt")
    if tensors is not None:
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].tobytes() == expected[name].tobytes() for name in expected)


PIECES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
PIECES += [STORAGE % b"0", STORAGE % b"7", TENSOR, view(), HUGE, MINUS_ONE, NESTED[:99], NESTED[-99:], b"X\1\0\0\0a"]
PIECES += [b"K\0", b"K\4", b"q\0", b"h\0", b"\x85R", b"\x86R", b"tR", b"cos\nsystem\n", b"X\x0c\0\0\0touch hacked"]
NUMBERS = st.integers(-1, 13) | st.sampled_from([2**31, 2**62, 2**64, 2**2000])
VIEWS = st.builds(
    lambda *numbers: view(*(pickle.dumps(n, protocol=2)[2:-1].replace(b"q\0", b"") for n in numbers)),
    NUMBERS,
    st.lists(NUMBERS, max_size=3).map(tuple),
    st.lists(NUMBERS, max_size=3).map(tuple),
)
PROGRAMS = st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=30).map(b"".join)


@FUZZ
@given(description=PROGRAMS | VIEWS | splices(view()) | splices(b"}X\1\0\0\0a" + view() + b"s"))
def test_a_description_with_a_right_checksum_loads_stored_values_or_is_refused(path: Path, description: bytes) -> None:
    """Whatever opcodes it has, in whatever order."""
    write_archive(path, description)
    tensors = loaded_or_refused(lambda: read_all(path), "x.pt")
    assert all(np.isin(tensor, X).all() for tensor in (tensors or {}).values())
    assert not Path("hacked").exists()


@FUZZ
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda end: b"PK\5\6" + end))
def test_any_other_bytes_are_refused(path: Path, content: bytes) -> None:
    """Also where they end as an archive does."""
    path.write_bytes(content)
    assert loaded_or_refused(lambda: read_all(path), "x.pt") is None
