"""Which tokens show what a feature is: the stories on which it is largest, and samples of all its sizes, in one pass.

How large a feature gets is known only at the end, but what is kept on the way is as if it had been known before:

largest   Of each story the token on which the feature is largest. Kept are the `LARGEST` largest of these, of those
          with the same token and the same five tokens before it only the largest. What is dropped on the way is below
          so many others that it could not come back: this is exactly what one would pick at the end.
samples   Every token has a random number, which depends on nothing but its place in the text. The sizes (0, max] are
          divided by fixed edges, eight an octave, and in each part the `SAMPLES` active tokens with the smallest random
          numbers are kept: a sample without replacement, each with the same chance. Parts 20 or more below the part of
          the largest size are one part, since the lowest fifth of [0, max] holds them all. Two parts together keep the
          smallest numbers of both, so that the intervals of [0, max] are put together at the end, and their samples
          are exact too. An interval ends at the edge next to a fifth, two, three or four fifths of the maximum, and it
          is told which.

Each is kept with the feature's values on the tokens around it.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jax_sae.pages.active import Active

LARGEST = 20
SAMPLES = 6
"""One more than a page shows of an interval: some may be shown among the largest already."""

PARTS = 21
"""The parts of the sizes that are told apart, from that of the largest size down; the last one has no lower end."""

INTERVALS = 5
LEFT, RIGHT = 64, 31
"""Tokens around an example whose values are kept."""

WINDOW = LEFT + 1 + RIGHT
NONE = np.iinfo(np.uint64).max
"""A random number that no token has: nothing is kept there."""

_BITS = 20
"""A float32 without its last 20 bits has 3 of its mantissa, so that neighbours are an eighth of an octave apart."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Whole stories, one after the other, whose N tokens are encoded at once."""

    story: np.ndarray
    """[N] int32, the number of each token's story in the text."""
    position: np.ndarray
    """[N] int32, of the token in its story."""
    starts: np.ndarray
    """[S] int64, the row with which each story begins."""
    begin: np.ndarray
    """[N] int64, the row with which the token's story begins."""
    end: np.ndarray
    """[N] int64, the row after its last."""
    context: np.ndarray
    """[N] uint64, a hash of the token and the five before it."""
    random: np.ndarray
    """[N] uint64, by which samples are drawn."""


@dataclass(frozen=True, eq=False)
class Examples:
    """A table of examples of F features, n of each; those that there are not have the story -1.

    Where an example moves in the table, its window, which is long, stays: it is found by its place.
    """

    story: np.ndarray
    """[F, n] int32."""
    position: np.ndarray
    """[F, n] int32."""
    value: np.ndarray
    """[F, n] float32, largest first, or in the order of their random numbers."""
    place: np.ndarray
    """[F, n] int32, of its window; of each feature all from 0 to n - 1."""
    windows: np.ndarray
    """[F, n, WINDOW] bfloat16, a feature's values around an example; 0 beyond the story."""

    def window(self, f: int, i: int) -> np.ndarray:
        """The values of feature f around its example i, [WINDOW] bfloat16."""
        return self.windows[f, self.place[f, i]]


def part_of(values: np.ndarray) -> np.ndarray:
    """The number of the part of the sizes that each positive float32 lies in."""
    return np.ascontiguousarray(values, np.float32).view(np.int32) >> _BITS


def interval_edges(maximum: np.ndarray) -> np.ndarray:
    """Of maxima [F] the edges [F, INTERVALS - 1] float32 between intervals of [0, max], largest first.

    Each is the edge of a part that is nearest to 4, 3, 2 and 1 fifths of the maximum, in the scale of parts.
    """
    wanted = maximum[:, None] * np.arange(INTERVALS - 1, 0, -1, dtype=np.float32) / np.float32(INTERVALS)
    bits = np.ascontiguousarray(wanted, np.float32).view(np.int32)
    return (((bits + (1 << (_BITS - 1))) >> _BITS) << _BITS).view(np.float32)


def hashed(*numbers: np.ndarray) -> np.ndarray:
    """uint64, well mixed, of whole numbers at the same index of all arrays (splitmix64)."""
    mixed = np.zeros(np.broadcast(*numbers).shape, np.uint64)
    for number in numbers:
        mixed = mixed + number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


