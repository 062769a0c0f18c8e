"""Where the features of a dictionary with several written places write: relative decoder norms.

Of feature i at place p it is |W_dec_i at p| / sum over all places q of |W_dec_i at q|, from 0, where it writes nothing
there, to 1, where it writes there alone: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model
Diffing" (https://transformer-circuits.pub/2024/crosscoders). Of two language models it is taken of each model, over its
places; the histogram of that of the second one shows which features both share.

W_dec is as it was trained, so norms are in units of each place's normalisation: a place with larger activations has no
larger norms because of that. Features that never fired on the measured tokens are left out: their directions are
nobody's, and most are as they began, alike everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_sae.activations.places import Place, columns

ONLY = 0.1
"""A feature is of one side alone if its relative norm is below this there, or above 1 - this on the other."""
SHARED = (0.4, 0.6)
"""It is shared if its relative norm is between these on both."""
BINS = 20


@dataclass(frozen=True)
class RelativeNorms:
    """Relative norms of the features of one dictionary; plain numbers, ready for JSON."""

    sides: list[str]
    """The written places, or the language models where they are of several."""
    compared: int
    """Features that fired and whose direction is not 0."""
    left_out: int
    """The others."""
    mean: list[float] | None
    """Of each side, over the features; None where there are none."""
    largest: list[int]
    """Of each side, how many features have their largest norm there."""
    edges: list[float]
    """Of the bins of the histograms, evenly from 0 to 1."""
    histograms: list[list[int]]
    """Of each side, how many features have which relative norm there; a bin holds its left edge, the last one 1 too."""
    only_first: float | None
    """Of two sides, the fraction of features whose relative norm on the second one is below 0.1; None of more sides."""
    shared: float | None
    """Of two, the fraction from 0.4 to 0.6."""
    only_second: float | None
    """Of two, the fraction above 0.9."""


def sides_of(places: Sequence[str]) -> list[str]:
    """Of each place, the side it is on: its language model, where places are of several (`base:9.resid_post`); itself.

    Else each place is a side of its own.
    """
    models = [place.rpartition(":")[0] for place in places]
    return models if all(models) and len(set(models)) > 1 else list(places)


def relative_norms(W_dec: np.ndarray, places: Sequence[Place]) -> tuple[list[str], np.ndarray]:
    """The sides, and of each feature its relative norm on each, [F, sides] float64; NaN for a direction of zeros.

    Args:
        W_dec: [F, D1 + D2 + ...], as it was trained, in units of each place's normalisation.
        places: whose columns these are, in their order.

    Returns:
        On a side of several places their relative norms are added, so the sides of a feature always make 1.
    """
    W = np.asarray(W_dec, np.float64)
    largest = np.abs(W).max(1, initial=0)
    W = W / np.where(largest > 0, largest, 1)[:, None]  # else the square of a tiny number could be 0
    norms = np.stack([np.linalg.norm(W[:, slice(*its)], axis=1) for its in columns(places).values()], axis=1)
    of_place = sides_of([place.name for place in places])
    sides = list(dict.fromkeys(of_place))
    on_sides = norms @ np.array([[place == side for side in sides] for place in of_place], np.float64)
    total = on_sides.sum(1, keepdims=True)
    return sides, np.divide(on_sides, total, out=np.full_like(on_sides, np.nan), where=total > 0)


def summarized(sides: Sequence[str], relative: np.ndarray, fired: np.ndarray) -> RelativeNorms:
    """What `relative_norms` gave, of the features that fired[F] bool."""
    its = relative[fired & np.isfinite(relative).all(1)]
    N, edges = len(its), np.linspace(0, 1, BINS + 1)
    second = its[:, 1] if len(sides) == 2 and N else None

    def part(which: np.ndarray | None) -> float | None:
        return None if which is None else float(np.mean(which))

    return RelativeNorms(
        sides=list(sides),
        compared=N,
        left_out=len(relative) - N,
        mean=its.mean(0).tolist() if N else None,
        largest=np.bincount(its.argmax(1), minlength=len(sides)).tolist() if N else [0] * len(sides),
        edges=edges.tolist(),
        histograms=[np.histogram(side, edges)[0].tolist() for side in its.T],
        only_first=part(None if second is None else second < ONLY),
        shared=part(None if second is None else (second >= SHARED[0]) & (second <= SHARED[1])),
        only_second=part(None if second is None else second > 1 - ONLY),
    )
