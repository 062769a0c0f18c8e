"""What a source of activations is, and the sources that a run's settings name.

A source is a sequence of items (a story, or a chunk of adjacent rows). Reading an item is cheap and tells how many
tokens it has; its activations are computed or copied only when they are needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jax_sae.activations.array_sources import open_array_sources
from jax_sae.activations.blocks import OnDevice, on_device
from jax_sae.activations.order import by_number, in_order
from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.activations.story_sources import StorySource, StreamSource
from jax_sae.config import Config, SweepConfig, named_models, places_of
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import choose_split, open_dataset
from jax_sae.language_model.places import hugging_face_name, width_of
from jax_sae.language_model.pretrained import LanguageModel, load_language_model
from jax_sae.language_model.several import Models, load_language_models, stories_for
from jax_sae.language_model.stream import choose_shards, first_buffer, open_shards
from jax_sae.language_model.text import Stories

if TYPE_CHECKING:
    from datasets import Dataset


class Item(Protocol):
    """A story, or a chunk of rows."""

    @property
    def tokens_cut(self) -> int:
        """Beyond the language model's positions."""

    @property
    def tokens_excluded(self) -> int:
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

    def count_tokens(self) -> tuple[int | None, bool]:
        """The tokens of one epoch, None if they are not known, and whether that is exact; takes well below a second."""

    def digests(self) -> dict[str, str]:
        """What decides the activations, by its name: a sha256 in hexadecimal of its content, not of its path."""


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

    def on_device(self, items: Sequence[Any]) -> OnDevice | None:
        """The same where the device keeps them, if it does."""
        return on_device(self.source, items)

    def count_tokens(self) -> tuple[int | None, bool]:
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

    def count_tokens(self) -> tuple[int | None, bool]:
        """As many as its part of all items, an estimate."""
        tokens, _ = self.source.count_tokens()
        if tokens is None:
            return None, False
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


def with_known_places(sweep: SweepConfig, source: Source) -> SweepConfig:
    """The sweep with the names by which a source knows its places, where a language model knows a place by several."""
    if not isinstance(source, StorySource):
        return sweep

    def known(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(source.known_place(name) for name in names)

    members = [
        replace(
            member,
            place=known((member.place,))[0] if member.place else member.place,
            reads=known(member.reads) if member.reads else member.reads,
            writes=known(member.writes) if member.writes else member.writes,
        )
        for member in sweep.members
    ]
    return replace(sweep, places=known(sweep.places), members=tuple(members))


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
    if config.train.batching == "tokens" and exact and tokens is not None and 0 < tokens < config.train.batch_tokens:
        raise BadInput(
            f"train.batch_tokens is {config.train.batch_tokens}, but the "
            f"{'activations have' if config.activations.path else 'text has'} {tokens:,} tokens to train on; lower it"
        )


def excluded_first_tokens(source: Source, said: int | None) -> int:
    """How many tokens are left out at the start of each item: what is said or, without that, what the source does."""
    if said is not None:
        return said
    return source.stories.exclude_first_tokens if isinstance(source, StorySource) else 0


def _open_stories(run: Config) -> Sources:
    model, text = run.model, run.text
    places = places_of(run.sweep)
    models: Models
    if model.models:
        if not places:
            raise BadInput(
                f"model.models are given, but no places in them; name some by sweep.places, such as "
                f"{next(iter(named_models(model)))}:9.resid_post"
            )
        models = load_language_models(named_models(model), places, model.precision, model.dtype)
    else:
        layer = None if places else model.layer
        models = {"": load_language_model(model.path, layer, model.precision, places=places, dtype=model.dtype)}
    model_lines = [_model_line(name, lm, None if places else model.layer) for name, lm in models.items()]

    def stories(rows: "Dataset") -> Stories:
        """The stories of rows, as the settings say."""
        return stories_for(
            models,
            rows,
            text.column,
            text.tokenizer,
            run.activations.exclude_first_tokens,
            text.window,
            text.pack,
            text.prepend_bos,
        )

    if text.streaming:
        all_shards = open_shards(text.path, text.column, text.config)
        name = held_out_name(text.validation_split, all_shards)
        shards = choose_shards(all_shards, text.path, text.split)
        some = first_buffer(choose_shards(all_shards, text.path, name) if name else shards)
        held_out = StorySource(stories(some.rows), 0, len(some.rows), models)
        if not name:
            shards = replace(shards, first=some.end)
            if some.end[0] == len(shards.names):
                raise BadInput(
                    f"{text.path} has {len(held_out):,} stories in all, which a stream holds out; leave text.streaming "
                    "out, or name a held-out split by text.validation_split"
                )
        stream = StreamSource(held_out.stories, 0, len(held_out), models, shards)
        lines = [
            *model_lines,
            f"text          {text.path}: the split '{text.split}', {len(shards.names):,} shards, streamed; how many "
            "stories they have is not known",
            f"held out      the first {len(held_out):,} stories of the split '{name or text.split}'"
            f"{'' if name else ', which are not trained on'}",
        ]
        return stream, held_out, [*lines, *_story_lines(held_out.stories)]
    splits = open_dataset(text.path, text.config)
    held_out_split = held_out_name(text.validation_split, splits)

    def source(split: str, first: int = 0, last: int | None = None) -> StorySource:
        found = stories(choose_split(splits, text.path, split, text.column))
        return StorySource(found, first, len(found) if last is None else last, models)

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
        *model_lines,
        f"text          {text.path}: {len(training):,} stories of the split '{text.split}'",
        f"held out      {held_out_line}",
        *_story_lines(training.stories),
    ]
    return training, held_out, lines


def _model_line(name: str, lm: LanguageModel, layer: int | None) -> str:
    """What is read of a language model: the residual stream at a layer, or its places."""
    a = lm.model.architecture
    model = f"model         {f'{name}: ' if name else ''}{lm.name}"
    if layer is not None:
        return f"{model}, the residual stream after {layer} of {a.num_layers} blocks, width {lm.width}"
    read = [f"{at} ({hugging_face_name(at, a, lm.model_type)}, width {width_of(at, a)})" for at in lm.places]
    return f"{model}, {lm.layer} of {a.num_layers} blocks are run, to read {', '.join(read)}"


def held_out_name(said: str, splits: Iterable[str]) -> str:
    """The split that is held out; empty where none is."""
    return said or next((name for name in ("validation", "test") if name in splits), "")


def _story_lines(stories: Stories) -> list[str]:
    """Lines that say how rows become stories, where they are not read as they are."""
    lines, k = [], stories.exclude_first_tokens
    if stories.window:
        how = ", shared by as many as fit" if stories.pack else ""
        lines.append(f"windows       rows are cut into windows of {stories.window:,} tokens, each then a story{how}")
    if stories.bos is not None:
        token = stories.tokenizer.convert_ids_to_tokens(stories.bos)
        out = f"; the first {k:,} tokens are not trained on" if k > 1 else f", which is {'not ' if k else ''}trained on"
        lines.append(f"beginnings    each story begins with {token}{out}")
    return lines
