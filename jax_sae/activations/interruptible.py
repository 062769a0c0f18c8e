"""A source whose reading can be broken off: a block of activations may take half a minute to harvest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from jax_sae.activations.blocks import OnDevice
from jax_sae.activations.sources import Wrapped

T = TypeVar("T")


class Stopped(Exception):
    """Reading was broken off because a stop was requested."""


@dataclass(frozen=True, eq=False)
class Interruptible(Wrapped):
    """The same source; reading activations raises `Stopped` once `stop_requested()` is true, between two items.

    On a device it is between two batches of them.
    """

    stop_requested: Callable[[], bool]

    def activations(self, items: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number in `items`, activations [T, D] float32) of each item that has tokens, in any order.

        Raises:
            Stopped: once a stop is requested.
        """
        return self._until_stopped(self.source.activations(items))

    def on_device(self, items: Sequence[Any]) -> OnDevice | None:
        """The same where the device keeps them, if it does."""
        batches = super().on_device(items)
        return None if batches is None else self._until_stopped(batches)

    def _until_stopped(self, parts: Iterator[T]) -> Iterator[T]:
        for part in parts:
            if self.stop_requested():
                raise Stopped
            yield part
            del part  # a batch on the device is gone before the next one is computed
