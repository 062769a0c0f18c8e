"""Where activations come from: a language model that reads stories, or arrays that are there already.

A source is a sequence of items (a story, or a chunk of adjacent rows). Reading an item is cheap and tells how many
tokens it has; its activations are computed or copied only when they are needed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from flax import traverse_util

from jax_sae.activations.array_sources import open_array_sources
from jax_sae.activations.places import Place, total_width
from jax_sae.activations.position import Position
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import choose_split, open_dataset
from jax_sae.language_model.gpt_neo import GPTNeo
from jax_sae.language_model.harvest import harvest
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.language_model.text import Stories, Story, text_digest, tokenizer_of

READ_AHEAD = 64
"""Items that are read (tokenised) at a time."""

STORIES_TO_COMPARE = 64
"""Stories whose token ids tell one tokenizer from another."""


class Item(Protocol):
    """A story, or a chunk of rows."""

    tokens_cut: int
    """Beyond the language model's positions."""
    tokens_excluded: int
    """At its start, not used and not counted as its own."""

    def __len__(self) -> int:
        """Return its number of tokens, those that are used."""


class Source(Protocol):
    """A sequence of items with activations of one place, or of several side by side."""

    @property
    def name(self) -> str:
        """What it is, for messages."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns the activations are, in their order; names are unique. A single one may have the name ''."""

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story, so that a token's place in its story is known."""

    def __len__(self) -> int:
        """Return the number of items."""

    def read(self, items: Sequence[int]) -> Sequence[Any]:
        """Read these items, in this order."""

    def activations(self, items: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number in `items`, activations [T, D] float32) of each item that has tokens, in any order."""

    def count_tokens(self) -> tuple[int, bool]:
        """The tokens of one epoch, and whether that number is exact; takes well below a second."""

    def digests(self) -> dict[str, str]:
        """What decides the activations, by its name: a sha256 in hexadecimal of its content, not of its path."""


def in_order(source: Source, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position]]:
    """The items of an epoch from a position on, to its end, and the position after each.

    A source with a method `in_order(start, shuffle_seed)` says so itself; it must not depend on anything else. Of
    another one they are all of its items, in an order that is random by the seed and the epoch, without a seed in their
    own.
    """
    own = getattr(source, "in_order", None)
    return by_number(source, start, shuffle_seed) if own is None else own(start, shuffle_seed)


def by_number(source: Source, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position]]:
    """The items of a source that can read each by its number, as `in_order` gives them."""
    order, here = random_order(len(source), shuffle_seed, start.epoch), start
    while here.item < len(order):
        for item in source.read(order[here.item : here.item + READ_AHEAD].tolist()):
            here = here.after(item, item=here.item + 1)
            yield item, here


@lru_cache(maxsize=2)
def random_order(n: int, seed: int | None, epoch: int) -> np.ndarray:
    """The numbers below n in an order that is random by the seed and the epoch; without a seed, in their own."""
    if seed is None:
        return np.arange(n)
    return np.random.Generator(np.random.Philox(key=[seed, 2 * epoch])).permutation(n)


@dataclass(frozen=True, eq=False)
class StorySource:
    """Stories `first` to `last` of a text, read by a language model; an item is a story."""

    stories: Stories
    first: int
    last: int
    model: GPTNeo
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"stories {self.first} to {self.last - 1}"

    @property
    def places(self) -> tuple[Place, ...]:
        """The place that is read."""
        return (Place("", self.model.config.hidden_size),)

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""
        return total_width(self.places)

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return True

    def __len__(self) -> int:
        """Return the number of stories, empty ones included."""
        return self.last - self.first

    def read(self, items: Sequence[int]) -> Sequence[Story]:
        """Tokenise stories."""
        return self.stories.read([self.first + int(i) for i in items])

    def activations(self, items: Sequence[Story]) -> Iterator[tuple[int, np.ndarray]]:
        """Run the language model over whole stories; the activations of excluded tokens are left out."""
        token_ids = [story.token_ids if len(story) else story.token_ids[:0] for story in items]
        for i, x in harvest(self.model, self.params, token_ids):
            yield i, x[items[i].tokens_excluded :]

    def count_tokens(self) -> tuple[int, bool]:
        """Those of 256 stories, evenly spread, make an estimate; exact if there are no more."""
        return self.stories.count_tokens(self.first, self.last)

    def digests(self) -> dict[str, str]:
        """Of the language model as it is run, of the whole text column of the split, and of the tokenizer.

        The tokenizer is known by the token ids of the first 64 stories, so another text there changes that one too.

        Raises:
            BadInput: if the column does not hold text.
        """
        of_ids = hashlib.sha256()
        for story in self.read(range(min(len(self), STORIES_TO_COMPARE))):
            of_ids.update(f"{len(story.token_ids)}\n".encode() + story.token_ids.astype("<i4").tobytes())
        return {
            "language model": model_digest(self.model, self.params),
            "text": text_digest(self.stories.rows, self.stories.column),
            "tokenizer": of_ids.hexdigest(),
        }


def model_digest(model: GPTNeo, params: Mapping[str, Any]) -> str:
    """The sha256, in hexadecimal, of a language model's sizes and of its parameters' names, dtypes, shapes and bytes.

    It is that of the parameters as they are run, in float32, whatever file and format they come from.
    """
    digest = hashlib.sha256(f"{model.config}\n".encode())
    for name, value in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A source that is asked in place of another one, which answers what a subclass does not."""

    source: Source

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return self.source.name

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns the activations are."""
        return self.source.places

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""
        return self.source.width

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return self.source.has_stories

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.source)

    def read(self, items: Sequence[int]) -> Sequence[Any]:
        """Read these items, in this order."""
        return self.source.read(items)

    def in_order(self, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position]]:
        """The items of an epoch from a position on, and the position after each."""
        return in_order(self.source, start, shuffle_seed)

    def activations(self, items: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number in `items`, activations [T, D] float32) of each item that has tokens, in any order."""
        return self.source.activations(items)

    def count_tokens(self) -> tuple[int, bool]:
        """The tokens of one epoch, and whether that number is exact."""
        return self.source.count_tokens()

    def digests(self) -> dict[str, str]:
        """Of all that decides the activations."""
        return self.source.digests()


