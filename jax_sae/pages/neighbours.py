"""Which features are alike: by the directions they write, and by firing on the same tokens."""

from dataclasses import dataclass

import numpy as np

from jax_sae.pages.tally import Together

NEAREST = 5
NUMBERS_AT_A_TIME = 2**24


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of each of F features some others, the most alike first."""

    feature: np.ndarray
    """[F, n] int32; -1 where there is none."""
    likeness: np.ndarray
    """[F, n] float32: a cosine, or a phi coefficient."""


def unit_rows(directions: np.ndarray) -> np.ndarray:
    """Directions [F, D] at norm 1; one of norm 0 stays 0."""
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions / np.where(norms > 0, norms, 1)).astype(np.float32)


def nearest(of: np.ndarray, among: np.ndarray, n: int, is_itself: bool = False) -> Neighbours:
    """Of unit rows [F, D] the n rows of [G, D] with the largest cosine; not itself, where both are the same."""
    n = min(n, len(among) - is_itself)
    at_a_time = max(1, NUMBERS_AT_A_TIME // len(among))
    parts = []
    for first in range(0, len(of), at_a_time):
        cosines = of[first : first + at_a_time] @ among.T
        if is_itself:
            cosines[np.arange(len(cosines)), first + np.arange(len(cosines))] = -np.inf
        parts.append(_largest(cosines, n))
    return _joined(parts)


def fire_together(together: Together, fired: np.ndarray, tokens: int, n: int) -> Neighbours:
    """Of each feature the n others with the largest phi coefficient; none where that is not above 0.

    Args:
        together: the tokens on which two fire.
        fired: [F], the tokens on which each fires.
        tokens: N, all of them.
        n: how many.
    """
    at_a_time = max(1, NUMBERS_AT_A_TIME // len(fired))
    n = min(n, len(fired) - 1)
    parts = []
    for first in range(0, len(fired), at_a_time):
        its = slice(first, first + at_a_time)
        correlations = phi(together.of(its, slice(None)), fired[its], fired, tokens)
        correlations[np.arange(len(correlations)), first + np.arange(len(correlations))] = 0
        parts.append(_above_0(_largest(correlations, n)))
    return _joined(parts)


def firing_match(together: np.ndarray, fired: np.ndarray, of_others: np.ndarray, tokens: int) -> Neighbours:
    """Of each of F features the one of G with the largest phi coefficient; none where that is not above 0.

    Args:
        together: [F, G], the tokens on which two fire.
        fired: [F], the tokens on which each fires.
        of_others: [G].
        tokens: N, all of them.
    """
    return _above_0(_largest(phi(together, fired, of_others, tokens), 1))


def phi(together: np.ndarray, fired: np.ndarray, of_others: np.ndarray, tokens: int) -> np.ndarray:
    """[F, G] float32: the correlation of firing with firing, of features that fire on so many tokens, and together.

    phi = (N n_ab - n_a n_b) / sqrt(n_a (N - n_a) n_b (N - n_b)); 0 where one fires never or always.
    """
    spread, others = (np.sqrt(n * (tokens - n).astype(np.float64)) for n in (fired, of_others))
    both = spread[:, None] * others
    covariance = float(tokens) * together - fired[:, None] * of_others.astype(np.float64)
    return np.where(both > 0, covariance / np.where(both > 0, both, 1), 0).astype(np.float32)


def _above_0(found: Neighbours) -> Neighbours:
    return Neighbours(np.where(found.likeness > 0, found.feature, -1), found.likeness)


def _largest(likeness: np.ndarray, n: int) -> Neighbours:
    order = np.argsort(-likeness, axis=1, kind="stable")[:, :n]
    return Neighbours(order.astype(np.int32), np.take_along_axis(likeness, order, 1))


def _joined(parts: list[Neighbours]) -> Neighbours:
    return Neighbours(np.concatenate([its.feature for its in parts]), np.concatenate([its.likeness for its in parts]))
