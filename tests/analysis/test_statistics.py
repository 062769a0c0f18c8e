"""Metrics of a stream of tokens are the plain formulas on the whole set, however it is split into batches."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sae.analysis.statistics import Sums, add_tokens, density_histogram, feature_density, metrics, no_tokens
from jax_sae.autoencoder.baselines import covariance_eigenvalues
from jax_sae.errors import BadInput

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


def some_tokens(N: int, D: int, F: int, mean: float, seed: int) -> Tokens:
    """x, features and x_hat; some tokens are zero, some reconstructed as zero, some features dead and some dense."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(N, D)) * rng.uniform(0.1, 3, D) + mean).astype(np.float32)
    features = np.maximum(rng.normal(size=(N, F)) - np.linspace(-1, 4, F), 0).astype(np.float32)
    x_hat = (0.8 * x + rng.normal(0, 0.3, (N, D))).astype(np.float32)
    x[rng.random(N) < 0.1] = 0
    x_hat[rng.random(N) < 0.1] = 0
    return x, features, x_hat


def streamed(tokens: Tokens, cuts: Iterable[int] = ()) -> Sums:
    """Sums of batches that end at these tokens."""
    x, features, x_hat = tokens
    edges = [0, *sorted(cuts), len(x)]
    sums = no_tokens(x.shape[1], features.shape[1])
    for start, stop in pairwise(edges):
        sums = add_tokens(sums, x[start:stop], features[start:stop], x_hat[start:stop])
    return sums


def by_hand(tokens: Tokens) -> dict[str, float | None]:
    """Every metric from its definition, on the whole set in float64."""
    x, f, x_hat = (array.astype(np.float64) for array in tokens)
    N = len(x)
    fvu = np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(0)) ** 2)
    norms, norms_out = np.sqrt((x**2).sum(1)), np.sqrt((x_hat**2).sum(1))
    directed = [n for n in range(N) if norms[n] > 0]
    cosines = [x[n] @ x_hat[n] / (norms[n] * norms_out[n]) if norms_out[n] > 0 else 0.0 for n in directed]
    fired = (f > 0).sum(0)
    return {
        "tokens": N,
        "zero_tokens": N - len(directed),
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": np.mean((x - x_hat) ** 2),
        "cossim": float(np.mean(cosines)) if directed else None,
        "l2_norm_in": norms.mean(),
        "l2_norm_out": norms_out.mean(),
        "l2_ratio": float(np.mean([norms_out[n] / norms[n] for n in directed])) if directed else None,
        "relative_reconstruction_bias": np.sum(x_hat**2) / np.sum(x * x_hat) if np.any(x_hat) else None,
        "l0": (f > 0).sum(1).mean(),
        "l1": f.sum(1).mean(),
        "features": f.shape[1],
        "dead_features": int((fired == 0).sum()),
        "dense_features": int((fired / N > 0.1).sum()),
    }


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_metrics_of_any_split_are_the_formulas_on_the_whole(data: st.DataObject) -> None:
    """Batches of any size, empty ones too, at a mean of up to 10,000 deviations."""
    N = data.draw(st.integers(2, 60))
    D, F = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    mean = data.draw(st.sampled_from([0.0, -3.0, 100.0, 1e4]))
    tokens = some_tokens(N, D, F, mean, data.draw(st.integers(0, 1000)))
    tokens[0][0, 0], tokens[2][0] = mean + 1, mean + 1  # never all equal, nor all zero
    cuts = data.draw(st.lists(st.integers(0, N)))
    found = asdict(metrics(streamed(tokens, cuts)))
    for name, expected in by_hand(tokens).items():
        assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), name
    assert found.keys() == by_hand(tokens).keys()


