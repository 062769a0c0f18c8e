"""Where activations come from: a language model that reads stories, or arrays that are there already.

A source is a sequence of items (a story, or a chunk of adjacent rows). Reading an item is cheap and tells how many
tokens it has; its activations are computed or copied only when they are needed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flax import traverse_util

from jax_sae.activations.array_sources import open_array_sources
from jax_sae.activations.order import by_number, in_order, random_order, stories_in_order
from jax_sae.activations.places import Place, total_width
from jax_sae.activations.position import Position
from jax_sae.config import Config, SweepConfig, places_of
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import choose_split, open_dataset
from jax_sae.language_model.harvest import harvest
from jax_sae.language_model.places import hugging_face_name, read_place, width_of
from jax_sae.language_model.pretrained import LanguageModel, load_language_model
from jax_sae.language_model.stream import Buffer, Shards, choose_shards, first_buffer, open_shards
from jax_sae.language_model.text import Stories, stories_of, tokenizer_of
from jax_sae.language_model.text_digest import text_digest
from jax_sae.language_model.windows import Story

if TYPE_CHECKING:
    from datasets import Dataset

STORIES_TO_COMPARE = 64
"""Stories whose token ids tell one tokenizer from another."""


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
class StorySource:
    """Rows `first` to `last` of a text, read by a language model; an item is a story: a row, or a window of rows."""

    stories: Stories
    first: int
    last: int
    lm: LanguageModel

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"stories {self.first} to {self.last - 1}"

    @property
    def places(self) -> tuple[Place, ...]:
        """Those that the language model reads."""
        architecture = self.lm.model.architecture
        return tuple(Place(place, width_of(place, architecture)) for place in self.lm.places)

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""
        return total_width(self.places)

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return True

    def __len__(self) -> int:
        """Return the number of rows, empty ones included."""
        return self.last - self.first

    def read(self, items: Sequence[int]) -> Sequence[Story]:
        """Tokenise rows."""
        return self.stories.read([self.first + int(i) for i in items])

    def in_order(self, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position]]:
        """The stories of rows in an order that is random by the seed, those of a row one after the other."""
        order = self.first + random_order(len(self), shuffle_seed, start.epoch)
        return stories_in_order(self.stories, order, start)

    def activations(self, items: Sequence[Story]) -> Iterator[tuple[int, np.ndarray]]:
        """Run the language model over whole stories; the activations of excluded tokens are left out."""
        token_ids = [story.token_ids if len(story) else story.token_ids[:0] for story in items]
        segments = [story.segments for story in items]
        together = segments if any(each is not None for each in segments) else None
        for i, x in harvest(self.lm.model, self.lm.places, self.lm.params, token_ids, together):
            yield i, x[items[i].used]

    def count_tokens(self) -> tuple[int | None, bool]:
        """Those of 256 stories, evenly spread, make an estimate; exact if there are no more."""
        return self.stories.count_tokens(self.first, self.last)

    def digests(self) -> dict[str, str]:
        """Of the language model as it is run, of the whole text column of the split, and of the tokenizer.

        The tokenizer is known by the token ids of the first 64 stories, so another text there changes that one too.

        Raises:
            BadInput: if the column does not hold text.
        """
        of_ids = hashlib.sha256()
        for story in self.read(range(min(self.last - self.first, STORIES_TO_COMPARE))):
            of_ids.update(f"{len(story.token_ids)}\n".encode() + story.token_ids.astype("<i4").tobytes())
        return {
            "language model": model_digest(self.lm),
            "text": text_digest(self.stories.rows, self.stories.column),
            "tokenizer": of_ids.hexdigest(),
        }


@dataclass(frozen=True, eq=False)
class StreamSource(StorySource):
    """A text that is read while it is trained on; how much there is of it is not known.

    An epoch is all shards in an order that is random by the seed, and of each buffer of their rows the rows in such an
    order. `stories` are those that are held out, by which the tokenizer is known.
    """

    shards: Shards
    _reading: list[tuple[tuple[Any, ...], Buffer, Iterator[Buffer]]] = field(default_factory=list, repr=False)
    """The buffer that was read last, what it is, and those that follow it."""

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"the stream {self.shards.path}"

    def __len__(self) -> int:
        """Raise TypeError: that is not known."""
        raise TypeError("how many stories a stream has is not known")

    def in_order(self, start: Position, shuffle_seed: int | None) -> Iterator[tuple[Item, Position]]:
        """The stories of shards in an order that is random by the seed, mixed within buffers of about a thousand rows.

        Raises:
            BadInput: if a shard was changed since it was read before; and as `Shards.buffers`.
            SourceLost: if a shard cannot be reached.
        """
        here = start
        order = self.shards.order(random_order(len(self.shards.names), shuffle_seed, start.epoch).tolist())
        while here.shard < len(order):
            buffer = self._buffer(order, here, shuffle_seed)
            if buffer is None:
                return
            self._refuse_changes(order, here, buffer)
            rows = replace(self.stories, rows=buffer.rows)
            place = np.arange(len(rows))
            if shuffle_seed is not None:
                place = np.random.Generator(
                    np.random.Philox(key=[shuffle_seed, 2 * here.epoch], counter=[0, 0, here.shard + 1, here.row])
                ).permutation(place)
            known = {**here.shards, **buffer.through}
            for item, following in stories_in_order(rows, place, here):
                if following.item < len(rows):
                    here = replace(following, digest=buffer.digest, shards=known)
                else:
                    shard, row = buffer.end
                    here = replace(following, item=0, shard=shard, row=row, digest=buffer.at_end, shards=known)
                yield item, here

    def _buffer(self, order: Sequence[int], here: Position, seed: int | None) -> Buffer | None:
        """The buffer that begins at a position, if there are rows left; what was just read is not read again."""
        of, begin = (here.epoch, seed), (here.shard, here.row)
        following = self.shards.buffers(order, *begin)
        if self._reading and self._reading[0][0] == of:
            _, buffer, rest = self._reading[0]
            if buffer.begin == begin:
                return buffer
            following = rest if buffer.end == begin else following
        self._reading.clear()
        if (found := next(following, None)) is not None:
            self._reading.append((of, found, following))
        return found

    def _refuse_changes(self, order: Sequence[int], here: Position, buffer: Buffer) -> None:
        """Raise BadInput if what was read before is not what is read now."""
        changed = [name for name, digest in buffer.through.items() if here.shards.get(name, digest) != digest]
        within = here.item > 0 or here.offset > 0
        if here.digest and here.digest != (buffer.digest if within else buffer.before) and not changed:
            changed = [
                self.shards.names[shard] for shard in order[here.shard : (buffer.end[0] if within else here.shard) + 1]
            ]
        if changed:
            raise BadInput(
                f"{' or '.join(changed)} of {self.shards.path}: changed since it was read before, by its sha256; put "
                "back what was there, or start a new run"
            )

    def count_tokens(self) -> tuple[int | None, bool]:
        """They are not known."""
        return None, False

    def digests(self) -> dict[str, str]:
        """Of the language model, of the tokenizer, and of the shards' names; positions remember what is in them."""
        names = hashlib.sha256("\n".join(self.shards.names).encode()).hexdigest()
        return {**super().digests(), "text": names}


