"""Text -> token ids, one story at a time.

Rows stay in the files of the `datasets` library, mapped into memory: only the rows asked for are read and tokenised.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import (
    NoAnswer,
    ask_hub,
    cannot_load,
    find_local,
    find_tokenizer_files,
    has_tokenizer,
    hub_switched_off,
    one_line,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ROWS_HASHED_AT_A_TIME = 100_000

STORIES_TO_COUNT = 256
"""Stories whose tokens are counted, to estimate those of all."""

FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


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


def open_split(path: str, split: str, column: str) -> "Dataset":
    """The rows of one split, mapped into memory.

    Args:
        path: a folder of parquet, JSON, CSV or text files, one such file (which is the split 'train'), or the name of a
            dataset on the Hugging Face hub. In a text file each line is a story.
        split: such as 'train'.
        column: the one that holds the text; a text file's is 'text'.

    Raises:
        BadInput: if there is no such dataset, split or column.
    """
    return choose_split(open_dataset(path), path, split, column)


def choose_split(splits: "DatasetDict", path: str, split: str, column: str) -> "Dataset":
    """The rows of one split of a dataset that is open already; `path` names it in errors, which are `open_split`'s."""
    if split not in splits:
        raise BadInput(f"{path}: no split {split!r}; there are {', '.join(map(repr, splits))}: name one of them")
    rows = splits[split]
    if column not in rows.column_names:
        there = ", ".join(map(repr, rows.column_names))
        raise BadInput(f"{path}: no column {column!r} in the split {split!r}; there are {there}: name one of them")
    return rows


def open_dataset(path: str) -> "DatasetDict":
    """All splits of a dataset, by name; `path` and errors as for `open_split`."""
    import datasets

    source, files, hub_is_silent = path, None, ""
    if (local := find_local(path)) is None:
        try:
            ask_hub(path, "dataset")
        except NoAnswer as reason:
            hub_is_silent = str(reason)
    elif local.is_dir():
        source = str(local.resolve())
    elif local.suffix not in FILE_KINDS:
        raise BadInput(f"{local}: neither a folder nor a file that ends in {', '.join(FILE_KINDS)}")
    elif not local.stat().st_size:
        raise BadInput(f"{local} is empty; stories were expected, one a row")
    else:
        source, files = FILE_KINDS[local.suffix], str(local.resolve())
    try:
        with _files_on_this_machine() if local or hub_is_silent else nullcontext():
            return datasets.load_dataset(source, data_files=files)
    except Exception as error:  # there are many, for each file format and each trouble
        if hub_is_silent:
            raise cannot_load(path, "dataset", hub_is_silent) from error
        raise BadInput(f"{path}: cannot be loaded as a dataset ({one_line(error.__cause__ or error)})") from error


@contextmanager
def _files_on_this_machine() -> Iterator[None]:
    """Within it, `datasets` asks no hub, logs no error that it then raises, and shows no progress.

    Only a download is slow enough for that.
    """
    import datasets

    were_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with hub_switched_off():
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not were_off:
            datasets.enable_progress_bars()


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
    """The stories in one column of a dataset.

    A story longer than `max_tokens` is cut off there. `vocab_size` is the language model's. Of each story, the first
    `exclude_first_tokens` tokens are read by the language model but not used; a shorter one has length 0.

    Raises:
        BadInput: if `exclude_first_tokens` is negative, or leaves nothing of any story.
    """

    rows: "Dataset"
    column: str
    tokenizer: Any
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
            BadInput: if the column does not hold text, or the tokenizer is not the model's.
        """
        texts = self.rows[self.column][[int(i) for i in indices]]
        for i, text in zip(indices, texts, strict=True):
            if not isinstance(text, str | None):
                raise BadInput(
                    f"column {self.column!r}, row {i}: a {type(text).__name__}; text was expected: name a column with "
                    "stories as text, not as token ids"
                )
        stories = []
        for ids in tokenize(self.tokenizer, [text if text and not text.isspace() else "" for text in texts]):
            if max(ids, default=0) >= self.vocab_size:
                raise BadInput(
                    f"the tokenizer gives id {max(ids)}, the model's vocabulary has {self.vocab_size}: they do not "
                    "belong together; name the model's own tokenizer"
                )
            kept = np.asarray(ids[: self.max_tokens], np.int32)
            stories.append(Story(kept, len(ids) - len(kept), min(self.exclude_first_tokens, len(kept))))
        return stories


def text_digest(rows: "Dataset", column: str) -> str:
    """The sha256, in hexadecimal, of all texts of a column: of the sha256s of their lengths and of their UTF-8 bytes.

    It does not depend on files, formats or chunks; null counts as "". Arrow's buffers are hashed where they lie, at
    about 2 GB a second.

    Raises:
        BadInput: if the column does not hold text.
    """
    import pyarrow as pa

    lengths, content = hashlib.sha256(), hashlib.sha256()
    offset_types = {pa.string(): np.int32, pa.large_string(): np.int64}
    for table in rows.select_columns([column]).with_format("arrow").iter(ROWS_HASHED_AT_A_TIME):
        for chunk in table.column(column).chunks:
            if chunk.type not in offset_types:
                raise BadInput(f"column {column!r} is of the type {chunk.type}; text was expected")
            texts = chunk.fill_null("") if chunk.null_count else chunk
            _, places, data = texts.buffers()
            offsets = np.frombuffer(places, offset_types[chunk.type])[texts.offset : texts.offset + len(texts) + 1]
            lengths.update(np.diff(offsets).astype("<i8").data)
            content.update(memoryview(data or b"")[offsets[0] : offsets[-1]])
    return hashlib.sha256(lengths.digest() + content.digest()).hexdigest()
