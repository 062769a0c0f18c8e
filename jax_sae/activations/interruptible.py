"""A source whose reading can be broken off: a block of activations may take half a minute to harvest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_sae.activations.sources import Source


class Stopped(Exception):
    """Reading was broken off because a stop was requested."""


@dataclass(frozen=True, eq=False)
class Interruptible:
    """The same source; its `activations` raise `Stopped` between two items once `stop_requested()` is true."""

    source: Source
    stop_requested: Callable[[], bool]

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return self.source.name

    @property
    def width(self) -> int:
        """D."""
        return self.source.width

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return self.source.has_stories

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.source)

    def read(self, items: Sequence[int]) -> Sequence[Any]:
        """Read these items, in this order."""
        return self.source.read(items)

    def activations(self, items: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number in `items`, activations [T, D] float32) of each item that has tokens, in any order.

        Raises:
            Stopped: once a stop is requested.
        """
        for pair in self.source.activations(items):
            if self.stop_requested():
                raise Stopped
            yield pair

    def count_tokens(self) -> tuple[int, bool]:
        """Tokens of an epoch, and whether that number is exact."""
        return self.source.count_tokens()

    def digests(self) -> dict[str, str]:
        """Digests of what decides the activations."""
        return self.source.digests()