def model_digest(lm: LanguageModel) -> str:
    """The sha256, in hexadecimal, of a language model's sizes and of its parameters' names, dtypes, shapes and bytes.

    It is that of the parameters as they are run, whatever file and format they come from.
    """
    digest = hashlib.sha256(f"{_described(lm)}\n".encode())
    for name, value in sorted(traverse_util.flatten_dict(lm.params, sep="/").items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _described(lm: LanguageModel) -> str:
    """What it is made of; of a GPT-Neo in the words of the versions that ran no other, whose runs go on."""
    a = lm.model.architecture
    if lm.model_type != "gpt_neo":
        return f"{lm.model_type} {a}"
    window = next((window for window in a.windows if window), 256)
    kinds = tuple("local" if window else "global" for window in a.windows)
    return (
        f"GPTNeoConfig(vocab_size={a.vocab_size}, hidden_size={a.hidden_size}, num_layers={a.num_layers}, "
        f"num_heads={a.num_heads}, max_position_embeddings={a.max_position_embeddings}, window_size={window}, "
        f"intermediate_size={a.intermediate_size}, activation_function={a.activation!r}, "
        f"layer_norm_epsilon={a.norm_epsilon}, attention_layers={kinds}, "
        f"tie_word_embeddings={a.tie_word_embeddings})"
    )


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
    architecture, model_type = source.lm.model.architecture, source.lm.model_type
    members = [
        replace(member, place=read_place(member.place, architecture, model_type)) if member.place else member
        for member in sweep.members
    ]
    places = [read_place(place, architecture, model_type) for place in sweep.places]
    return replace(sweep, places=tuple(places), members=tuple(members))


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
    layer = None if places else model.layer
    lm = load_language_model(model.path, layer, model.precision, places=places, dtype=model.dtype)
    architecture = lm.model.architecture
    model_line = (
        f"model         {model.path}, the residual stream after {model.layer} of {architecture.num_layers} blocks, "
        f"width {lm.width}"
    )
    if places:
        read = ", ".join(
            f"{place} ({hugging_face_name(place, architecture, lm.model_type)}, width {width_of(place, architecture)})"
            for place in lm.places
        )
        blocks = f"{lm.layer} of {architecture.num_layers} blocks are run"
        model_line = f"model         {model.path}, {blocks}, to read {read}"

    def stories(rows: "Dataset") -> Stories:
        """The stories of rows, as the settings say."""
        tokenizer = tokenizer_of(rows, text.column, text.tokenizer, lambda: lm.tokenizer)
        return stories_of(
            rows,
            text.column,
            tokenizer,
            architecture.max_position_embeddings,
            architecture.vocab_size,
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
        held_out = StorySource(stories(some.rows), 0, len(some.rows), lm)
        if not name:
            shards = replace(shards, first=some.end)
            if some.end[0] == len(shards.names):
                raise BadInput(
                    f"{text.path} has {len(held_out):,} stories in all, which a stream holds out; leave text.streaming "
                    "out, or name a held-out split by text.validation_split"
                )
        stream = StreamSource(held_out.stories, 0, len(held_out), lm, shards)
        lines = [
            model_line,
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
        return StorySource(found, first, len(found) if last is None else last, lm)

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
        model_line,
        f"text          {text.path}: {len(training):,} stories of the split '{text.split}'",
        f"held out      {held_out_line}",
        *_story_lines(training.stories),
    ]
    return training, held_out, lines


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
