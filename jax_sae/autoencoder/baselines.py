"""What is possible at all: the floor that PCA sets."""

from dataclasses import dataclass

import numpy as np

ROUNDING = 2.0**-24
"""The largest relative error of a number that is rounded to float32, as activations are."""


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
    """The scatter with the rows of x[B, D] too; B may be 0.

    The rows are centred by their own mean and merged with those before (Chan, Golub and LeVeque 1979), in float64, so a
    large mean costs no digits.
    """
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
        (eigenvalues [D] float64 of the scatter, largest first, those that are rounding 0; directions [D, D] float64,
        row i of norm 1 belonging to eigenvalue i).
    """
    eigenvalues, columns = np.linalg.eigh(scatter.matrix)
    return _without_rounding(eigenvalues[::-1], scatter), columns.T[::-1]


def covariance_eigenvalues(x: np.ndarray, rows_at_a_time: int = 8192) -> np.ndarray:
    """Eigenvalues of sum_n (x_n - mean)(x_n - mean)^T, as `principal_directions` gives them; [D] float64.

    Args:
        x: [N, D], activations.
        rows_at_a_time: rows that are held as float64 at once.
    """
    scatter = no_scatter(x.shape[1])
    for start in range(0, len(x), rows_at_a_time):
        scatter = add_rows(scatter, x[start : start + rows_at_a_time])
    return _without_rounding(np.linalg.eigvalsh(scatter.matrix)[::-1], scatter)


def _without_rounding(eigenvalues: np.ndarray, scatter: Scatter) -> np.ndarray:
    """The eigenvalues with 0 in place of those up to u^2 sum_n |x_n|^2, where u = 2^-24.

    Activations are float32: each element differs from what it stands for by up to u of its size, so the rows X[N, D]
    are X_exact + E with |E|_F^2 <= u^2 sum_n |x_n|^2. By Weyl's inequality each singular value of the centred rows is
    moved by |E| at most, so where X_exact does not vary in a direction (after a layer norm, with centred rows, with
    rank 5), X shows an eigenvalue up to that bound. What is larger cannot be rounding and stays. The bound is 2^-48 of
    the sum of squares, and so 32 or more roundings of the largest eigenvalue in float64: it covers the solver's too.
    """
    squares = np.trace(scatter.matrix) + scatter.tokens * float(scatter.mean @ scatter.mean)
    return np.where(eigenvalues > ROUNDING**2 * squares, eigenvalues, 0.0)


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


PcaCurve = tuple[list[int], list[float]]
"""Numbers of directions, and the FVU of PCA with each."""


def pca_curve(eigenvalues: np.ndarray, points: int = 64) -> PcaCurve:
    """FVU of PCA against its number of directions, at 0 and up to `points` numbers from 1 to D, evenly on a logarithm.

    Args:
        eigenvalues: [D], of the tokens' scatter, largest first.
        points: how many; fewer where that many whole numbers are not there.
    """
    spaced = np.geomspace(1, len(eigenvalues), points).round().astype(int)
    directions = [0, *np.unique(spaced).tolist()]
    return directions, [float(pca_fvu(eigenvalues, n)) for n in directions]
