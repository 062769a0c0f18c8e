"""A text that is read while it is trained on: shards, pieces of their rows, and buffers of those.

    shards in any order ─► pieces of 64 rows ─► a buffer of about a thousand rows, which may begin in one and end in
                                                another shard

A shard is a file. Where a buffer begins is a shard and a row, so reading goes on from there without the shards before
it; the rows before it in its own shard are read again.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jax_sae.errors import BadInput, SourceLost
from jax_sae.language_model.dataset import addresses, is_address, open_address, open_streams, with_column
from jax_sae.language_model.hub import one_line
from jax_sae.language_model.text import mask_column
from jax_sae.language_model.text_digest import TextDigest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

PIECE_ROWS = 64
"""Rows that are read at a time."""

BUFFER_ROWS, BUFFER_BYTES = 1024, 16 << 20
"""A buffer is full once it has so many rows or so many bytes."""

SECONDS_TO_WAIT = (1.0, 2.0, 4.0, 8.0)
"""Before a shard that could not be read is tried again, each time."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Adjacent rows of shards in some order."""

    begin: tuple[int, int]
    """Where it begins: place of a shard in the order, and rows of that shard before it."""
    end: tuple[int, int]
    """Where the next one begins; behind the last shard, row 0, if it is the last."""
    rows: "Dataset"
    before: str
    """Sha256 of the rows of its first shard that stand before it; empty if there are none."""
    digest: str
    """Sha256 of all shards that it is of, each up to the buffer's end."""
    at_end: str
    """What the next one has as `before`."""
    through: Mapping[str, str]
    """Sha256 of each shard that ended in it, by its name."""


@dataclass(frozen=True, eq=False)
class Shards:
    """One split of a text."""

    path: str
    """Of the text, for messages."""
    split: str
    names: tuple[str, ...]
    column: str
    is_remote: bool
    open_shard: Callable[[int], "IterableDataset"]
    first: tuple[int, int] = (0, 0)
    """The shard and the row at which it begins: what stands before it is held out."""

    def order(self, order: Sequence[int]) -> list[int]:
        """The same order of shards without those that are held out as a whole."""
        return [int(shard) for shard in order if shard >= self.first[0]]

    def buffers(self, order: Sequence[int], place: int = 0, row: int = 0) -> Iterator[Buffer]:
        """The buffers of shards in an order, from a place in it and a row of that shard on, at which a buffer begins.

        Raises:
            BadInput: if a shard has no such column, is damaged, or has fewer rows than were read before.
            SourceLost: if a shard cannot be reached.
        """
        pieces: list[Dataset] = []
        touched: dict[int, TextDigest] = {}
        through: dict[str, str] = {}
        begin, before = (place, row), ""
        for p in range(place, len(order)):
            digest, read = TextDigest(self.column), 0
            unread = self.first[1] if order[p] == self.first[0] else 0
            if p == place:
                unread = max(unread, row)
            for piece in self.pieces(order[p]):
                if read >= unread:
                    so_far = digest.hexdigest() if read else ""
                    if _is_full(pieces):
                        yield _buffer(begin, (p, read), pieces, before, touched, so_far, through)
                        pieces, touched, through, begin = [], {}, {}, (p, read)
                    if not pieces:
                        before = so_far
                    pieces.append(piece)
                digest.add(piece)
                read += len(piece)
                touched[p] = digest
            if read < row and p == place:
                raise BadInput(
                    f"{self.names[order[p]]} of {self.path} has {read:,} rows, but {row:,} were read of it before: it "
                    "was changed; put back what was there, or start a new run"
                )
            through[self.names[order[p]]] = digest.hexdigest()
        if pieces:
            yield _buffer(begin, (len(order), 0), pieces, before, touched, "", through)

    def pieces(self, shard: int) -> Iterator["Dataset"]:
        """All rows of a shard, some at a time. What cannot be reached is tried again, from the row that was reached.

        Raises:
            BadInput: if it has no such column, or is damaged.
            SourceLost: if it cannot be reached any more.
        """
        read = failures = 0
        while True:
            try:
                for number, piece in enumerate(self._pieces_at_once(shard)):
                    if number == read:
                        yield piece
                        read, failures = read + 1, 0
                if self.is_remote and not read:  # `datasets` takes a file that it cannot reach for an empty folder
                    raise ConnectionError("nothing came")
                return
            except BadInput:
                raise
            except Exception as error:  # of many libraries; what a broken connection ends in depends on the format
                name = self.names[shard]
                if not self.is_remote and not isinstance(error, OSError):
                    raise BadInput(f"{name} of {self.path}: cannot be read ({one_line(error)})") from error
                if failures == len(SECONDS_TO_WAIT):
                    raise SourceLost(
                        f"{name} of {self.path} could not be read, tried {failures + 1} times ({one_line(error)})"
                    ) from error
                time.sleep(SECONDS_TO_WAIT[failures])
                failures += 1

    def _pieces_at_once(self, shard: int) -> Iterator["Dataset"]:
        """The same without a second try."""
        import datasets

        with _without_own_retries():
            tables = iter(self.open_shard(shard).with_format("arrow").iter(PIECE_ROWS))
        while True:  # not a `for` loop: the context is for `datasets` alone
            with _without_own_retries():
                table = next(tables, None)
            if table is None:
                return
            rows = datasets.Dataset(datasets.table.InMemoryTable(table.replace_schema_metadata(None)), fingerprint="")
            rows = with_column(rows, self.column, f"{self.path}: no column {self.column!r} in {self.names[shard]}")
            mask = mask_column(rows, self.column)
            kept = rows.data.table.select([self.column, mask] if mask else [self.column])
            yield datasets.Dataset(datasets.table.InMemoryTable(kept), fingerprint="")


