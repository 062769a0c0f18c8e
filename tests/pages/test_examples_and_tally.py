"""What is kept and counted while a text goes by is what one would pick and count with all of it at hand."""

from collections.abc import Iterator
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from jax_sae.pages.active import entries, joined
from jax_sae.pages.examples import (
    INTERVALS,
    LARGEST,
    LEFT,
    RIGHT,
    SAMPLES,
    WINDOW,
    Chunk,
    ExampleKeeper,
    interval_edges,
)
from jax_sae.pages.reading import _chunk, _Story
from jax_sae.pages.tally import BARS, PLACES_IN_STORY, Tally, Tokens, TokenTally, bar_edges

V, F = 2, 7
rng = np.random.default_rng(0)
LENGTHS = rng.integers(1, 60, 90)
IDS = [rng.integers(0, V, length).astype(np.int32) for length in LENGTHS]
USED = [np.arange(length) >= (length > 3) for length in LENGTHS]
GROWTH = np.exp(np.linspace(0, 5, len(LENGTHS)))
"""Maxima grow while stories go by, so that what was a high value becomes a low one."""
X = [
    (growth * np.exp(rng.normal(size=(length, F))) * (rng.random((length, F)) < [0.9, 0.5, 0.2, 0.05, 0.003, 0, 0]))
    .round(2)
    .astype(np.float32)
    * used[:, None]
    for length, growth, used in zip(LENGTHS, GROWTH, USED, strict=True)
]
"""Rounded, so that some are equal. The last feature never fires, the one before it grows at once to a thousandfold."""
for number, (x, used) in enumerate(zip(X, USED, strict=True)):
    x[:, F - 2] = used * (rng.random(len(x)) < 0.1) * np.float32(1 if number < 60 else 1024)


def chunks(stories_at_once: int) -> Iterator[tuple[Chunk, Tokens, np.ndarray, np.ndarray]]:
    """Chunks of so many stories, with what is used, and the features between rows that do not matter."""
    for first in range(0, len(IDS), stories_at_once):
        some = range(first, min(first + stories_at_once, len(IDS)))
        chunk, tokens, used, x = _chunk([_Story(i, IDS[i], USED[i], X[i]) for i in some])
        yield (
            chunk,
            tokens,
            used,
            x,
        )


