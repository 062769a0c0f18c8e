"""A store, activations on disk as this project writes them: .npy shards and a JSON manifest.

    my_store/
      manifest.json      format, model, layer, dtype, width, rows, and of each shard its rows and sha256
      shard-00000.npy    [rows, D] float32, float16 or bfloat16; one story after another, in the order they were read
      shard-00001.npy

The manifest is written last and by renaming, so a directory with a manifest is whole. `scripts/harvest_activations.py`
writes a store with our own GPT-Neo, `scripts/export_torch_activations.py` one of any Hugging Face model with torch.
"""

import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.array_files import open_npy
from jax_sae.activations.arrays import Rows, check_floats, named_dtype, sha256
from jax_sae.errors import BadInput, RunFailed
from jax_sae.language_model.hub import read_json

FORMAT = "jax_sae activations 1"
SHARD_BYTES = 256 * 2**20
DTYPES = ("float32", "float16", "bfloat16")
SHARD_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.npy"


def write_store(
    directory: Path, stories: Iterable[np.ndarray], *, model: str, layer: int, dtype: str = "float32", **facts: Any
) -> dict[str, Any]:
    """Write the activations of stories, each [T, D], as a store and return its manifest.

    Memory holds the rows of one shard (256 MiB) twice. If it cannot be done, what was written is removed again.

    Args:
        directory: is created; must not exist or be empty.
        stories: floating-point activations of one story after another, all of the same D; T may be 0.
        model: where they come from: Hugging Face id or directory.
        layer: which of its hidden_states.
        dtype: 'float32'; or, with half the disk, 'float16' (11 bits of mantissa, at most 65504) or 'bfloat16' (8 bits).
        **facts: anything else that should stand in the manifest (text, tokenizer, ...); JSON values.

    Raises:
        BadInput: if the directory holds something or cannot be made, the dtype is unknown, there are no activations,
            they are not [T, D] floats of one D, or one of them is not finite in `dtype`.
        RunFailed: if a file cannot be written: the disk is full.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}; a store holds {' or '.join(DTYPES)}")
    with _new_directory(directory):
        shards, width = _write_shards(directory, stories, np.dtype(dtype))
        manifest = {
            "format": FORMAT,
            "model": model,
            "layer": layer,
            **facts,
            "dtype": dtype,
            "width": width,
            "rows": sum(shard["rows"] for shard in shards),
            "shards": shards,
        }
        with _may_find_no_room(directory):
            temporary = directory / "manifest.json.partial"
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")
            os.replace(temporary, directory / "manifest.json")
    return manifest


def _write_shards(directory: Path, stories: Iterable[np.ndarray], dtype: np.dtype) -> tuple[list[dict[str, Any]], int]:
    """The shards as they stand in the manifest, and D."""
    shards: list[dict[str, Any]] = []
    pending: list[np.ndarray] = []
    width = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards):05d}.npy"
        rows = np.concatenate(pending)
        with _may_find_no_room(directory):
            np.save(path, rows)
        shards.append({"file": path.name, "rows": len(rows), "sha256": sha256(path)})
        pending.clear()

    for story in stories:
        check_floats(story, f"a story for {directory}")
        width = width or story.shape[1]
        with np.errstate(over="ignore"):  # reported below, with what to do
            rows = story.astype(dtype)
        if rows.shape[1] != width:
            raise BadInput(
                f"{directory}: a story has activations of width {rows.shape[1]}, those before it {width}; "
                "a store has one width"
            )
        if not np.isfinite(rows).all():
            hint = "; float16 ends at 65504: use float32" if dtype == np.float16 and np.isfinite(story).all() else ""
            raise BadInput(f"{directory}: a story's activations are not finite in {dtype}{hint}")
        if len(rows):
            pending.append(rows)
        if sum(piece.nbytes for piece in pending) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    if not shards:
        raise BadInput(f"{directory}: there were no activations to write; is the text empty, or all of it excluded?")
    return shards, width


def check_new_directory(directory: Path) -> None:
    """Raise BadInput unless a store can be written to a directory: it is empty, or can be made; nothing is made yet."""
    absolute = directory.absolute()
    try:
        there = next(path for path in (absolute, *absolute.parents) if path.exists())
        is_empty = not any(there.iterdir())
    except OSError as error:  # a file is in the way, or the name is too long
        raise BadInput(f"{directory} cannot be made a directory ({error}); give the store another") from error
    if there == absolute and not is_empty:
        raise BadInput(f"{directory} is not empty; give the store a new directory")
    if not os.access(there, os.W_OK):
        raise BadInput(f"{directory} cannot be made a directory ({there} is read-only); give the store another")


@contextmanager
def _new_directory(directory: Path) -> Iterator[None]:
    """Make it; if what is done within ends badly, remove the store's files again, and the directory if it was new."""
    check_new_directory(directory)
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=not is_new)
    except OSError as error:
        raise BadInput(f"{directory} cannot be made a directory ({error}); give the store another") from error
    try:
        yield
    except BaseException:
        for path in [*directory.glob("shard-*.npy"), *directory.glob("manifest.json*")]:
            path.unlink()
        if is_new:
            directory.rmdir()
        raise


