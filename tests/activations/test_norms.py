"""Norms are told as they are, and a few tokens that dominate are named with the option that leaves them out."""

from dataclasses import asdict

import numpy as np
import pytest

from jax_sae.activations.norms import norm_lines, norm_statistics, token_norms, within_norm_limit
from jax_sae.commands.flags import check_flags
from jax_sae.config import ActivationsConfig
from jax_sae.errors import BadInput

STORIES, ROWS = (ActivationsConfig(), True), (ActivationsConfig(), False)


def with_norms(*norms_of_stories: list[float]) -> list[np.ndarray]:
    """Stories [T, 2] float32 whose tokens have these norms, far from centred."""
    return [np.outer(norms, [0.6, -0.8]).astype(np.float32) for norms in norms_of_stories]


def option_in(line: str) -> str:
    """The flag and value that a warning names."""
    return line[line.index("--") :].split(" leaves")[0]


def test_statistics_are_the_definitions() -> None:
    """Percentiles of |x|; large is above 10 times the median; the share is of squares; the first 4 of each story."""
    sample = with_norms([50, 1, 1, 0.5, 1], [1, 1, 1, 20, 1, 1, 1, 1], [1, 1, 1, 1, 30, 10])
    found = norm_statistics(sample, *STORIES)
    norms = [np.hypot(*row) for x in sample for row in x.astype(np.float64)]
    assert [found.percent_1, found.percent_99] == pytest.approx([np.percentile(norms, 1), np.percentile(norms, 99)])
    assert (found.tokens, found.median, found.largest) == (19, pytest.approx(1), pytest.approx(50))
    assert (found.large_tokens, found.large_first_tokens, found.exclude_first_tokens) == (3, 2, 4)  # 10 is not above 10
    squares = 50**2 + 20**2 + 30**2
    assert found.large_share == pytest.approx(squares / (squares + 14 + 0.25 + 100), rel=1e-6)
    assert all(type(value) in (int, float) for value in asdict(found).values())


@pytest.mark.parametrize("scale", [1e30, 1e37, 1e-19, 1e-30])
def test_no_size_of_float32_overflows_or_vanishes(scale: float) -> None:
    """Squares of 1e37 are beyond float32, those of 1e-30 below it."""
    sample = [x * np.float32(scale) for x in with_norms([30, 1, 1, 1], [1, 2, 3])]
    found, plain = norm_statistics(sample, *STORIES), norm_statistics(with_norms([30, 1, 1, 1], [1, 2, 3]), *STORIES)
    assert found.largest == pytest.approx(30 * scale, rel=1e-6) and found.median == pytest.approx(scale, rel=1e-6)
    assert (found.large_tokens, found.large_share) == (1, pytest.approx(plain.large_share, rel=1e-6))
    assert token_norms(sample[0]).dtype == np.float64
    assert len(within_norm_limit(sample, 10 * scale, "x")[0]) == 3


def test_lines_show_the_norms() -> None:
    """In few digits, whatever their size, behind a label of 14 characters."""
    line, _ = norm_lines(norm_statistics(with_norms([3.2] * 30 + [10.1] * 940 + [14.0] * 30 + [1213.4]), *STORIES))
    assert line == "norms         1 %: 3.2, 50 %: 10.1, 99 %: 14.0, largest 1,213"
    [line] = norm_lines(norm_statistics(with_norms([500.0] * 10**5 + [12128.7]), *STORIES))
    assert line == "norms         1 %: 500.0, 50 %: 500.0, 99 %: 500.0, largest 12,129"
    [line] = norm_lines(norm_statistics(with_norms([0.0123, 1.2e30]), *ROWS))[:1]
    assert line.startswith("norms         1 %: 1.2e+28, 50 %: 6e+29")


def test_a_few_tokens_that_dominate_are_warned_of() -> None:
    """Above 1 % of the squared norms, not at it: one norm of 10.05 among 10,000 of 1 is 1.0 %."""
    for large, n_lines in [(10.04, 1), (10.06, 2)]:
        assert len(norm_lines(norm_statistics(with_norms([large] + [1.0] * 9999), *STORIES))) == n_lines
    norm, warning = norm_lines(norm_statistics(with_norms(*[[100.0, 90.0] + [1.0] * 98] * 20), *STORIES))
    assert norm.startswith("norms ")
    assert warning == (
        "warning       40 of 2,000 tokens have more than 10 times the median norm and hold 99.5 % of the summed "
        "squared norms, all among the first 4 of their story; --activations.exclude-first-tokens 2 leaves these out"
    )
    for large, share in [(1.2e2, "12.6 %"), (9e3, "99.9 %"), (1e9, "100 %")]:
        assert f"and hold {share} of" in norm_lines(norm_statistics(with_norms([large] + [1.0] * 99_999), *STORIES))[1]


