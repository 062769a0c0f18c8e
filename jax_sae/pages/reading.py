"""One pass over a text: each activation is read once, and every member's features are looked at as it goes by.

The encoders are the jitted ones of `TrainedAutoencoder`; what follows them goes through the active entries alone.
Memory holds a piece of the text, and of each member what `examples.py` and `tally.py` keep.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from jax_sae.activations.batches import finite_activations
from jax_sae.activations.norms import token_norms
from jax_sae.activations.places import columns
from jax_sae.activations.stored_stories import StoredStories
from jax_sae.activations.story_sources import StorySource
from jax_sae.analysis.measure import pieces
from jax_sae.errors import BadInput
from jax_sae.language_model.windows import Story
from jax_sae.pages.active import Active, Entries, entries, joined, side_by_side
from jax_sae.pages.examples import Chunk, ExampleKeeper, hashed
from jax_sae.pages.tally import HALVES, Tally, Together, Tokens, TokenTally, place_in_story
from jax_sae.streams import progress_bar
from jax_sae.trained import TrainedAutoencoder

NUMBERS_AT_A_TIME = 2**21
"""Of features, rows times F, that are encoded at once: they stay near the cores."""

CHUNK_TOKENS = 2**13
"""That are looked at together: what is done once a chunk for each feature is then little."""

CONTEXT = 5
"""Tokens before an example by which it is the same as another one."""

SHOWN_STORIES = 24
"""Stories of which it is shown what is active on each token."""

SHOWN_FEATURES = 8
"""How many of those active on a token are shown, the largest first."""


WithText = StorySource | StoredStories
"""Sources of which token ids are known."""


@dataclass(frozen=True, eq=False)
class StoryFeatures:
    """A story, and the features that are largest on each of its tokens."""

    token_ids: np.ndarray
    """[T] int32."""
    feature: np.ndarray
    """[T, SHOWN_FEATURES] int32, largest first."""
    value: np.ndarray
    """[T, SHOWN_FEATURES] float32; 0 where there is none."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a member's features."""

    examples: ExampleKeeper
    tally: Tally
    stories: list[StoryFeatures]
    """The first ones of the text."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a pass over a text tells."""

    members: dict[str, Seen]
    tokens: TokenTally
    n_tokens: int
    """Those that were used."""
    n_stories: int
    together: tuple[Together, ...] = ()
    """Of each group of members that was asked for, its features side by side."""


@dataclass(frozen=True, eq=False)
class _Story:
    number: int
    token_ids: np.ndarray
    used: np.ndarray
    """[T] bool."""
    x: np.ndarray
    """[T, D]; 0 where a token is not used."""


def read(
    source: WithText,
    members: Mapping[str, TrainedAutoencoder],
    n_tokens: int,
    groups: Sequence[Sequence[str]] = (),
) -> Reading:
    """Read the first whole stories of a source, about `n_tokens` tokens, for all members in one pass.

    Each reads its own place or places of the source. Tokens that the run leaves out count as not active, here as there.

    Args:
        source: of stories.
        members: by their names.
        n_tokens: about how many.
        groups: names of members of which it is counted on how many tokens features fire together with each other's.

    Raises:
        BadInput: if an activation is not finite, or a feature.
    """
    V = source.vocabulary
    seen = {name: Seen(ExampleKeeper(sae.features), Tally(sae.features, V), []) for name, sae in members.items()}
    tokens = TokenTally(V)
    together = tuple(Together(sum(members[name].features for name in group)) for group in groups)
    waiting: list[_Story] = []
    n_stories = 0

    def look(is_last: bool) -> None:
        """Take chunks from the stories that wait."""
        for some in _taken(waiting, CHUNK_TOKENS, is_last):
            chunk, its_tokens, used, x = _chunk(some)
            tokens.add(its_tokens, used)
            looked = _active(members, source, chunk, used, x)
            for name, its in looked.items():
                seen[name].examples.add(chunk, its)
                seen[name].tally.add(its_tokens, its)
                seen[name].stories.extend(_shown(chunk, its_tokens, its))
            for group, counted in zip(groups, together, strict=True):
                counted.add(*side_by_side([looked[name] for name in group]))

    with progress_bar(total=n_tokens, unit=" tokens", desc="features", leave=False) as bar:
        for items in pieces(source, n_tokens):
            stories = list(_stories(source, items, n_stories, _norm_limit(members)))
            n_stories += len(items)
            waiting += stories
            look(is_last=False)
            bar.update(sum(int(story.used.sum()) for story in stories))
        look(is_last=True)
        bar.total = bar.n
        bar.refresh()
    for each in seen.values():
        each.tally.finish()
    return Reading(seen, tokens, int(tokens.tokens.sum()), n_stories, together)


