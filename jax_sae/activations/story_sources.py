"""Stories that a language model reads, as sources: rows of a text that is there, or a text that is streamed."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import traverse_util

from jax_sae.activations.blocks import OnDevice
from jax_sae.activations.order import random_order, stories_in_order
from jax_sae.activations.places import Place, total_width
from jax_sae.activations.position import Position
from jax_sae.errors import BadInput
from jax_sae.language_model.devices import seen_by_all
from jax_sae.language_model.harvest import stays_on_device
from jax_sae.language_model.pretrained import LanguageModel
from jax_sae.language_model.several import (
    Models,
    harvest_each,
    harvest_each_on_device,
    known_place,
    places_read,
)
from jax_sae.language_model.stream import Buffer, Shards
from jax_sae.language_model.text import Stories
from jax_sae.language_model.text_digest import text_digest
from jax_sae.language_model.windows import Story

if TYPE_CHECKING:
    from jax_sae.activations.sources import Item

STORIES_TO_COMPARE = 64
"""Stories whose token ids tell one tokenizer from another."""


@dataclass(frozen=True, eq=False)
class StorySource:
    """Rows `first` to `last` of a text, read by language models; an item is a story: a row, or a window of rows."""

    stories: Stories
    first: int
    last: int
    models: Models
    """Those that read it: one, with the name '', or several."""

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"stories {self.first} to {self.last - 1}"

    @property
    def lm(self) -> LanguageModel:
        """The language model that reads it; BadInput if there are several."""
        if len(self.models) > 1:
            raise BadInput(f"several language models read {self.name}, {', '.join(self.models)}; this is of one")
        return next(iter(self.models.values()))

    @property
    def vocabulary(self) -> int:
        """Above all token ids."""
        return self.lm.model.architecture.vocab_size

    @property
    def tokenizer(self) -> Any:
        """That of the text; None where the text is token ids, and nothing says what they stand for."""
        if self.stories.tokenizer is not None:
            return self.stories.tokenizer
        try:
            return self.lm.tokenizer
        except BadInput:
            return None

    @property
    def places(self) -> tuple[Place, ...]:
        """Those that the language models read."""
        return tuple(Place(name, width) for name, width in places_read(self.models).items())

    def known_place(self, place: str) -> str:
        """A place as it is called in `places`, from any of its names; BadInput if there is none."""
        return known_place(place, self.models)

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

    def in_order(self, start: Position, shuffle_seed: int | None) -> Iterator[tuple["Item", Position]]:
        """The stories of rows in an order that is random by the seed, those of a row one after the other."""
        order = self.first + random_order(len(self), shuffle_seed, start.epoch)
        return stories_in_order(self.stories, order, start)

    def activations(self, items: Sequence[Story]) -> Iterator[tuple[int, np.ndarray]]:
        """Run the language models over whole stories; the activations of excluded tokens are left out."""
        for i, x in harvest_each(self.models, *_to_read(items)):
            yield i, x[items[i].used]

    def on_device(self, items: Sequence[Story]) -> OnDevice | None:
        """The same where the device keeps them, as `blocks.on_device` tells; None where NumPy sees them anyway."""
        return self._on_device(items) if stays_on_device() else None

    def _on_device(self, items: Sequence[Story]) -> OnDevice:
        for batch, x in harvest_each_on_device(self.models, *_to_read(items)):
            yield x, [(i, np.arange(len(items[i].token_ids))[items[i].used]) for i in batch]
            del x  # a batch is gone before the next one is computed

    def count_tokens(self) -> tuple[int | None, bool]:
        """Those of 256 stories, evenly spread, make an estimate; exact if there are no more."""
        return self.stories.count_tokens(self.first, self.last)

    def digests(self) -> dict[str, str]:
        """Of each language model as it is run, of the whole text column of the split, and of the tokenizer.

        The tokenizer is known by the token ids of the first 64 stories, so another text there changes that one too.

        Raises:
            BadInput: if the column does not hold text.
        """
        of_ids = hashlib.sha256()
        for story in self.read(range(min(self.last - self.first, STORIES_TO_COMPARE))):
            of_ids.update(f"{len(story.token_ids)}\n".encode() + story.token_ids.astype("<i4").tobytes())
        return {
            **{f"language model {name}".rstrip(): model_digest(lm) for name, lm in self.models.items()},
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

    def in_order(self, start: Position, shuffle_seed: int | None) -> Iterator[tuple["Item", Position]]:
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


def _to_read(items: Sequence[Story]) -> tuple[list[np.ndarray], list[np.ndarray | None] | None]:
    """What language models read of stories: token ids, none where none are used; segments, where there are some."""
    token_ids = [story.token_ids if len(story) else story.token_ids[:0] for story in items]
    segments = [story.segments for story in items]
    return token_ids, segments if any(each is not None for each in segments) else None


def model_digest(lm: LanguageModel) -> str:
    """The sha256, in hexadecimal, of a language model's sizes and of its parameters' names, dtypes, shapes and bytes.

    It is that of the parameters as they are run, whatever file and format they come from.
    """
    digest = hashlib.sha256(f"{_described(lm)}\n".encode())
    for name, value in sorted(traverse_util.flatten_dict(lm.params, sep="/").items()):
        array = np.ascontiguousarray(seen_by_all(value))
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
