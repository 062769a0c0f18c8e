"""A source whose reading can be broken off: a block of activations may take half a minute to harvest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_sae.activations.sources import Wrapped


class Stopped(Exception):
    """Reading was broken off because a stop was requested."""


@dataclass(frozen=True, eq=False)
class Interruptible(Wrapped):
    """The same source; its `activations` raise `Stopped` between two items once `stop_requested()` is true."""

    stop_requested: Callable[[], bool]

    def activations(self, items: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number in `items`, activations [T, D] float32) of each item that has tokens, in any order.

        Raises:
            Stopped: once a stop is requested.
        """
        for pair in self.source.activations(items):
            if self.stop_requested():
                raise Stopped
            yield pair
