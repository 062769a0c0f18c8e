"""FVU and the PCA floor against closed forms."""

import numpy as np
import pytest

from jax_sae.autoencoder.baselines import add_rows, covariance_eigenvalues, no_scatter, pca_floor, principal_directions
from jax_sae.autoencoder.metrics import fraction_of_variance_unexplained

X = (np.random.default_rng(0).normal(size=(500, 8)) * np.array([5, 4, 3, 2, 1, 0.5, 0.1, 0.01]) + 100).astype(
    np.float32
)


def fvu(x_hat: np.ndarray) -> float:
    """FVU of a reconstruction of X."""
    x = X.astype(np.float64)
    return fraction_of_variance_unexplained(np.square(x - x_hat).sum(1), np.square(x - x.mean(0)).sum())


def test_fvu_of_identity_mean_and_a_shifted_mean() -> None:
    """0, 1, and 1 + |shift|^2 / variance."""
    mean = X.mean(0, dtype=np.float64)
    variance = np.square(X - mean).sum(1).mean()
    assert fvu(X) == 0
    assert fvu(mean) == pytest.approx(1, abs=1e-12)
    assert fvu(mean + 2.0) == pytest.approx(1 + 8 * 4 / variance, rel=1e-9)


@pytest.mark.parametrize("directions", range(9))
def test_pca_reaches_its_floor_and_other_directions_do_not(directions: int) -> None:
    """The floor is what projection on the leading eigenvectors loses; random directions lose more."""
    eigenvalues = covariance_eigenvalues(X, rows_at_a_time=64)
    x = X.astype(np.float64) - X.mean(0, dtype=np.float64)
    _, _, V = np.linalg.svd(x, full_matrices=False)
    lost = np.square(x - x @ V[:directions].T @ V[:directions]).sum()
    assert pca_floor(eigenvalues, directions) == pytest.approx(lost, rel=1e-6, abs=1e-6)
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0][:, :directions]
    if 0 < directions < 8:
        assert np.square(x - x @ Q @ Q.T).sum() > lost


def test_eigenvalues_sum_to_the_variance() -> None:
    """Largest first, and all of it."""
    eigenvalues = covariance_eigenvalues(X)
    assert np.all(np.diff(eigenvalues) <= 0)
    assert eigenvalues.sum() == pytest.approx(np.square(X - X.mean(0, dtype=np.float64)).sum(), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 499, 500, 8192])
def test_eigenvalues_depend_neither_on_chunks_nor_on_the_mean(rows: int) -> None:
    """Those of a singular value decomposition of the centred rows in float64, at a mean of 10,000 too."""
    for x in (X, X + np.float32(10_000), X[:5]):
        exact = x.astype(np.float64)
        singular = np.linalg.svd(exact - exact.mean(0), compute_uv=False)
        expected = np.pad(singular**2, (0, 8 - len(singular)))
        found = covariance_eigenvalues(x, rows_at_a_time=rows)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * expected[0])


def rows_of_rank(kind: str, width: int) -> tuple[np.ndarray, int]:
    """Float32 rows as layers give them, and the number of directions in which they vary."""
    chance = np.random.default_rng(0)
    x = (chance.normal(size=(700, width)) * np.exp(chance.normal(size=width))).astype(np.float32)
    x[:, 3] += 300  # as the residual streams of most models have it
    centred = x - x.mean(-1, keepdims=True)
    gain, bias = chance.normal(size=(2, width)).astype(np.float32)
    match kind:
        case "centred":
            return centred, width - 1
        case "layer-normed":
            return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * gain + bias, width - 1
        case "rank 5":
            factors = chance.normal(size=(700, 5)), chance.normal(size=(5, width))
            return factors[0].astype(np.float32) @ factors[1].astype(np.float32) + 20 * bias, 5
        case "equal":
            return np.broadcast_to(bias * np.float32(0.1), (700, width)), 0
        case "steep":  # standard deviations from 1 to 1e-5
            turned = np.linalg.qr(chance.normal(size=(width, width)))[0]
            return ((chance.normal(size=(700, width)) * np.geomspace(1, 1e-5, width)) @ turned).astype(
                np.float32
            ), width
    return x, width


@pytest.mark.parametrize("width", [8, 64, 512])
@pytest.mark.parametrize("kind", ["centred", "layer-normed", "rank 5", "equal", "steep", "full"])
def test_eigenvalues_that_are_rounding_are_zero_and_no_others(kind: str, width: int) -> None:
    """At once and in pieces. No floor, and no ratio to one, is made of what float32 has added to the last digits."""
    x, rank = rows_of_rank(kind, width)
    scatter = no_scatter(width)
    for start in range(0, 700, 97):
        scatter = add_rows(scatter, x[start : start + 97])
    for eigenvalues in (covariance_eigenvalues(x), principal_directions(scatter)[0]):
        assert (eigenvalues > 0).tolist() == [True] * rank + [False] * (width - rank)
        assert pca_floor(eigenvalues, rank) == 0 and (rank == 0 or pca_floor(eigenvalues, rank - 1) > 0)


def test_fvu_sums_in_float64() -> None:
    """Exactly, where float32 would lose the thousand small errors beside the large one."""
    errors = np.array([2.0**30, *[1.0] * 1000])
    assert fraction_of_variance_unexplained(errors, 4.0) == (2**30 + 1000) / 4
