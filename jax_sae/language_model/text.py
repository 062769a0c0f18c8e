"""Rows of text, of messages, or of token ids -> the token ids of their stories.

Rows stay in the files of the `datasets` library, mapped into memory: only the rows asked for are read and tokenised.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_sae.config import PrependBos
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import find_tokenizer_files, has_tokenizer, hub_switched_off, one_line
from jax_sae.language_model.windows import Story, Windows

if TYPE_CHECKING:
    from datasets import Dataset

STORIES_TO_COUNT = 256
"""Stories whose tokens are counted, to estimate those of all."""


def quiet_transformers() -> None:
    """Keep transformers from saying, when it is imported, that it misses PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


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
    quiet_transformers()
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
class Stories:
    """The stories in one column of a dataset: text, messages of a chat, or lists of token ids, used as they are.

    Beside a column `input_ids`, a column `attention_mask` says by 0 which ids are padding; they are left out. A story
    longer than `max_tokens` is cut off there, unless rows are cut into windows. `vocab_size` is the language model's.
    Of each story, the first `exclude_first_tokens` tokens are read by the language model but not used; a shorter one
    has length 0.

    Raises:
        BadInput: if `exclude_first_tokens` is negative, or leaves nothing of any story, or a window is longer than
            `max_tokens`.
    """

    rows: "Dataset"
    column: str
    tokenizer: Any
    """Not used for token ids."""
    max_tokens: int
    vocab_size: int
    exclude_first_tokens: int = 0
    window: int = 0
    """Tokens of the windows that rows are cut into, each a story of its own; 0: a row is a story."""
    pack: bool = False
    """Whether windows are shared, where `windows` makes stories of documents; `read` makes none that are."""
    bos: int | None = None
    """The token that each story begins with."""
    eos: int | None = None
    """The token that follows each row."""

    def __post_init__(self) -> None:
        """Check the window and the number of tokens that are excluded."""
        if self.window < 0:
            raise BadInput(f"text.window is {self.window}; 0 or more was expected")
        if self.window > self.max_tokens:
            raise BadInput(
                f"text.window is {self.window:,}, but the language model has {self.max_tokens:,} positions; give at "
                "most that"
            )
        _ = self.windows

    @property
    def windows(self) -> Windows:
        """How rows become stories."""
        k, length = self.exclude_first_tokens, self.window or self.max_tokens
        return Windows(length, k, self.window > 0, self.pack, self.bos, self.eos)

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
        """The stories in these rows, in this order: one a row, or its windows. One without text has no tokens.

        Raises:
            BadInput: as for `token_ids`.
        """
        return [story for ids in self.token_ids(indices) for story, _ in self.windows.stories(ids)]

    def token_ids(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """The token ids of these rows, in this order, whole; none where there is no text, or only white space.

        Raises:
            BadInput: if the column holds neither text nor messages nor token ids, an id is not one of the model's, the
                tokenizer is not the model's, or its chat template does not take the messages.
        """
        places = [int(i) for i in indices]
        return self._given(places) if holds_token_ids(self.rows, self.column) else self._tokenized(places)

    def _tokenized(self, places: list[int]) -> list[list[int]]:
        texts = self.rows[self.column][places]
        if holds_messages(self.rows, self.column):
            texts = [self._rendered(i, messages) for i, messages in zip(places, texts, strict=True)]
        for i, text in zip(places, texts, strict=True):
            if not isinstance(text, str | None):
                raise BadInput(
                    f"column {self.column!r}, row {i}: a {type(text).__name__}; text was expected: name a column with "
                    "stories as text, as lists of token ids, or as lists of messages"
                )
        token_ids = tokenize(self.tokenizer, [text if text and not text.isspace() else "" for text in texts])
        for ids in token_ids:
            if max(ids, default=0) >= self.vocab_size:
                raise BadInput(
                    f"the tokenizer gives id {max(ids)}, the model's vocabulary has {self.vocab_size}: they do not "
                    "belong together; name the model's own tokenizer"
                )
        return token_ids

    def _rendered(self, row: int, messages: Any) -> str:
        """A chat as the text that the tokenizer's template makes of it."""
        if not messages:
            return ""
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if not all({"role", "content"} <= message.keys() for message in said):
            raise BadInput(
                f"column {self.column!r}, row {row}: a message with {', '.join(map(repr, said[0])) or 'nothing'}; "
                "'role' and 'content' were expected in each"
            )
        try:
            return self.tokenizer.apply_chat_template(said, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise BadInput(
                f"column {self.column!r}, row {row}: the tokenizer's chat template does not take these messages "
                f"({one_line(error)})"
            ) from error

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


def holds_messages(rows: "Dataset", column: str) -> bool:
    """Whether a column holds lists of messages, each with named entries."""
    import pyarrow as pa

    kind = rows.data.schema.field(column).type
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)


def mask_column(rows: "Dataset", column: str) -> str | None:
    """The column that says which ids of `input_ids` are tokens, if there is one."""
    outer, _, name = column.rpartition("input_ids")
    mask = f"{outer}attention_mask"
    return mask if not name and column.endswith("input_ids") and mask in rows.column_names else None


def tokenizer_of(rows: "Dataset", column: str, given: str, own: Callable[[], Any]) -> Any:
    """The tokenizer for a column: the one that is given by name or directory, else the model's own; None for token ids.

    Raises:
        BadInput: if there is no such tokenizer, it has no chat template for a column of messages, or one is given for
            token ids, which need none.
    """
    if not holds_token_ids(rows, column):
        tokenizer = load_tokenizer(given) if given else own()
        if holds_messages(rows, column) and not tokenizer.chat_template:
            raise BadInput(
                f"the column {column!r} holds messages, but the tokenizer has no chat template; name the tokenizer of "
                "a chat model by text.tokenizer, or a column of text"
            )
        return tokenizer
    if given:
        raise BadInput(
            f"the tokenizer {given!r} is given, but the column {column!r} holds token ids, which are used as they are; "
            "leave the tokenizer out, or name a column of text"
        )
    return None


def stories_of(
    rows: "Dataset",
    column: str,
    tokenizer: Any,
    max_tokens: int,
    vocab_size: int,
    exclude_first_tokens: int | None = None,
    window: int = 0,
    pack: bool = False,
    prepend_bos: PrependBos = "auto",
) -> Stories:
    """The stories of rows, as the settings of a run or a command say; see `Stories`.

    Where stories begin with BOS, one first token is left out, unless another number is said. Where they do not, and
    share windows, the tokenizer's EOS token follows each row.

    Raises:
        BadInput: as `Stories`, and as `beginning`.
    """
    bos = beginning(tokenizer, prepend_bos)
    exclude = int(bos is not None) if exclude_first_tokens is None else exclude_first_tokens
    eos = tokenizer.eos_token_id if pack and tokenizer is not None and bos is None else None
    return Stories(rows, column, tokenizer, max_tokens, vocab_size, exclude, window, pack, bos, eos)


def beginning(tokenizer: Any, prepend: PrependBos) -> int | None:
    """The token id that stories begin with: the tokenizer's BOS token, with 'auto' if it adds one to texts itself.

    Args:
        tokenizer: None for token ids, which begin as they are.
        prepend: the setting `text.prepend_bos`.

    Raises:
        BadInput: if there is to be one, but the tokenizer has none, or there is no tokenizer.
    """
    bos: int | None = None if tokenizer is None else tokenizer.bos_token_id
    if prepend == "on" and bos is None:
        found = "the tokenizer has no BOS token" if tokenizer else "the column holds token ids, used as they are"
        raise BadInput(f"text.prepend_bos is 'on', but {found}; leave it out")
    if prepend == "off" or bos is None:
        return None
    return bos if prepend == "on" or tokenizer("a")["input_ids"][:1] == [bos] else None
