"""A text -> its activations on disk, whichever program runs the language model.

stories in order ─► blocks of whole stories ─► activations, in any order ─► in the order of the text ─► write_store
"""

import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.places import Place, described
from jax_sae.activations.store import write_store
from jax_sae.errors import BadInput
from jax_sae.language_model.text import Stories
from jax_sae.language_model.windows import Story
from jax_sae.streams import progress_bar

BLOCK_TOKENS = 65_536
"""Tokens that are computed before they are written: enough for batches of equal length, few enough for memory."""

READ_AHEAD = 64
"""Stories that are tokenised at a time."""


def write_text(
    directory: Path,
    stories: Stories,
    activations_of: Callable[[Sequence[np.ndarray]], Iterable[tuple[int, np.ndarray]]],
    n_tokens: int | None,
    dtype: str = "float32",
    places: Sequence[Place] = (),
    **facts: Any,
) -> str:
    """Write the activations of a text as a store: whole stories in order, with a progress bar.

    Args:
        directory: of the store; must not exist or be empty.
        stories: the text.
        activations_of: token ids [T] of stories, none of them empty -> (number of the story, its activations [T, D])
            of each, in any order. Those of the first `stories.exclude_first_tokens` tokens are not written.
        n_tokens: end with the story that reaches so many written tokens; None: all stories.
        dtype: as for `write_store`.
        places: as for `write_store`.
        **facts: as for `write_store`; what became of the text is put beside them.

    Returns:
        A line that says what was written.

    Raises:
        BadInput: as `write_store` and `Stories.read`, if `n_tokens` is not above 0, or, after the first block, if the
            disk is too small for all of them.
        RunFailed: as `write_store`.
    """
    if n_tokens is not None and n_tokens < 1:
        raise BadInput(f"the number of tokens to write is {n_tokens}; a number above 0 was expected")
    width = 0
    read: deque[np.ndarray] = deque()  # token ids of stories, as long as they are not written
    counts = {"stories": 0, "empty_stories": 0, "cut_stories": 0, "tokens_cut": 0, "tokens_excluded": 0}

    def in_order() -> Generator[np.ndarray]:
        with progress_bar(total=n_tokens or len(stories), unit=" tokens" if n_tokens else " stories") as bar:
            for number, block in enumerate(_blocks(stories, n_tokens, counts)):
                found: list[Any] = [None] * len(block)
                for i, x in activations_of([story.token_ids for story in block]):
                    found[i] = x[block[i].used]
                    bar.update(min(len(found[i]), bar.total - bar.n) if n_tokens else 1)
                if number == 0:
                    nonlocal width
                    width = found[0].shape[1]
                    refuse_small_disk(directory, stories, n_tokens, width, dtype)
                if not n_tokens:
                    bar.update(counts["stories"] - bar.n)  # the empty ones
                read.extend(story.token_ids for story in block)
                yield from found

    with closing(in_order()) as activations:  # so that the bar ends before an error is told
        manifest = write_store(
            directory,
            activations,
            dtype=dtype,
            places=places,
            token_ids=(read.popleft() for _ in count()),
            text_read=counts,
            **facts,
        )  # reads `counts` last
    n_bytes = sum(shard.stat().st_size for shard in directory.glob("*.npy"))
    k = stories.exclude_first_tokens
    excluded = f"; the first {k:,} tokens of each left out ({counts['tokens_excluded']:,} tokens)" if k else ""
    return (
        f"{directory}: {manifest['rows']:,} rows of {described(places or [Place('', width)])} in {manifest['dtype']}, "
        f"{n_bytes / 1e6:,.1f} MB, of {counts['stories']:,} stories; {counts['empty_stories']:,} had no text"
        f"{f' beyond their first {k:,} tokens' if k else ''}, {counts['cut_stories']:,} were cut at "
        f"{stories.max_tokens:,} tokens ({counts['tokens_cut']:,} tokens lost){excluded}"
    )


def refuse_small_disk(directory: Path, stories: Stories, n_tokens: int | None, width: int, dtype: str) -> None:
    """Raise BadInput if the disk of `directory` has no room for the activations [n_tokens, width] of a text."""
    in_text, _ = stories.count_tokens(0, len(stories))
    rows = in_text if n_tokens is None else min(n_tokens, in_text)
    needed, free = rows * width * np.dtype(dtype).itemsize, shutil.disk_usage(directory).free
    if needed > free:
        half = " or half as many bytes by float16, a quarter by int8" if dtype == "float32" else ""
        raise BadInput(
            f"{directory}: about {rows:,} rows of width {width} in {dtype} need {needed / 1e6:,.1f} MB, but the disk "
            f"has {free / 1e6:,.1f} MB left; make room, choose another disk, or write fewer tokens{half}"
        )


def _blocks(stories: Stories, n_tokens: int | None, counts: dict[str, int]) -> Iterator[list[Story]]:
    """Stories that have tokens, about `BLOCK_TOKENS` tokens at a time, up to the one that reaches `n_tokens`."""
    block: list[Story] = []
    in_block = total = 0
    for first in range(0, len(stories), READ_AHEAD):
        for story in stories.read(range(first, min(first + READ_AHEAD, len(stories)))):
            counts["stories"] += 1
            counts["empty_stories"] += len(story) == 0
            counts["cut_stories"] += story.tokens_cut > 0
            counts["tokens_cut"] += story.tokens_cut
            counts["tokens_excluded"] += story.tokens_excluded
            if len(story):
                block.append(story)
                in_block, total = in_block + len(story.token_ids), total + len(story)
            is_last = n_tokens is not None and total >= n_tokens
            if in_block >= BLOCK_TOKENS or is_last:
                yield block
                block, in_block = [], 0
            if is_last:
                return
    if block:
        yield block
