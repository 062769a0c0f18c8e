"""Activations that are there already, in memory or mapped from a file: rows [N, D], or stories [N, T, D].

NumPy, JAX and torch arrays are taken as they lie, neither copied nor cast; only what is read is, to float32. Torch is
not imported: a tensor is asked for what it can do itself.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_sae.activations.places import Place, total_width
from jax_sae.config import plain_name
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import one_line

FLOATS = ("float16", "bfloat16", "float32", "float64")

ROWS_AT_A_TIME = 16_384
"""Rows that are held in memory at once where all are looked at."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations [N, D] that lie in several arrays, one after another."""

    arrays: tuple[np.ndarray, ...]
    name: str
    shard_digests: tuple[str, ...] = ()
    """Of a store, the sha256 of each shard."""
    file: Path | None = None
    """The one that holds them, and nothing else that decides them."""
    place: str = ""
    """Where in a language model they are from; empty where it is not known."""
    scales: tuple[np.ndarray, ...] = ()
    """Of arrays of int8, [n] each: what a row is multiplied by."""

    @cached_property
    def digest(self) -> str:
        """The sha256, in hexadecimal: of a store over those of its shards, of a file over its bytes, else of values.

        Raises:
            BadInput: if the file cannot be read any more.
        """
        if self.shard_digests:
            return hashlib.sha256("".join(self.shard_digests).encode()).hexdigest()
        return sha256(self.file) if self.file else _digest_of_values(self)

    @property
    def checked(self) -> bool:
        """Whether all values are known to be finite: a store's were checked when it was written."""
        return bool(self.shard_digests)

    def __len__(self) -> int:
        """Return the number of rows N."""
        return sum(len(array) for array in self.arrays)

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns they are."""
        return (Place(self.place, self.width),)

    @property
    def width(self) -> int:
        """D."""
        return self.arrays[0].shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as a new float32 array [stop - start, D].

        Raises:
            IndexError: if there are no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of {len(self)}")
        rows = np.empty((stop - start, self.width), np.float32)
        first = 0  # the number of the array's first row
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the reader refuses
            for i, array in enumerate(self.arrays):
                begin, end = max(start, first), min(stop, first + len(array))
                if begin < end:
                    rows[begin - start : end - start] = array[begin - first : end - first]
                    if self.scales:
                        rows[begin - start : end - start] *= self.scales[i][begin - first : end - first, None]
                first += len(array)
        return rows

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a first row, and it and those after it, [n, D] float32, until all were read."""
        for start in range(0, len(self), ROWS_AT_A_TIME):
            yield start, self.read(start, min(start + ROWS_AT_A_TIME, len(self)))


