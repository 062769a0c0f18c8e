"""How often features fire, how large they are, on which tokens, after which, where in a story, and which together.

Only active entries are counted, in sparse products, so that the time grows with L0 and not with F. Every count is
exact, and memory does not grow with the text: a table of tokens has at most as many entries as there are pairs of a
token and a feature.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

ENTRIES_AT_A_TIME = 2**20
"""About how many active entries are counted at once."""

MOST_TOGETHER = 16_384
"""Features for whose pairs there is room: with more, firing together is not counted."""

OCTAVES_BELOW, BARS_AN_OCTAVE, BARS = 24, 4, 192
"""Bars of the histogram: four an octave from 2^-24 to 2^24; the first and the last also hold what lies beyond."""

PLACES_IN_STORY = 12
"""The first token; the next three; the others by the tenth of the story in which they lie."""

HALVES = 2
"""Stories with even numbers, in which rules are found, and with odd ones, on which they are tried."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known of each token of a chunk, whatever the member."""

    ids: np.ndarray
    """[N] int32."""
    before: np.ndarray
    """[N] int32, the id of the token before; -1 where there is none."""
    place: np.ndarray
    """[N] int32, below PLACES_IN_STORY."""
    half: np.ndarray
    """[N] int32, 0 or 1."""


def place_in_story(position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which place in its story a token has, of its position in it and the story's length."""
    tenth = 2 + position * (PLACES_IN_STORY - 2) // np.maximum(length, 1)
    return np.where(position == 0, 0, np.where(position < 4, 1, tenth)).astype(np.int32)


def bar_of(values: np.ndarray) -> np.ndarray:
    """The bar of the histogram of each positive float32; a quarter of an octave, linear within the octave."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32) >> 21
    return np.clip(bits - (127 - OCTAVES_BELOW) * BARS_AN_OCTAVE, 0, BARS - 1)


def bar_edges() -> np.ndarray:
    """[BARS + 1] float32, between which the bars of the histogram lie."""
    bits = (np.arange(BARS + 1, dtype=np.int32) + (127 - OCTAVES_BELOW) * BARS_AN_OCTAVE) << 21
    return bits.view(np.float32)


class TokenTally:
    """How often each token came, in which half, and after which one: the same for all members."""

    def __init__(self, vocabulary: int) -> None:
        """Of none."""
        self.ids = np.zeros((HALVES, vocabulary), np.int64)
        self.before = np.zeros((HALVES, vocabulary), np.int64)
        self.places = np.zeros((HALVES, PLACES_IN_STORY), np.int64)
        self.tokens = np.zeros(HALVES, np.int64)

    def add(self, tokens: Tokens, used: np.ndarray) -> None:
        """Count those that are used, [N] bool."""
        for half in range(HALVES):
            its = used & (tokens.half == half)
            self.tokens[half] += int(its.sum())
            self.ids[half] += np.bincount(tokens.ids[its], minlength=self.ids.shape[1])
            self.before[half] += np.bincount(tokens.before[its & (tokens.before >= 0)], minlength=self.ids.shape[1])
            self.places[half] += np.bincount(tokens.place[its], minlength=PLACES_IN_STORY)


class Tally:
    """Counts of a member's F features while chunks go by."""

    def __init__(self, features: int, vocabulary: int) -> None:
        """Of nothing."""
        F, V = features, vocabulary
        self.fired = np.zeros(F, np.int64)
        self.sum = np.zeros(F)
        self.histogram = np.zeros((F, BARS), np.int64)
        self.mass_on = sparse.csr_matrix((V, F))
        """The sum of a feature's values on a token."""
        self.fired_on = sparse.csr_matrix((HALVES * V, F))
        """How often it fires there, by halves."""
        self.fired_after = sparse.csr_matrix((HALVES * V, F))
        self.fired_at = sparse.csr_matrix((HALVES * PLACES_IN_STORY, F))
        self.together: np.ndarray | None = np.zeros((F, F), np.int64) if F <= MOST_TOGETHER else None
        """[F, F], the tokens on which two features fire."""
        self._waiting: list[tuple[Tokens, np.ndarray, np.ndarray, np.ndarray]] = []
        self._entries = 0

    def add(self, tokens: Tokens, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Count a chunk's entries above 0: rows [n], one after the other, columns [n], values [n]."""
        self._waiting.append((tokens, rows, columns, values))
        self._entries += len(rows)
        if self._entries >= ENTRIES_AT_A_TIME:
            self.finish()

    def finish(self) -> None:
        """Count what waits; then all is counted."""
        if not self._waiting:
            return
        tokens, rows, columns, values = zip(*self._waiting, strict=True)
        self._waiting, self._entries = [], 0
        firsts = np.cumsum([0] + [len(each.ids) for each in tokens])
        N, (F, _) = int(firsts[-1]), self.histogram.shape
        row = np.concatenate([its + first for its, first in zip(rows, firsts, strict=False)])
        column, value = np.concatenate(columns), np.concatenate(values)
        ids, before, place, half = (
            np.concatenate([getattr(each, name) for each in tokens]) for name in ("ids", "before", "place", "half")
        )
        self.fired += np.bincount(column, minlength=F)
        self.sum += np.bincount(column, value, F)
        self.histogram += np.bincount(column * BARS + bar_of(value), minlength=F * BARS).reshape(F, BARS)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=N))])
        masses = sparse.csr_matrix((value.astype(np.float64), column, indptr), (N, F))
        ones = sparse.csr_matrix((np.ones(len(value)), column, indptr), (N, F))
        V = self.mass_on.shape[0]
        self.mass_on += _which(ids, V) @ masses
        self.fired_on += _which(half * V + ids, HALVES * V) @ ones
        self.fired_after += _which(np.where(before < 0, -1, half * V + before), HALVES * V) @ ones
        self.fired_at += _which(half * PLACES_IN_STORY + place, HALVES * PLACES_IN_STORY) @ ones
        if self.together is not None:
            self.together += _together(ones)


def _which(number: np.ndarray, numbers: int) -> sparse.csr_matrix:
    """[numbers, N], 1 where a token has that number; none has -1."""
    N = len(number)
    order = np.argsort(number, kind="stable")
    order = order[np.searchsorted(number[order], 0) :]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(number[order], minlength=numbers))])
    return sparse.csr_matrix((np.ones(len(order)), order, indptr), (numbers, N))


def _together(ones: sparse.csr_matrix) -> np.ndarray:
    """[F, F] of [N, F] zeros and ones: on how many of the N rows two columns are 1.

    As a sparse product, or where many are active as a dense one, whichever has less to do; both are exact.
    """
    N, F = ones.shape
    active = np.diff(ones.indptr).astype(np.float64)
    if (active**2).sum() * 250 < N * float(F) ** 2:  # an entry of the sparse product takes about 250 times as long
        return np.asarray((ones.T @ ones).todense()).astype(np.int64)
    found = np.zeros((F, F), np.int64)
    at_a_time = max(1, 2**23 // F)
    for first in range(0, N, at_a_time):
        some = ones[first : first + at_a_time].astype(np.float32).toarray()
        found += (some.T @ some).astype(np.int64)  # whole numbers below 2^24
    return found
