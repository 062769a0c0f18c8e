"""Files of arrays as other programs write them: .npy, .npz, .safetensors, .pt, and folders by `save_to_disk`.

Arrays are mapped into memory, never copied, so that a file may be larger than memory.
"""

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_sae.activations.arrays import Activations, Rows, StoryArrays, side_by_side
from jax_sae.activations.given import FLOATS, make_activations, named_dtype
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import open_saved
from jax_sae.language_model.hub import JSON_BYTES, one_line
from jax_sae.language_model.torch_file import (
    ZIP_ERRORS,
    TensorReference,
    is_plain_name,
    map_entries,
    map_tensors,
    open_torch_arrays,
    open_zip,
)

ENDINGS = (".npy", ".npz", ".safetensors", ".pt", ".pth", ".bin")

USUAL_NAME = "activations"
USUAL_MASKS = ("attention_mask", "mask")
"""What arrays are called in a file of several where the settings do not say it."""

SAFETENSORS_DTYPES = {
    **{"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True, eq=False)
class Stored:
    """An array in a file, or a list of arrays; its values are not looked at yet."""

    dtype: np.dtype
    """Of the first of a list."""
    open: Callable[[], list[np.ndarray]]
    """Its parts, mapped into memory."""
    is_list: bool = False
    """Whether each part is a story [T, D], or several [n, T, D]; else the parts are one array, one after another."""


def open_arrays(path: Path, array: str, mask: str, places: Sequence[str] = ()) -> tuple[Activations, list[str]]:
    """The activations in a file or in a folder that `save_to_disk` wrote, and lines that say what they were taken for.

    Args:
        path: of the file or folder.
        array: name of the array, or of the folder's column; '': that called `activations`, or the only one of floats.
        mask: name of the mask in the same file, or another file, with one array. '': the array called `attention_mask`
            or `mask`, where there is one; else all are tokens.
        places: names of arrays, each the activations at a place, of the same tokens; none: there is one, `array`.

    Raises:
        BadInput: if it is damaged, it is not clear which array is meant, or it is not [N, D] or [N, T, D] of floats.
    """
    notes: list[str] = []
    there = arrays_in(path)
    mask_name = _mask_name(path, there, mask)
    if places and array:
        raise BadInput(
            f"activations.array is {array!r}, but sweep.places names the arrays {', '.join(places)}; give one of them"
        )
    if lacking := [place for place in places if place not in there]:
        has = f"holds {', '.join(_shown(there))}" if [*there] != [""] else "holds one array without a name"
        raise BadInput(f"{path}: sweep.places names {', '.join(lacking)}, but the file {has}")
    file = path if path.is_file() else None
    if places:
        of_each: dict[str, Rows | StoryArrays] = {}
        for place in places:
            parts = [named_dtype(part, str(path), notes) for part in there[place].open()]
            masks = _masks(path, there, mask_name, mask)
            of_each[place] = make_activations(parts, masks, is_list=there[place].is_list, name=str(path), file=file)
        if mask_name is not None:
            notes.append(f"note          {path}: the array '{mask_name}' says which are tokens")
        return side_by_side(of_each, str(path)), notes
    name = _name(path, there, array, mask_name)
    chosen = there[name]
    parts = [named_dtype(part, str(path), notes) for part in chosen.open()]
    masks = _masks(path, there, mask_name, mask)
    if name and len(there) > 1:
        also = f", with the mask '{mask_name}'" if mask_name is not None else ""
        notes.append(f"note          {path}: the array '{name}' of {len(there)}{also}")
    return make_activations(parts, masks, is_list=chosen.is_list, name=str(path), file=file), notes


def _mask_name(path: Path, there: Mapping[str, Stored], mask: str) -> str | None:
    if mask:
        return mask if mask in there else None
    usual = [name for name in USUAL_MASKS if name in there]
    if len(usual) > 1:
        raise BadInput(f"{path} holds an array 'attention_mask' and one 'mask'; name one of them by activations.mask")
    return usual[0] if usual else None


def _name(path: Path, there: Mapping[str, Stored], array: str, mask: str | None) -> str:
    """Which array holds the activations."""
    shown = _shown(there)
    if array:
        if array in there:
            return array
        instead = ", ".join(shown) if [*there] != [""] else "one without a name"
        raise BadInput(f"{path} holds no array {array!r} (there are {instead}); name one of them by activations.array")
    names = [name for name in there if name != mask]
    floats = [name for name in names if there[name].dtype.name in FLOATS or there[name].dtype == np.dtype("V2")]
    for candidates in (names, floats, [name for name in floats if name == USUAL_NAME]):
        if len(candidates) == 1:
            return candidates[0]
    raise BadInput(
        f"{path} holds {len(there)} arrays ({', '.join(shown)}); one array [N, D] or [N, T, D] was expected, or "
        f"several with one called '{USUAL_NAME}': name one of them by activations.array"
    )


def _shown(there: Mapping[str, Stored]) -> list[str]:
    return [name if is_plain_name(name) else ascii(name[:80]) for name in sorted(there)[:8]]


def _masks(path: Path, there: Mapping[str, Stored], mask_name: str | None, mask: str) -> list[np.ndarray] | None:
    """Of the array with that name in the file, or of a file of its own; None where all are tokens."""
    if mask_name is not None:
        return there[mask_name].open()
    return _mask_in_file(Path(os.path.expanduser(mask))) if mask else None


def _mask_in_file(path: Path) -> list[np.ndarray]:
    if not path.is_file():
        raise BadInput(
            f"activations.mask is {str(path)!r}, but there is neither an array nor a file of that name; give an .npy "
            "file [N, T], 1 for a token and 0 for padding"
        )
    there = arrays_in(path)
    if len(there) != 1:
        raise BadInput(f"{path} holds {len(there)} arrays; one, the mask [N, T], was expected")
    return next(iter(there.values())).open()


def arrays_in(path: Path) -> dict[str, Stored]:
    """What a file holds, by name; a file of one array without a name has the name ''."""
    if path.is_dir():
        return _in_saved_folder(path)
    ending = path.suffix.lower()
    if ending == ".npy":
        return {"": _of_one(open_npy(path))}
    if ending == ".npz":
        return _in_npz(path)
    if ending == ".safetensors":
        return _in_safetensors(path)
    if ending in (".pt", ".pth", ".bin"):
        return {name: _in_torch_file(tensors) for name, tensors in open_torch_arrays(path).items()}
    raise BadInput(f"{path}: the name ends in {path.suffix!r}; .npy, .safetensors or .pt was expected, or .npz")


def _of_one(array: np.ndarray) -> Stored:
    return Stored(array.dtype, lambda: [array])


def open_npy(path: Path) -> np.ndarray:
    """The array in an .npy file, mapped into memory; BadInput if it is not whole."""
    try:
        with np.errstate(over="ignore"):  # by a size that cannot be, which is refused next
            return np.asarray(np.lib.format.open_memmap(path, mode="r"))  # as a plain array: slices of it are cheap
    except Exception as error:  # the header is parsed as Python, and a damaged one may raise anything
        raise BadInput(f"{path} is not a whole .npy file of numbers ({one_line(error)})") from error


def _in_npz(path: Path) -> dict[str, Stored]:
    """Of an archive of .npy files that is not compressed; each is an array by its name without the ending."""
    try:
        with open_zip(path) as archive:
            entries = archive.infolist()
    except ZIP_ERRORS as error:
        raise BadInput(f"{path} is not a whole .npz file ({one_line(error)})") from error
    if any(entry.compress_type for entry in entries):
        raise BadInput(
            f"{path} is compressed, so that it cannot be read in parts; write it again by "
            "np.savez('new.npz', **np.load(path))"
        )

    def open_entry(entry: str) -> np.ndarray:
        content = map_entries(path, [entry])[entry]
        start = io.BytesIO(content[:65_536].tobytes())
        try:
            with np.errstate(over="ignore"):
                version = np.lib.format.read_magic(start)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, is_fortran, dtype = read[version](start)
            size = math.prod(shape) * dtype.itemsize
            values = content[start.tell() : start.tell() + size]
            if dtype.hasobject or min(shape, default=0) < 0 or len(values) != size:
                raise ValueError(f"{dtype}{list(shape)} in {len(content)} bytes")
            return values.view(dtype).reshape(shape, order="F" if is_fortran else "C")
        except Exception as error:  # the header is parsed as Python, and a damaged one may raise anything
            raise BadInput(f"{path}: {entry} is not a whole array of numbers ({one_line(error)})") from error

    arrays = {entry.filename.removesuffix(".npy"): open_entry(entry.filename) for entry in entries}
    return {name: _of_one(x) for name, x in arrays.items()}


def _in_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
            if length > JSON_BYTES:
                raise SafetensorError(f"its header claims to have {length} bytes")
            header = start.read(length)
        with safe_open(path, framework="numpy") as file:  # which holds sizes and places against each other
            names = list(file.keys())
        entries = json.loads(header)
        whole = np.asarray(np.memmap(path, np.uint8, "r"))
        found = {}
        for name in names:
            kind, shape = entries[name]["dtype"], tuple(entries[name]["shape"])
            if kind not in SAFETENSORS_DTYPES:
                raise BadInput(f"{path}: the array {name[:80]!a} is of {kind}; {', '.join(FLOATS)} were expected")
            begin, end = (8 + length + place for place in entries[name]["data_offsets"])
            x = whole[begin:end].view(SAFETENSORS_DTYPES[kind]).reshape(shape)
            found[name] = _of_one(x)
        return found
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{path} cannot be read as a .safetensors file ({one_line(error)})") from error


def _in_torch_file(tensors: TensorReference | list[TensorReference]) -> Stored:
    if isinstance(tensors, TensorReference):
        return Stored(tensors.dtype, lambda: map_tensors([tensors]))
    return Stored(tensors[0].dtype, lambda: map_tensors(tensors), is_list=True)


def _in_saved_folder(folder: Path) -> dict[str, Stored]:
    """The columns of a folder by `save_to_disk` whose rows are vectors or lists of vectors of numbers.

    So SAELens caches activations: a column [T, D] a row, and one of token ids. Rows [D] are those of [N, D].
    """
    splits = open_saved(folder)
    if len(splits) != 1:
        raise BadInput(f"{folder} has the splits {', '.join(splits)}; give the folder of one of them")
    [rows] = splits.values()
    found = {}
    for name in rows.column_names:
        chunks = [getattr(chunk, "storage", chunk) for chunk in rows.data.column(name).chunks]
        depth, kind = 0, chunks[0].type
        while hasattr(kind, "value_type"):
            depth, kind = depth + 1, kind.value_type
        dtype = kind.to_pandas_dtype() if depth in (1, 2) else None
        if dtype and np.dtype(dtype).kind in "fiub":
            where = f"{folder}, column {name!r}"
            found[name] = Stored(np.dtype(dtype), partial(_arrays_of_lists, chunks, where), is_list=depth == 2)
    if not found:
        raise BadInput(f"{folder}: not one of its columns ({', '.join(rows.column_names)}) has vectors of numbers")
    return found


def _arrays_of_lists(chunks: Sequence[Any], where: str) -> list[np.ndarray]:
    """Of Arrow's lists of numbers, [n, D] of each chunk; of lists of those, [n, T, D], or if T varies [T, D] each."""
    found: list[np.ndarray] = []
    for chunk in chunks:
        lengths = [np.asarray(chunk.value_lengths().fill_null(0))]
        values = chunk.flatten()
        if hasattr(values.type, "value_type"):
            lengths.append(np.asarray(values.value_lengths().fill_null(0)))
            values = values.flatten()
        if values.null_count or len(set(lengths[-1].tolist())) > 1:
            raise BadInput(
                f"{where}: vectors of {min(lengths[-1])} to {max(lengths[-1])} numbers, or null; one D was expected"
            )
        x = np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(lengths[-1]), -1)
        if len(lengths) == 1:
            found.append(x)
        elif len(set(lengths[0].tolist())) == 1:
            found.append(x.reshape(len(chunk), -1, x.shape[1]))
        else:
            found += np.split(x, np.cumsum(lengths[0])[:-1])
    return found
