"""The same directions are found again, in any order and at any length; random ones are as alike as the null says."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sae.analysis.stability import stability
from jax_sae.errors import BadInput


def random_rows(F: int, D: int, seed: int) -> np.ndarray:
    """Rows of different lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(F, D)) * rng.uniform(1e-3, 1e3, (F, 1))


@settings(deadline=None, max_examples=30)
@given(F=st.integers(1, 30), D=st.integers(2, 12), seed=st.integers(0, 1000))
def test_a_permuted_and_rescaled_dictionary_is_the_same(F: int, D: int, seed: int) -> None:
    """Both measures are 1; with rows left out of one side, the other way round from the smaller one too."""
    rng = np.random.default_rng(seed)
    first = random_rows(F, D, seed)
    second = first[rng.permutation(F)] * rng.uniform(1e-6, 1e6, (F, 1))
    same = stability(first, second, seed=0)
    assert same.mean_max_cosine == pytest.approx(1) and same.matched_cosine == pytest.approx(1)
    fewer = stability(second[: max(1, F // 2)], first, seed=0)
    assert fewer.mean_max_cosine == pytest.approx(1) and fewer.matched_cosine == pytest.approx(1)


def test_random_dictionaries_are_as_alike_as_the_null() -> None:
    """Within a tenth, F the same or not; far from 1."""
    for F in (80, 150):
        found = stability(random_rows(F, 20, 1), random_rows(80, 20, 2), seed=3)
        assert found.mean_max_cosine == pytest.approx(found.null_mean_max_cosine, rel=0.1)
        assert found.matched_cosine == pytest.approx(found.null_matched_cosine, rel=0.1)
        assert found.matched_cosine < 0.6 and found.mean_max_cosine < 0.7 and found.compared == (F, 80)


@pytest.mark.parametrize(("few", "many"), [(4, 4), (3, 5)])
def test_the_matching_is_the_best_of_all(few: int, many: int) -> None:
    """Against every one-to-one assignment, either way round; the maximum may take a row twice, the matching may not."""
    a, b = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (random_rows(few, 3, 4), random_rows(many, 3, 5)))
    best = max(np.mean([a[i] @ b[j] for i, j in enumerate(order)]) for order in permutations(range(many), few))
    assert stability(a, b, 0).matched_cosine == pytest.approx(best)
    assert stability(b, a, 0).matched_cosine == pytest.approx(best)
    assert stability(a, b, 0).mean_max_cosine == pytest.approx(np.mean([max(row @ other for other in b) for row in a]))
    twice = stability(a[[0, 0]], np.stack([a[0], -a[0]]), 0)
    assert twice.mean_max_cosine == pytest.approx(1) and twice.matched_cosine == pytest.approx(0, abs=1e-12)


def test_the_opposite_direction_is_another_one() -> None:
    """Cosines are signed."""
    rows = np.eye(3)
    assert stability(rows, -rows, 0).mean_max_cosine == 0
    assert stability(rows[:1], -rows[:1], 0).matched_cosine == -1


def test_rows_of_zeros_are_left_out_and_counted() -> None:
    """And nothing else changes, nor does the null; a tiny row is not zero."""
    first, second = random_rows(10, 4, 6), random_rows(8, 4, 7)
    padded = np.insert(first, [0, 5], 0, axis=0)
    plain, with_zeros = stability(first, second, 8), stability(padded, np.vstack([second, np.zeros((3, 4))]), 8)
    assert plain.zero_rows == (0, 0) and with_zeros.zero_rows == (2, 3)
    assert with_zeros.compared == plain.compared == (10, 8)
    assert (with_zeros.mean_max_cosine, with_zeros.matched_cosine) == (plain.mean_max_cosine, plain.matched_cosine)
    assert with_zeros.null_matched_cosine == plain.null_matched_cosine
    assert stability(first * 1e-300, second, 8).matched_cosine == pytest.approx(plain.matched_cosine)


def test_the_null_depends_on_the_seed_alone() -> None:
    """Not on the dictionaries, whose sizes it has."""
    a, b, c = (stability(random_rows(9, 4, i), random_rows(7, 4, 10 + i), seed) for i, seed in ((0, 5), (1, 5), (2, 6)))
    assert (a.null_mean_max_cosine, a.null_matched_cosine) == (b.null_mean_max_cosine, b.null_matched_cosine)
    assert a.null_mean_max_cosine != c.null_mean_max_cosine


def test_dictionaries_that_cannot_be_compared_are_refused() -> None:
    """Other widths, no direction at all, a number that is not finite."""
    rows = random_rows(4, 3, 0)
    with pytest.raises(BadInput, match=r"shapes \(4, 3\) and \(4, 2\)"):
        stability(rows, rows[:, :2], 0)
    with pytest.raises(BadInput, match="all rows of the second dictionary are 0"):
        stability(rows, 0 * rows, 0)
    with pytest.raises(BadInput, match="the first dictionary has numbers that are not finite"):
        stability(rows * np.nan, rows, 0)
