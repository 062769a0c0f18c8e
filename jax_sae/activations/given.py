"""Arrays as people have them, by NumPy, JAX or torch -> activations, as they lie.

Torch is not imported: a tensor is asked for what it can do itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_sae.activations.arrays import Activations, Rows, SideBySide, StoryArrays, side_by_side
from jax_sae.config import plain_name
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import one_line

FLOATS = ("float16", "bfloat16", "float32", "float64")


def named_dtype(array: np.ndarray, where: str, notes: list[str]) -> np.ndarray:
    """The array, as bfloat16 where its numbers are 2 bytes without a name, which `np.save` makes of those; noted once.

    Raises:
        BadInput: if they are 1 byte without a name, as of float8.
    """
    if array.dtype == np.dtype("V2"):
        note = f"note          {where}: numbers of type |V2, as np.save leaves of bfloat16, are read as that"
        notes += [note] if note not in notes else []
        return array.view(ml_dtypes.bfloat16)
    if array.dtype == np.dtype("V1"):
        raise BadInput(
            f"{where}: its numbers have the type |V1, as np.save leaves of float8, of which there are several; save "
            "it as float32, float16 or bfloat16"
        )
    return array


def to_array(x: Any, where: str, notes: list[str]) -> np.ndarray:
    """A NumPy array of what is given, without a copy where it lies in this machine's memory.

    Args:
        x: a NumPy or JAX array, a torch tensor on any device, or what NumPy takes for an array.
        where: names it in errors.
        notes: takes a line where it was read as bfloat16.

    Raises:
        BadInput: if it is none of these.
    """
    try:
        if hasattr(x, "detach") and hasattr(x, "cpu"):  # a torch tensor
            tensor = x.detach().cpu()
            if str(tensor.dtype) == "torch.bfloat16":  # which NumPy has no name for: its bits are taken
                bits = tensor.contiguous().view(tensor[:0].short().dtype).numpy()
                return bits.view(ml_dtypes.bfloat16)
            return tensor.numpy()
        array = np.asarray(x)
    except Exception as error:  # of whatever library it is from
        raise BadInput(f"{where}: a {type(x).__name__} cannot be taken as an array ({one_line(error)})") from error
    return named_dtype(array, where, notes)


def make_activations(
    parts: Sequence[np.ndarray],
    mask_parts: Sequence[np.ndarray] | None,
    *,
    is_list: bool,
    name: str,
    file: Path | None = None,
) -> Rows | StoryArrays:
    """Rows [N, D], or stories.

    Args:
        parts: of a list, arrays [T, D], a story each, or [n, T, D]; else several arrays [n, D] or [n, T, D], which
            together are one.
        mask_parts: of each of them which are tokens, [T] or [n, T], bool or 0 and 1; None where all are.
        is_list: whether an array [T, D] is a story, and not rows.
        name: for messages.
        file: as in `Rows` and `StoryArrays`.

    Raises:
        BadInput: if shapes or types are others, there is nothing in them, or a mask belongs to rows.
    """
    if not parts:
        raise BadInput(f"{name}: a list of no arrays; there is nothing in it")
    dimensions = {part.ndim for part in parts}
    for part in parts:
        check_floats(part, name, (2, 3))
    widths = {part.shape[-1] for part in parts}
    if len(widths) > 1:
        raise BadInput(f"{name}: its arrays have the widths {', '.join(map(str, sorted(widths)))}; they have one D")
    if not any(part.size for part in parts):
        raise BadInput(f"{name}: the array has shape {list(parts[0].shape)}: there is nothing in it")
    if not is_list and dimensions == {2}:
        if mask_parts is not None:
            raise BadInput(
                f"{name}: a mask [N, T] says which are tokens of activations [N, T, D], but here they are rows "
                f"{list(parts[0].shape)}; leave the mask out, or save stories with their padding"
            )
        return Rows(tuple(parts), name, file=file)
    arrays = tuple(part if part.ndim == 3 else part[None] for part in parts)
    masks = None if mask_parts is None else tuple(_masks(arrays, mask_parts, name))
    if masks is not None and not any(mask.any() for mask in masks):
        raise BadInput(f"{name}: the mask has no 1: there is not one token")
    return StoryArrays(arrays, masks or (), name, file)


def check_floats(array: np.ndarray, where: str, dimensions: tuple[int, ...] = (2,)) -> None:
    """Raise BadInput unless an array is one of floats, with so many dimensions."""
    if array.ndim not in dimensions:
        stories = ", or [N, T, D], N stories of T tokens," if 3 in dimensions else ","
        raise BadInput(
            f"{where}: the array has shape {list(array.shape)}; [N, D], N tokens of D numbers{stories} was expected"
        )
    if array.dtype.name not in FLOATS:
        raise BadInput(
            f"{where}: the array is of {array.dtype}; floating-point activations were expected ({', '.join(FLOATS)})"
        )


def _masks(arrays: Sequence[np.ndarray], masks: Sequence[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """Each [n, T] bool."""
    if len(masks) != len(arrays):
        raise BadInput(
            f"{name}: {len(arrays)} arrays of activations, but {len(masks)} of the mask; one each was expected"
        )
    for array, mask in zip(arrays, masks, strict=True):
        mask = mask[None] if mask.ndim == 1 and len(array) == 1 else mask
        if mask.shape != array.shape[:2]:
            raise BadInput(
                f"{name}: the mask has shape {list(mask.shape)}, but the activations have {list(array.shape)}; "
                f"{list(array.shape[:2])} was expected"
            )
        if mask.dtype != np.bool_ and not ((mask == 0) | (mask == 1)).all():
            raise BadInput(
                f"{name}: the mask has other numbers than 0 and 1; 1 for a token, 0 for padding was expected"
            )
        yield np.asarray(mask == 1)


def from_memory(x: Any, mask: Any = None, name: str = "the activations given") -> tuple[Activations, list[str]]:
    """Activations in memory, as they lie there, and lines that say what they were taken for. Do not change them after.

    Args:
        x: rows [N, D]; stories [N, T, D]; or a list of stories [T, D] or [n, T, D]. NumPy or JAX arrays, or torch
            tensors on any device, of float16, bfloat16, float32 or float64. Or a dictionary of these, of the same
            tokens at several places, by the places' names.
        mask: which are tokens, [N, T], or a list of [T] or [n, T]; bool or 0 and 1. None: all are.
        name: for messages.

    Raises:
        BadInput: if it is none of that.
    """
    notes: list[str] = []
    if isinstance(x, Mapping):
        parts_of: dict[str, Rows | StoryArrays] = {}
        for place, its in x.items():
            plain_name(f"a place of {name}", str(place))
            part, more = from_memory(its, mask, f"{name} at {place}")
            if isinstance(part, SideBySide):
                raise BadInput(f"{name}: {place} is a dictionary; the activations of one place were expected")
            parts_of[str(place)], notes = replace(part, name=name), [*notes, *more]
        return side_by_side(parts_of, name), notes
    is_list = isinstance(x, list | tuple)
    parts = [to_array(part, name, notes) for part in (x if is_list else [x])]
    mask_parts = None
    if mask is not None:
        each = mask if is_list and isinstance(mask, list | tuple) else [mask]
        mask_parts = [to_array(part, f"the mask of {name}", notes) for part in each]
    return make_activations(parts, mask_parts, is_list=is_list, name=name), notes
