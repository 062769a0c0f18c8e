"""Files and texts that were made to do harm: nothing in them is run, no memory is taken on their word, each is refused.

What single bytes can do is tried at random in test_torch_file, test_pretrained and test_gpt_neo.
"""

import io
import json
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from fuzzing import FUZZ, cuts, flip, loaded_or_refused, splices
from hypothesis import given
from hypothesis import strategies as st
from running import REPOSITORY
from safetensors.numpy import save

from jax_sae import load_autoencoder
from jax_sae.activations.array_sources import open_activations
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import open_split
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.language_model.text import Stories, load_tokenizer

DATA = REPOSITORY / "tests" / "data"
SMALL, DEMO = DATA / "gpt_neo_safetensors", REPOSITORY / "jax_sae" / "demo" / "model"


# Memory


def archive(entries: dict[str, bytes], **lies: Any) -> bytes:
    """A zip archive as torch.save writes; of its last entry, the table of contents says `lies`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in entries.items():
            out.writestr(name, content)
        for field, value in lies.items():
            setattr(out.filelist[-1], field, value)
    return file.getvalue()


def described(elements: int) -> bytes:
    """The data.pkl of one float32 tensor of that many elements."""
    number = b"\x8a\x08" + elements.to_bytes(8, "little")
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + number + b"\x85K\x01\x85\x89}tR."


def header(tensors: dict[str, list[int]], claimed: int | None = None) -> bytes:
    """A safetensors file without values: of float32 tensors of these shapes, one after another."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * int(np.prod(shape, dtype=object))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text


def entries_without_end(number: int) -> bytes:
    """An archive whose table of contents has the same entry so many times, 52 bytes each."""
    content = archive({"a/data": b""})
    table, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    size = struct.pack("<I", number * (end - table))
    return content[:table] + content[table:end] * number + content[end : end + 12] + size + content[end + 16 :]


def gibibytes_of_noughts(number: int) -> bytes:
    """They compressed, about 1 MB each: the same block over and over."""
    compress = zlib.compressobj(wbits=-15)
    block = compress.compress(bytes(1 << 20)) + compress.flush(zlib.Z_FULL_FLUSH)
    return block * (1024 * number) + compress.flush()


BOMB = {"compress_type": zipfile.ZIP_DEFLATED, "file_size": 4 << 30}
TERABYTE = {"file_size": 1 << 40}
FLOATS = bytes(400)
TORCH_FILES = {
    "an entry that claims a terabyte": lambda: archive(
        {"a/data.pkl": described(1 << 38), "a/data/0": FLOATS}, **TERABYTE
    ),
    "an entry that claims to have one in the file": lambda: archive(
        {"a/data.pkl": described(1 << 38), "a/data/0": FLOATS}, **TERABYTE, compress_size=1 << 40
    ),
    "a bomb for values": lambda: archive(
        {"a/data.pkl": described(1 << 30), "a/data/0": gibibytes_of_noughts(4)}, **BOMB
    ),
    "a bomb for a description": lambda: archive({"a/data/0": FLOATS, "a/data.pkl": gibibytes_of_noughts(4)}, **BOMB),
    "a description of 16 MB": lambda: archive({"a/data.pkl": b"]" * (16 << 20)}),
    "a description of a million lists": lambda: archive({"a/data.pkl": b"]" * (1 << 20)}),
    "tuples that double 60 times as a function": lambda: archive({"a/data.pkl": b")" + b"q\0h\0\x86" * 60 + b")R."}),
    "a million entries": lambda: entries_without_end(10**6),
}
SAFETENSORS_FILES = {
    "a header that claims a terabyte": lambda: header({"x": [8, 8]}, claimed=1 << 40),
    "a tensor of a terabyte": lambda: header({"x": [1 << 30, 256]}),
}
CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": 10**12},
    {"hidden_size": 2**24, "num_heads": 1},
    {"vocab_size": 2**24},
    {"max_position_embeddings": 2**24},
    {"intermediate_size": 2**24},
    {"num_layers": 10**9, "attention_layers": None},
    {"num_layers": 900, "attention_layers": None, "attention_types": [[[0] * 10**6, 10**12]]},
    {"num_layers": 900, "attention_layers": ["global"] * 900},
]