def test_the_option_that_is_named_leaves_them_out() -> None:
    """With it there is nothing left to warn of, and it is a flag that exists."""
    first = [[1.0, 1, 80] + [1.0] * 50] * 10
    sample = with_norms(*first)
    option = option_in(norm_lines(norm_statistics(sample, *STORIES))[1])
    assert option == "--activations.exclude-first-tokens 3"
    assert (
        len(norm_lines(norm_statistics([x[3:] for x in sample], ActivationsConfig(exclude_first_tokens=3), True))) == 1
    )

    for sample, settings in [(with_norms(*first), ROWS), (with_norms([1.0] * 50 + [4e6]), STORIES)]:
        option = option_in(norm_lines(norm_statistics(sample, *settings))[1])
        flag, limit = option.split()
        assert flag == "--activations.norm-limit" and float(limit) == 10
        left = within_norm_limit(sample, float(limit), "x")
        limited = ActivationsConfig(norm_limit=float(limit))
        assert len(norm_lines(norm_statistics(left, limited, settings[1]))) == 1
        check_flags(option.split())

    [_, warning] = norm_lines(norm_statistics(with_norms([80.0, 12.34, 12.34, 12.34, 12.34, 900, *[12.34] * 9]), *ROWS))
    assert option_in(warning) == "--activations.norm-limit 120"  # 123.4, in two digits


def test_tokens_that_dominate_at_several_places_are_all_named() -> None:
    """Some among the first, some not: each option with what it leaves out."""
    _, warning = norm_lines(norm_statistics(with_norms([80.0] + [1.0] * 20, [1.0] * 10 + [70.0]), *STORIES))
    assert "2 of 32 tokens" in warning and ", 1 among the first 4 of their story" in warning
    assert warning.endswith("exclude-first-tokens 1 leaves these out, --activations.norm-limit 10 all")
    _, warning = norm_lines(norm_statistics(with_norms([1.0] * 10 + [70.0]), *STORIES))
    assert "none among the first 4" in warning and "exclude-first-tokens" not in warning


def test_places_count_from_the_start_of_the_story_and_are_left_open_where_they_are_lost() -> None:
    """Where 2 tokens are excluded already, the next one is the third; rows, and what a limit left, have no place."""
    sample = with_norms([70.0] + [1.0] * 20, [1.0, 1.0, 70.0] + [1.0] * 20)
    found = norm_statistics(sample, ActivationsConfig(exclude_first_tokens=2), True)
    assert (found.large_tokens, found.large_first_tokens, found.exclude_first_tokens) == (2, 1, 3)
    for settings in (ROWS, (ActivationsConfig(norm_limit=100.0), True)):
        found = norm_statistics(sample, *settings)
        assert (found.large_tokens, found.large_first_tokens, found.exclude_first_tokens) == (2, None, None)
        assert "story" not in norm_lines(found)[1]


def test_activations_that_are_mostly_zero_are_warned_of_without_advice() -> None:
    """A limit of 10 times 0 would be none; and nothing is divided by 0."""
    lines = norm_lines(norm_statistics(with_norms([0.0] * 6 + [5.0] * 5), *STORIES))
    assert len(lines) == 2 and "norm 0" in lines[1] and "--" not in lines[1]
    assert norm_lines(norm_statistics(with_norms([0.0] * 6), *STORIES)) == [
        "norms         1 %: 0, 50 %: 0, 99 %: 0, largest 0"
    ]


def test_a_norm_limit_keeps_the_rows_within_it_in_their_stories() -> None:
    """A norm equal to the limit is within it; 0 is no limit; half of all rows may go, not more."""
    sample = [np.float32([[3, 4], [6, 8], [0, 5]]), np.float32([[30, 40]]), np.float32([[0, 1], [0, 2]])]
    kept = within_norm_limit(sample, 5.0, "x")
    assert [x.tolist() for x in kept] == [[[3, 4], [0, 5]], [], [[0, 1], [0, 2]]]
    assert all(np.array_equal(a, b) for a, b in zip(within_norm_limit(sample, 0.0, "x"), sample, strict=True))
    with pytest.raises(BadInput, match=r"^x: 4 of 6 tokens have a larger norm .*, 4.9; .* and at most 50.0: raise"):
        within_norm_limit(sample, 4.9, "x")