@contextmanager
def _may_find_no_room(directory: Path) -> Iterator[None]:
    """Raise RunFailed where a file in the directory cannot be written."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(directory).free
        raise RunFailed(
            f"the store {directory} could not be written ({error.strerror or error}), {free / 1e6:,.1f} MB are left "
            "there; what was written of it is removed: make room, choose another disk, or write fewer tokens"
        ) from error


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a store, its entries of the right types; whether they are true of the shards is not looked at.

    Raises:
        BadInput: if there is none, or it is not one of this format.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise BadInput(
            f"{directory} is not a whole store of activations: it has no manifest.json; write it again, or "
            "name one of its files"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise BadInput(f"{path} is not a manifest of the format {FORMAT!r}")
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raise BadInput at the first entry that is missing or of the wrong type; a shard is a file beside the manifest."""

    def check(entries: dict[str, Any], key: str, fits: Callable[[Any], bool], expected: str, where: str = "") -> None:
        if key not in entries:
            raise BadInput(f"{path}: {where}{key!r} is missing")
        if not fits(entries[key]):
            raise BadInput(f"{path}: {where}{key!r} is {reprlib.repr(entries[key])}; {expected} was expected")

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**63

    check(manifest, "dtype", lambda value: value in DTYPES, " or ".join(DTYPES))
    check(manifest, "width", is_count, "a whole number above 0")
    check(manifest, "rows", is_count, "a whole number above 0")
    check(manifest, "shards", lambda value: isinstance(value, list) and len(value) > 0, "a list of shards")
    for i, shard in enumerate(manifest["shards"]):
        where = f"of shard {i}, "
        if not isinstance(shard, dict):
            raise BadInput(f"{path}: shard {i} is {reprlib.repr(shard)}; an object was expected")
        check(shard, "file", lambda name: matches(SHARD_NAME, name), "the plain name of an .npy file", where)
        check(shard, "rows", is_count, "a whole number above 0", where)
        check(shard, "sha256", lambda digest: matches("[0-9a-f]{64}", digest), "64 hexadecimal digits", where)
    in_shards = sum(shard["rows"] for shard in manifest["shards"])
    if manifest["rows"] != in_shards:
        raise BadInput(f"{path}: 'rows' is {manifest['rows']}, but its shards have {in_shards} rows together")


def matches(pattern: str, text: Any) -> bool:
    """Whether `text` is a string of that form."""
    return isinstance(text, str) and re.fullmatch(pattern, text) is not None


def open_store(directory: Path) -> Rows:
    """The rows of a store, memory-mapped.

    Raises:
        BadInput: if it is not whole, or a shard is not what the manifest says, by its sha256, shape and type.
    """
    manifest = read_manifest(directory)
    arrays = []
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        if not path.is_file():
            raise BadInput(f"{directory}: the manifest names {path.name}, which is missing; export the store again")
        if sha256(path) != shard["sha256"]:
            raise BadInput(f"{path} is damaged: its sha256 is not the manifest's; export the store again")
        array = named_dtype(open_npy(path), str(path), [])  # what it is the manifest says
        found = f"{array.dtype}{list(array.shape)}"
        expected = f"{manifest['dtype']}{[shard['rows'], manifest['width']]}"
        if found != expected:
            raise BadInput(f"{path}: holds {found}, but the manifest says {expected}")
        arrays.append(array)
    return Rows(tuple(arrays), str(directory), tuple(shard["sha256"] for shard in manifest["shards"]))
