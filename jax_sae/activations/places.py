"""Places in a language model whose activations lie side by side: x[T, D1 + D2 + ...], the columns of each in turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Place:
    """A place, and how many numbers a token has there."""

    name: str
    """Such as `9.resid_post`: what comes out of block 9, counted from 0 (language_model/places.py). Empty where nothing
    names it, as of an array alone."""
    width: int
    """D."""


def total_width(places: Sequence[Place]) -> int:
    """The number of columns of all of them."""
    return sum(place.width for place in places)


Columns = tuple[int, int]
"""The first of a place's columns, and the one after its last."""


def columns(places: Sequence[Place]) -> dict[str, Columns]:
    """The columns of each place, by its name."""
    found, first = {}, 0
    for place in places:
        found[place.name] = first, first + place.width
        first += place.width
    return found


def own_columns(x: Any, its: Sequence[Columns] | None) -> Any:
    """Those columns of x[..., D1 + D2 + ...], side by side in their order; x itself where they are all, or None."""
    if its is None:
        return x
    spans: list[Columns] = []
    for first, last in its:  # neighbours are one span, which costs no copy
        adjacent = spans and spans[-1][1] == first
        spans[-1:] = [(spans[-1][0], last)] if adjacent else [*spans[-1:], (first, last)]
    if spans == [(0, x.shape[-1])]:
        return x
    parts = [x[..., slice(*span)] for span in spans]
    return parts[0] if len(parts) == 1 else (np if isinstance(x, np.ndarray) else jnp).concatenate(parts, axis=-1)


def described(places: Sequence[Place]) -> str:
    """Their widths, with their names where they have some."""
    if [place.name for place in places] == [""]:
        return f"width {places[0].width}"
    return ", ".join(f"{place.name} of width {place.width}" for place in places)
