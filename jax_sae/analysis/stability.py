"""Whether two dictionaries hold the same directions: rows of W_dec of two members, compared by cosine.

Row i of W_dec is the direction of feature i. Cosines are signed, because features are not negative: a direction and its
opposite are different features. A row of norm 0 has no direction; such rows are left out and counted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jax_sae.errors import BadInput


@dataclass(frozen=True)
class Stability:
    """How alike two dictionaries are; plain numbers, ready for JSON."""

    mean_max_cosine: float
    """Mean over the first's rows of the largest cosine with any row of the second. Not symmetric."""
    matched_cosine: float
    """Mean cosine of the one-to-one matching with the largest sum, over the rows of the smaller dictionary."""
    null_mean_max_cosine: float
    """The same of random directions, as many as were compared on either side."""
    null_matched_cosine: float
    compared: tuple[int, int]
    """Rows of the first and of the second that are not 0."""
    zero_rows: tuple[int, int]
    """Rows of the first and of the second of norm 0, which are left out."""


def stability(first: ArrayLike, second: ArrayLike, seed: int) -> Stability:
    """Compare two dictionaries, and as many random directions.

    Time grows with the cube of the number of rows and memory with its square (8 bytes for each pair), for the Hungarian
    matching.

    Args:
        first: W_dec [F, D] of one member.
        second: W_dec of another, with the same D; F may differ.
        seed: of the random directions, which are isotropic: normalised Gaussian vectors.

    Raises:
        BadInput: if D differs, a number is not finite, or all rows of one are 0.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise BadInput(
            f"the dictionaries have the shapes {first.shape} and {second.shape}; [F, D] with the same D was expected: "
            "compare members of one layer"
        )
    a, b = _directions(first, "first"), _directions(second, "second")
    rng = np.random.default_rng(seed)
    random = [_directions(rng.standard_normal(each.shape), "random") for each in (a, b)]
    mean_max, matched = _compare(a, b)
    null_mean_max, null_matched = _compare(*random)
    zero_rows = (len(first) - len(a), len(second) - len(b))
    return Stability(mean_max, matched, null_mean_max, null_matched, (len(a), len(b)), zero_rows)


def _directions(rows: np.ndarray, which: str) -> np.ndarray:
    """The rows that are not 0, at norm 1."""
    if not np.isfinite(rows).all():
        raise BadInput(f"the {which} dictionary has numbers that are not finite; take a checkpoint before it diverged")
    largest = np.abs(rows).max(1, initial=0)
    rows = rows[largest > 0] / largest[largest > 0, None]  # else the square of a tiny number could be 0
    if not len(rows):
        raise BadInput(f"all rows of the {which} dictionary are 0, so it has no directions; has this member trained?")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean max cosine of directions a [F, D] with b, and mean cosine of the best one-to-one matching."""
    from scipy.optimize import linear_sum_assignment

    cosines = a @ b.T
    return float(cosines.max(1).mean()), float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())
