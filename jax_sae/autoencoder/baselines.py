"""What is possible at all: the floor that PCA sets."""

import numpy as np


def covariance_eigenvalues(x: np.ndarray, rows_at_a_time: int = 8192) -> np.ndarray:
    """Eigenvalues of sum_n (x_n - mean)(x_n - mean)^T, largest first; [D] float64, each at least 0.

    Two passes in float64 (the mean first), so that a large mean costs no digits.

    Args:
        x: [N, D], activations.
        rows_at_a_time: rows that are held as float64 at once.
    """
    mean = x.mean(0, dtype=np.float64)
    scatter = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), rows_at_a_time):
        centred = x[start : start + rows_at_a_time] - mean
        scatter += centred.T @ centred
    return np.maximum(np.linalg.eigvalsh(scatter)[::-1], 0.0)


def pca_floor(eigenvalues: np.ndarray, directions: int) -> float:
    """The least squared error, summed over tokens, of any reconstruction in an affine space of that many directions.

    The sum of the D - F smallest eigenvalues (Eckart and Young 1936); 0 for F >= D. A decoder with F rows and a bias
    reaches such a space, whatever its encoder does, so no autoencoder with F features can be below it on these tokens.
    """
    return float(eigenvalues[directions:].sum())


def pca_fvu(eigenvalues: np.ndarray, directions: float) -> float:
    """FVU of PCA with that many directions: the sum of the smallest D - `directions` eigenvalues, divided by all.

    Between two whole numbers it is linear: PCA with 3.2 directions uses 4 on a fifth of the tokens, drawn by chance,
    and 3 on the others, and has that FVU on average.
    """
    fewer = min(int(directions), len(eigenvalues))
    low, high = pca_floor(eigenvalues, fewer), pca_floor(eigenvalues, fewer + 1)
    return (low + (directions - int(directions)) * (high - low)) / float(eigenvalues.sum())
