"""Scales that are taken into a dictionary's parameters, in float64, so that it works on raw activations."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

ROWS_AT_A_TIME = 64
"""So little is in float64 at once."""


def scaled_rows(W: np.ndarray, by: Any, is_copy: bool = False) -> np.ndarray:
    """W[N, M] with row i multiplied by `by`[i], or all by one number; computed in float64, kept in float32.

    If W is a copy that nobody else has, it is scaled where it is.
    """
    return _times(W, np.broadcast_to(np.asarray(by, np.float64), len(W))[:, None], is_copy)


def scaled_columns(W: np.ndarray, by: np.ndarray, is_copy: bool = False) -> np.ndarray:
    """W[N, M] with column j multiplied by `by`[j]; as `scaled_rows`."""
    return _times(W, np.broadcast_to(np.asarray(by, np.float64), (len(W), W.shape[1])), is_copy)


def _times(W: np.ndarray, by: np.ndarray, is_copy: bool) -> np.ndarray:
    out = W if is_copy and W.flags.writeable else np.empty(W.shape, np.float32)

    def part(start: int) -> None:
        rows = slice(start, start + ROWS_AT_A_TIME)
        with np.errstate(over="ignore"):
            out[rows] = W[rows] * by[rows]

    with ThreadPoolExecutor() as pool:
        list(pool.map(part, range(0, len(W), ROWS_AT_A_TIME)))
    return out


def scaled(x: np.ndarray, by: Any) -> np.ndarray:
    """A vector times a number, or times another vector; computed in float64, kept in float32."""
    with np.errstate(over="ignore"):
        return (np.asarray(x, np.float64) * by).astype(np.float32)


def row_norms(W: np.ndarray) -> np.ndarray:
    """|W_i|, [F] float64."""
    parts = [np.square(W[start : start + 1024], dtype=np.float64).sum(-1) for start in range(0, len(W), 1024)]
    return np.sqrt(np.concatenate(parts))


def times_matrix(x: np.ndarray, W: np.ndarray) -> np.ndarray:
    """x[N] W[N, M] -> [M] in float64, without a copy of W in float64."""
    total = np.zeros(W.shape[1])
    for start in range(0, len(W), 64):
        rows = slice(start, start + 64)
        total += np.asarray(x[rows], np.float64) @ W[rows].astype(np.float64)
    return total
