"""How good a reconstruction is."""

import numpy as np


def fraction_of_variance_unexplained(squared_errors: np.ndarray, total_variance: float) -> float:
    """FVU = sum_n |x_n - x_hat_n|^2 / sum_n |x_n - mean|^2, 1 - explained variance; the mean is that of the whole set.

    Args:
        squared_errors: [N] float64, |x_n - x_hat_n|^2 of each token, in the language model's own scale.
        total_variance: sum_n |x_n - mean|^2 of the same tokens, as `baselines.covariance_eigenvalues` sums to.
    """
    return float(np.sum(squared_errors, dtype=np.float64) / total_variance)
