"""What linear maps from inputs to targets reach: the least squared error of each rank, in closed form.

It stands beside PCA for dictionaries that read one place and write another. What each number bounds, on the tokens that
were added:

- PCA of the *targets* with F directions (`baselines.pca_floor`) is a floor of every dictionary with F features and no
  skip connection: f W_dec + b_dec lies in an affine space of F directions, whatever f is computed from.
- Regression of rank F is a floor of linear maps alone, y = (x - mean) A B + c with A[D_in, F] and B[F, D_out]: of a
  dictionary with F features and no skip whose encoder were linear. It is never below the PCA floor. A dictionary whose
  features go through a ReLU is no such map, and may be below it: then it has learned what no linear map of its rank
  knows.
- Full linear regression, of rank min(D_in, D_out), is what a skip connection W_skip[D_in, D_out] with a bias reaches
  without a single feature. It is no floor of a dictionary with one, whose features add to it; above it, they do harm.

Where inputs and targets are the same columns, regression of rank F is PCA with F directions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jax_sae.autoencoder.baselines import ROUNDING, Scatter, add_rows, no_scatter, principal_directions


@dataclass(frozen=True, eq=False)
class Pairs:
    """Sums over the pairs (x_n, y_n) of inputs and targets so far, from which regression is made."""

    inputs: Scatter
    targets: Scatter
    cross: np.ndarray
    """[D_in, D_out] float64, sum_n (x_n - mean of x)(y_n - mean of y)^T."""


def no_pairs(inputs: int, targets: int) -> Pairs:
    """The sums of no pairs, for D_in = `inputs` and D_out = `targets`."""
    return Pairs(no_scatter(inputs), no_scatter(targets), np.zeros((inputs, targets)))


def add_pairs(pairs: Pairs, x: np.ndarray, y: np.ndarray) -> Pairs:
    """The sums with the rows of x[B, D_in] and y[B, D_out] too; B may be 0. Merged as `baselines.add_rows` does."""
    if not len(x):
        return pairs
    mean_x, mean_y = x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64)
    before = pairs.inputs.tokens
    shifts = np.outer(mean_x - pairs.inputs.mean, mean_y - pairs.targets.mean)
    cross = pairs.cross + (x - mean_x).T @ (y - mean_y) + shifts * (before * len(x) / (before + len(x)))
    return Pairs(add_rows(pairs.inputs, x), add_rows(pairs.targets, y), cross)


@dataclass(frozen=True, eq=False)
class Regression:
    """Linear regression in R directions, which are in the order of what they explain.

    The first F of them are the best map of rank F: y_hat = (x - input_mean) encoder[:, :F] decoder[:F] + target_mean.
    """

    input_mean: np.ndarray
    """[D_in] float64."""
    target_mean: np.ndarray
    """[D_out] float64."""
    encoder: np.ndarray
    """[D_in, R] float64; what it makes of the centred inputs is orthonormal over the tokens."""
    decoder: np.ndarray
    """[R, D_out] float64."""
    variance: np.ndarray
    """[D_out] float64, sum_n (s y_n - mean)^2 of each column, in the units that `scale` made."""
    explained: np.ndarray
    """[R, D_out] float64, what each direction takes away from that."""
    squares: np.ndarray
    """[D_out] float64, sum_n (s y_n)^2."""


def regression(pairs: Pairs, scale: ArrayLike = 1.0) -> Regression:
    """The least squares solution of every rank at once (Izenman 1975, "Reduced-rank regression").

    With S_xx = V diag(l) V^T and the singular values M = U diag(s) W^T of M = diag(l)^-1/2 V^T S_xy, full regression is
    A = V diag(l)^-1/2 U, B = diag(s) W^T, and cutting both to F directions is the best map of rank F, because the
    inputs diag(l)^-1/2 V^T (x - mean) are orthonormal (Eckart and Young 1936). Each direction takes s_i^2 off the
    squared error.

    Directions in which the inputs do not vary beyond float32's rounding are left out, as in
    `baselines.principal_directions`: fewer tokens than D_in, a layer norm's output, repeated columns. A linear map that
    used them would fit rounding.

    Args:
        pairs: of the tokens.
        scale: [] or [D_out], a number s above 0 for each column of y: errors are those of s y. The normalisers' scales
            of several written places make one error of theirs. The full regression does not depend on it, that of a
            lower rank does.
    """
    s = np.broadcast_to(np.asarray(scale, np.float64), pairs.targets.mean.shape)
    eigenvalues, directions = principal_directions(pairs.inputs)
    R = int(np.count_nonzero(eigenvalues))
    whiten = directions[:R].T / np.sqrt(eigenvalues[:R])
    U, values, W = np.linalg.svd(whiten.T @ pairs.cross * s, full_matrices=False)
    scaled = values[:, None] * W
    deviations = np.diag(pairs.targets.matrix)
    squares = deviations + pairs.targets.tokens * np.square(pairs.targets.mean)
    return Regression(
        input_mean=pairs.inputs.mean,
        target_mean=pairs.targets.mean,
        encoder=whiten @ U,
        decoder=scaled / s,
        variance=deviations * np.square(s),
        explained=np.square(scaled),
        squares=squares * np.square(s),
    )


def regression_errors(found: Regression, directions: int) -> np.ndarray:
    """The squared error of each column, [D_out] float64, summed over tokens, of the best map with that many directions.

    Their sum is the least of any linear map of that rank; from min(D_in, D_out) on, that of full linear regression, in
    each column by itself too. Up to u^2 sum_n (s y_n)^2, where u = 2^-24, an error is float32's rounding of y, and 0.
    """
    errors = found.variance - found.explained[:directions].sum(0)
    return np.where(errors > ROUNDING**2 * found.squares, errors, 0.0)


def regression_fvu(found: Regression, directions: int) -> float:
    """FVU of the best linear map with that many directions, over all columns, in the units that `scale` made."""
    return float(regression_errors(found, directions).sum() / found.variance.sum())


def predicted(found: Regression, x: np.ndarray, directions: int | None = None) -> np.ndarray:
    """x[..., D_in] -> [..., D_out] float64, by the best map with that many directions; None: by all."""
    return (x - found.input_mean) @ found.encoder[:, :directions] @ found.decoder[:directions] + found.target_mean
