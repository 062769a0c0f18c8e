"""Which colour and marker a thing has: the same in every figure and on every page, and by name, not by its order.

Okabe and Ito's colours for the kinds of this package: the colour-blind can tell them apart, and on white and on dark
paper all can be seen. Kinds from elsewhere have four more, as far from those and from each other.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class Look:
    """How a line and its points are drawn."""

    colour: str
    """#RRGGBB."""
    marker: str
    """As matplotlib names it."""


KINDS = {
    "relu": Look("#0072B2", "o"),
    "gated": Look("#D55E00", "s"),
    "jumprelu": Look("#009E73", "D"),
    "topk": Look("#CC79A7", "^"),
    "batchtopk": Look("#E69F00", "v"),
    "matryoshka": Look("#56B4E9", "P"),
}
OWN = (Look("#A60DF2", "X"), Look("#CB0B2B", "<"), Look("#4F783A", ">"), Look("#7E54D4", "p"))
"""For kinds from elsewhere."""
GREY = "#808080"
"""What dictionaries are held against: PCA, linear maps."""
SEQUENCE = ("#6A46D2", "#2E8FDB", "#2EB398", "#A3C72C")
"""For numbers of features, from few to many; between two of these there are all colours between."""


def looks(kinds: Iterable[str]) -> dict[str, Look]:
    """By kind; of one from elsewhere what its name says, or the next that is free where another one has that."""
    names = list(dict.fromkeys(kinds))
    found = {kind: KINDS[kind] for kind in names if kind in KINDS}
    for kind in sorted(set(names) - set(KINDS)):
        first = int(sha256(kind.encode()).hexdigest(), 16) % len(OWN)
        in_turn = OWN[first:] + OWN[:first]
        found[kind] = next((look for look in in_turn if look not in found.values()), in_turn[0])
    return {kind: found[kind] for kind in names}


def line_looks(lines: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Look]:
    """By kind and F, of lines that are drawn together: the kind's, lighter for the smaller of several F.

    Where there is one kind, colours of `SEQUENCE` say F.
    """
    kinds, found = looks(kind for kind, _ in lines), {}
    for kind, F in lines:
        widths = sorted({its for each, its in lines if each == kind})
        look, i, n = kinds[kind], widths.index(F), len(widths)
        alone = len(kinds) == 1 and n > 1
        found[kind, F] = Look(_in_sequence(i / (n - 1)) if alone else shade(look.colour, i, n), look.marker)
    return found


def shades(kinds: Sequence[str], features: Sequence[int], variants: Sequence[Hashable]) -> list[str]:
    """Of each member a colour that no other variant has: that of its line, from light to full in the order given.

    Args:
        kinds: of the members.
        features: F of the members.
        variants: what tells members of a line apart; equal ones, as with another seed, have one colour.
    """
    of_lines = line_looks(list(zip(kinds, features, strict=True)))
    if len(set(kinds)) > 1:
        lines: list[Hashable] = list(kinds)
        full = [looks(kinds)[kind].colour for kind in kinds]
    else:
        lines = list(features)
        full = [of_lines[line].colour for line in zip(kinds, features, strict=True)]
    found = []
    for line, colour, variant in zip(lines, full, variants, strict=True):
        alike = list(dict.fromkeys(other for its, other in zip(lines, variants, strict=True) if its == line))
        found.append(shade(colour, alike.index(variant), len(alike)))
    return found


def shade(colour: str, i: int, n: int) -> str:
    """The i-th of n from light to full; the last one is the colour itself."""
    return _mixed(colour, "#FFFFFF", 0.6 * (1 - (i + 1) / n))


def _in_sequence(part: float) -> str:
    """The colour at a part of the way through `SEQUENCE`, from 0 to 1."""
    i = min(int(part * (len(SEQUENCE) - 1)), len(SEQUENCE) - 2)
    return _mixed(SEQUENCE[i], SEQUENCE[i + 1], part * (len(SEQUENCE) - 1) - i)


def _mixed(one: str, other: str, part: float) -> str:
    """A part of the way from one colour to another."""
    ends = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (one, other))
    return "#" + "".join(f"{round(a + part * (b - a)):02X}" for a, b in zip(*ends, strict=True))
