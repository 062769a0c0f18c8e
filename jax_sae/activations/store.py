"""A store, activations on disk as this project writes them: .npy shards and a JSON manifest.

    my_store/
      manifest.json      format, model, layer, dtype, width, rows, and of each shard its rows and sha256
      shard-00000.npy    [rows, D] float32, float16 or bfloat16; one story after another, in the order they were read
      shard-00001.npy
      shard-00000.tokens.npy   [tokens, 2] int32: token ids of the same stories, and the position of each in its story;
                               the first `exclude_first_tokens` have no row. Older stores do not have these files

With named places, or with int8, the format is the second one. Each place has files of its own, so that one is read
without the others; of int8, a row times its scale is the activation:

      manifest.json                     format, model, dtype, places (name, width), rows, and of each shard its columns
      shard-00000.9.mlp_out.npy         [rows, D]
      shard-00000.9.mlp_out.scales.npy  [rows] float32, where dtype is int8

The manifest is written last and by renaming, so a directory with a manifest is whole. `scripts/harvest_activations.py`
writes a store with our own GPT-Neo, `scripts/export_torch_activations.py` one of any Hugging Face model with torch.
"""

import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.array_files import open_npy
from jax_sae.activations.arrays import Activations, Rows, sha256, side_by_side
from jax_sae.activations.given import check_floats, named_dtype
from jax_sae.activations.places import Place, columns, total_width
from jax_sae.errors import BadInput, RunFailed
from jax_sae.language_model.hub import read_json

FORMAT = "jax_sae activations 1"
FORMAT_OF_PLACES = "jax_sae activations 2"
SHARD_BYTES = 256 * 2**20
DTYPES = ("float32", "float16", "bfloat16", "int8")
SHARD_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.npy"


def write_store(
    directory: Path,
    stories: Iterable[np.ndarray],
    *,
    model: str,
    layer: int | None,
    dtype: str = "float32",
    places: Sequence[Place] = (),
    token_ids: Iterator[np.ndarray] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write the activations of stories, each [T, D], as a store and return its manifest.

    Memory holds the rows of one shard (256 MiB) twice. If it cannot be done, what was written is removed again.

    Args:
        directory: is created; must not exist or be empty.
        stories: floating-point activations of one story after another, all of the same D; T may be 0.
        model: where they come from: Hugging Face id or directory.
        layer: which of its hidden_states; None where there are places.
        dtype: 'float32'; or, with half the disk, 'float16' (11 bits of mantissa, at most 65504) or 'bfloat16' (8 bits);
            or, with a quarter, 'int8' with a scale for each row and place: its largest number becomes 127.
        places: whose columns the stories have, side by side; none: one place without a name.
        token_ids: of each of these stories in turn all tokens, those at its start without rows too; None: the store
            keeps none, and pages on features cannot show its text.
        **facts: anything else that should stand in the manifest (text, tokenizer, ...); JSON values.

    Raises:
        BadInput: if the directory holds something or cannot be made, the dtype is unknown, there are no activations,
            they are not [T, D] floats of one D, or one of them is not finite in `dtype`.
        RunFailed: if a file cannot be written: the disk is full.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}; a store holds {' or '.join(DTYPES)}")
    with _new_directory(directory):
        shards, places = _write_shards(directory, stories, np.dtype(dtype), places, token_ids)
        of_places = {"format": FORMAT_OF_PLACES, "model": model, **({} if layer is None else {"layer": layer}), **facts}
        manifest = {
            **of_places,
            "dtype": dtype,
            "places": [asdict(place) for place in places],
            "rows": sum(shard["rows"] for shard in shards),
            "shards": shards,
        }
        if [place.name for place in places] == [""] and dtype != "int8":
            manifest = {
                **of_places,
                "format": FORMAT,
                "dtype": dtype,
                "width": total_width(places),
                "rows": manifest["rows"],
                "shards": [
                    {
                        **{"file": c["file"], "rows": s["rows"], "sha256": c["sha256"]},
                        **{key: s[key] for key in ("tokens",) if key in s},
                    }
                    for s in shards
                    for c in s["columns"]
                ],
            }
        with _may_find_no_room(directory):
            temporary = directory / "manifest.json.partial"
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")
            os.replace(temporary, directory / "manifest.json")
    return manifest


