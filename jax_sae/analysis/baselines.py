"""What simple reconstructions reach on the same tokens: the mean, and PCA with as many directions."""

from dataclasses import dataclass

import numpy as np

from jax_sae.autoencoder.baselines import pca_fvu


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
