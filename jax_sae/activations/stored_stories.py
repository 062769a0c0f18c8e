"""The stories of a store that kept their token ids, so that a text stands beside its rows: for pages on features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.activations.array_sources import RowSource
from jax_sae.activations.arrays import sha256
from jax_sae.activations.places import Place, total_width
from jax_sae.activations.store import read_manifest
from jax_sae.errors import BadInput
from jax_sae.language_model.pretrained import LanguageModel, load_language_model
from jax_sae.language_model.text import load_tokenizer
from jax_sae.language_model.windows import Story
from jax_sae.streams import say


@dataclass(frozen=True, eq=False)
class StoredStory(Story):
    """A story, and where its rows are."""

    row: int = 0
    """The first of them."""


@dataclass(frozen=True, eq=False)
class StoredStories:
    """Stories whose rows lie in a part of a store; an item is a story."""

    rows: RowSource
    token_ids: np.ndarray
    """[all] int32, of every story of the store, one after the other."""
    starts: np.ndarray
    """[n + 1], where each story of this part begins among these, and the last one ends."""
    first_rows: np.ndarray
    """[n], of these stories."""
    exclude_first_tokens: int
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"the {len(self):,} stories in {self.rows.name}"

    @property
    def places(self) -> tuple[Place, ...]:
        """Whose columns the activations are; of a layer by the name that the place has in a language model."""
        layer = self.manifest.get("layer")
        if layer is None:
            return self.rows.places
        return (Place("embed" if layer == 0 else f"{layer - 1}.resid_post", self.width),)

    @property
    def width(self) -> int:
        """D, the sum of the places' widths."""
        return total_width(self.rows.places)

    @property
    def has_stories(self) -> bool:
        """Whether an item is a story."""
        return True

    @cached_property
    def lm(self) -> LanguageModel | None:
        """The language model that the manifest names, if it can be run; what directions do to its logits is shown."""
        try:
            lm = load_language_model(self.manifest["model"])
            fits = lm.model.architecture.vocab_size > int(self.token_ids.max())
            problem = "" if fits else "it has fewer token ids than the store"
        except BadInput as error:
            problem = str(error)
        if problem:
            say([f"note          the store's language model is not read, so no logits are shown: {problem}"])
            return None
        return lm

    @property
    def vocabulary(self) -> int:
        """Above all token ids."""
        return int(self.token_ids.max()) + 1 if self.lm is None else self.lm.model.architecture.vocab_size

    @cached_property
    def tokenizer(self) -> Any:
        """That of the store's text; None where it is not there."""
        name = self.manifest.get("tokenizer")
        try:
            if isinstance(name, str) and name != self.manifest["model"]:
                return load_tokenizer(name)
            return self.lm.tokenizer if self.lm is not None else load_tokenizer(self.manifest["model"])
        except BadInput:
            return None

    def __len__(self) -> int:
        """Return the number of stories."""
        return len(self.first_rows)

    def read(self, items: Sequence[int]) -> Sequence[StoredStory]:
        """Find stories."""
        return [
            StoredStory(
                np.asarray(self.token_ids[self.starts[i] : self.starts[i + 1]]),
                0,
                self.exclude_first_tokens,
                row=int(self.first_rows[i]),
            )
            for i in items
        ]

    def activations(self, items: Sequence[StoredStory]) -> Iterator[tuple[int, np.ndarray]]:
        """Copy the stories' rows."""
        for i, story in enumerate(items):
            yield i, self.rows.rows.read(story.row, story.row + len(story))

    def count_tokens(self) -> tuple[int, bool]:
        """The tokens that are used, which is exact."""
        return int(self.starts[-1] - self.starts[0]) - len(self) * self.exclude_first_tokens, True

    def digests(self) -> dict[str, str]:
        """Of all rows."""
        return self.rows.digests()


def stored_stories(directory: Path, rows: RowSource) -> StoredStories:
    """The stories of a store whose rows are among those of a source.

    Raises:
        BadInput: if the store kept no token ids, they are not what its manifest says, or no whole story is there.
    """
    manifest = read_manifest(directory)
    if lacking := [shard for shard in manifest["shards"] if "tokens" not in shard]:
        written = "it was written" if len(lacking) == len(manifest["shards"]) else "part of it was written"
        raise BadInput(
            f"{directory} is a store without token ids ({written} by an earlier version or by another program), so "
            "there is no text to show; write it again by jax-sae harvest, and train on that"
        )
    exclude = manifest.get("exclude_first_tokens", 0)
    parts = [_tokens(directory, shard, exclude) for shard in manifest["shards"]]
    token_ids, position = np.concatenate(parts).T
    starts = np.append(np.flatnonzero(position == 0), len(position))
    ends = np.cumsum(np.diff(starts) - exclude)
    first_rows = ends - (np.diff(starts) - exclude)
    inside = np.flatnonzero((first_rows >= rows.first) & (ends <= rows.last))
    if not len(inside):
        raise BadInput(f"{rows.name} hold no whole story; read more of them, such as those that were trained on")
    its_starts = starts[inside[0] : inside[-1] + 2]
    return StoredStories(rows, np.ascontiguousarray(token_ids), its_starts, first_rows[inside], exclude, manifest)


def _tokens(directory: Path, shard: dict[str, Any], exclude: int) -> np.ndarray:
    """[tokens, 2] int32 of a shard: token ids, and their positions in their stories."""
    path = directory / shard["tokens"]["file"]
    try:
        if sha256(path) != shard["tokens"]["sha256"]:
            raise BadInput(f"{path} is not what the store's manifest says, by its sha256; write the store again")
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}); write the store again") from error
    fits = found.dtype == np.int32 and found.ndim == 2 and found.shape[1] == 2 and len(found) and found[0, 1] == 0
    if not fits or int((found[:, 1] >= exclude).sum()) != shard["rows"]:
        raise BadInput(f"{path} has other tokens than the store has rows; write the store again")
    return found