@dataclass(frozen=True, eq=False)
class StoryArrays:
    """Activations of stories that lie in several arrays [n, T, D], of n stories each; T may differ between arrays."""

    arrays: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    """Of each array, which are tokens, [n, T] bool; no arrays where all are."""
    name: str
    file: Path | None = None
    """The one that holds the arrays, and nothing else that decides them but the masks."""
    place: str = ""
    """Where in a language model they are from; empty where it is not known."""

    @cached_property
    def digest(self) -> str:
        """The sha256, in hexadecimal: of a file over its bytes and the masks, else over the values of the tokens.

        Raises:
            BadInput: if the file cannot be read any more.
        """
        if not self.file:
            return _digest_of_values(self)
        if not self.masks:
            return sha256(self.file)
        digest = hashlib.sha256(sha256(self.file).encode())
        for mask in self.masks:
            digest.update(f"mask {mask.shape}\n".encode() + np.packbits(mask).tobytes())
        return digest.hexdigest()

    @property
    def checked(self) -> bool:
        """Whether all values are known to be finite."""
        return False

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns they are."""
        return (Place(self.place, self.width),)

    @property
    def width(self) -> int:
        """D."""
        return self.arrays[0].shape[2]

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each story, [N] int64."""
        if self.masks:
            return np.concatenate([mask.sum(1, dtype=np.int64) for mask in self.masks])
        return np.concatenate([np.full(len(array), array.shape[1], np.int64) for array in self.arrays])

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The number of each array's first story."""
        return np.cumsum([0] + [len(array) for array in self.arrays])

    def __len__(self) -> int:
        """Return the number of stories N, those without tokens included."""
        return int(self._firsts[-1])

    def read(self, story: int, exclude: int = 0) -> np.ndarray:
        """The activations of a story's tokens but the first `exclude`, as a new array [T, D] float32.

        Raises:
            IndexError: if there is no such story.
        """
        if not 0 <= story < len(self):
            raise IndexError(f"story {story} of {len(self)}")
        i = int(np.searchsorted(self._firsts, story, "right")) - 1
        x = self.arrays[i][story - self._firsts[i]]
        if self.masks:
            x = x[self.masks[i][story - self._firsts[i]]]
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the reader refuses
            return np.array(x[exclude:], np.float32)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a token and it and those after it, [n, D] float32, until all were read."""
        first, some, n = 0, [], 0
        for story in range(len(self)):
            some.append(self.read(story))
            n += len(some[-1])
            if n >= ROWS_AT_A_TIME or story == len(self) - 1:
                yield first, np.concatenate(some)
                first, some, n = first + n, [], 0


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Activations of the same tokens at several places; it is read as `Rows` or `StoryArrays`, whichever they are."""

    parts: tuple["Rows | StoryArrays", ...]
    """One a place."""

    @property
    def name(self) -> str:
        """What holds them, for messages."""
        return self.parts[0].name

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns they are."""
        return tuple(place for part in self.parts for place in part.places)

    @property
    def width(self) -> int:
        """The number of columns."""
        return total_width(self.places)

    @property
    def checked(self) -> bool:
        """Whether all values are known to be finite."""
        return all(part.checked for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """The sha256, in hexadecimal, over the places' names and digests; that of a file they share is taken once."""
        shared = len({part.file for part in self.parts}) == 1 and self.parts[0].file is not None
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.place} {(self.parts[0] if shared else part).digest}\n".encode())
        return digest.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Of stories, the number of tokens of each, [N] int64."""
        assert isinstance(self.parts[0], StoryArrays)
        return self.parts[0].lengths

    def __len__(self) -> int:
        """Return the number of rows or stories N."""
        return len(self.parts[0])

    def read(self, *which: int) -> np.ndarray:
        """What `read` of each gives, side by side, [T, D1 + D2 + ...] float32."""
        return np.concatenate([part.read(*which) for part in self.parts], axis=1)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """What `pieces` of each gives, side by side."""
        for pieces in zip(*(part.pieces() for part in self.parts), strict=True):
            yield pieces[0][0], np.concatenate([x for _, x in pieces], axis=1)


Activations = Rows | StoryArrays | SideBySide


def side_by_side(parts: Mapping[str, Rows | StoryArrays], name: str) -> Activations:
    """Activations at places, by the places' names; of the same tokens.

    Raises:
        BadInput: if they are none, are rows and stories, or have different numbers of rows or tokens.
    """
    if not parts:
        raise BadInput(f"{name}: there is no place in it; give the activations of one, {{'9.resid_post': x}}")
    named = [replace(part, place=place) for place, part in parts.items()]
    first = named[0]
    for part in named[1:]:
        sizes = [f"{len(each):,} {'rows' if isinstance(each, Rows) else 'stories'}" for each in (first, part)]
        if sizes[0] != sizes[1]:
            raise BadInput(
                f"{name}: {first.place} has {sizes[0]}, but {part.place} {sizes[1]}; places have the same tokens"
            )
        lengths = [each.lengths for each in (first, part) if isinstance(each, StoryArrays)]
        if lengths and not np.array_equal(lengths[0], lengths[-1]):
            raise BadInput(
                f"{name}: stories of {first.place} and {part.place} have different numbers of tokens; places have "
                "the same tokens"
            )
    return first if len(named) == 1 else SideBySide(tuple(named))


def is_rows(activations: Activations) -> bool:
    """Whether they are rows, and not stories."""
    return isinstance(activations.parts[0] if isinstance(activations, SideBySide) else activations, Rows)


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal; BadInput if they cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _digest_of_values(activations: Rows | StoryArrays) -> str:
    """The sha256 over the float32 values of all tokens and where stories end; it knows no padding, dtype or pieces."""
    digest = hashlib.sha256(f"width {activations.width}\n".encode())
    if isinstance(activations, StoryArrays):
        digest.update(b"stories\n" + activations.lengths.astype("<i8").tobytes())
    for _, x in activations.pieces():
        digest.update(np.ascontiguousarray(x, "<f4").data)
    return digest.hexdigest()


def refuse_not_finite(activations: Activations) -> None:
    """Raise BadInput if a token has a NaN or an infinity; those of a store were checked when it was written.

    All are read, as for the digest: a run would come upon them after hours.
    """
    if activations.checked:
        return
    count, first, total = 0, 0, 0
    for start, x in activations.pieces():
        bad = np.flatnonzero(~np.isfinite(x).all(-1))
        if len(bad) and not count:
            first = start + int(bad[0])
        count, total = count + len(bad), total + len(x)
    if count:
        where = f"row {first:,}"
        if not isinstance(activations, Rows) and not is_rows(activations):
            where = f"in story {int(np.searchsorted(np.cumsum(activations.lengths), first, 'right')):,}"
        raise BadInput(
            f"{activations.name}: {count:,} of {total:,} rows are not finite in float32, the first of them {where}; "
            "export them again in float32, without texts on which the language model overflows"
        )


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