@dataclass(frozen=True, eq=False)
class Part(Wrapped):
    """Items `first` to `last` of a source."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"items {self.first} to {self.last - 1} of {self.source.name}"

    def __len__(self) -> int:
        """Return the number of items."""
        return self.last - self.first

    def read(self, items: Sequence[int]) -> Sequence[Any]:
        """Read these items, in this order."""
        return self.source.read([self.first + int(i) for i in items])

    def in_order(self, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position]]:
        """Its own, by their numbers."""
        return by_number(self, start, shuffle_seed)

    def count_tokens(self) -> tuple[int, bool]:
        """As many as its part of all items, an estimate."""
        tokens, _ = self.source.count_tokens()
        return round(tokens * len(self) / max(1, len(self.source))), False


Sources = tuple[Source, Source, list[str]]
"""The source to train on, the held-out one, and lines for the screen that say what they are."""


def hold_out(source: Source, config: Config) -> Sources:
    """Hold the last tenth of a source's items out, but no more than `held_out_tokens` need.

    Raises:
        BadInput: if it has fewer than 10 items.
    """
    N = len(source)
    if N < 10:
        raise BadInput(f"{source.name} has {N} items; at least 10 are needed, a tenth of them held out")
    first, tokens = N, 0
    while first > N - N // 10 and tokens < config.activations.held_out_tokens:
        first -= 1
        tokens += len(source.read([first])[0])
    lines = [
        f"activations   {source.name}, width {source.width}",
        f"held out      the last {N - first:,} of {N:,} items, which are not trained on",
    ]
    return Part(source, 0, first), Part(source, first, N), lines


def open_sources(config: Config) -> Sources:
    """Open what `config` names.

    Raises:
        BadInput: if a model, text, tokenizer or file is missing, damaged or does not fit the others, or if an epoch is
            known to have fewer tokens than a batch.
    """
    training, held_out, lines = open_array_sources(config) if config.activations.path else _open_stories(config)
    refuse_large_batch(config, training)
    return training, held_out, lines


def refuse_large_batch(config: Config, training: Source) -> None:
    """Raise BadInput if an epoch is known to have fewer tokens than a batch."""
    tokens, exact = training.count_tokens()
    if config.train.batching == "tokens" and exact and 0 < tokens < config.train.batch_tokens:
        raise BadInput(
            f"train.batch_tokens is {config.train.batch_tokens}, but the "
            f"{'activations have' if config.activations.path else 'text has'} {tokens:,} tokens to train on; lower it"
        )


def _open_stories(run: Config) -> Sources:
    model, text, exclude = run.model, run.text, run.activations.exclude_first_tokens
    lm = load_language_model(model.path, model.layer, model.precision)
    splits = open_dataset(text.path, text.config)
    held_out_split = text.validation_split or next((name for name in ("validation", "test") if name in splits), "")
    config = lm.model.config

    def source(split: str, first: int = 0, last: int | None = None) -> StorySource:
        rows = choose_split(splits, text.path, split, text.column)
        tokenizer = tokenizer_of(rows, text.column, text.tokenizer, lambda: lm.tokenizer)
        stories = Stories(rows, text.column, tokenizer, config.max_position_embeddings, config.vocab_size, exclude)
        return StorySource(stories, first, len(stories) if last is None else last, lm.model, lm.params)

    training = source(text.split)
    if held_out_split:
        held_out = source(held_out_split)
        held_out_line = f"the split '{held_out_split}'"
    else:
        if len(training) < 20:
            raise BadInput(
                f"{text.path} has {len(training)} stories and no held-out split; "
                "at least 20 are needed, a tenth held out"
            )
        first = len(training) - max(2, min(1000, len(training) // 10))
        held_out, training = source(text.split, first), source(text.split, 0, first)
        held_out_line = f"the last {len(held_out):,} stories of the split '{text.split}', which are not trained on"
    lines = [
        f"model         {model.path}, the residual stream after {model.layer} of {config.num_layers} blocks, "
        f"width {config.hidden_size}",
        f"text          {text.path}: {len(training):,} stories of the split '{text.split}'",
        f"held out      {held_out_line}",
    ]
    return training, held_out, lines
