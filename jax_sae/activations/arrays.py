"""Activations that are there already, in memory or mapped from a file: rows [N, D], or stories [N, T, D].

They are neither copied nor cast; only what is read is, to float32.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from jax_sae.activations.places import Place, total_width
from jax_sae.errors import BadInput

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