class ExampleKeeper:
    """Keeps the examples of F features while chunks go by."""

    def __init__(self, features: int) -> None:
        """Without any."""
        F = features
        self.maximum = np.zeros(F, np.float32)
        self.largest = _none(F, LARGEST)
        self._contexts = np.zeros((F, LARGEST), np.uint64)
        self._part = np.zeros(F, np.int32)
        """Of the maximum."""
        self._random = np.full((F, PARTS, SAMPLES), NONE)
        self._samples = _none(F, PARTS * SAMPLES)

    def add(self, chunk: Chunk, active: Active) -> None:
        """Look at a chunk's features that are above 0."""
        if not len(active.value):
            return
        self._add_largest(chunk, active)
        fires = np.flatnonzero(np.diff(active.first))
        maximum = np.zeros_like(self.maximum)
        maximum[fires] = np.maximum.reduceat(active.value, active.first[fires])
        self._raise(maximum)
        self._add_samples(chunk, active)

    def _add_largest(self, chunk: Chunk, active: Active) -> None:
        at = np.flatnonzero(active.value > self.largest.value[active.column, -1])
        if not len(at):
            return
        column, begin, value = active.column[at], chunk.begin[active.row[at]], active.value[at]
        first = np.flatnonzero(np.append(True, (column[1:] != column[:-1]) | (begin[1:] != begin[:-1])))
        at = at[_where_largest(value, first)]  # of each feature, one story after the other
        column = column[first]
        is_first = np.append(True, column[1:] != column[:-1])
        found, line = column[is_first], np.cumsum(is_first) - 1
        rank = np.arange(len(line)) - np.flatnonzero(is_first)[line]
        entry = np.zeros((len(found), rank.max() + 1), np.int64)
        entry[line, rank] = at
        value = np.zeros(entry.shape, np.float32)
        value[line, rank] = active.value[at]
        values = np.concatenate([self.largest.value[found], value], 1)
        contexts = np.concatenate([self._contexts[found], chunk.context[active.row[entry]]], 1)
        order = np.argsort(-values, axis=1, kind="stable")  # what came first stays before what is as large
        values, contexts = np.take_along_axis(values, order, 1), np.take_along_axis(contexts, order, 1)
        seen_before = np.zeros(values.shape, bool)
        for j in range(1, values.shape[1]):
            seen_before[:, j] = (contexts[:, :j] == contexts[:, j : j + 1]).any(1)
        keep = np.argsort(seen_before | (values <= 0), axis=1, kind="stable")[:, :LARGEST]
        order = np.take_along_axis(order, keep, 1)
        is_one = ~np.take_along_axis(seen_before | (values <= 0), keep, 1)
        self._contexts[found] = np.where(is_one, np.take_along_axis(contexts, keep, 1), 0)
        _replace(self.largest, found, order, is_one, chunk, active, entry, found)

    def _raise(self, maximum: np.ndarray) -> None:
        """Take a larger maximum into account: parts move down, and those that are now far below it become one."""
        grown = np.maximum(self.maximum, maximum)
        before, now = self._part, np.where(grown > 0, part_of(grown), 0)
        moved = np.flatnonzero((now > before) & (self.maximum > 0))
        self.maximum, self._part = grown, now.astype(np.int32)
        if not len(moved):
            return
        steps = np.minimum(now[moved] - before[moved], PARTS - 1)[:, None, None]
        random = self._random[moved]
        part = np.arange(PARTS)[None, :, None]
        index = np.arange(PARTS * SAMPLES).reshape(1, PARTS, SAMPLES)
        source = index - steps * SAMPLES
        new = np.where(
            source >= 0,
            np.take_along_axis(random.reshape(len(moved), -1), _flat(source), 1).reshape(len(moved), PARTS, SAMPLES),
            NONE,
        )
        into_last = np.where(part + steps >= PARTS - 1, random, NONE).reshape(len(moved), -1)
        smallest = np.argsort(into_last, axis=1, kind="stable")[:, :SAMPLES]
        new[:, -1] = np.take_along_axis(into_last, smallest, 1)
        source[:, -1] = smallest
        self._random[moved] = new
        _reorder(self._samples, moved, _flat(source), new.reshape(len(moved), -1) != NONE)

    def _add_samples(self, chunk: Chunk, active: Active) -> None:
        part = np.minimum(self._part[active.column] - part_of(active.value), PARTS - 1)
        group = active.column * PARTS + part
        random = chunk.random[active.row]
        at = np.flatnonzero(random < np.ascontiguousarray(self._random[:, :, -1]).ravel()[group])
        if not len(at):
            return
        group, random = group[at], random[at]
        order = np.lexsort((random, group))
        group, random, at = group[order], random[order], at[order]
        is_first = np.append(True, group[1:] != group[:-1])
        number = np.cumsum(is_first) - 1
        rank = np.arange(len(group)) - np.flatnonzero(is_first)[number]
        is_small = rank < SAMPLES
        groups, number, rank = group[is_first], number[is_small], rank[is_small]
        new, source = np.full((len(groups), SAMPLES), NONE), np.zeros((len(groups), SAMPLES), np.int64)
        new[number, rank], source[number, rank] = random[is_small], at[is_small]
        both = np.concatenate([self._random.reshape(-1, SAMPLES)[groups], new], 1)
        order = np.argsort(both, axis=1, kind="stable")[:, :SAMPLES]
        smallest = np.take_along_axis(both, order, 1)
        self._random.reshape(-1, SAMPLES)[groups] = smallest
        its = _by(self._samples, SAMPLES)
        _replace(its, groups, order, smallest != NONE, chunk, active, source, groups // PARTS)

    def samples(self) -> Examples:
        """Of each feature INTERVALS x SAMPLES examples: those of its highest interval first."""
        F = len(self.maximum)
        top = part_of(interval_edges(np.where(self.maximum > 0, self.maximum, 1)))
        after = np.minimum(
            self._part[:, None] - top + 1, PARTS - 1
        )  # the part below each edge, from the largest's down
        bounds = np.concatenate([np.zeros((F, 1), int), after, np.full((F, 1), PARTS)], 1)
        part = np.arange(PARTS)[None, :, None]
        chosen = np.zeros((F, INTERVALS, SAMPLES), np.int64)
        there = np.zeros((F, INTERVALS, SAMPLES), bool)
        for i in range(INTERVALS):
            within = (part >= bounds[:, i, None, None]) & (part < bounds[:, i + 1, None, None])
            random = np.where(within, self._random, NONE).reshape(F, -1)
            chosen[:, i] = np.argsort(random, axis=1, kind="stable")[:, :SAMPLES]
            there[:, i] = np.take_along_axis(random, chosen[:, i], 1) != NONE
        found = _none(F, INTERVALS * SAMPLES)
        flat, is_one = chosen.reshape(F, -1), there.reshape(F, -1)
        line, example = np.nonzero(is_one)[0], flat[is_one]
        for name in ("story", "position", "value"):
            getattr(found, name)[is_one] = getattr(self._samples, name)[line, example]
        found.windows[is_one] = self._samples.windows[line, self._samples.place[line, example]]
        return found


def _where_largest(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Of each group of values, which begins at first[g], the first index at which it has its largest."""
    number = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(values))))
    at = np.flatnonzero(values == np.maximum.reduceat(values, first)[number])
    found = np.zeros(len(first), np.int64)
    found[number[at[::-1]]] = at[::-1]
    return found


def _none(features: int, n: int) -> Examples:
    return Examples(
        np.full((features, n), -1, np.int32),
        np.zeros((features, n), np.int32),
        np.zeros((features, n), np.float32),
        np.tile(np.arange(n, dtype=np.int32), (features, 1)),
        np.zeros((features, n, WINDOW), ml_dtypes.bfloat16),
    )


def _flat(indices: np.ndarray) -> np.ndarray:
    return np.maximum(indices, 0).reshape(len(indices), -1)


def _by(examples: Examples, n: int) -> Examples:
    """A view of the same with n in each row; windows stay those of a feature."""
    return Examples(
        examples.story.reshape(-1, n),
        examples.position.reshape(-1, n),
        examples.value.reshape(-1, n),
        examples.place.reshape(-1, n),
        examples.windows,
    )


def _reorder(examples: Examples, lines: np.ndarray, source: np.ndarray, there: np.ndarray) -> None:
    """In those lines, take what stood at `source`, as far as it is there; the others have the places that are left."""
    for name, empty in (("value", 0), ("position", 0), ("story", -1)):
        table = getattr(examples, name)
        table[lines] = np.where(there, np.take_along_axis(table[lines], source, 1), empty)
    is_taken = np.zeros(source.shape, bool)
    is_taken[np.nonzero(there)[0], source[there]] = True
    left = np.argsort(is_taken, axis=1, kind="stable")
    number = np.maximum(np.cumsum(~there, 1) - 1, 0)
    source = np.where(there, source, np.take_along_axis(left, number, 1))
    examples.place[lines] = np.take_along_axis(examples.place[lines], source, 1)


def _replace(
    examples: Examples,
    lines: np.ndarray,
    source: np.ndarray,
    there: np.ndarray,
    chunk: Chunk,
    active: Active,
    at: np.ndarray,
    features: np.ndarray,
) -> None:
    """In those lines, take what stood at `source`; beyond the line's end, what is at `at` of the active entries.

    Args:
        examples: [lines, n].
        lines: [l], which of them.
        source: [l, n], where each comes from: n + i is the entry at[l, i].
        there: [l, n], whether there is one.
        chunk: the tokens.
        active: their features.
        at: [l, m], indices of entries in the order of features.
        features: [l], whose examples the lines are.
    """
    n = source.shape[1]
    _reorder(examples, lines, np.minimum(source, n - 1), there & (source < n))
    line, i = np.nonzero(there & (source >= n))
    entry = at[line, source[line, i] - n]
    row, into, feature = active.row[entry], (lines[line], i), features[line]
    examples.story[into], examples.position[into] = chunk.story[row], chunk.position[row]
    examples.value[into] = active.value[entry]
    # An example's window has few entries above 0: those of its feature between two rows, which are neighbours.
    begin, end = np.maximum(row - LEFT, chunk.begin[row]), np.minimum(row + RIGHT + 1, chunk.end[row])
    first, last = np.searchsorted(active.key, [feature * active.tokens + begin, feature * active.tokens + end])
    length = last - first
    its = np.repeat(first - np.cumsum(length) + length, length) + np.arange(length.sum())
    place = feature, examples.place[into]
    examples.windows[place] = 0
    where = [np.repeat(each, length) for each in place]
    examples.windows[*where, active.row[its] - np.repeat(row - LEFT, length)] = active.value[its]