@pytest.fixture(scope="module", params=[1, 8, 90])
def kept(request: pytest.FixtureRequest) -> Iterator[tuple[ExampleKeeper, Tally, TokenTally]]:
    """With different numbers of stories at once, and all ways to count: that of a few dense features and the others."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param > 1:
            patch.setattr("jax_sae.pages.tally.PAIRS_AS_DEAR_AS", 0)
        if request.param > 8:
            patch.setattr("jax_sae.pages.tally.FEW_FEATURES", 0)
            patch.setattr("jax_sae.pages.tally.KEYS_BESIDE_A_FLOAT", 0)
            patch.setattr("jax_sae.pages.tally.PAIRS_AT_A_TIME", 100)
        yield looked_at(request.param)


def looked_at(stories_at_once: int) -> tuple[ExampleKeeper, Tally, TokenTally]:
    """Of so many stories at once."""
    keeper, tally, all_tokens = ExampleKeeper(F), Tally(F, V), TokenTally(V)
    for n, (chunk, tokens, used, x) in enumerate(chunks(stories_at_once)):
        its = joined([entries(part) for part in np.array_split(x, 3)], F)
        keeper.add(chunk, its)
        tally.add(tokens, its)
        all_tokens.add(tokens, used)
        if n % 3 == 0:
            tally.finish()
    tally.finish()
    return keeper, tally, all_tokens


def window(story: int, position: int, f: int) -> np.ndarray:
    """The values around a token."""
    around = np.zeros(WINDOW, np.float32)
    for i, t in enumerate(range(position - LEFT, position + RIGHT + 1)):
        if 0 <= t < LENGTHS[story]:
            around[i] = X[story][t, f]
    return around.astype(ml_dtypes.bfloat16)


def test_the_largest_are_those_of_all_stories_without_repetitions(
    kept: tuple[ExampleKeeper, Tally, TokenTally],
) -> None:
    """One a story; of those with the same token after the same five, the largest."""
    keeper, *_ = kept
    for f in range(F):
        peaks = [(float(x[:, f].max()), i, int(x[:, f].argmax())) for i, x in enumerate(X) if x[:, f].max() > 0]
        expected, seen = [], set()
        for value, story, at in sorted(peaks, key=lambda peak: -peak[0]):
            context = tuple(IDS[story][max(0, at - 5) : at + 1])
            if context not in seen:
                seen.add(context)
                expected.append((value, story, at))
        its = keeper.largest
        found = list(zip(its.value[f].tolist(), its.story[f].tolist(), its.position[f].tolist(), strict=True))
        assert [each for each in found if each[1] >= 0] == expected[:LARGEST]
        for i, (_, story, at) in enumerate(expected[:LARGEST]):
            np.testing.assert_array_equal(its.window(f, i), window(story, at, f))
    assert keeper.maximum.tolist() == np.concatenate(X).max(0).tolist()


def test_samples_are_the_smallest_random_numbers_of_each_interval(
    kept: tuple[ExampleKeeper, Tally, TokenTally],
) -> None:
    """Of all tokens whose value lies in it; edges are within a sixteenth of an octave of the fifths of the maximum."""
    keeper, *_ = kept
    edges, samples = interval_edges(keeper.maximum), keeper.samples()
    random = {}
    for chunk, *_ in chunks(90):
        places = zip(chunk.story.tolist(), chunk.position.tolist(), strict=True)
        random = dict(zip(places, chunk.random.tolist(), strict=True))
    for f in range(F - 1):
        bounds = [np.inf, *edges[f], 0]
        fifths = keeper.maximum[f] * np.arange(INTERVALS - 1, 0, -1) / INTERVALS
        assert np.all(np.abs(edges[f] / fifths - 1) < 1 / 15)
        for i, (above, edge) in enumerate(pairwise(bounds)):
            within = [
                (random[story, t], story, t, float(X[story][t, f]))
                for story in range(len(X))
                for t in np.flatnonzero(
                    (X[story][:, f] >= edge) & (X[story][:, f] < above) & (X[story][:, f] > 0)
                ).tolist()
            ]
            its = slice(i * SAMPLES, (i + 1) * SAMPLES)
            found = zip(
                samples.story[f, its].tolist(),
                samples.position[f, its].tolist(),
                samples.value[f, its].tolist(),
                strict=True,
            )
            assert [each for each in found if each[0] >= 0] == [each[1:] for each in sorted(within)[:SAMPLES]]
        for i, (story, at) in enumerate(zip(samples.story[f], samples.position[f], strict=True)):
            if story >= 0:
                np.testing.assert_array_equal(samples.window(f, i), window(story, at, f))
    assert (samples.story[F - 1] == -1).all()


def test_counts_are_those_of_all_tokens(kept: tuple[ExampleKeeper, Tally, TokenTally]) -> None:
    """By token, token before, place, size and pair."""
    _, tally, tokens = kept
    x, ids = np.concatenate(X), np.concatenate(IDS)
    before = np.concatenate([[-1, *its[:-1]] for its in IDS])
    half = np.repeat(np.arange(len(IDS)) % 2, LENGTHS)
    position, length = np.concatenate([np.arange(n) for n in LENGTHS]), np.repeat(LENGTHS, LENGTHS)
    place = [0 if p == 0 else 1 if p < 4 else 2 + p * 10 // n for p, n in zip(position, length, strict=True)]
    fires, used = x > 0, np.concatenate(USED)
    on, after, at = np.zeros((2, V, F)), np.zeros((2, V, F)), np.zeros((2, PLACES_IN_STORY, F))
    mass, seen = np.zeros((V, F)), np.zeros((2, V))
    for t in range(len(x)):
        on[half[t], ids[t]] += fires[t]
        mass[ids[t]] += x[t]
        at[half[t], place[t]] += fires[t]
        seen[half[t], ids[t]] += used[t]
        if before[t] >= 0:
            after[half[t], before[t]] += fires[t]
    np.testing.assert_array_equal(tally.fired_on.toarray(), on.reshape(-1, F))
    np.testing.assert_array_equal(tally.fired_after.toarray(), after.reshape(-1, F))
    np.testing.assert_array_equal(tally.fired_at, at)
    np.testing.assert_array_equal(tokens.ids, seen)
    np.testing.assert_allclose(tally.mass_on.toarray(), mass)
    np.testing.assert_array_equal(tally.fired, fires.sum(0))
    np.testing.assert_allclose(tally.sum, x.sum(0, dtype=np.float64))
    assert tally.together is not None
    together = fires.T.astype(int) @ fires.astype(int)
    np.testing.assert_array_equal(tally.together.of(slice(None), slice(None)), together - np.diag(together.diagonal()))
    for f in range(F):
        expected, _ = np.histogram(x[fires[:, f], f], bar_edges())
        np.testing.assert_array_equal(tally.histogram[f], expected)
    assert tally.histogram.shape == (F, BARS)
