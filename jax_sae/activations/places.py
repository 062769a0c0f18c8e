"""Places in a language model whose activations lie side by side: x[T, D1 + D2 + ...], the columns of each in turn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shortened

from jax_sae.errors import BadInput

NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}"
"""What a place may be called: `9.mlp_out`, `blocks.9.hook_mlp_out`; files and members are named after it."""


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


def columns(places: Sequence[Place], name: str) -> slice:
    """Which columns are those of the place with that name, which is among them."""
    i = [place.name for place in places].index(name)
    first = total_width(places[:i])
    return slice(first, first + places[i].width)


def check_name(name: str, where: str) -> None:
    """Raise BadInput unless a place may be called so; `where` is what named it."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise BadInput(
            f"{where} names a place {shortened(name)}; letters, digits, '.', '_' and '-' were expected, such as "
            "9.resid_post"
        )
