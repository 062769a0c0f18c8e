"""Activations that are there already, on disk or in memory -> the source to train on and the held-out one."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.array_files import ENDINGS, open_arrays
from jax_sae.activations.arrays import Activations, Rows, SideBySide, StoryArrays, is_rows, refuse_not_finite
from jax_sae.activations.given import from_memory
from jax_sae.activations.places import Place, described, total_width
from jax_sae.activations.store import open_store
from jax_sae.config import IN_MEMORY, Config, places_of
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import is_saved_to_disk

ROWS_PER_CHUNK = 256
"""Adjacent rows that are read at once; blocks are made of many such chunks from all over them."""


@dataclass(frozen=True)
class Chunk:
    """Adjacent rows."""

    start: int
    stop: int
    tokens_cut: int = 0
    tokens_excluded: int = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class RowSource:
    """Rows `first` to `last`, whose stories are not known; an item is a chunk of `ROWS_PER_CHUNK` rows."""

    rows: Rows | SideBySide
    first: int
    last: int

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"rows {self.first} to {self.last - 1} of {self.rows.name}"

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns the activations are."""
        return self.rows.places

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""
        return total_width(self.places)

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return False

    def __len__(self) -> int:
        """Return the number of chunks; the last may be shorter."""
        return -(-(self.last - self.first) // ROWS_PER_CHUNK)

    def read(self, items: Sequence[int]) -> Sequence[Chunk]:
        """Find the chunks; nothing is read yet."""
        starts = [self.first + int(i) * ROWS_PER_CHUNK for i in items]
        return [Chunk(start, min(start + ROWS_PER_CHUNK, self.last)) for start in starts]

    def activations(self, items: Sequence[Chunk]) -> Iterator[tuple[int, np.ndarray]]:
        """Copy the chunks' rows."""
        for i, chunk in enumerate(items):
            yield i, self.rows.read(chunk.start, chunk.stop)

    def count_tokens(self) -> tuple[int, bool]:
        """The number of rows, which is exact."""
        return self.last - self.first, True

    def digests(self) -> dict[str, str]:
        """Of all rows; a bare file is read for it."""
        return {"activations": self.rows.digest}


@dataclass(frozen=True)
class StoryOfArray:
    """One story by its number."""

    number: int
    tokens: int
    """Those that are used."""
    tokens_excluded: int
    tokens_cut: int = 0

    def __len__(self) -> int:
        """Return the number of tokens whose activations are used."""
        return self.tokens


@dataclass(frozen=True, eq=False)
class StoryArraySource:
    """Stories `first` to `last` of arrays [N, T, D]; an item is a story, without its first `exclude` tokens."""

    stories: StoryArrays | SideBySide
    first: int
    last: int
    exclude: int = 0

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"stories {self.first} to {self.last - 1} of {self.stories.name}"

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns the activations are."""
        return self.stories.places

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""
        return total_width(self.places)

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return True

    def __len__(self) -> int:
        """Return the number of stories, empty ones included."""
        return self.last - self.first

    def read(self, items: Sequence[int]) -> Sequence[StoryOfArray]:
        """Find the stories; nothing is read yet."""
        found = []
        for i in items:
            tokens = int(self.stories.lengths[self.first + int(i)])
            excluded = min(tokens, self.exclude)
            found.append(StoryOfArray(self.first + int(i), tokens - excluded, excluded))
        return found

    def activations(self, items: Sequence[StoryOfArray]) -> Iterator[tuple[int, np.ndarray]]:
        """Copy the stories' tokens."""
        for i, story in enumerate(items):
            if story.tokens:
                yield i, self.stories.read(story.number, self.exclude)

    def count_tokens(self) -> tuple[int, bool]:
        """The tokens of all stories that are used, which is exact."""
        return int(np.maximum(0, self.stories.lengths[self.first : self.last] - self.exclude).sum()), True

    def digests(self) -> dict[str, str]:
        """Of all stories; a bare file is read for it."""
        return {"activations": self.stories.digest}


ArraySource = RowSource | StoryArraySource


def open_activations(
    path: str, array: str = "", mask: str = "", places: Sequence[str] = ()
) -> tuple[Activations, list[str]]:
    """Open a store's directory, a file of arrays, or a folder that `save_to_disk` wrote; and say what it was taken for.

    float16, bfloat16, float32 and float64 are read, as float32. Nothing is copied into memory.

    Args:
        path: of the store, file or folder.
        array: as in `open_arrays`.
        mask: as in `open_arrays`.
        places: which of several; none: there is one.

    Raises:
        BadInput: if there is nothing to read at `path`, it is damaged, or it is not one array of activations.
    """
    where = Path(os.path.expanduser(path))
    if where.is_dir() and not is_saved_to_disk(where):
        if array or mask:
            given = "activations.array" if array else "activations.mask"
            raise BadInput(f"{path} is a store, which holds rows alone, but {given} is given; leave it out")
        return open_store(where, places), []
    if not where.exists():
        raise BadInput(
            f"activations.path is {path!r}, but there is no such file or directory; give a store's directory, a folder "
            f"by save_to_disk, or a file with one array [N, D] or [N, T, D] ({', '.join(ENDINGS)})"
        )
    return open_arrays(where, array, mask, places)


def array_sources(
    config: Config, x: Any, mask: Any = None, name: str = "the activations given"
) -> tuple[ArraySource, ArraySource, list[str]]:
    """Sources of arrays in memory: the one to train on, the held-out one, and lines that say what they are.

    `train` takes them in place of what `config` names. Nothing is copied: do not change the arrays while they are used.

    Args:
        config: its `activations` say what is held out and excluded.
        x: rows [N, D]; stories [N, T, D]; or a list of stories [T, D] or [n, T, D]. NumPy or JAX arrays, or torch
            tensors on any device, of float16, bfloat16, float32 or float64. Or a dictionary of these, of the same
            tokens at several places, by the places' names.
        mask: which are tokens, [N, T], or a list of [T] or [n, T]; bool or 0 and 1. None: all are.
        name: for messages.

    Raises:
        BadInput: if `x` or `mask` is none of that, an activation is not finite, there are too few, or the settings need
            stories where there are rows.
    """
    activations, notes = from_memory(x, mask, name)
    return sources_of(config, activations, notes)


def open_array_sources(config: Config) -> tuple[ArraySource, ArraySource, list[str]]:
    """The same of what `activations.path` names.

    Raises:
        BadInput: as `array_sources` and `open_activations`, and if the activations were in memory.
    """
    where = config.activations
    if where.path == IN_MEMORY:
        raise BadInput(
            "the activations were in memory, given by a program, and no file holds them; have it give them again, as "
            "`sources`"
        )
    activations, notes = open_activations(where.path, where.array, where.mask, places_of(config.sweep))
    return sources_of(config, activations, notes)


def sources_of(
    config: Config, activations: Activations, notes: list[str]
) -> tuple[ArraySource, ArraySource, list[str]]:
    """Hold the last tenth out, but no more than `held_out_tokens` need: rows, or whole stories.

    Raises:
        BadInput: if an activation is not finite, there are too few, or the settings need stories where there are rows.
    """
    settings = config.activations
    N, name = len(activations), activations.name
    if is_rows(activations):
        assert not isinstance(activations, StoryArrays)
        _refuse_settings_of_stories(config)
        refuse_not_finite(activations)
        held_out = min(settings.held_out_tokens, N // 10)
        if held_out < 2:
            raise BadInput(f"{name} has {N} rows; at least 20 are needed, a tenth of them held out")
        lines = [
            f"activations   {name}: {N:,} rows of {described(activations.places)}",
            f"held out      the last {held_out:,} rows, which are not trained on",
        ]
        rows = (RowSource(activations, 0, N - held_out), RowSource(activations, N - held_out, N))
        return *rows, lines[:1] + notes + lines[1:]
    if N < 10:
        raise BadInput(
            f"{name} has {N} stories; at least 10 are needed, a tenth of them held out. Tokens without stories are "
            "rows, one array [N, D]"
        )
    assert not isinstance(activations, Rows)
    refuse_not_finite(activations)
    exclude = settings.exclude_first_tokens or 0
    used = np.maximum(0, activations.lengths - exclude)
    enough = 1 + int(np.searchsorted(np.cumsum(used[::-1]), settings.held_out_tokens))
    first = N - min(enough, N // 10)
    training, held_out_source = (
        StoryArraySource(activations, start, stop, exclude) for start, stop in ((0, first), (first, N))
    )
    shortest, longest = int(activations.lengths.min()), int(activations.lengths.max())
    tokens = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    lines = [
        f"activations   {name}: {N:,} stories of {tokens} tokens, {described(activations.places)}",
        f"held out      the last {N - first:,} stories, which are not trained on",
    ]
    return training, held_out_source, lines[:1] + notes + lines[1:]


def _refuse_settings_of_stories(config: Config) -> None:
    """Raise BadInput where a setting needs to know which rows are one story."""
    activations = config.activations
    if config.train.batching == "story" or activations.normalization == "story":
        raise BadInput(
            "activations.path holds rows without their stories, so train.batching and activations.normalization "
            "cannot be 'story'; use 'tokens' and 'dataset', or give an array [N, T, D]"
        )
    if activations.exclude_first_tokens:
        raise BadInput(
            f"activations.exclude_first_tokens is {activations.exclude_first_tokens}, but activations.path holds rows "
            "without their stories; export them again with --exclude-first-tokens, give an array [N, T, D], or use "
            "activations.norm_limit"
        )
