"""What is above 0 among a chunk's features: all that is looked at, so that time grows with L0 and not with F."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse


@dataclass(frozen=True, eq=False)
class Active:
    """The n entries above 0 of features [N, F], in two orders."""

    tokens: int
    """N."""
    columns: np.ndarray
    """[n] int32, one token after the other: the features."""
    values: np.ndarray
    """[n] float32."""
    first_of_token: np.ndarray
    """[N + 1], where each token begins among these."""
    row: np.ndarray
    """[n] int32, one feature after the other: the tokens, in their order."""
    value: np.ndarray
    """[n] float32."""
    first: np.ndarray
    """[F + 1], where each feature begins among these."""

    def dense(self, tokens: slice) -> np.ndarray:
        """The features [T, F] float32 of some tokens."""
        first, last = self.first_of_token[tokens.start], self.first_of_token[tokens.stop]
        active = np.diff(self.first_of_token[tokens.start : tokens.stop + 1])
        found = np.zeros((len(active), len(self.first) - 1), np.float32)
        found[np.repeat(np.arange(len(active)), active), self.columns[first:last]] = self.values[first:last]
        return found

    @cached_property
    def column(self) -> np.ndarray:
        """[n] int64, of the entries one feature after the other: the features."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @cached_property
    def key(self) -> np.ndarray:
        """[n] int64, ascending: the feature times N, and the token."""
        return self.column * self.tokens + self.row


Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Entries above 0, one token after the other: their features, their values, and how many each token has."""


def entries(dense: np.ndarray) -> Entries:
    """Those of features [N, F] float32."""
    N, F = dense.shape
    at = np.flatnonzero(dense > 0)
    rows = at // F
    return (at - rows * F).astype(np.int32), dense.ravel()[at], np.bincount(rows, minlength=N)


def joined(parts: Sequence[Entries], features: int) -> Active:
    """Entries of some tokens and of those that follow, of F features."""
    columns, values, active = (np.concatenate(each) for each in zip(*parts, strict=True))
    first_of_token = np.concatenate([[0], np.cumsum(active)])
    by_feature = sparse.csr_matrix((values, columns, first_of_token), (len(active), features)).tocsc()
    return Active(len(active), columns, values, first_of_token, by_feature.indices, by_feature.data, by_feature.indptr)


def side_by_side(several: Sequence[Active]) -> tuple[np.ndarray, np.ndarray]:
    """Features of the same tokens as those of one: columns, one token after the other, and how many a token has."""
    each = [np.diff(its.first_of_token) for its in several]
    begins = np.cumsum([0] + [len(its.first) - 1 for its in several])
    columns = np.concatenate([its.columns + begin for its, begin in zip(several, begins, strict=False)])
    token = np.concatenate([np.repeat(np.arange(len(n)), n) for n in each])
    return columns[np.argsort(token, kind="stable")], np.sum(each, 0)
