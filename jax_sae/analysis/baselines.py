"""What simple reconstructions reach on the same tokens: the mean, and PCA with as many directions."""

from dataclasses import dataclass

import numpy as np

from jax_sae.autoencoder.baselines import pca_fvu


@dataclass(frozen=True, eq=False)
class Scatter:
    """Mean and scatter of the tokens so far, from which PCA is made."""

    mean: np.ndarray
    """[D] float64."""
    matrix: np.ndarray
    """[D, D] float64, sum_n (x_n - mean)(x_n - mean)^T."""
    tokens: int = 0


def no_scatter(width: int) -> Scatter:
    """The scatter of no tokens, for D = `width`."""
    return Scatter(np.zeros(width), np.zeros((width, width)))


def add_rows(scatter: Scatter, x: np.ndarray) -> Scatter:
    """The scatter with the rows of x[B, D] too; B may be 0. Merged as `statistics.add_tokens` does, in float64."""
    if not len(x):
        return scatter
    mean = x.mean(0, dtype=np.float64)
    centred, shift = x - mean, mean - scatter.mean
    tokens = scatter.tokens + len(x)
    between = np.outer(shift, shift) * (scatter.tokens * len(x) / tokens)
    matrix = scatter.matrix + centred.T @ centred + between
    return Scatter(scatter.mean + shift * (len(x) / tokens), matrix, tokens)


def principal_directions(scatter: Scatter) -> tuple[np.ndarray, np.ndarray]:
    """PCA of all tokens that were added.

    Returns:
        (eigenvalues [D] float64 of the scatter, largest first, each at least 0; directions [D, D] float64, row i of
        norm 1 belonging to eigenvalue i).
    """
    eigenvalues, columns = np.linalg.eigh(scatter.matrix)
    return np.maximum(eigenvalues[::-1], 0.0), columns.T[::-1]


@dataclass(frozen=True)
class Baselines:
    """FVU and MSE (per element) of reconstructions that need no training; plain numbers, ready for JSON."""

    mean_fvu: float
    """Of the mean of all tokens: 1, by the definition of FVU."""
    mean_mse: float
    pca_features_fvu: float
    """Of PCA with F directions: the floor of any autoencoder with F features; 0 for F >= D."""
    pca_features_mse: float
    pca_l0_fvu: float
    """Of PCA with L0 directions, the same for every token; an autoencoder chooses L0 of its F for each token."""
    pca_l0_mse: float


def baselines(eigenvalues: np.ndarray, tokens: int, features: int, l0: float) -> Baselines:
    """The baselines of an autoencoder with F = `features` that uses `l0` of them on average.

    Args:
        eigenvalues: [D], of the tokens' scatter, largest first, as `covariance_eigenvalues` gives them.
        tokens: N, how many they are.
        features: F.
        l0: mean number of active features.
    """
    of_features, of_l0 = pca_fvu(eigenvalues, features), pca_fvu(eigenvalues, l0)
    mean_mse = float(eigenvalues.sum()) / (tokens * len(eigenvalues))
    return Baselines(1.0, mean_mse, of_features, of_features * mean_mse, of_l0, of_l0 * mean_mse)