def open_shards(path: str, column: str, config: str = "") -> dict[str, Shards]:
    """The splits of a text in shards, by their names; nothing but names, and the beginning of a file, is read.

    Args:
        path: as for `open_split`; or the address of a file, with `{00..15}` or `{a,b}` in it that of several, which are
            the split 'train'.
        column: as for `open_split`.
        config: as for `open_split`.

    Raises:
        BadInput: if there is no such text or configuration.
    """
    if is_address(path):
        if config:
            raise BadInput(f"{path}: text.config is {config!r}, but an address has no configurations; leave it out")
        files = addresses(path)
        return {"train": Shards(path, "train", shard_names(files), column, True, lambda i: open_address(files[i]))}

    def shards(split: str, stream: "IterableDataset") -> Shards:
        n = stream.num_shards
        files = files_of(stream)
        is_remote = any(map(is_address, files))
        return Shards(path, split, shard_names(files), column, is_remote, lambda i: stream.shard(n, i))

    return {str(split): shards(str(split), stream) for split, stream in open_streams(path, config).items()}


def choose_shards(splits: Mapping[str, Shards], path: str, split: str) -> Shards:
    """The shards of one split; BadInput if there is no such split."""
    if split not in splits:
        raise BadInput(f"{path}: no split {split!r}; there are {', '.join(map(repr, splits))}: name one of them")
    return splits[split]


def first_buffer(shards: Shards) -> Buffer:
    """The first rows of a split, in their own order.

    Raises:
        BadInput: if there are none; and as `Shards.buffers`.
    """
    found = next(shards.buffers(range(len(shards.names))), None)
    if found is None:
        raise BadInput(f"{shards.path}: the split {shards.split!r} has no rows; stories were expected, one a row")
    return found


def files_of(stream: "IterableDataset") -> list[str]:
    """The files of a streamed split, one a shard; their numbers, where `datasets` does not say what they are."""
    given: Mapping[str, Any] = getattr(stream._ex_iterable, "kwargs", {})
    for name in ("original_files", "base_files", "files"):
        files = list(given.get(name, ()))
        if len(files) == stream.num_shards and all(isinstance(file, str) for file in files):
            return files
    return [f"shard {i}" for i in range(stream.num_shards)]


def shard_names(files: Sequence[str]) -> tuple[str, ...]:
    """What shards are called: their files, without what all of these have in common, and without signatures."""
    paths = [urlsplit(file).path if is_address(file) else file for file in files]
    common = len(os.path.commonpath([os.path.dirname(path) for path in paths]))
    return tuple(path[common:].lstrip("/") if os.path.dirname(path) else path for path in paths)


def _is_full(pieces: Sequence["Dataset"]) -> bool:
    rows, n_bytes = sum(map(len, pieces)), sum(piece.data.nbytes for piece in pieces)
    return rows >= BUFFER_ROWS or n_bytes >= BUFFER_BYTES


def _buffer(
    begin: tuple[int, int],
    end: tuple[int, int],
    pieces: Sequence["Dataset"],
    before: str,
    touched: Mapping[int, TextDigest],
    at_end: str,
    through: Mapping[str, str],
) -> Buffer:
    import datasets
    import pyarrow as pa

    table = pa.concat_tables([piece.data.table for piece in pieces], promote_options="permissive")
    rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="")
    digest = hashlib.sha256("".join(each.hexdigest() for each in touched.values()).encode()).hexdigest()
    return Buffer(begin, end, rows, before, digest, at_end, through)


@contextmanager
def _without_own_retries() -> Iterator[None]:
    """Within it, `datasets` does not try again what fails, which would take minutes without a word."""
    import datasets
    from datasets import config

    names = ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES")
    before = {name: getattr(config, name) for name in names}
    intervals = {name: getattr(config, name) for name in vars(config) if re.match("STREAMING_.*_INTERVAL", name)}
    verbosity = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        for name, value in {**dict.fromkeys(before, 1), **dict.fromkeys(intervals, 0)}.items():
            setattr(config, name, value)
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        for name, value in {**before, **intervals}.items():
            setattr(config, name, value)
