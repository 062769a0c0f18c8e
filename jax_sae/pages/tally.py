"""How often features fire, how large they are, on which tokens, after which, where in a story, and which together.

Only active entries are counted, by sorting them, so that the time grows with L0 and not with F. Every count is
exact, and memory does not grow with the text: a table of tokens has at most as many entries as there are pairs of a
token and a feature.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from jax_sae.pages.active import Active

ENTRIES_AT_A_TIME = 2**20
"""About how many active entries are counted at once."""

MOST_TOGETHER = 16_384
"""Features for whose pairs there is room: with more, firing together is not counted."""

PAIRS_AT_A_TIME = 2**24
PAIRS_AS_DEAR_AS = 200
"""Two entries of a product of matrices take so many times less than a pair that is counted by itself."""

FEW_FEATURES = 1024
"""A table of all of their pairs stays in the caches."""

KEYS_BESIDE_A_FLOAT = 2**33

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
        self.fired_on = sparse.csr_matrix((HALVES * V, F))
        """How often a feature fires on a token, by halves."""
        self.fired_after = sparse.csr_matrix((HALVES * V, F))
        self.fired_at = np.zeros((HALVES, PLACES_IN_STORY, F), np.int64)
        self.together = Together(F) if F <= MOST_TOGETHER else None
        self._mass_on = sparse.csr_matrix((HALVES * V, F))
        self._waiting: list[tuple[Tokens, Active]] = []
        self._entries = 0

    @property
    def mass_on(self) -> sparse.csr_matrix:
        """[V, F], the sum of a feature's values on a token."""
        V = self._mass_on.shape[0] // HALVES
        return sum((self._mass_on[half * V : (half + 1) * V] for half in range(1, HALVES)), self._mass_on[:V])

    def add(self, tokens: Tokens, active: Active) -> None:
        """Count a chunk's entries."""
        self._waiting.append((tokens, active))
        self._entries += len(active.values)
        if self._entries >= ENTRIES_AT_A_TIME:
            self.finish()

    def finish(self) -> None:
        """Count what waits; then all is counted."""
        if not self._waiting:
            return
        tokens, some = zip(*self._waiting, strict=True)
        self._waiting, self._entries = [], 0
        F, V = len(self.fired), self.fired_on.shape[0] // HALVES
        column, value = (np.concatenate([getattr(each, name) for each in some]) for name in ("columns", "values"))
        active = np.concatenate([np.diff(each.first_of_token) for each in some])
        ids, before, place, half = (
            np.concatenate([getattr(each, name) for each in tokens]) for name in ("ids", "before", "place", "half")
        )

        def with_feature(of_token: np.ndarray) -> np.ndarray:
            """Of each entry, a number of its token and its feature in one, [n] int64."""
            return np.repeat(of_token * np.int64(F), active) + column

        self.fired += np.bincount(column, minlength=F)
        self.sum += np.bincount(column, value, F)
        self.histogram += np.bincount(column * BARS + bar_of(value), minlength=F * BARS).reshape(F, BARS)
        at = np.bincount(with_feature(half * PLACES_IN_STORY + place), minlength=self.fired_at.size)
        self.fired_at += at.reshape(self.fired_at.shape)
        fired_on, mass_on = _sums(with_feature(half * V + ids), value, self.fired_on.shape)
        self.fired_on, self._mass_on = self.fired_on + fired_on, self._mass_on + mass_on
        after = with_feature(np.where(before < 0, -1, half * V + before))
        self.fired_after += _counts(after[after >= 0], self.fired_after.shape)
        if self.together is not None:
            self.together.add(column, active)


class Together:
    """On how many tokens two of F features are active, while chunks go by."""

    def __init__(self, features: int) -> None:
        """On none."""
        self._above = np.zeros((features, features), np.int32)
        """[i, j] of i < j."""

    def add(self, column: np.ndarray, active: np.ndarray) -> None:
        """Count the tokens whose features are `column`, active[t] ascending ones each, one token after the other."""
        F, at_once = len(self._above), np.cumsum(active * (active - 1) // 2)
        firsts = np.concatenate([[0], np.cumsum(active)])
        parts = np.searchsorted(at_once, np.arange(PAIRS_AT_A_TIME, at_once[-1] + 1, PAIRS_AT_A_TIME)) + 1
        for first, last in pairwise(np.unique([0, *parts, len(active)])):
            its, n = column[firsts[first] : firsts[last]], active[first:last]
            if (n * (n - 1.0)).sum() * PAIRS_AS_DEAR_AS > len(n) * float(F) ** 2:
                self._add_dense(its, n)
                continue
            pairs = _pairs(its, n, F)
            if F <= FEW_FEATURES:
                self._above += np.bincount(pairs, minlength=F * F).reshape(F, F)
            else:  # a sort takes less than finding one's place in a table that is larger than the caches
                keys, counts = _runs(np.sort(pairs))
                self._above.reshape(-1)[keys] += counts

    def _add_dense(self, column: np.ndarray, active: np.ndarray) -> None:
        F = len(self._above)
        firsts = np.concatenate([[0], np.cumsum(active)])
        for first in range(0, len(active), at_a_time := max(1, 2**23 // F)):
            n = active[first : first + at_a_time]
            fires = np.zeros((len(n), F), np.float32)
            fires[np.repeat(np.arange(len(n)), n), column[firsts[first] : firsts[first] + n.sum()]] = 1
            self._above += np.triu(fires.T @ fires, 1).astype(np.int32)  # whole numbers below 2^24

    def of(self, rows: slice, columns: slice) -> np.ndarray:
        """[i, j] int32 of some features i and others j; of a feature with itself 0."""
        return self._above[rows, columns] + self._above[columns, rows].T


def _pairs(column: np.ndarray, active: np.ndarray, features: int) -> np.ndarray:
    """Of all pairs of entries i < j of a token, column i times F plus column j, in any order; int64."""
    first = np.cumsum(active) - active
    found = np.empty(int((active * (active - 1) // 2).sum()), np.int64)
    done = 0
    for n in np.unique(active[active > 1]):  # tokens with equally many: a table with a line an entry
        its = column[first[active == n] + np.arange(n)[:, None]]
        for i in range(n - 1):
            there = found[done : done + its[i + 1 :].size].reshape(n - 1 - i, -1)
            np.add(its[i] * np.int64(features), its[i + 1 :], out=there)
            done += there.size
    return found


def _runs(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that there are, and how often each is there."""
    first = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: len(ascending)])
    return ascending[first], np.diff(np.append(first, len(ascending)))


def _counts(keys: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """How often each key is there: key = row * columns + column."""
    return _table(*_runs(np.sort(keys)), shape)


def _sums(keys: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """How often each key is there, and the sum of its values, which are above 0."""
    if shape[0] * shape[1] < KEYS_BESIDE_A_FLOAT:  # a key and a float without its sign are sorted as one number
        both = np.sort((keys.astype(np.uint64) << np.uint64(31)) | values.view(np.uint32))
        keys = (both >> np.uint64(31)).astype(np.int64)
        values = (both & np.uint64(2**31 - 1)).astype(np.uint32).view(np.float32)
    else:
        order = np.argsort(keys)
        keys, values = keys[order], values[order]
    found, counts = _runs(keys)
    sums = np.add.reduceat(values.astype(np.float64), np.cumsum(counts) - counts) if len(keys) else counts
    return _table(found, counts, shape), _table(found, sums, shape)


def _table(keys: np.ndarray, numbers: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Those numbers at ascending keys."""
    rows = keys // shape[1]
    first = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    return sparse.csr_matrix((numbers.astype(np.float64), keys - rows * shape[1], first), shape)
