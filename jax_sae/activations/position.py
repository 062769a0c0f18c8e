"""Where a run stands in its data: all that a checkpoint keeps of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Position:
    """A place in the data: the start of a block, and how much of the block is used.

    `item` to `shards` say where the block's first item is; which of them a source uses, it knows (`in_order`).
    """

    block: int = 0
    epoch: int = 0
    item: int = 0
    """Place in the epoch's order of items or, where an item is a part of a document, of documents; of a stream, in the
    order of its buffer."""
    token: int = 0
    """Tokens of that item that earlier blocks have used."""
    batch: int = 0
    """Batches of the block that are used."""
    empty_stories: int = 0
    """Stories without tokens that are used, skipped so far; like the next three counted in the first epoch only."""
    cut_stories: int = 0
    """Stories longer than the language model's positions, cut there."""
    tokens_cut: int = 0
    tokens_excluded: int = 0
    """Tokens at the start of stories that are not used (`exclude_first_tokens`)."""
    offset: int = 0
    """Tokens of that document that earlier items have used."""
    shard: int = 0
    """Of a stream: place in the epoch's order of shards of the one in which the buffer begins."""
    row: int = 0
    """Rows of that shard before the buffer."""
    digest: str = ""
    """Sha256 of what was read of that shard up to the buffer's end, and of the shards after it that the buffer took
    from; empty before the first item of a buffer."""
    shards: Mapping[str, str] = field(default_factory=dict)
    """Sha256 of each shard that was read through, by its name."""

    @property
    def within_epoch(self) -> bool:
        """Whether earlier blocks have used items of this epoch."""
        return bool(self.item or self.offset or self.shard or self.row)

    def next_epoch(self) -> "Position":
        """The beginning of the epoch that follows."""
        return replace(self, epoch=self.epoch + 1, item=0, offset=0, shard=0, row=0, digest="")

    def after(self, item: Any, /, **place: Any) -> "Position":
        """The position once an item is used, which is counted; `place` says where the next one is."""
        first_time = self.epoch == 0
        return replace(
            self,
            token=0,
            empty_stories=self.empty_stories + (first_time and len(item) == 0),
            cut_stories=self.cut_stories + (first_time and item.tokens_cut > 0),
            tokens_cut=self.tokens_cut + first_time * item.tokens_cut,
            tokens_excluded=self.tokens_excluded + first_time * item.tokens_excluded,
            **place,
        )
