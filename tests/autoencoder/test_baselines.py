"""What the mean and PCA reach is what they reach when they are run."""

import numpy as np
import pytest

from jax_sae.analysis.statistics import Metrics, add_tokens, metrics, no_tokens
from jax_sae.autoencoder.baselines import (
    add_rows,
    baselines,
    covariance_eigenvalues,
    no_scatter,
    pca_fvu,
    principal_directions,
)

X = np.random.default_rng(0).normal(size=(400, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 7


def pca(directions: int) -> Metrics:
    """Metrics of a projection on the leading directions."""
    mean = X.mean(0)
    V = np.linalg.svd(X - mean, full_matrices=False)[2][:directions]
    return metrics(add_tokens(no_tokens(6, 1), X, np.ones((400, 1)), (X - mean) @ V.T @ V + mean))


@pytest.mark.parametrize("directions", range(7))
def test_baselines_are_those_of_a_projection(directions: int) -> None:
    """FVU and MSE, with F and with L0 directions; 0 directions are the mean."""
    eigenvalues = covariance_eigenvalues(X)
    found = baselines(eigenvalues, 400, directions, l0=6 - directions)
    assert found.mean_fvu == 1 and found.mean_mse == pytest.approx(pca(0).mse)
    assert found.pca_features_fvu == pytest.approx(pca(directions).fvu, abs=1e-12)
    assert found.pca_features_mse == pytest.approx(pca(directions).mse, abs=1e-12)
    assert found.pca_l0_fvu == pytest.approx(pca(6 - directions).fvu, abs=1e-12)
    assert found.pca_l0_mse == pytest.approx(pca(6 - directions).mse, abs=1e-12)


def test_directions_between_whole_numbers_and_beyond_the_width() -> None:
    """A mixture of the two nearest; nothing is left at D and beyond."""
    eigenvalues = covariance_eigenvalues(X)
    assert pca_fvu(eigenvalues, 2.2) == pytest.approx(0.8 * pca(2).fvu + 0.2 * pca(3).fvu)
    assert pca_fvu(eigenvalues, 5.5) == pytest.approx(0.5 * pca(5).fvu)
    assert [pca_fvu(eigenvalues, n) for n in (6, 6.5, 7, 100.3)] == [0, 0, 0, 0]


@pytest.mark.parametrize("rows", [1, 7, 399, 400])
def test_directions_of_a_stream_are_those_of_all_rows(rows: int) -> None:
    """However many come at a time: eigenvalues as in two passes, and directions that leave just the others over."""
    scatter = no_scatter(6)
    for start in range(0, 400, rows):
        scatter = add_rows(scatter, X[start : start + rows])
    scatter = add_rows(scatter, X[:0])
    eigenvalues, directions = principal_directions(scatter)
    assert scatter.tokens == 400
    np.testing.assert_allclose(scatter.mean, X.mean(0))
    np.testing.assert_allclose(eigenvalues, covariance_eigenvalues(X))
    np.testing.assert_allclose(directions @ directions.T, np.eye(6), atol=1e-12)
    centred = X - X.mean(0)
    for n in range(7):
        V = directions[:n]
        np.testing.assert_allclose(np.square(centred - centred @ V.T @ V).sum(), eigenvalues[n:].sum(), atol=1e-9)