def _write_shards(
    directory: Path,
    stories: Iterable[np.ndarray],
    dtype: np.dtype,
    places: Sequence[Place],
    token_ids: Iterator[np.ndarray] | None,
) -> tuple[list[dict[str, Any]], Sequence[Place]]:
    """The shards as they stand in the manifest of places, and the places; without any, a nameless one."""
    shards: list[dict[str, Any]] = []
    pending: list[list[np.ndarray]] = []
    tokens: list[np.ndarray] = []
    n_bytes = 0

    def save(name: str, array: np.ndarray) -> dict[str, str]:
        path = directory / name
        with _may_find_no_room(directory):
            np.save(path, array)
        return {"file": name, "sha256": sha256(path)}

    def flush() -> None:
        its_columns: list[dict[str, Any]] = []
        for place, parts in zip(places, zip(*pending, strict=True), strict=True):
            stem = f"shard-{len(shards):05d}" + (f".{place.name.replace(':', '.')}" if place.name else "")
            if dtype == np.int8:
                rows, scales = in_int8(np.concatenate(parts))
                its_columns.append({**save(f"{stem}.npy", rows), "scales": save(f"{stem}.scales.npy", scales)})
            else:
                its_columns.append(save(f"{stem}.npy", np.concatenate(parts)))
        shards.append({"rows": sum(len(story[0]) for story in pending), "columns": its_columns})
        if tokens:
            shards[-1]["tokens"] = save(f"shard-{len(shards) - 1:05d}.tokens.npy", np.concatenate(tokens))
        pending.clear()
        tokens.clear()

    for story in stories:
        check_floats(story, f"a story for {directory}")
        places = places or [Place("", story.shape[1])]
        if story.shape[1] != (width := total_width(places)):
            raise BadInput(
                f"{directory}: a story has activations of width {story.shape[1]}, those before it {width}; "
                "a store has one width"
            )
        parts = [
            _in_dtype(story[:, slice(*its)], dtype, f"{directory}{f', {name}' if name else ''}")
            for name, its in columns(places).items()
        ]
        ids = None if token_ids is None else next(token_ids)
        if len(story):
            if ids is not None:
                tokens.append(np.stack([ids, np.arange(len(ids))], 1).astype(np.int32))
            pending.append(parts)
            n_bytes += story.size * dtype.itemsize
        if n_bytes >= SHARD_BYTES:
            flush()
            n_bytes = 0
    if pending:
        flush()
    if not shards:
        raise BadInput(f"{directory}: there were no activations to write; is the text empty, or all of it excluded?")
    return shards, places


