"""Batches are a pure function of seed and position, and use every token once an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.activations.batches import SMALL_BLOCKS, BatchRun, batch_runs, first_activations
from jax_sae.activations.normalize import identity
from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.autoencoder.loss import loss_per_element
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
    tokens_excluded: int = 0

    def __len__(self) -> int:
        """Return its number of tokens that are used."""
        return self.length - self.tokens_excluded


class FakeSource:
    """Stories of given lengths; the tokens of the whole text are numbered from 1.

    The first `exclude` of each story are not used; the numbers of `giants` are 1e30 times too large.
    """

    name = "a fake text"
    places = (Place("", 2),)
    width = 2

    def __init__(
        self,
        lengths: Sequence[int],
        cut: dict[int, int] | None = None,
        exclude: int = 0,
        giants: Sequence[int] = (),
    ) -> None:
        """Remember the lengths."""
        starts = np.cumsum([1, *lengths])
        self.stories = [
            FakeStory(int(s), n, (cut or {}).get(i, 0), min(exclude, n))
            for i, (s, n) in enumerate(zip(starts, lengths, strict=False))
        ]
        self.giants = giants

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
                numbers = np.arange(items[i].start, items[i].start + items[i].length, dtype=np.float32)
                numbers *= np.where(np.isin(numbers, self.giants), np.float32(1e30), 1)
                yield i, np.stack([numbers, -numbers], 1)[items[i].tokens_excluded :]


LENGTHS = [5, 0, 17, 1, 30, 9, 12, 3, 0, 8, 21, 6]  # 112 tokens
SOURCE = FakeSource(LENGTHS, cut={4: 100})
WITHOUT_FIRST_3 = FakeSource(LENGTHS, exclude=3)  # 84 tokens
FIRST_3 = {s.start + i for s in SOURCE.stories for i in range(min(3, s.length))}
GIANTS = list(range(2, 113, 5))
WITH_GIANTS = FakeSource(LENGTHS, giants=GIANTS)
LIMITED = replace(ACTIVATIONS, norm_limit=200.0)  # the norm of token n is 1.41 n


def runs(
    train: TrainConfig,
    position: Position = Position(),  # noqa: B008
    source: FakeSource = SOURCE,
    activations: ActivationsConfig = ACTIVATIONS,
) -> Iterator[BatchRun]:
    """Batch runs of the fake source."""
    return batch_runs(source, identity(2), position, activations, train)


def batches(
    train: TrainConfig,
    position: Position,
    n: int,
    source: FakeSource = SOURCE,
    activations: ActivationsConfig = ACTIVATIONS,
) -> list[tuple[list[float], Position]]:
    """The token numbers of the next n batches, and the position after each."""
    found: list[tuple[list[float], Position]] = []
    for run in runs(train, position, source, activations):
        for i in range(run.used, len(run.after)):
            assert np.array_equal(run.x[i, :, 1], -run.x[i, :, 0])
            found.append((run.x[i, :, 0][run.weights[i] > 0].tolist(), run.after[i]))
            if len(found) == n:
                return found
    raise AssertionError


def test_every_token_is_used_once_an_epoch() -> None:
    """5 epochs of 112 tokens in blocks of up to 40; blocks end in the middle of stories and of epochs."""
    found = [token for tokens, _ in batches(TOKENS, Position(), 70) for token in tokens]
    assert sorted(found) == sorted(list(range(1, 113)) * 5)
    assert len(set(found[:80])) == 80  # two blocks, all within the first epoch


def test_the_first_blocks_are_smaller_and_of_the_same_shape() -> None:
    """1, 2, 4, 8 and then 16 of 16 batches; where a block has few, at least one; what is not a batch is 0."""
    for block_tokens, sizes in ((128, [1, 2, 4, 8, 16, 16]), (40, [1, 1, 1, 2, 5, 5]), (8, [1, 1, 1, 1, 1, 1])):
        found = list(islice(runs(TOKENS, activations=replace(ACTIVATIONS, block_tokens=block_tokens)), 6))
        assert [len(run.after) for run in found] == sizes
        for run, size in zip(found, sizes, strict=True):
            assert run.x.shape == (block_tokens // 8, 8, 2) and run.weights.shape == (block_tokens // 8, 8)
            assert run.x[:size].all() and run.weights[:size].all()
            assert not run.x[size:].any() and not run.weights[size:].any()


def test_tokens_of_a_batch_come_from_many_stories_and_epochs_differ() -> None:
    """Shuffled across stories, in another order each epoch."""
    found = [tokens for tokens, _ in batches(TOKENS, Position(block=SMALL_BLOCKS), 28)]
    assert all(np.abs(np.diff(sorted(tokens))).max() > 1 for tokens in found)
    assert found[:14] != found[14:]
    assert batches(replace(TOKENS, seed=4), Position(), 1) != batches(TOKENS, Position(), 1)


@pytest.mark.parametrize(
    ("train", "source", "activations"),
    [
        (TOKENS, SOURCE, ACTIVATIONS),
        (STORY, SOURCE, ACTIVATIONS),
        (TOKENS, WITHOUT_FIRST_3, ACTIVATIONS),
        (STORY, WITHOUT_FIRST_3, ACTIVATIONS),
        (TOKENS, WITH_GIANTS, LIMITED),
    ],
    ids=["tokens", "story", "tokens, some excluded", "story, some excluded", "tokens, some over the norm limit"],
)
def test_any_position_continues_exactly(train: TrainConfig, source: FakeSource, activations: ActivationsConfig) -> None:
    """From the position after any batch the same batches follow, and the same positions."""
    straight = batches(train, Position(), 40, source, activations)
    for i in range(30):
        assert batches(train, straight[i][1], 10, source, activations) == straight[i + 1 : i + 11]


@pytest.mark.parametrize(("train", "n_batches"), [(TOKENS, 105), (STORY, 80)], ids=["tokens", "story"])
def test_excluded_tokens_are_in_no_batch_and_all_others_in_one_an_epoch(train: TrainConfig, n_batches: int) -> None:
    """10 epochs: 84 tokens in batches of 8, or the 8 stories that have more than 3 tokens."""
    found = [token for tokens, _ in batches(train, Position(), n_batches, WITHOUT_FIRST_3) for token in tokens]
    assert sorted(found) == sorted([token for token in range(1, 113) if token not in FIRST_3] * 10)


def test_a_token_over_the_norm_limit_has_weight_0_in_its_place() -> None:
    """Every other number, every weight and every position is as without the limit, and the token's row is 0."""
    limited, plain = (islice(runs(TOKENS, source=WITH_GIANTS, activations=a), 17) for a in (LIMITED, ACTIVATIONS))
    used = []
    for run, other in zip(limited, plain, strict=True):
        giant = other.x[..., 0] > 1e20
        assert (giant.any() or len(run.after) < 5) and np.array_equal(run.weights, np.where(giant, 0, other.weights))
        assert run.x.tobytes() == np.where(giant[..., None], np.float32(0), other.x).tobytes()
        assert run.after == other.after
        used += run.x[run.weights > 0, 0].tolist()
    assert sorted(used) == sorted([token for token in range(1, 113) if token not in GIANTS] * 5)