CHILD = """
import pathlib, resource, sys
from jax_sae.activations.array_sources import open_activations
from jax_sae.errors import BadInput
from jax_sae.language_model.pretrained import load_language_model

def load(path):
    return load_language_model(path, 1) if pathlib.Path(path).is_dir() else open_activations(path)

harmless, paths = sys.argv[1:4], sys.argv[4:]
for path in harmless:
    load(path)
now = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), resource.RLIM_INFINITY))
for path in paths:
    try:
        print("LOADED", path, load(path))
    except BadInput as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits a process's memory so")
def test_no_file_takes_memory_on_its_word(tmp_path: Path) -> None:
    """A process that may have 256 MB more than for harmless files refuses every one of them, each by its name."""
    paths = []
    for i, (ending, make) in enumerate(
        [("pt", make) for make in TORCH_FILES.values()] + [("safetensors", make) for make in SAFETENSORS_FILES.values()]
    ):
        paths.append(tmp_path / f"{i}.{ending}")
        paths[-1].write_bytes(make())
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    models: list[dict[str, Path | None]] = [{"config.json": large}]
    models.append({"model.safetensors.index.json": large, "model.safetensors": None})
    many_names = tmp_path / "names.safetensors"
    many_names.write_bytes(header({f"{i}": [0] for i in range(500_000)}))
    models.append({"model.safetensors": many_names})
    paths.append(many_names)
    for i, config in enumerate(CONFIGS):
        path = tmp_path / f"config{i}.json"
        path.write_text(json.dumps(json.loads((SMALL / "config.json").read_text()) | config))
        models.append({"config.json": path})
    for i, files in enumerate(models):
        paths.append(tmp_path / f"model{i}")
        paths[-1].mkdir()
        for name, target in ({name: SMALL / name for name in ("config.json", "model.safetensors")} | files).items():
            if target is not None:
                (paths[-1] / name).symlink_to(target)
    np.save(tmp_path / "x.npy", np.ones((2, 2), np.float32))
    harmless = [SMALL, DATA / "torch_save" / "tensor.pt", tmp_path / "x.npy"]
    command = [sys.executable, "-c", CHILD, *map(str, harmless), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for path, line in zip(paths, lines, strict=True):
        assert line.startswith(str(path)) and len(line) < 1000, (path, line)


# A file of one array


X = np.arange(12, dtype=np.float32).reshape(4, 3)
ONE = save({"x": X})
START = len(ONE) - X.nbytes
SHAPES = st.lists(st.sampled_from([-1, 0, 1, 3, 4, 12, 2**31, 2**33 - 1]), max_size=9)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F64", "BF16", "I32", "F4", "F8_E4M3", "BOOL", "C64", "\x1b[31m"])
        | st.none(),
        "shape": SHAPES | st.none(),
        "data_offsets": st.lists(st.sampled_from([-1, 0, 1, 24, 48, 2**64 - 1, 2**64]), min_size=2, max_size=2),
        "more": st.none(),
    },
)


def with_entry(changes: dict[str, Any]) -> bytes:
    """The file with some fields of its header changed."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]} | changes}).encode()
    return len(text).to_bytes(8, "little") + text + X.tobytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to be written over and over."""
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def rows(path: Path, content: bytes) -> np.ndarray | None:
    """The rows in a file of that content; None where it is refused."""
    path.write_bytes(content)
    opened = loaded_or_refused(lambda: open_activations(str(path))[0], "x.safetensors")
    return None if opened is None else opened.read(0, len(opened))


@FUZZ
@given(bit=st.integers(0, 8 * len(ONE) - 1))
def test_a_flipped_bit_in_an_array_changes_one_number_at_most(path: Path, bit: int) -> None:
    """The one that it lies in: the format has no checksum. In the header it changes nothing, or the file is refused."""
    content = flip(ONE, bit)
    found = rows(path, content)
    assert found is None or found.tobytes() == (content if bit // 8 >= START else ONE)[START:]


@FUZZ
@given(content=HEADERS.map(with_entry) | cuts(ONE) | splices(ONE[:START]) | st.binary(max_size=40))
def test_a_damaged_file_of_one_array_holds_as_many_numbers_or_is_refused(path: Path, content: bytes) -> None:
    """Lengths, places and kinds that lie; bytes lost, put in or changed."""
    found = rows(path, content)
    assert found is None or found.size * np.dtype(np.float16).itemsize <= X.nbytes


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": [2**62, 0]},
        {"x": [0, 2**63]},
        {"x": [2**32, 2**31, 0]},
        {"x": [0] * 100},
        {"a\n\x1b[31m": [0, 3], "b" * 10**6: [0, 3]},
    ],
    ids=["2**62", "2**63", "2**63 in two", "100 axes", "names"],
)
def test_arrays_and_names_that_cannot_be_are_refused(path: Path, tensors: dict[str, list[int]]) -> None:
    """Sizes beyond any array's beside a size of nought, which takes no bytes; names that no message could show."""
    assert rows(path, header(tensors)) is None