def _in_dtype(x: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """x as it is kept until its shard is written: in that dtype, but for int8 in float32.

    Raises:
        BadInput: if it is not finite in that dtype.
    """
    with np.errstate(over="ignore"):  # reported below, with what to do
        rows = x.astype(np.float32 if dtype == np.int8 else dtype)
    if np.isfinite(rows).all():
        return rows
    if dtype == np.float16 and np.isfinite(x).all():
        raise BadInput(
            f"{where}: a story's activations are not finite in {dtype}; float16 ends at 65504, and one is "
            f"{float(np.abs(x).max()):,.0f}: use float32, bfloat16 or int8"
        )
    raise BadInput(f"{where}: a story's activations are not finite in {dtype}")


def in_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows x[N, D] -> (int8 [N, D], float32 scale [N]) whose product is nearest to them; a row of zeros has scale 0."""
    scales = (np.abs(x).max(1) / 127).astype(np.float32)
    return np.rint(x / np.where(scales > 0, scales, 1)[:, None]).clip(-127, 127).astype(np.int8), scales


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
    if manifest.get("format") not in (FORMAT, FORMAT_OF_PLACES):
        raise BadInput(f"{path} is not a manifest of the format {FORMAT!r} or {FORMAT_OF_PLACES!r}")
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

    def check_file(entries: Any, where: str) -> None:
        if not isinstance(entries, dict):
            raise BadInput(f"{path}: {where}{reprlib.repr(entries)} is no file; an object was expected")
        check(entries, "file", lambda name: matches(SHARD_NAME, name), "the plain name of an .npy file", where)
        check(entries, "sha256", lambda digest: matches("[0-9a-f]{64}", digest), "64 hexadecimal digits", where)

    of_places = manifest["format"] == FORMAT_OF_PLACES
    dtypes = DTYPES if of_places else DTYPES[:-1]
    check(manifest, "dtype", lambda value: value in dtypes, " or ".join(dtypes))
    check(manifest, "rows", is_count, "a whole number above 0")
    check(manifest, "shards", lambda value: isinstance(value, list) and len(value) > 0, "a list of shards")
    if of_places:
        check(manifest, "places", lambda value: isinstance(value, list) and len(value) > 0, "a list of places")
        for i, place in enumerate(manifest["places"]):
            if not isinstance(place, dict) or set(place) != {"name", "width"}:
                raise BadInput(f"{path}: place {i} is {reprlib.repr(place)}; an object of name and width was expected")
            check(
                place,
                "name",
                lambda name: name == "" or matches(r"[A-Za-z0-9._:-]+", name),
                "a name",
                f"of place {i}, ",
            )
            check(place, "width", is_count, "a whole number above 0", f"of place {i}, ")
        if len({place["name"] for place in manifest["places"]}) < len(manifest["places"]):
            raise BadInput(f"{path}: two of its places have one name")
    else:
        check(manifest, "width", is_count, "a whole number above 0")
    for i, shard in enumerate(manifest["shards"]):
        where = f"of shard {i}, "
        if not isinstance(shard, dict):
            raise BadInput(f"{path}: shard {i} is {reprlib.repr(shard)}; an object was expected")
        if of_places:
            n = len(manifest["places"])
            check(shard, "columns", lambda each: isinstance(each, list) and len(each) == n, f"a list of {n}", where)  # noqa: B023
            for its in shard["columns"]:
                check_file(its, where)
                if manifest["dtype"] == "int8":
                    check_file(its.get("scales"), f"{where}scales: ")
        else:
            check_file(shard, where)
        if "tokens" in shard:
            check_file(shard["tokens"], f"{where}tokens: ")
        check(shard, "rows", is_count, "a whole number above 0", where)
    in_shards = sum(shard["rows"] for shard in manifest["shards"])
    if manifest["rows"] != in_shards:
        raise BadInput(f"{path}: 'rows' is {manifest['rows']}, but its shards have {in_shards} rows together")


def matches(pattern: str, text: Any) -> bool:
    """Whether `text` is a string of that form."""
    return isinstance(text, str) and re.fullmatch(pattern, text) is not None


def open_store(directory: Path, wanted: Sequence[str] = ()) -> Activations:
    """The rows of a store, memory-mapped; only files of the places that are wanted are read.

    Args:
        directory: of the store.
        wanted: names of places; none: the only one there is.

    Raises:
        BadInput: if it is not whole, a file is not what the manifest says, by its sha256, shape and type, or it lacks a
            place, or has several and none is named.
    """
    manifest = read_manifest(directory)
    places = [Place(**place) for place in manifest.get("places", [{"name": "", "width": manifest.get("width")}])]
    names = [place.name for place in places]
    if lacking := [name for name in wanted if name not in names]:
        has = f"the places {', '.join(names)}" if names != [""] else "one place, which has no name: leave it out"
        raise BadInput(f"{directory}: sweep.places names {', '.join(lacking)}, but the store has {has}")
    if not wanted and len(places) > 1:
        raise BadInput(f"{directory} has the places {', '.join(names)}; name those to read by sweep.places")
    chosen = [names.index(name) for name in wanted or names]
    parts = {names[i]: _rows_at(directory, manifest, i, places[i]) for i in chosen}
    return side_by_side(parts, str(directory))


def _rows_at(directory: Path, manifest: dict[str, Any], i: int, place: Place) -> Rows:
    """The rows at place i."""
    arrays, scales, digests = [], [], []
    for shard in manifest["shards"]:
        its = shard["columns"][i] if "columns" in shard else shard
        arrays.append(_open_shard(directory, its, manifest["dtype"], [shard["rows"], place.width]))
        digests.append(its["sha256"])
        if manifest["dtype"] == "int8":
            scales.append(_open_shard(directory, its["scales"], "float32", [shard["rows"]]))
            digests.append(its["scales"]["sha256"])
            if not np.isfinite(scales[-1]).all():
                raise BadInput(f"{directory / its['scales']['file']}: a scale is not finite; export the store again")
    return Rows(tuple(arrays), str(directory), tuple(digests), scales=tuple(scales))


def _open_shard(directory: Path, its: dict[str, Any], dtype: str, shape: list[int]) -> np.ndarray:
    path = directory / its["file"]
    if not path.is_file():
        raise BadInput(f"{directory}: the manifest names {path.name}, which is missing; export the store again")
    if sha256(path) != its["sha256"]:
        raise BadInput(f"{path} is damaged: its sha256 is not the manifest's; export the store again")
    array = named_dtype(open_npy(path), str(path), [])  # what it is the manifest says
    found, expected = f"{array.dtype}{list(array.shape)}", f"{dtype}{shape}"
    if found != expected:
        raise BadInput(f"{path}: holds {found}, but the manifest says {expected}")
    return array
