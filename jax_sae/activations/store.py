"""Activations on disk: .npy shards and a JSON manifest, or a bare array file.

    my_store/
      manifest.json      format, model, layer, dtype, width, rows, and of each shard its rows and sha256
      shard-00000.npy    [rows, D] float32 or float16; one story after another, in the order they were read
      shard-00001.npy

The manifest is written last and by renaming, so a directory with a manifest is whole. `scripts/harvest_activations.py`
writes a store with our own GPT-Neo, `scripts/export_torch_activations.py` one of any Hugging Face model with torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.errors import BadInput

FORMAT = "jax_sae activations 1"
SHARD_BYTES = 256 * 2**20
DTYPES = ("float32", "float16")


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations [N, D] that lie in several memory-mapped arrays, one after another."""

    arrays: tuple[np.ndarray, ...]
    name: str

    def __len__(self) -> int:
        """Return the number of rows N."""
        return sum(len(array) for array in self.arrays)

    @property
    def width(self) -> int:
        """D."""
        return self.arrays[0].shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as a new float32 array [stop - start, D]."""
        pieces = []
        for array in self.arrays:
            pieces.append(array[max(start, 0) : max(stop, 0)].astype(np.float32))
            start, stop = start - len(array), stop - len(array)
        return np.concatenate(pieces)


def write_store(
    directory: Path, stories: Iterable[np.ndarray], *, model: str, layer: int, dtype: str = "float32", **facts: Any
) -> dict[str, Any]:
    """Write the activations of stories, each [T, D], as a store and return its manifest.

    Memory holds one shard (256 MiB) at a time.

    Args:
        directory: is created; must not exist or be empty.
        stories: activations of one story after another, all of the same D, or blocks of rows.
        model: where they come from: Hugging Face id or directory.
        layer: which of its hidden_states.
        dtype: 'float32', or 'float16' (half the disk; 11 bits of mantissa, at most 65504).
        **facts: anything else that should stand in the manifest (text, tokenizer, ...); JSON values.

    Raises:
        BadInput: if the directory holds something, the dtype is unknown, or an activation is not finite in it.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}; a store holds {' or '.join(DTYPES)}")
    if directory.exists() and any(directory.iterdir()):
        raise BadInput(f"{directory} is not empty; give the store a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    pending: list[np.ndarray] = []
    width = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards):05d}.npy"
        rows = np.concatenate(pending)
        np.save(path, rows)
        shards.append({"file": path.name, "rows": len(rows), "sha256": sha256(path)})
        pending.clear()

    for story in stories:
        width = width or story.shape[1]
        with np.errstate(over="ignore"):  # reported below, with what to do
            rows = story.astype(dtype)
        if rows.shape[1] != width:
            raise BadInput(f"a story has activations of width {rows.shape[1]}, those before it {width}; a store has one width")
        if not np.isfinite(rows).all():
            hint = "; float16 ends at 65504: use float32" if np.isfinite(story).all() else ""
            raise BadInput(f"{directory}: a story's activations are not finite in {dtype}{hint}")
        pending.append(rows)
        if sum(piece.nbytes for piece in pending) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    if not shards:
        raise BadInput(f"{directory}: there were no activations to write; is the text empty?")
    manifest = {
        "format": FORMAT,
        "model": model,
        "layer": layer,
        "dtype": dtype,
        "width": width,
        "rows": sum(shard["rows"] for shard in shards),
        "shards": shards,
        **facts,
    }
    temporary = directory / "manifest.json.partial"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, directory / "manifest.json")
    return manifest


def open_rows(path: str) -> Rows:
    """Open a store's directory, or an .npy, .safetensors or .pt file that holds one array [N, D].

    Arrays stay on disk where the format allows (.npy); float16, float32 and float64 are read, as float32.

    Raises:
        BadInput: if there is nothing to read at `path`, it is damaged, or it is not one two-dimensional array of floats.
    """
    where = Path(path)
    if where.is_dir():
        return _open_store(where)
    if not where.is_file():
        raise BadInput(
            f"activations.path is {path!r}, but there is no such file or directory; "
            "give a store's directory, or an .npy, .safetensors or .pt file with one array [N, D]"
        )
    if where.suffix == ".npy":
        array = _open_npy(where)
    elif where.suffix == ".safetensors":
        array = _open_safetensors(where)
    elif where.suffix in (".pt", ".pth", ".bin"):
        array = _open_torch(where)
    else:
        raise BadInput(f"{path}: the name ends in {where.suffix!r}; .npy, .safetensors or .pt was expected")
    return Rows((_check(array, where),), path)


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        BadInput: if there is none, or it is not one of this format.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{directory} is not a store of activations: it has no readable manifest.json") from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadInput(f"{path} is not a manifest of the format {FORMAT!r}")
    return manifest


def _open_store(directory: Path) -> Rows:
    manifest = read_manifest(directory)
    arrays = []
    for shard in manifest["shards"]:
        path = directory / Path(shard["file"]).name
        if not path.is_file():
            raise BadInput(f"{directory}: the manifest names {path.name}, which is missing; export the store again")
        array = _check(_open_npy(path), path)
        expected = (shard["rows"], manifest["width"])
        if array.shape != expected or str(array.dtype) != manifest["dtype"]:
            raise BadInput(
                f"{path}: holds {array.dtype}{list(array.shape)}, but the manifest says {manifest['dtype']}{list(expected)}"
            )
        if sha256(path) != shard["sha256"]:
            raise BadInput(f"{path} is damaged: its sha256 is not the manifest's; export the store again")
        arrays.append(array)
    return Rows(tuple(arrays), str(directory))


def _open_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path} is not a whole .npy file: {error}") from error


def _open_safetensors(path: Path) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(_only(list(file.keys()), path))
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole .safetensors file: {error}") from error


def _open_torch(path: Path) -> np.ndarray:
    from jax_sae.language_model.torch_file import open_torch_file

    content = open_torch_file(path)
    if isinstance(content, dict):
        content = content[_only(list(content), path)]
    return content.read()


def _only(names: Sequence[str], path: Path) -> str:
    if len(names) != 1:
        raise BadInput(f"{path} holds {len(names)} arrays ({', '.join(sorted(names)[:8])}); one array [N, D] was expected")
    return names[0]


def _check(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape:
        raise BadInput(f"{path}: the array has shape {list(array.shape)}; [N, D], N tokens of D numbers, was expected")
    if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise BadInput(f"{path}: the array is of {array.dtype}; floating-point activations were expected")
    return array
