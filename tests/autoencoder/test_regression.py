"""Regression in closed form is NumPy's least squares, no linear map of its rank is below it, and a ReLU may be."""

import numpy as np
import pytest

from jax_sae.autoencoder.baselines import add_rows, covariance_eigenvalues, no_scatter, pca_floor
from jax_sae.autoencoder.regression import (
    Pairs,
    Regression,
    add_pairs,
    no_pairs,
    predicted,
    regression,
    regression_errors,
    regression_fvu,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(500, 7)) @ RNG.normal(size=(7, 7)) + 30
Y = np.tanh((X - 30) @ RNG.normal(size=(7, 5)) / 2) * [4, 2, 1, 1, 0.3] - 9


def pairs_of(x: np.ndarray, y: np.ndarray, rows: int = 500) -> Pairs:
    """Their sums, so many rows at a time."""
    pairs = no_pairs(x.shape[1], y.shape[1])
    for first in range(0, len(x), rows):
        pairs = add_pairs(pairs, x[first : first + rows], y[first : first + rows])
    return add_pairs(pairs, x[:0], y[:0])


def full(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and their errors in each column, by NumPy's least squares with a column of ones."""
    ones = np.c_[x - x.mean(0), np.ones(len(x))]
    y_hat = ones @ np.linalg.lstsq(ones, y, rcond=1e-7)[0]
    return y_hat, np.square(y - y_hat).sum(0)


@pytest.mark.parametrize("rows", [1, 77, 500])
def test_of_full_rank_it_is_numpys_least_squares(rows: int) -> None:
    """However many rows come at a time, and whatever the columns' scale: weights, and errors of each column."""
    y_hat, errors = full(X, Y)
    for scale in (1.0, np.arange(1.0, 6)):
        found = regression(pairs_of(X, Y, rows), scale)
        np.testing.assert_allclose(predicted(found, X), y_hat, rtol=1e-9)
        np.testing.assert_allclose(regression_errors(found, 5), errors * np.square(scale), rtol=1e-8)
        np.testing.assert_allclose(regression_errors(found, 99), regression_errors(found, 5))


@pytest.mark.parametrize("directions", range(6))
def test_errors_are_those_of_the_weights_and_nothing_linear_is_below(directions: int) -> None:
    """Of each rank, against random maps, maps near the best one, and the best decoder of random encoders."""
    scale = np.array([1, 1, 2, 2, 5.0])
    found = regression(pairs_of(X, Y), scale)

    def error(y_hat: np.ndarray) -> float:
        return float(np.square(scale * (Y - y_hat)).sum())

    least = error(predicted(found, X, directions))
    by_column = np.square(scale * (Y - predicted(found, X, directions))).sum(0)
    np.testing.assert_allclose(regression_errors(found, directions), by_column, rtol=1e-8)
    assert regression_fvu(found, directions) == pytest.approx(least / np.square(scale * (Y - Y.mean(0))).sum())
    centred, rng = X - X.mean(0), np.random.default_rng(1)
    A, B = found.encoder[:, :directions], found.decoder[:directions]
    for size in (1e-3, 1e-2, 0.1, 1):
        for _ in range(50):
            near = [
                each + size * np.abs(each).mean() * rng.normal(size=each.shape) if each.size else each
                for each in (A, B)
            ]
            assert error(centred @ near[0] @ near[1] + Y.mean(0)) >= least
            best, _ = full(centred @ rng.normal(size=A.shape), Y) if directions else (Y.mean(0), 0)
            assert error(best) >= least * (1 - 1e-9)


def test_the_floor_of_targets_is_below_it_and_meets_it_where_inputs_are_the_targets() -> None:
    """PCA of the targets is a floor of whatever writes F directions, so of linear maps; of x -> x they are one."""
    found, same = regression(pairs_of(X, Y)), regression(pairs_of(X, X))
    of_y, of_x = covariance_eigenvalues(Y), covariance_eigenvalues(X)
    for directions in range(5):
        assert pca_floor(of_y, directions) <= regression_errors(found, directions).sum() * (1 + 1e-12)
    for directions in range(8):
        floor = pca_floor(of_x, directions)
        assert regression_errors(same, directions).sum() == pytest.approx(floor, rel=1e-9, abs=1e-9)


def test_a_relu_may_be_below_it_and_not_below_the_floor_of_targets() -> None:
    """y = |x| is two features of a ReLU, of which no linear map knows anything; that is what is said of the bound."""
    x = np.random.default_rng(0).normal(size=(400, 1))
    y = np.abs(x) * [1, 2]
    found = regression(pairs_of(x, y))
    assert regression_fvu(found, 2) > 0.9
    written = np.maximum(x * [1, -1], 0) @ [[1, 2], [1, 2.0]]
    assert np.square(y - written).sum() == 0 == pca_floor(covariance_eigenvalues(y), 2)


def of_lower_rank(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, as float32 has them, that do not vary in all directions, and targets of them and of something else."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 6))
    x = {
        "rank 3": x[:, :3] @ rng.normal(size=(3, 6)) + 5,
        "a layer norm's": (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True),
        "a column twice and a constant one": np.c_[x[:, :4], x[:, 0], np.full(300, 7.0)],
        "fewer rows than columns": x[:4],
        "equal rows": np.ones((300, 6)) / 3,
    }[case]
    x = x.astype(np.float32)
    return x, (x[:, :4] @ rng.normal(size=(4, 3)) + rng.normal(size=(len(x), 3))).astype(np.float32)


@pytest.mark.parametrize(
    "case", ["rank 3", "a layer norm's", "a column twice and a constant one", "fewer rows than columns", "equal rows"]
)
def test_inputs_of_lower_rank(case: str) -> None:
    """No direction is made of rounding: as NumPy's least squares that leaves them out, with weights of usual size."""
    x, y = of_lower_rank(case)
    found: Regression = regression(pairs_of(x, y))
    rank = {"rank 3": 3, "a layer norm's": 5, "a column twice and a constant one": 4, "fewer rows than columns": 3}
    assert found.encoder.shape[1] == min(3, rank.get(case, 0))
    y_hat, errors = full(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(predicted(found, x), y_hat, atol=1e-5)
    np.testing.assert_allclose(regression_errors(found, 6), errors, atol=1e-5)
    assert np.abs(found.encoder @ found.decoder).max(initial=0) < 100


def test_a_linear_function_is_found_to_rounding_and_then_has_no_error() -> None:
    """Targets that float32 has rounded leave nothing over that is more than this rounding; means cost no digits."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(300, 6)) + 1000).astype(np.float32)
    y = ((x.astype(np.float64) - 1000) @ rng.normal(size=(6, 2)) @ rng.normal(size=(2, 4))).astype(np.float32)
    found = regression(pairs_of(x, y, 100))
    assert [bool(regression_errors(found, n).sum()) for n in (0, 1, 2, 4)] == [True, True, False, False]
    np.testing.assert_allclose(predicted(found, x, 2), y, atol=1e-5)
    for got, columns in ((pairs_of(x, y, 7).inputs, x), (pairs_of(x, y, 7).targets, y)):
        np.testing.assert_allclose(got.matrix, add_rows(no_scatter(columns.shape[1]), columns).matrix, rtol=1e-6)
