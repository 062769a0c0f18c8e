"""Arrays in slices: what of an array a process holds, how a slice is called, and which digest it has."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Index = tuple[tuple[int, int], ...]
"""Of a slice of an array: of each axis where it begins and where it ends."""


@dataclass(frozen=True, eq=False)
class Slices:
    """An array that is written or read in slices, of which a process has some."""

    shape: tuple[int, ...]
    """Of the array."""
    dtype: np.dtype[Any]
    slice_shape: tuple[int, ...]
    """Of its slices; the last ones along an axis may be shorter."""
    here: Mapping[Index, np.ndarray]
    """Those that this process writes, each of them alone, or has read."""

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def whole(shape: Iterable[int]) -> Index:
    """The slice that is all of an array."""
    return tuple((0, n) for n in shape)


def place(index: Index, within: Index | None = None) -> tuple[slice, ...]:
    """What NumPy calls a slice, counted from where another one begins."""
    starts = [first for first, _ in within] if within else [0] * len(index)
    return tuple(slice(first - start, last - start) for (first, last), start in zip(index, starts, strict=True))


def common(one: Index, other: Index) -> Index | None:
    """What two slices have in common, None if that is nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(first < last for first, last in found) else None


def size(index: Index) -> int:
    """The number of elements of a slice."""
    return math.prod(last - first for first, last in index)


def to_text(index: Index) -> str:
    """A slice as Python has it, such as `0:64, 32:64`; nothing for a scalar."""
    return ", ".join(f"{first}:{last}" for first, last in index)


def from_text(text: str) -> Index:
    """The inverse of `to_text`.

    Raises:
        ValueError: if it is not such a text.
    """
    found = []
    for axis in filter(None, text.split(", ")):
        first, last = axis.split(":")
        found.append((int(first), int(last)))
    return tuple(found)


def saved_slices(digest: Any, shape: tuple[int, ...]) -> dict[Index, str]:
    """The slices in which an array was saved and their sha256.

    Args:
        digest: as it stands in a checkpoint: that of an array which was saved as a whole, or by each slice its own.
        shape: of the array.

    Raises:
        ValueError: if it is neither, or the slices are not all of the array.
    """
    if isinstance(digest, str):
        return {whole(shape): digest}
    found = {from_text(text): str(of_slice) for text, of_slice in dict(digest).items()}
    if any(common(index, whole(shape)) != index for index in found) or sum(map(size, found)) != math.prod(shape):
        raise ValueError(f"its slices, {'; '.join(map(to_text, found))}, are not all of {shape}")
    return found


def of_all(digests: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Digests of arrays by their names, as several processes know them: each of its own slices."""
    found: dict[str, Any] = {}
    for of_process in digests:
        for name, digest in of_process.items():
            if isinstance(digest, str):
                found[name] = digest
            elif not isinstance(found.setdefault(name, {}), str):
                found[name].update(digest)
    return found
