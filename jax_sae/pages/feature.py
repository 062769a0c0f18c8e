"""One feature of a member: where it is largest in a text, how often it fires, which tokens it makes likelier."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from jax_sae.card import card, shaded
from jax_sae.errors import BadInput
from jax_sae.pages.make import directions, lenses_of, word_of
from jax_sae.pages.reading import CONTEXT, WithText, values_in_texts, values_of
from jax_sae.trained import TrainedAutoencoder

BEFORE, AFTER = 16, 8
"""Tokens around the one on which a feature is largest, as far as they are shown."""


@dataclass(frozen=True, eq=False)
class Example:
    """A piece of a text, and the feature on each of its tokens."""

    tokens: tuple[str, ...]
    values: np.ndarray
    """[tokens] float32, in the feature's own scale; 0 where it does not fire."""

    @property
    def largest(self) -> int:
        """Which of the tokens has the largest value."""
        return int(self.values.argmax())


@dataclass(frozen=True, eq=False, repr=False)
class Feature:
    """What a feature is, as far as a text shows it; a notebook shows its examples, the tokens shaded by its values."""

    member: str
    index: int
    read: int
    """Tokens that were read."""
    fired: int
    """Of these, on how many it is above 0."""
    maximum: float
    """Its largest value; 0 where it never fired."""
    mean: float
    """Of its values above 0; 0 where it never fired."""
    examples: tuple[Example, ...]
    """Of the stories in which it is largest, the surroundings of the token; the largest first."""
    raised: tuple[tuple[str, float], ...]
    """The tokens that its direction makes likeliest by itself, with their logits; none where no head follows."""
    lowered: tuple[tuple[str, float], ...]
    """Those that it makes least likely."""

    @property
    def density(self) -> float:
        """The part of the tokens on which it fires."""
        return self.fired / self.read

    def _facts(self) -> dict[str, str]:
        return {
            "fires on": f"{100 * self.density:.3g} % of {self.read:,} tokens",
            "largest": f"{self.maximum:.3g}",
            "mean": f"{self.mean:.3g}",
        } | {
            name: " ".join(repr(token) for token, _ in tokens)
            for name, tokens in (("raises", self.raised), ("lowers", self.lowered))
            if tokens
        }

    def __repr__(self) -> str:
        """Lines: the facts, then examples, in which the token with the largest value stands in brackets."""
        lines = [
            f"Feature {self.index} of {self.member}",
            *(f"{name:10}{fact}" for name, fact in self._facts().items()),
        ]
        for example in self.examples:
            at = example.largest
            marked = [f"[{token}]" if i == at else token for i, token in enumerate(example.tokens)]
            lines.append(f"{example.values[at]:>8.3g}  {''.join(marked)}".replace("\n", "⏎"))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A card, and the examples below it."""
        rows = "".join(
            f'<tr><td style="text-align:right;opacity:.65">{example.values.max():.3g}</td>'
            f'<td style="text-align:left">{shaded(example.tokens, example.values / self.maximum)}</td></tr>'
            for example in self.examples
        )
        about = card(f"Feature {self.index} of {self.member}", self._facts())
        return f'{about}<table style="color:inherit">{rows}</table>'


def look_at_feature(
    sae: TrainedAutoencoder, feature: int, source: WithText, texts: Sequence[str], tokens: int, examples: int
) -> Feature:
    """Read a text, and tell what a feature of a member is there.

    Args:
        sae: the member.
        feature: its number.
        source: the text, and the language model of the run.
        texts: texts of one's own, which are read instead; none: the first whole stories of the source.
        tokens: of the source, about how many.
        examples: the most that are kept, each of another story; of those with the same token after the same five ones
            the largest.

    Raises:
        BadInput: if there is no such feature, or a text has no token that the language model knows.
    """
    if not 0 <= feature < sae.features:
        raise BadInput(f"{sae.name} has no feature {feature}; its features are 0 to {sae.features - 1}")
    for name, number in (("tokens", tokens), ("examples", examples)):
        if number < 1:
            raise BadInput(f"{name} is {number}; one above 0 was expected")
    of_texts = values_in_texts(source, sae, texts, feature) if texts else values_of(source, sae, tokens, feature)
    read, fired, total = 0, 0, 0.0
    found: dict[tuple[int, ...], tuple[float, np.ndarray, np.ndarray]] = {}  # by the token and those before it
    for ids, used, values in of_texts:
        read, fired, total = read + int(used.sum()), fired + int((values > 0).sum()), total + float(values.sum())
        if values.any():
            at = int(values.argmax())
            context = tuple(ids[max(0, at - CONTEXT) : at + 1].tolist())
            found[context] = max(
                found.get(context, (0.0, ids, values)), (float(values[at]), ids, values), key=itemgetter(0)
            )
    largest = sorted(found.values(), key=itemgetter(0), reverse=True)[:examples]
    direction = directions(sae)[[feature]]
    lens = next(reversed(lenses_of(source, sae.writes, direction, is_read=False).values()), None)

    def named(ids: np.ndarray, by: np.ndarray) -> tuple[tuple[str, float], ...]:
        return tuple((word_of(source, int(v)), float(logit)) for v, logit in zip(ids[0], by[0], strict=True))

    return Feature(
        sae.name,
        feature,
        read,
        fired,
        largest[0][0] if largest else 0.0,
        total / max(1, fired),
        tuple(_around(source, ids, values) for _, ids, values in largest),
        named(lens.raised, lens.raised_by) if lens else (),
        named(lens.lowered, lens.lowered_by) if lens else (),
    )


def _around(source: WithText, ids: np.ndarray, values: np.ndarray) -> Example:
    at = int(values.argmax())
    its = slice(max(0, at - BEFORE), at + AFTER + 1)
    return Example(tuple(word_of(source, int(v)) for v in ids[its]), values[its])