# Texts and tokenizers


STORIES = {
    "HTML": "<script>alert(1)</script> &lt;b&gt; <!-- ${7*7} {{7*7}} `touch hacked` $(touch hacked) -->",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\x1b[31m\x1b]0;hacked\x07",
    "NUL": "Once\0upon",
    "marks that turn the direction round": "a\u202eb\u200fc\u2066d\ufeff",
    "no characters": "\uffff\ufffe\U0010ffff",
    "100 kB without white space": "a" * 100_000,
    "100 kB of all signs without white space": "".join(chr(33 + (i * i * 7919 + i) % 90) for i in range(100_000)),
    "accents on accents": "e" + "\u0301" * 50_000,
    "the mark between stories": "Once<|endoftext|>upon <|endoftext|>",
}


@pytest.mark.parametrize("text", STORIES.values(), ids=STORIES.keys())
def test_any_text_becomes_ids_of_the_vocabulary_and_back(text: str) -> None:
    """Through rows of a dataset, cut at the model's positions; the whole decodes to the same text."""
    tokenizer = load_tokenizer(str(DEMO))
    stories = Stories(Dataset.from_dict({"text": [text, "Once."]}), "text", tokenizer, max_tokens=512, vocab_size=2048)
    story, once = stories.read([0, 1])
    assert 0 < len(story) <= 512 and story.token_ids.dtype == np.int32
    assert 0 <= story.token_ids.min() and story.token_ids.max() < 2048
    whole = Stories(stories.rows, "text", tokenizer, max_tokens=10**6, vocab_size=2048).read([0])[0]
    assert tokenizer.decode(whole.token_ids) == text and len(whole) == len(story) + story.tokens_cut
    model = load_language_model(str(DEMO), 1)
    assert np.isfinite(model.activations([story.token_ids])[0]).all()
    np.testing.assert_array_equal(model.activations(["Once."])[0], model.activations([once.token_ids])[0])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", b'{"text": "a\\ud800b"}\n', "surrogate"),
        ("x.jsonl", b'{"text": "a\0b"}\n', "cannot be loaded as a dataset"),
        ("x.jsonl", b'{"text": "a\\u0000\\u001b[31m<b>"}\n', ["a\0\x1b[31m<b>"]),
        ("x.jsonl", b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", "cannot be loaded as a dataset"),
        ("x.txt", b"a\xff\n", "cannot be loaded as a dataset"),
        ("x.txt", "a\0\x1b\u2028\x85<b>\n".encode(), ["a\0\x1b\u2028\x85<b>"]),
        ("x.csv", b"text\na\0\n", ["a\0"]),
    ],
)
def test_texts_in_files_are_read_as_they_are_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, expected: list[str] | str
) -> None:
    """Half a surrogate pair is no text; control characters are."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=f"{name}: .*{expected}"):
            open_split(str(tmp_path / name), "train", "text")
    else:
        assert open_split(str(tmp_path / name), "train", "text")["text"][:] == expected


def test_code_beside_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever config.json and tokenizer_config.json say of classes in files of the directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "hostile.py").write_text("open('hacked', 'w')\nclass Hostile: pass\n")
    for name, key in [("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")]:
        path = tmp_path / "model" / name
        hostile = {"auto_map": {key: "hostile.Hostile", "AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | hostile | {"tokenizer_class": "Hostile"}))
    model = load_language_model(str(tmp_path / "model"), 1)
    try:
        assert len(model.activations(["Once."])) == 1
    except BadInput as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "hacked").exists()


# Names


@pytest.mark.parametrize("name", ["../../x", "../F8", "/etc/passwd", "F8/../F8", "", "F8\0", "\ud800", "params", "."])
def test_members_are_chosen_among_their_names_only(demo_run: Path, name: str) -> None:
    """No name leads anywhere."""
    with pytest.raises(BadInput, match=r"has 0 members with name .*; say name= one of F8, "):
        load_autoencoder(demo_run, name=name)


@pytest.mark.parametrize("run", ["../../x", "/etc", "/etc/passwd", "", "a\0b", "~nobody-here/x", "\ud800"])
def test_runs_that_are_none_are_refused(run: str) -> None:
    """Wherever the path leads."""
    with pytest.raises(BadInput):
        load_autoencoder(run)