def rows_at_a_time(features: int) -> int:
    """Tokens that are encoded at once: a power of two, so that few shapes are compiled."""
    return int(2 ** np.clip(int(np.log2(NUMBERS_AT_A_TIME / features)), 8, 13))


def story_features(
    source: WithText, members: Mapping[str, TrainedAutoencoder], texts: Sequence[str]
) -> dict[str, list[StoryFeatures]]:
    """What is active on each token of texts of one's own, for each member.

    Raises:
        BadInput: if the tokenizer makes nothing of a text, or more tokens than the language model has positions.
    """
    if not texts:
        return {name: [] for name in members}
    found: dict[str, list[StoryFeatures]] = {name: [] for name in members}
    for story in _own_stories(source, texts):
        chunk, _, used, x = _chunk([story])
        for name, its in _active(members, source, chunk, used, x).items():
            found[name].append(_largest(story.token_ids, its.dense(slice(0, len(story.token_ids)))))
    return found


def _own_stories(source: WithText, texts: Sequence[str]) -> list[_Story]:
    """Texts of one's own, read by a run's language model."""
    if not isinstance(source, StorySource):
        raise BadInput(
            f"--text is given, but {source.name} are of a store, and a text of one's own is read by a run's language "
            "model; leave it out"
        )
    all_ids = source.lm.token_ids(texts)
    for text, ids in zip(texts, all_ids, strict=True):
        unknown = getattr(source.lm.tokenizer, "unk_token_id", None)
        if not len(ids) or (unknown is not None and (ids == unknown).all()):
            raise BadInput(f"the text {text!r} has no token that the language model knows; give another one")
    found = []
    for ids, x in zip(all_ids, source.lm.activations(all_ids), strict=True):
        used = np.arange(len(ids)) >= min(source.stories.exclude_first_tokens, len(ids) - 1)
        found.append(_Story(0, ids, used, np.where(used[:, None], x, 0)))
    return found


