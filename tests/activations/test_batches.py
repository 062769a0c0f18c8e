"""Batches are a pure function of seed and position, and use every token once an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest

from jax_sae.activations.batches import BatchRun, Position, batch_runs, first_activations
from jax_sae.activations.normalize import identity
from jax_sae.config import ActivationsConfig, TrainConfig
from jax_sae.errors import BadInput

ACTIVATIONS = ActivationsConfig(normalization="none", block_tokens=40)
TOKENS = TrainConfig(batch_tokens=8, seed=3)
STORY = replace(TOKENS, batching="story")


@dataclass
class FakeStory:
    """A story whose activation at each token says which token of the text it is."""

    start: int
    length: int
    tokens_cut: int = 0

    def __len__(self) -> int:
        """Return its number of tokens."""
        return self.length


class FakeSource:
    """Stories of given lengths; the tokens of the whole text are numbered from 1."""

    name = "a fake text"
    width = 2

    def __init__(self, lengths: Sequence[int], cut: dict[int, int] | None = None) -> None:
        """Remember the lengths."""
        starts = np.cumsum([1, *lengths])
        self.stories = [
            FakeStory(int(s), n, (cut or {}).get(i, 0)) for i, (s, n) in enumerate(zip(starts, lengths, strict=False))
        ]

    def __len__(self) -> int:
        """Return the number of stories."""
        return len(self.stories)

    def read(self, items: Sequence[int]) -> list[FakeStory]:
        """Look stories up."""
        return [self.stories[i] for i in items]

    def activations(self, items: Sequence[FakeStory]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield token numbers, longest story first, as the harvest does."""
        for i in sorted(range(len(items)), key=lambda i: -len(items[i])):
            if len(items[i]):
                numbers = np.arange(items[i].start, items[i].start + len(items[i]), dtype=np.float32)
                yield i, np.stack([numbers, -numbers], 1)


SOURCE = FakeSource([5, 0, 17, 1, 30, 9, 12, 3, 0, 8, 21, 6], cut={4: 100})  # 112 tokens


def runs(train: TrainConfig, position: Position = Position(), source: FakeSource = SOURCE) -> Iterator[BatchRun]:  # noqa: B008
    """Batch runs of the fake source."""
    return batch_runs(source, identity(2), position, ACTIVATIONS, train)


def batches(train: TrainConfig, position: Position, n: int) -> list[tuple[list[float], Position]]:
    """The token numbers of the next n batches, and the position after each."""
    found: list[tuple[list[float], Position]] = []
    for run in runs(train, position):
        for i in range(run.used, len(run.x)):
            assert np.array_equal(run.x[i, :, 1], -run.x[i, :, 0])
            found.append((run.x[i, :, 0][run.weights[i] > 0].tolist(), run.after[i]))
            if len(found) == n:
                return found
    raise AssertionError


def test_every_token_is_used_once_an_epoch() -> None:
    """5 epochs of 112 tokens are 14 blocks of 40; blocks end in the middle of stories and of epochs."""
    found = [token for tokens, _ in batches(TOKENS, Position(), 70) for token in tokens]
    assert sorted(found) == sorted(list(range(1, 113)) * 5)
    assert len(set(found[:80])) == 80  # two blocks, all within the first epoch


def test_tokens_of_a_batch_come_from_many_stories_and_epochs_differ() -> None:
    """Shuffled across stories, in another order each epoch."""
    found = [tokens for tokens, _ in batches(TOKENS, Position(), 28)]
    assert all(np.abs(np.diff(sorted(tokens))).max() > 1 for tokens in found)
    assert found[:14] != found[14:]
    assert batches(replace(TOKENS, seed=4), Position(), 1) != batches(TOKENS, Position(), 1)


@pytest.mark.parametrize("train", [TOKENS, STORY], ids=["tokens", "story"])
def test_any_position_continues_exactly(train: TrainConfig) -> None:
    """From the position after any batch the same batches follow, and the same positions."""
    straight = batches(train, Position(), 40)
    for i in range(30):
        assert batches(train, straight[i][1], 10) == straight[i + 1 : i + 11]


def test_story_batching_gives_whole_stories_in_order() -> None:
    """One story a batch, padded, the empty ones left out; then the text from its beginning again."""
    found = [tokens for tokens, _ in batches(STORY, Position(), 20)]
    stories = [list(map(float, range(s.start, s.start + s.length))) for s in SOURCE.stories if s.length]
    assert found == (stories * 2)[:20]
    assert all(run.x.shape[:2] in [(1, 16), (1, 32)] for run in islice(runs(STORY), 10))


def test_skipped_and_cut_stories_are_counted_in_the_first_epoch() -> None:
    """2 empty, 1 cut by 100 tokens; the second epoch adds nothing."""
    for n in (20, 50):
        end = batches(TOKENS, Position(), n)[-1][1]
        assert (end.empty_stories, end.cut_stories, end.tokens_cut) == (2, 1, 100)


def test_text_without_tokens_is_an_error() -> None:
    """Not an endless search."""
    with pytest.raises(BadInput, match="not one of 3"):
        next(runs(TOKENS, source=FakeSource([0, 0, 0])))


def test_activations_that_are_not_finite_are_an_error() -> None:
    """They would spoil every member without a word."""

    class Broken(FakeSource):
        def activations(self, items: Sequence[FakeStory]) -> Iterator[tuple[int, np.ndarray]]:
            for i, x in super().activations(items):
                yield i, np.where(x == 50, np.nan, x)

    with pytest.raises(BadInput, match=r"1 of \d+ adjacent activations are not finite"):
        list(islice(runs(TOKENS, source=Broken([5, 60, 40])), 4))


def test_first_activations_are_whole_stories() -> None:
    """Up to the number of tokens asked for, in order; never more than one epoch."""
    assert [len(x) for x in first_activations(SOURCE, 30, None)] == [5, 17, 1]
    assert sum(len(x) for x in first_activations(SOURCE, 10**6, None)) == 112
    assert [len(x) for x in first_activations(SOURCE, 1, None)] == [5]