def test_a_norm_limit_that_most_tokens_are_over_is_refused_with_their_norms() -> None:
    """It is not meant for them: the norms go from 1.4 to 158, half of them above 80."""
    activations = replace(ACTIVATIONS, norm_limit=20.0, block_tokens=112)
    with pytest.raises(
        BadInput, match=r"98 of 112 tokens .* activations.norm_limit, 20; .* 79.9 at 50 %.* 158.4: raise"
    ):
        next(runs(TOKENS, Position(block=SMALL_BLOCKS), activations=activations))
    with pytest.raises(
        BadInput, match=r"98 of 112 tokens .* activations.norm_limit, 20; .* 79.9 at 50 %.* 158.4: raise"
    ):
        first_activations(SOURCE, 10**6, None, norm_limit=20.0)
    half = float(np.sqrt(2) * 56.5)
    next(runs(TOKENS, Position(block=SMALL_BLOCKS), activations=replace(activations, norm_limit=half)))
    assert sum(map(len, first_activations(SOURCE, 10**6, None, norm_limit=half))) == 56


def test_a_batch_of_tokens_over_the_limit_alone_has_the_loss_0() -> None:
    """Not 0 / 0, which would say that the run has diverged."""
    assert loss_per_element(jnp.float32(0), jnp.float32(0), 2) == 0
    assert loss_per_element(jnp.float32(6), jnp.float32(1), 2) == 3


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
        assert (end.empty_stories, end.cut_stories, end.tokens_cut, end.tokens_excluded) == (2, 1, 100, 0)


def test_excluded_tokens_are_counted_in_the_first_epoch() -> None:
    """28 of them; 2 stories have no other tokens, beside the 2 that have none at all."""
    for n in (20, 50):
        end = batches(TOKENS, Position(), n, WITHOUT_FIRST_3)[-1][1]
        assert (end.empty_stories, end.cut_stories, end.tokens_excluded) == (4, 0, 28)


def test_text_without_tokens_is_an_error() -> None:
    """Not an endless search."""
    with pytest.raises(BadInput, match="not one has any tokens"):
        next(runs(TOKENS, source=FakeSource([0, 0, 0])))
    with pytest.raises(BadInput, match=r"not one has any tokens .* lower activations.exclude_first_tokens"):
        next(runs(TOKENS, source=FakeSource([0, 3, 2], exclude=3)))


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


def test_first_activations_leave_out_what_is_excluded_or_over_the_limit() -> None:
    """Of the same stories; a limit changes only which rows are left of them."""
    assert [x[:, 0].tolist() for x in first_activations(WITHOUT_FIRST_3, 16, None)] == [[4, 5], [*range(9, 23)]]
    found = first_activations(WITH_GIANTS, 30, None, norm_limit=200.0)
    whole = [range(1, 6), range(6, 23), range(23, 24)]
    assert [x[:, 0].tolist() for x in found] == [[n for n in numbers if n not in GIANTS] for numbers in whole]
