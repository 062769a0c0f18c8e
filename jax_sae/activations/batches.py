"""Activations -> batches, as a pure function of the seed and of a position in the data.

    stories in the epoch's order ─► a block of whole stories, harvested ─► shuffled across its stories ─► batches

With `tokens` batching a block holds a whole number of batches of B tokens: what is left of its last story begins the
next block, so that an epoch uses every token once. With `story` batching a batch is a story, in the order of the text.
A `Position` is all that a checkpoint keeps of the data: its block is made again from there, bit for bit. The first
blocks are smaller, so that training begins after seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jax_sae.activations.blocks import Making, Taken, filled, finite_activations, part
from jax_sae.activations.normalize import Normalization
from jax_sae.activations.norms import over_norm_limit, within_norm_limit
from jax_sae.activations.order import in_order
from jax_sae.activations.position import Position
from jax_sae.activations.sources import Item, Source
from jax_sae.config import ActivationsConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.language_model.harvest import padded_length
from jax_sae.processes import together
from jax_sae.rows import padded_rows

SMALL_BLOCKS = 4
"""Blocks at the start of a run that are smaller: 1/16, 1/8, 1/4 and 1/2 of the others."""


@dataclass(frozen=True, eq=False)
class BatchRun:
    """Adjacent batches of a block, all of one shape: as many as there are entries in `after`.

    What follows them in the arrays is 0: it gives smaller blocks the shape of the others, for which the training step
    is compiled.
    """

    x: np.ndarray | jax.Array
    """[batches, B, D] float32, normalised; 0 where the weight is. D are the columns of all places, side by side. A JAX
    array where activations stay on the device."""
    weights: np.ndarray
    """[batches, B] float32, 1 for a token, 0 for padding and for a token over the norm limit."""
    used: int
    """Batches of this run that were used before."""
    after: tuple[Position, ...]
    """Where the data stands after each batch."""
    end: Position
    """Where the block ends: it counts all stories that were read so far, those of this block too."""


def batch_runs(
    source: Source, fitted: Normalization, position: Position, activations: ActivationsConfig, train: TrainConfig
) -> Iterator[BatchRun]:
    """Batches from `position` on, for ever, a run of equal shape at a time.

    Args:
        source: of stories or rows.
        fitted: the normalisation, where it is one for all stories.
        position: where to go on.
        activations: its `normalization`, `block_tokens` and, with tokens batching, `norm_limit` are used.
        train: its `batching`, `batch_tokens` and `seed` are used.

    Raises:
        BadInput: if an epoch has no tokens at all, an activation is not finite, or more than half of a block's tokens
            are over the norm limit.
    """
    for each in batch_runs_in_pieces(source, fitted, position, activations, train):
        if isinstance(each, BatchRun):
            yield each
        del each  # so that there is one block at a time


def batch_runs_in_pieces(
    source: Source, fitted: Normalization, position: Position, activations: ActivationsConfig, train: TrainConfig
) -> Iterator[BatchRun | float]:
    """The same, and before the first run of a block, now and then, how much of it is there, from 0 to 1.

    At each of these numbers the caller may do something else on the devices.
    """
    make_block = _token_block if train.batching == "tokens" else _story_block
    while True:
        used, start = position.batch, replace(position, batch=0)
        runs, position = yield from make_block(source, fitted, start, activations, train)
        for run in runs:
            if used < len(run.after):
                yield replace(run, used=used)
            used = max(0, used - len(run.after))
            del run


def _token_block(
    source: Source, fitted: Normalization, start: Position, activations: ActivationsConfig, train: TrainConfig
) -> Making[tuple[Iterator[BatchRun], Position]]:
    """One run with all batches of the block, and where the next block starts.

    A token over the norm limit keeps its place, with weight 0, so that positions follow from numbers of tokens alone.
    """
    B = train.batch_tokens
    room = activations.block_tokens // B
    n_batches = max(1, room >> max(0, SMALL_BLOCKS - start.block))
    items: list[Item] = []
    spans: list[tuple[int, int]] = []  # of each item: the first and last token used
    free = n_batches * B
    with together():
        for item, here, after_item in walk(source, start, shuffle_seed=train.seed):
            last = min(here.token + free, len(item))
            items.append(item)
            spans.append((here.token, last))
            free -= last - here.token
            if not free:
                end = replace(here, token=last) if last < len(item) else after_item
                break
    places = np.random.Generator(np.random.Philox(key=[train.seed, 2 * start.block + 1])).permutation(n_batches * B)
    firsts = np.cumsum([0] + [last - first for first, last in spans])
    taken = [Taken(*span, places[firsts[i] : firsts[i + 1]]) for i, span in enumerate(spans)]
    x, norms = yield from filled(source, items, taken, (room, B), fitted, activations)
    weights = np.zeros(room * B, np.float32)
    weights[: n_batches * B] = ~over_norm_limit(norms[: n_batches * B], activations.norm_limit, source.name)
    end = replace(end, block=start.block + 1)
    after = (*(replace(start, batch=n) for n in range(1, n_batches)), end)
    return iter([BatchRun(x, weights.reshape(room, B), 0, after, end)]), end


def _story_block(
    source: Source, fitted: Normalization, start: Position, activations: ActivationsConfig, train: TrainConfig
) -> Making[tuple[Iterator[BatchRun], Position]]:
    """A run of one batch for each story of the block, and where the next block starts."""
    del train  # stories come in the order of the text, whole
    items: list[Item] = []
    tokens = 0
    with together():
        for item, _, after_item in walk(source, start, shuffle_seed=None):
            items.append(item)
            tokens += len(item)
            if tokens >= activations.block_tokens:
                end = replace(after_item, block=start.block + 1)
                break
    lengths = [padded_length(len(item)) for item in items]
    firsts = np.cumsum([0, *lengths])
    taken = [Taken(0, len(item), np.arange(len(item)) + firsts[i]) for i, item in enumerate(items)]
    x, _ = yield from filled(source, items, taken, (1, padded_rows(int(firsts[-1]))), fitted, activations)

    def of_stories() -> Iterator[BatchRun]:
        for i, (item, length) in enumerate(zip(items, lengths, strict=True)):
            weights = (np.arange(length) < len(item)).astype(np.float32)[None]
            here = replace(start, batch=i + 1) if i + 1 < len(items) else end
            yield BatchRun(part(x, firsts[i], length), weights, 0, (here,), end)

    return of_stories(), end


def walk(source: Source, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position, Position]]:
    """Yield items that have tokens, where they stand and what follows them, epoch after epoch; empty ones are counted.

    Raises:
        BadInput: if an epoch has no tokens at all.
    """
    here, seen_in_epoch = start, start.within_epoch
    while True:
        for item, following in in_order(source, here, shuffle_seed):
            if len(item):
                seen_in_epoch = True
                yield item, here, following
            here = following
        if not seen_in_epoch:
            if here.tokens_excluded:
                raise BadInput(
                    f"{source.name}: not one has any tokens but the first ones, which are excluded; "
                    "lower activations.exclude_first_tokens"
                )
            raise BadInput(f"{source.name}: not one has any tokens; is this the right text column?")
        here, seen_in_epoch = here.next_epoch(), False


def first_activations(
    source: Source, n_tokens: int, shuffle_seed: int | None, norm_limit: float = 0.0
) -> list[np.ndarray]:
    """The activations [T, D] float32 of the first items of epoch 0, whole ones, about `n_tokens` tokens in all.

    Fewer where the source has fewer; at least one item. They are in the language model's scale. Rows with a norm larger
    than `norm_limit`, where it is not 0, are left out.

    Raises:
        BadInput: if an activation is not finite, or more than half of them are over the limit.
    """
    items: list[Item] = []
    for item, here, _ in walk(source, Position(), shuffle_seed):
        if here.epoch or (items and sum(map(len, items)) + len(item) > n_tokens):
            break
        items.append(item)
    found: list[Any] = [None] * len(items)
    for i, x in finite_activations(source, items):
        found[i] = x.copy()
    return within_norm_limit(found, norm_limit, source.name)
