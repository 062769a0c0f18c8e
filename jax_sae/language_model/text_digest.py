"""What is read of a text, known by its sha256: of all of a column, or of what was read of it so far."""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.text import holds_messages, holds_token_ids, mask_column

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROWS_HASHED_AT_A_TIME = 100_000


def text_digest(rows: "Dataset", column: str) -> str:
    """The sha256, in hexadecimal, of all texts of a column; errors as for `TextDigest.add`."""
    digest = TextDigest(column)
    digest.add(rows)
    return digest.hexdigest()


class TextDigest:
    """The sha256 of the texts of a column, which are added piece by piece; it depends on them alone.

    It is that of the sha256s of their lengths and of their UTF-8 bytes, whatever the files, formats, chunks and pieces;
    null counts as "". Arrow's buffers are hashed where they lie, at about 2 GB a second. Of token ids, it is that of
    their numbers and of the ids without padding; of messages, that of their JSON.
    """

    def __init__(self, column: str) -> None:
        """Of no texts yet."""
        self._column, self._is_of_ids = column, False
        self._lengths, self._content = hashlib.sha256(), hashlib.sha256()

    def hexdigest(self) -> str:
        """In hexadecimal."""
        return hashlib.sha256(self._lengths.digest() + self._content.digest()).hexdigest()

    def add(self, rows: "Dataset") -> None:
        """Add texts.

        Raises:
            BadInput: if the column holds neither text nor messages nor token ids.
        """
        import pyarrow as pa

        if holds_token_ids(rows, self._column):
            if not self._is_of_ids:
                self._lengths.update(b"token ids")
                self._is_of_ids = True
            for counts, ids in _token_id_chunks(rows, self._column):
                self._lengths.update(counts.astype("<i8").data)
                self._content.update(ids.astype("<i8").data)
            return
        of_messages = holds_messages(rows, self._column)
        for table in rows.select_columns([self._column]).with_format("arrow").iter(ROWS_HASHED_AT_A_TIME):
            column = table.column(self._column)
            if of_messages:
                column = pa.chunked_array(
                    [[json.dumps(messages) for messages in column.to_pylist()]], pa.large_string()
                )
            for chunk in column.chunks:
                self._add_texts(chunk)

    def _add_texts(self, chunk: "pa.Array") -> None:
        import pyarrow as pa

        offset_types = {pa.string(): np.int32, pa.large_string(): np.int64}
        kind = chunk.type.value_type if pa.types.is_dictionary(chunk.type) else chunk.type
        if pa.types.is_string_view(kind) or (kind != chunk.type and kind in offset_types):
            chunk = chunk.cast(pa.large_string())
        if chunk.type not in offset_types:
            raise BadInput(f"column {self._column!r} is of the type {chunk.type}; text was expected")
        texts = chunk.fill_null("") if chunk.null_count else chunk
        _, places, data = texts.buffers()
        offsets = np.frombuffer(places, offset_types[chunk.type])[texts.offset : texts.offset + len(texts) + 1]
        self._lengths.update(np.diff(offsets).astype("<i8").data)
        self._content.update(memoryview(data or b"")[offsets[0] : offsets[-1]])


def _token_id_chunks(rows: "Dataset", column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of token ids of rows [n], and those ids one after another, without padding."""
    import pyarrow as pa

    mask = mask_column(rows, column)
    columns = [column, mask] if mask else [column]
    for table in rows.select_columns(columns).with_format("arrow").iter(ROWS_HASHED_AT_A_TIME):
        flat = []
        for name in columns:
            lists = table.column(name).cast(pa.large_list(pa.int64())).combine_chunks()
            lengths = np.asarray(lists.value_lengths().fill_null(0))
            values = lists.flatten()
            if values.null_count:
                raise BadInput(f"column {name!r}: a list has an entry that is null; whole numbers were expected")
            flat.append((lengths, np.asarray(values)))
        lengths, ids = flat[0]
        if mask:
            if not np.array_equal(lengths, flat[1][0]):
                raise BadInput(f"columns {column!r} and {mask!r}: a row has more of one than of the other")
            kept = flat[1][1] == 1
            ends = np.cumsum(lengths)
            lengths = np.diff(np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], ends])])
            ids = ids[kept]
        yield lengths, ids
