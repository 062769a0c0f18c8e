"""In which order the items of a source come, and where a run stands after each."""

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from jax_sae.activations.position import Position
from jax_sae.language_model.text import Stories

if TYPE_CHECKING:
    from jax_sae.activations.sources import Item, Source

READ_AHEAD = 64
"""Items that are read (tokenised) at a time."""


def in_order(source: "Source", start: Position, shuffle_seed: int | None) -> Iterator[tuple["Item", Position]]:
    """The items of an epoch from a position on, to its end, and the position after each.

    A source with a method `in_order(start, shuffle_seed)` says so itself; it must not depend on anything else. Of
    another one they are all of its items, in an order that is random by the seed and the epoch, without a seed in their
    own.
    """
    own = getattr(source, "in_order", None)
    return by_number(source, start, shuffle_seed) if own is None else own(start, shuffle_seed)


def by_number(source: "Source", start: Position, shuffle_seed: int | None) -> Iterator[tuple["Item", Position]]:
    """The items of a source that can read each by its number, as `in_order` gives them."""
    order, here = random_order(len(source), shuffle_seed, start.epoch), start
    while here.item < len(order):
        for item in source.read(order[here.item : here.item + READ_AHEAD].tolist()):
            here = here.after(item, item=here.item + 1)
            yield item, here


@lru_cache(maxsize=2)
def random_order(n: int, seed: int | None, epoch: int) -> np.ndarray:
    """The numbers below n in an order that is random by the seed and the epoch; without a seed, in their own."""
    if seed is None:
        return np.arange(n)
    return np.random.Generator(np.random.Philox(key=[seed, 2 * epoch])).permutation(n)


def stories_in_order(stories: Stories, order: np.ndarray, start: Position) -> Iterator[tuple["Item", Position]]:
    """The stories of rows in an order, from `start.item` in it and `start.offset` in that row on; positions as there.

    Rows are read some at a time, as they are needed.
    """

    def documents() -> Iterator[list[int]]:
        for first in range(start.item, len(order), READ_AHEAD):
            yield from stories.token_ids(order[first : first + READ_AHEAD])

    here = start
    for story, passed, used_up, offset in stories.windows.items(documents(), start.offset):
        for each in (*passed, story):
            here = here.after(each, item=start.item + used_up, offset=offset)
        yield story, here