def test_a_huge_mean_costs_no_digits() -> None:
    """At a mean of a million deviations, where a sum of squares minus a squared sum keeps four digits."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3)) + 1e6  # float64, whose own rounding is 1e-10
    noise = 0.1 * rng.normal(size=x.shape)
    features = np.ones((2000, 1))
    expected = np.sum(((x + noise) - x) ** 2) / np.sum((x - x.mean(0)) ** 2)
    for cuts in ((), range(2000), [1, 2, 1999]):
        assert metrics(streamed((x, features, x + noise), cuts)).fvu == pytest.approx(expected, rel=1e-8)


def test_variance_is_what_the_eigenvalues_sum_to() -> None:
    """So FVU and the PCA floor beside it have one denominator; the mean is that of the whole set."""
    tokens = some_tokens(500, 6, 4, 5.0, seed=1)
    sums = streamed(tokens, [100, 101, 350])
    assert sums.variance == pytest.approx(covariance_eigenvalues(tokens[0]).sum(), rel=1e-9)
    np.testing.assert_allclose(sums.mean, tokens[0].mean(0, dtype=np.float64), rtol=1e-12)


def test_known_reconstructions_have_known_metrics() -> None:
    """The identity, the mean, the half and zero."""
    x, features, _ = some_tokens(300, 5, 7, 2.0, seed=2)
    x[:2] = 0
    identity, half, zero = (metrics(streamed((x, features, scale * x))) for scale in (1, np.float32(0.5), 0))
    assert (identity.fvu, identity.explained_variance, identity.mse) == (0, 1, 0)
    assert (identity.l2_ratio, identity.relative_reconstruction_bias) == (1, 1)
    assert identity.cossim == pytest.approx(1, rel=1e-12) and half.cossim == pytest.approx(1, rel=1e-12)
    assert half.l2_ratio == pytest.approx(0.5) and half.relative_reconstruction_bias == pytest.approx(0.5)
    assert (zero.cossim, zero.l2_ratio, zero.relative_reconstruction_bias) == (0, 0, None)
    mean = np.broadcast_to(x.mean(0, dtype=np.float64), x.shape)
    assert metrics(streamed((x, features, mean))).fvu == pytest.approx(1, abs=1e-12)


def test_relative_reconstruction_bias_is_the_best_divisor() -> None:
    """Of all gamma, sum |x_hat / gamma - x|^2 is least at this one: the definition in the paper."""
    tokens = some_tokens(400, 5, 3, 1.0, seed=3)
    x, _, x_hat = (array.astype(np.float64) for array in tokens)
    gamma = metrics(streamed(tokens)).relative_reconstruction_bias
    assert gamma is not None

    def error(divisor: float) -> float:
        return float(np.square(x_hat / divisor - x).sum())

    assert all(error(gamma) < error(gamma * factor) for factor in (0.9, 0.999, 1.001, 1.1))


def test_a_feature_is_dead_in_its_window_only_and_dense_above_a_tenth() -> None:
    """Firing on exactly 10 % of the tokens is not too dense; one token more is."""
    features = np.zeros((1000, 4), np.float32)
    features[:100, 1] = features[:101, 2] = 1e-30
    features[999, 3] = 5
    x = np.random.default_rng(4).normal(size=(1000, 2))
    whole = metrics(streamed((x, features, x), [7]))
    assert (whole.tokens, whole.dead_features, whole.dense_features) == (1000, 1, 1)
    assert whole.l0 == pytest.approx(202 / 1000)
    first = metrics(streamed((x[:900], features[:900], x[:900])))
    assert (first.tokens, first.dead_features) == (900, 2)
    sums = streamed((x, features, x))
    np.testing.assert_array_equal(feature_density(sums), [0, 0.1, 0.101, 0.001])
    edges, counts = density_histogram(sums)
    assert edges[[0, -1]].tolist() == [-3, 0] and counts.sum() == 3
    assert [counts[np.searchsorted(edges, log10, "right") - 1] for log10 in (-3, -0.999)] == [1, 2]


@settings(deadline=None)
@given(N=st.integers(1, 10**7), seed=st.integers(0, 100))
def test_every_feature_that_fires_is_in_the_histogram(N: int, seed: int) -> None:
    """From one token in N to every token, whatever N is."""
    fired = np.random.default_rng(seed).integers(0, N, size=20, endpoint=True)
    fired[:3] = 0, 1, N
    edges, counts = density_histogram(replace(no_tokens(1, 20), tokens=N, fired=fired))
    assert counts.sum() == np.sum(fired > 0) and len(counts) == len(edges) - 1 and counts[-1] > 0


def test_what_cannot_be_measured_is_refused() -> None:
    """Wrong shapes, numbers that are not finite, negative features, no tokens, and no variance."""
    x, features, x_hat = some_tokens(5, 3, 4, 1.0, seed=5)
    sums = no_tokens(3, 4)
    for wrong in ((x[:, :2], features, x_hat), (x, features[:, :3], x_hat), (x, features[:4], x_hat), (x, features, x)):
        if wrong[2] is x:
            wrong = (x, features, x[:4])
        with pytest.raises(BadInput, match="have the shapes"):
            add_tokens(sums, *wrong)
    for i in range(3):
        for value in (np.nan, np.inf):
            spoiled = [x.copy(), features.copy(), x_hat.copy()]
            spoiled[i][2, 1] = value
            with pytest.raises(BadInput, match=r"finite|a feature is nan"):
                add_tokens(sums, *spoiled)
    with pytest.raises(BadInput, match=r"a feature is -1\.0; 0 or more"):
        add_tokens(sums, x, features - np.eye(5, 4, dtype=np.float32) * (features + 1), x_hat)
    with pytest.raises(BadInput, match="no variance to explain"):
        metrics(sums)
    with pytest.raises(BadInput, match="no variance to explain"):
        metrics(add_tokens(sums, x[:1], features[:1], x_hat[:1]))
    with pytest.raises(BadInput, match="no tokens"):
        density_histogram(sums)