def values_of(
    source: WithText, sae: TrainedAutoencoder, n_tokens: int, feature: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of the first whole stories of a source, about `n_tokens` tokens: (token ids [T], used [T], values [T]).

    Values are a feature's, float32; a token that is not used has 0.
    """
    with progress_bar(total=n_tokens, unit=" tokens", desc="feature", leave=False) as bar:
        for items in pieces(source, n_tokens):
            stories = list(_stories(source, items, 0, _norm_limit({sae.name: sae})))
            yield from _values(source, sae, stories, feature)
            bar.update(sum(int(story.used.sum()) for story in stories))


def values_in_texts(
    source: WithText, sae: TrainedAutoencoder, texts: Sequence[str], feature: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The same of texts of one's own.

    Raises:
        BadInput: as `story_features`.
    """
    yield from _values(source, sae, _own_stories(source, texts), feature)


def _values(
    source: WithText, sae: TrainedAutoencoder, stories: Sequence[_Story], feature: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    if not stories:
        return
    chunk, _, used, x = _chunk(stories)
    values = np.zeros(len(used), np.float32)
    for _, rows, encoded in _encoded({sae.name: sae}, source, chunk, used, x):
        values[rows] = np.where(used[rows], np.asarray(encoded[: rows.stop - rows.start, feature]), 0)
    ends = np.cumsum([len(story.token_ids) for story in stories])[:-1]
    yield from zip((story.token_ids for story in stories), np.split(used, ends), np.split(values, ends), strict=True)


def token_ids_of(source: WithText, n_tokens: int, wanted: Iterable[int]) -> dict[int, np.ndarray]:
    """The token ids of some stories of a pass, by their numbers; the text is read again, the language model is not."""
    left, found, n = set(wanted), {}, 0
    for items in pieces(source, n_tokens):
        for item in items:
            if n in left and isinstance(item, Story):
                found[n] = item.token_ids
            n += 1
    return found


T = TypeVar("T")


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same; each is made before the one before it is used, so that encoding goes on meanwhile."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def _norm_limit(members: Mapping[str, TrainedAutoencoder]) -> float:
    return next(iter(members.values())).config.activations.norm_limit


def _stories(source: WithText, items: Sequence[Any], first: int, norm_limit: float) -> Iterator[_Story]:
    found: list[np.ndarray] = [np.zeros((0, source.width), np.float32)] * len(items)
    for i, x in finite_activations(source, items):
        found[i] = x
    for i, (item, x) in enumerate(zip(items, found, strict=True)):
        T = len(item.token_ids)
        used, whole = np.zeros(T, bool), np.zeros((T, source.width), np.float32)
        whole[item.used] = x
        used[item.used] = True if not norm_limit else token_norms(x) <= norm_limit
        yield _Story(first + i, item.token_ids, used, whole)


def _taken(stories: list[_Story], rows: int, is_last: bool) -> Iterator[list[_Story]]:
    """Take whole stories of at most so many tokens together, or one that is longer; what makes no full chunk waits."""
    while stories:
        ends = np.cumsum([len(story.token_ids) for story in stories])
        if ends[-1] <= rows and not is_last:
            return
        n = max(1, int(np.searchsorted(ends, rows, side="right")))
        some, stories[:n] = stories[:n], []
        yield some


def _chunk(stories: Sequence[_Story]) -> tuple[Chunk, Tokens, np.ndarray, np.ndarray]:
    """The chunk, its tokens, which of them are used, and their activations."""
    lengths = np.array([len(story.token_ids) for story in stories])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    number = np.repeat(np.array([story.number for story in stories], np.int32), lengths)
    position = np.arange(ends[-1], dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    ids = np.concatenate([story.token_ids for story in stories])

    def earlier(n: int) -> np.ndarray:
        """The token n before, -1 where the story begins later."""
        shifted = np.concatenate([np.full(min(n, len(ids)), -1, ids.dtype), ids[: max(0, len(ids) - n)]])
        return np.where(position >= n, shifted, -1)

    context = hashed(*(earlier(n) + 1 for n in range(CONTEXT + 1)))
    begin, end = np.repeat(starts, lengths), np.repeat(ends, lengths)
    chunk = Chunk(number, position, starts, begin, end, context, hashed(number, position))
    tokens = Tokens(
        ids, earlier(1).astype(np.int32), place_in_story(position, np.repeat(lengths, lengths)), number % HALVES
    )
    used, x = (np.concatenate([getattr(story, name) for story in stories]) for name in ("used", "x"))
    return chunk, tokens, used, x


def _active(
    members: Mapping[str, TrainedAutoencoder], source: WithText, chunk: Chunk, used: np.ndarray, x: np.ndarray
) -> dict[str, Active]:
    """What is above 0 of each member's features of a chunk; nothing where a token is not used.

    Raises:
        BadInput: if a feature is not finite.
    """
    parts: dict[str, list[Entries]] = {name: [] for name in members}
    for name, rows, encoded in _one_ahead(_encoded(members, source, chunk, used, x)):
        dense = np.asarray(encoded)[: rows.stop - rows.start]
        if not used[rows].all():
            dense = np.where(used[rows, None], dense, 0)
        if not np.isfinite(dense.max()):
            raise BadInput(
                f"{name} has features that are not finite; leave it out with --member, or take an earlier --step"
            )
        parts[name].append(entries(dense))
    return {name: joined(its, members[name].features) for name, its in parts.items()}


def _encoded(
    members: Mapping[str, TrainedAutoencoder], source: WithText, chunk: Chunk, used: np.ndarray, x: np.ndarray
) -> Iterator[tuple[str, slice, Any]]:
    """Of each member the features of the rows of a chunk, a part after the other: (name, which rows, features).

    Rows behind the last one may have been added. What is given may still be computed.
    """
    for name, sae in members.items():
        its_x = x_of(source, sae, x)
        if sae.per_story:
            its = replace(sae, exclude_first_tokens=0)  # those that are not used are taken out here
            for begin in chunk.starts:
                story = slice(begin, chunk.end[begin])
                encoded = np.zeros((story.stop - begin, sae.features), np.float32)
                if used[story].any():
                    encoded[used[story]] = its.encode(its_x[story][used[story]])
                yield name, story, encoded
            continue
        n = rows_at_a_time(sae.features)
        for first in range(0, len(x), n):
            rows = slice(first, min(first + n, len(x)))
            whole = np.zeros((n, its_x.shape[1]), np.float32)
            whole[: rows.stop - first] = its_x[rows]
            yield name, rows, sae.encode(whole)


def _shown(chunk: Chunk, tokens: Tokens, its: Active) -> Iterator[StoryFeatures]:
    """Those stories of a chunk that are shown."""
    for begin in chunk.starts:
        if chunk.story[begin] < SHOWN_STORIES:
            story = slice(begin, chunk.end[begin])
            yield _largest(tokens.ids[story], its.dense(story))


def x_of(source: WithText, sae: TrainedAutoencoder, x: np.ndarray) -> np.ndarray:
    """The columns of x[N, D] that a member reads."""
    if len(source.places) == 1:
        return x
    its = columns(source.places)
    return np.concatenate([x[:, slice(*its[place])] for place in sae.reads], 1)


def _largest(token_ids: np.ndarray, dense: np.ndarray) -> StoryFeatures:
    n = min(SHOWN_FEATURES, dense.shape[1])
    feature = np.argsort(-dense, axis=1, kind="stable")[:, :n]
    return StoryFeatures(token_ids, feature.astype(np.int32), np.take_along_axis(dense, feature, 1))
