"""The token ids of documents -> stories: what the language model reads at once.

whole     a document is a story; what the model has no positions for is cut off, and counted
windows   a document is cut into stories of a number of tokens, the last one shorter; nothing is thrown away
packed    the same, and as many adjacent ones as fit share a story, in which each attends to itself alone
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_sae.errors import BadInput


@dataclass(frozen=True, eq=False)
class Story:
    """Token ids [T] int32, all of which the language model reads."""

    token_ids: np.ndarray
    tokens_cut: int
    """How many more tokens the text had than were kept."""
    tokens_excluded: int = 0
    """How many of the T, at the start, are read but not used; where several share the story, at each one's start."""
    segments: np.ndarray | None = None
    """[T] int32, where several share the story: equal numbers see each other, and positions begin anew with each."""
    kept: np.ndarray | None = None
    """[T] bool, where several share the story: which of the T are used."""

    @property
    def used(self) -> slice | np.ndarray:
        """Which of the T are used: an index of their activations [T, D]."""
        return slice(self.tokens_excluded, None) if self.kept is None else self.kept

    def __len__(self) -> int:
        """Return the number of tokens whose activations are used."""
        return len(self.token_ids) - self.tokens_excluded


@dataclass(frozen=True)
class Windows:
    """How documents become stories."""

    length: int
    """Tokens of a story at most."""
    exclude_first_tokens: int = 0
    """How many are not used at the start of each story, or of each part of one that is shared."""
    cut: bool = False
    """Whether what is longer begins another story; else it is cut off."""
    pack: bool = False
    bos: int | None = None
    """The token with which each story begins, and each part of one that is shared."""
    eos: int | None = None
    """The token that follows a document."""

    def __post_init__(self) -> None:
        """Raise BadInput if nothing could be left of any story."""
        k = self.exclude_first_tokens
        if k < 0:
            raise BadInput(f"the number of first tokens to exclude is {k}; 0 or more was expected")
        if k >= self.length:
            raise BadInput(
                f"the number of first tokens to exclude is {k}, but a story has at most {self.length} tokens: "
                "nothing would be left of any; exclude fewer"
            )
        if self.bos is not None and self.length < 2:
            raise BadInput("text.window is 1, which the BOS token alone would fill; give 2 or more")

    def stories(self, document: Sequence[int], offset: int = 0) -> Iterator[tuple[Story, int]]:
        """The stories of a document from its token `offset` on; one without tokens is a story of none.

        Args:
            document: its token ids; a BOS token at its start, and an EOS token at its end, are not put there again.
            offset: how many tokens of it, without BOS, stories before these have used.

        Yields:
            (story, the offset from which on the next one is; 0 after the last one)
        """
        start = [] if self.bos is None else [self.bos]
        tokens = list(document)
        if start and tokens[:1] == start:
            tokens = tokens[1:]
        if self.eos is not None and tokens and tokens[-1] != self.eos:
            tokens.append(self.eos)
        if not tokens:
            yield Story(np.zeros(0, np.int32), 0), 0
            return
        room = self.length - len(start)
        while offset < len(tokens):
            token_ids = np.asarray(start + tokens[offset : offset + room], np.int32)
            offset = min(offset + room, len(tokens))
            lost = 0 if self.cut else len(tokens) - offset
            excluded = min(self.exclude_first_tokens, len(token_ids))
            is_last = lost > 0 or offset == len(tokens)
            yield Story(token_ids, lost, excluded), 0 if is_last else offset
            if is_last:
                return

    def items(
        self, documents: Iterable[Sequence[int]], offset: int = 0
    ) -> Iterator[tuple[Story, list[Story], int, int]]:
        """The stories of documents, packed if they are to be, from the token `offset` of the first document on.

        Yields:
            (story, stories without used tokens that stand between it and the next one, and are passed over;
            how many documents are used up after it; the offset in the document that follows)
        """
        shared: list[Story] = []
        passed: list[Story] = []
        n = -1
        for n, document in enumerate(documents):
            at = 0 if n else offset
            for story, following in self.stories(document, at):
                if shared and len(story):
                    if sum(len(each.token_ids) for each in (*shared, story)) > self.length:
                        yield packed(shared), passed, n, at
                        shared, passed = [], []
                    shared.append(story)
                elif shared:
                    passed.append(story)
                elif self.pack and len(story):
                    shared.append(story)
                else:
                    yield story, [], n if following else n + 1, following
                at = following
        if shared:
            yield packed(shared), passed, n + 1, 0


def packed(parts: Sequence[Story]) -> Story:
    """Stories side by side in one."""
    lengths = [len(part.token_ids) for part in parts]
    kept = np.concatenate([np.arange(n) >= part.tokens_excluded for n, part in zip(lengths, parts, strict=True)])
    return Story(
        np.concatenate([part.token_ids for part in parts]),
        sum(part.tokens_cut for part in parts),
        sum(part.tokens_excluded for part in parts),
        np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        kept,
    )
