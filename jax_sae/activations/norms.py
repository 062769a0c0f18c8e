"""How large activations are, and whether a few of them dominate.

In many models the first tokens of a story, and some others, have 100 times the norm of the rest. A scale or an FVU that
sums squares then measures those few alone. Norms are |x|, in the model's own scale, not centred, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_sae.config import ActivationsConfig
from jax_sae.errors import BadInput

LARGE = 10.0
"""A token is large if its norm is more than this multiple of the median norm."""

FIRST_POSITIONS = 4
"""Places at the start of a story where large tokens are expected."""

SHARE_TO_WARN_OF = 0.01


@dataclass(frozen=True)
class NormStatistics:
    """Norms |x| of N tokens; plain numbers, ready for JSON."""

    tokens: int
    """N."""
    percent_1: float
    """1 % of the norms are smaller."""
    median: float
    percent_99: float
    largest: float
    large_tokens: int
    """Tokens with more than 10 times the median norm."""
    large_share: float
    """Their part of the N tokens' summed squared norms, from 0 to 1."""
    large_first_tokens: int | None
    """How many of them are among the first 4 tokens of their story; None where places in a story are not known."""
    exclude_first_tokens: int | None
    """The fewest first tokens of each story that, excluded, leave out all of those; 0 where there are none."""


def token_norms(x: np.ndarray) -> np.ndarray:
    """|x| of each row of x[T, D]: [T] float64, so that a float32 of 1e30 does not overflow when squared."""
    return np.sqrt(np.einsum("td,td->t", x, x, dtype=np.float64))


def norm_statistics(sample: Sequence[np.ndarray], activations: ActivationsConfig, has_stories: bool) -> NormStatistics:
    """Statistics of the norms of a sample, as `first_activations` gives it.

    Args:
        sample: arrays [T, D] in the model's scale, one a story or chunk of rows; at least one row in all.
        activations: tells the place in its story of an array's first row, which is its `exclude_first_tokens`; rows
            that a `norm_limit` left do not know their place.
        has_stories: whether an array is a story.
    """
    of_each = [token_norms(x) for x in sample]
    norms = np.concatenate(of_each)
    percent_1, median, percent_99, largest = np.percentile(norms, [1, 50, 99, 100]).tolist()
    large = norms > LARGE * median
    squares = np.square(norms)
    share = float(squares[large].sum() / squares.sum()) if large.any() else 0.0
    first_tokens = exclude = None
    if has_stories and not activations.norm_limit:
        places = np.concatenate([np.arange(len(each)) for each in of_each]) + (activations.exclude_first_tokens or 0)
        found = places[large & (places < FIRST_POSITIONS)]
        first_tokens, exclude = len(found), int(found.max(initial=-1)) + 1
    return NormStatistics(
        len(norms), percent_1, median, percent_99, largest, int(large.sum()), share, first_tokens, exclude
    )


def norm_lines(found: NormStatistics, place: str = "") -> list[str]:
    """Lines for the screen: the norms, and a warning where large tokens hold more than 1 % of the squared norms.

    `place` is said where there are several; there is no limit for them, so that none is advised.
    """
    shown = [_shown(norm) for norm in (found.percent_1, found.median, found.percent_99, found.largest)]
    at = f"{place}, " if place else ""
    lines = ["norms         {}1 %: {}, 50 %: {}, 99 %: {}, largest {}".format(at, *shown)]
    if found.large_share <= SHARE_TO_WARN_OF:
        return lines
    if not found.median:
        question = "half of the tokens or more have the norm 0: are these the right activations?"
        return [*lines, f"warning       {at}{question}"]
    limit = f"--activations.norm-limit {float(f'{LARGE * found.median:.2g}'):g}"
    if not found.large_first_tokens:
        where = "" if found.large_first_tokens is None else f", none among the first {FIRST_POSITIONS} of its story"
        advice = f"{limit} leaves them out" if not place else "train it alone with a norm_limit to leave them out"
    else:
        all_of_them = found.large_first_tokens == found.large_tokens
        where = (
            f", {'all' if all_of_them else f'{found.large_first_tokens:,}'} among the first {FIRST_POSITIONS} of their "
            "story"
        )
        advice = f"--activations.exclude-first-tokens {found.exclude_first_tokens} leaves these out"
        advice += "" if all_of_them or place else f", {limit} all"
    return [
        *lines,
        f"warning       {at}{found.large_tokens:,} of {found.tokens:,} tokens have more than {LARGE:g} times the "
        f"median norm and hold {100 * found.large_share:.3g} % of the summed squared norms{where}; {advice}",
    ]


def over_norm_limit(norms: np.ndarray, limit: float, name: str) -> np.ndarray:
    """Which of the norms [N] are larger than `limit`, [N] bool; none where it is 0, which means no limit.

    Raises:
        BadInput: if they are more than half, so that the limit is not one for a few; `name` is what was read.
    """
    over = norms > limit if limit else np.zeros(len(norms), bool)
    if 2 * over.sum() > len(norms):
        percent_1, median, percent_99, largest = map(_shown, np.percentile(norms, [1, 50, 99, 100]).tolist())
        raise BadInput(
            f"{name}: {over.sum():,} of {len(norms):,} tokens have a larger norm than activations.norm_limit, "
            f"{limit:g}; their norms are {percent_1} at 1 %, {median} at 50 %, {percent_99} at 99 % and at most "
            f"{largest}: raise the limit"
        )
    return over


def within_norm_limit(sample: Sequence[np.ndarray], limit: float, name: str) -> list[np.ndarray]:
    """Arrays [T, D] without the rows whose norm is larger than `limit`; unchanged where it is 0.

    Raises:
        BadInput: as `over_norm_limit`, for all rows together.
    """
    if not limit:
        return list(sample)
    over = over_norm_limit(np.concatenate([token_norms(x) for x in sample]), limit, name)
    firsts = np.cumsum([len(x) for x in sample])[:-1]
    return [x[~of_x] for x, of_x in zip(sample, np.split(over, firsts), strict=True)]


def _shown(norm: float) -> str:
    """Three or so digits: 0.012, 3.2, 14.0, 1,213, 1.2e+30."""
    if 1 <= norm < 1e7:
        return f"{norm:.1f}" if norm < 1000 else f"{norm:,.0f}"
    return f"{norm:.2g}"
