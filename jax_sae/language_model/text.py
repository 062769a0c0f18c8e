"""Rows of text, or of token ids -> the token ids of one story each.

Rows stay in the files of the `datasets` library, mapped into memory: only the rows asked for are read and tokenised.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import find_tokenizer_files, has_tokenizer, hub_switched_off, one_line

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_HASHED_AT_A_TIME = 100_000

STORIES_TO_COUNT = 256
"""Stories whose tokens are counted, to estimate those of all."""


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a directory, or of that name on the Hugging Face hub.

    Raises:
        BadInput: if there is none, or its files are damaged.
    """
    directory = find_tokenizer_files(name)
    if not has_tokenizer(directory):
        raise BadInput(
            f"{directory}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt. Copy one there, name "
            "another tokenizer, or give token ids in place of text"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it says on import that it misses PyTorch
    from transformers import AutoTokenizer

    try:
        with hub_switched_off():
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of the two libraries it is made of; one raises bare Exception
        raise BadInput(f"{directory}: its tokenizer cannot be loaded ({one_line(error)})") from error


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens; "" gives none. No limit on their number."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


@dataclass(frozen=True, eq=False)
class Story:
    """One row as token ids [T] int32, all of which the language model reads."""

    token_ids: np.ndarray
    tokens_cut: int
    """How many more tokens the text had than were kept."""
    tokens_excluded: int = 0
    """How many of the T, at the start, are read but not used."""

    def __len__(self) -> int:
        """Return the number of tokens whose activations are used."""
        return len(self.token_ids) - self.tokens_excluded


@dataclass(frozen=True, eq=False)
class Stories:
    """The stories in one column of a dataset: text, or lists of token ids, which are used as they are.

    Beside a column `input_ids`, a column `attention_mask` says by 0 which ids are padding; they are left out. A story
    longer than `max_tokens` is cut off there. `vocab_size` is the language model's. Of each story, the first
    `exclude_first_tokens` tokens are read by the language model but not used; a shorter one has length 0.

    Raises:
        BadInput: if `exclude_first_tokens` is negative, or leaves nothing of any story.
    """

    rows: "Dataset"
    column: str
    tokenizer: Any
    """Not used for token ids."""
    max_tokens: int
    vocab_size: int
    exclude_first_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the number of tokens that are excluded."""
        k = self.exclude_first_tokens
        if k < 0:
            raise BadInput(f"the number of first tokens to exclude is {k}; 0 or more was expected")
        if k >= self.max_tokens:
            raise BadInput(
                f"the number of first tokens to exclude is {k}, but a story has at most {self.max_tokens} tokens: "
                "nothing would be left of any; exclude fewer"
            )

    def __len__(self) -> int:
        """The number of rows, those without text included."""
        return len(self.rows)

    def count_tokens(self, first: int, last: int) -> tuple[int, bool]:
        """The tokens of rows `first` to `last` that are used, and whether that number is exact.

        Tokenises 256 of them, evenly spread; exact if there are no more. Errors as for `read`.
        """
        n, some = last - first, min(last - first, STORIES_TO_COUNT)
        tokens = sum(len(story) for story in self.read([first + i * n // some for i in range(some)]))
        return (tokens, True) if n == some else (round(tokens * n / some), False)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Story]:
        """The stories in these rows, in this order; where there is no text (or only white space), of no tokens.

        Raises:
            BadInput: if the column holds neither text nor token ids, an id is not one of the model's, or the tokenizer
                is not the model's.
        """
        places = [int(i) for i in indices]
        token_ids = self._given(places) if holds_token_ids(self.rows, self.column) else self._tokenized(places)
        stories = []
        for ids in token_ids:
            kept = np.asarray(ids[: self.max_tokens], np.int32)
            stories.append(Story(kept, len(ids) - len(kept), min(self.exclude_first_tokens, len(kept))))
        return stories

    def _tokenized(self, places: list[int]) -> list[list[int]]:
        texts = self.rows[self.column][places]
        for i, text in zip(places, texts, strict=True):
            if not isinstance(text, str | None):
                raise BadInput(
                    f"column {self.column!r}, row {i}: a {type(text).__name__}; text was expected: name a column with "
                    "stories as text, or as lists of token ids"
                )
        token_ids = tokenize(self.tokenizer, [text if text and not text.isspace() else "" for text in texts])
        for ids in token_ids:
            if max(ids, default=0) >= self.vocab_size:
                raise BadInput(
                    f"the tokenizer gives id {max(ids)}, the model's vocabulary has {self.vocab_size}: they do not "
                    "belong together; name the model's own tokenizer"
                )
        return token_ids

    def _given(self, places: list[int]) -> list[list[int]]:
        rows = self.rows[places]
        mask = mask_column(self.rows, self.column)
        found = []
        for i, ids, keep in zip(places, rows[self.column], rows[mask] if mask else [None] * len(places), strict=True):
            ids = ids or []
            if keep is not None:
                if len(keep) != len(ids) or not set(keep) <= {0, 1}:
                    raise BadInput(
                        f"column {mask!r}, row {i}: {len(ids)} numbers, 0 or 1, were expected, one a token id"
                    )
                ids = [token_id for token_id, kept in zip(ids, keep, strict=True) if kept]
            wrong = next((x for x in ids if x is None or not 0 <= x < self.vocab_size), 0)
            if wrong is None or wrong:
                raise BadInput(
                    f"column {self.column!r}, row {i}: the token id {wrong}, but the model's vocabulary has the ids 0 "
                    f"to {self.vocab_size - 1}; give ids of the model's own tokenizer, without padding, or text"
                )
            found.append(ids)
        return found


def holds_token_ids(rows: "Dataset", column: str) -> bool:
    """Whether a column holds lists of whole numbers."""
    import pyarrow as pa

    kind = rows.data.schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def mask_column(rows: "Dataset", column: str) -> str | None:
    """The column that says which ids of `input_ids` are tokens, if there is one."""
    outer, _, name = column.rpartition("input_ids")
    mask = f"{outer}attention_mask"
    return mask if not name and column.endswith("input_ids") and mask in rows.column_names else None


def tokenizer_of(rows: "Dataset", column: str, given: str, own: Callable[[], Any]) -> Any:
    """The tokenizer for a column: the one that is given by name or directory, else the model's own; None for token ids.

    Raises:
        BadInput: if there is no such tokenizer, or one is given for token ids, which need none.
    """
    if not holds_token_ids(rows, column):
        return load_tokenizer(given) if given else own()
    if given:
        raise BadInput(
            f"the tokenizer {given!r} is given, but the column {column!r} holds token ids, which are used as they are; "
            "leave the tokenizer out, or name a column of text"
        )
    return None


def text_digest(rows: "Dataset", column: str) -> str:
    """The sha256, in hexadecimal, of all texts of a column: of the sha256s of their lengths and of their UTF-8 bytes.

    It does not depend on files, formats or chunks; null counts as "". Arrow's buffers are hashed where they lie, at
    about 2 GB a second. Of token ids, it is that of their numbers and of the ids without padding.

    Raises:
        BadInput: if the column holds neither text nor token ids.
    """
    import pyarrow as pa

    lengths, content = hashlib.sha256(), hashlib.sha256()
    if holds_token_ids(rows, column):
        lengths.update(b"token ids")
        for counts, ids in _token_id_chunks(rows, column):
            lengths.update(counts.astype("<i8").data)
            content.update(ids.astype("<i8").data)
        return hashlib.sha256(lengths.digest() + content.digest()).hexdigest()
    offset_types = {pa.string(): np.int32, pa.large_string(): np.int64}
    for table in rows.select_columns([column]).with_format("arrow").iter(ROWS_HASHED_AT_A_TIME):
        for chunk in table.column(column).chunks:
            kind = chunk.type.value_type if pa.types.is_dictionary(chunk.type) else chunk.type
            if pa.types.is_string_view(kind) or (kind != chunk.type and kind in offset_types):
                chunk = chunk.cast(pa.large_string())
            if chunk.type not in offset_types:
                raise BadInput(f"column {column!r} is of the type {chunk.type}; text was expected")
            texts = chunk.fill_null("") if chunk.null_count else chunk
            _, places, data = texts.buffers()
            offsets = np.frombuffer(places, offset_types[chunk.type])[texts.offset : texts.offset + len(texts) + 1]
            lengths.update(np.diff(offsets).astype("<i8").data)
            content.update(memoryview(data or b"")[offsets[0] : offsets[-1]])
    return hashlib.sha256(lengths.digest() + content.digest()).hexdigest()


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
