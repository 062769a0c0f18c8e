"""Normalisations do what their formulas say, can be undone, and fold."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from running import initial

from jax_sae.activations.normalize import (
    Normalization,
    denormalize,
    estimate_dataset,
    estimate_story,
    fold,
    identity,
    normalize,
)
from jax_sae.autoencoder.kinds.relu import ReLU
from jax_sae.autoencoder.model import decode, encode
from jax_sae.config import Member, TrainConfig
from jax_sae.errors import BadInput

X = np.random.default_rng(0).normal(3.0, 5.0, (200, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
FAR_AWAY = (1e4 + np.random.default_rng(1).normal(0, np.linspace(0.02, 0.1, 6), (300, 6))).astype(np.float32)
"""A mean of 1e4 and deviations of a few hundredths: about 50 times the distance of neighbouring float32 numbers."""
ROUNDING = 2.0**-24
"""Relative error of one float32 operation."""


@pytest.mark.parametrize("x", [X, FAR_AWAY], ids=["near 0", "far away"])
def test_estimates_are_the_formulas_in_float64(x: np.ndarray) -> None:
    """Mean and scale to the last digit of float32, however large the mean is beside the deviations."""
    mean = [sum(map(float, column)) / len(x) for column in x.T]
    variance = sum((float(value) - mean[d]) ** 2 for row in x for d, value in enumerate(row)) / len(x)
    found = estimate_dataset(x)
    assert found.mean.dtype == found.scale.dtype == np.float32
    np.testing.assert_allclose(found.mean, mean, rtol=1.01 * ROUNDING)
    assert float(found.scale) == pytest.approx((6 / variance) ** 0.5, rel=1.01 * ROUNDING)
    for story in (x, x[:1], x[3:5]):
        numbers = [float(value) for value in story.ravel()]
        mean_of_all = sum(numbers) / len(numbers)
        variance = sum((number - mean_of_all) ** 2 for number in numbers) / (len(numbers) - 1)
        of_story = estimate_story(story)
        assert of_story.mean.dtype == of_story.scale.dtype == np.float32
        assert float(of_story.mean) == pytest.approx(mean_of_all, rel=1.01 * ROUNDING)
        assert float(of_story.scale) == pytest.approx((6 / variance) ** 0.5, rel=1.01 * ROUNDING)


@pytest.mark.parametrize("x", [X, FAR_AWAY], ids=["near 0", "far away"])
@pytest.mark.parametrize("as_array", [np.asarray, jax.numpy.asarray], ids=["NumPy", "JAX"])
@pytest.mark.parametrize("estimate", [estimate_dataset, estimate_story, lambda x: identity(6)])
def test_round_trip_gives_the_activations_back(
    x: np.ndarray, as_array: Callable[[np.ndarray], np.ndarray], estimate: Callable[[np.ndarray], Normalization]
) -> None:
    """Within the rounding of its four operations, 3 u |x - mean| + u |x|; exactly where nothing is to be done."""
    normalization = estimate(x)
    back = np.asarray(denormalize(normalization, normalize(normalization, as_array(x))))
    assert back.dtype == np.float32
    exact = x.astype(np.float64)
    bound = 1.01 * ROUNDING * (3 * np.abs(exact - normalization.mean) + np.abs(exact))
    assert np.all(np.abs(back - exact) <= bound)
    if normalization.scale == 1:
        assert np.array_equal(back, x)


def test_dataset_normalisation_has_mean_zero_and_mean_squared_norm_d() -> None:
    """And is undone exactly, up to rounding."""
    normalization = estimate_dataset(X)
    x = normalize(normalization, X)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    assert np.square(x).sum(1).mean() == pytest.approx(6, rel=1e-5)
    np.testing.assert_allclose(denormalize(normalization, x), X, atol=1e-4)


def test_story_normalisation_is_the_source_experiments() -> None:
    """(x - mean) / std * sqrt(D) with scalar mean and unbiased std."""
    expected = (X - X.mean()) / X.std(ddof=1) * np.sqrt(6)
    np.testing.assert_allclose(normalize(estimate_story(X), X), expected, atol=1e-5)


def test_folded_parameters_do_the_same_on_raw_activations() -> None:
    """Same features, and the reconstruction in the model's own scale."""
    normalization = estimate_dataset(X)
    params = initial(Member(11), 6, TrainConfig()).params
    model = ReLU(6, 11)
    folded = fold(normalization, params)
    features = encode(model, params, {}, normalize(normalization, X))
    np.testing.assert_allclose(encode(model, folded, {}, X), features, atol=1e-5)
    expected = denormalize(normalization, decode(model, params, features))
    np.testing.assert_allclose(decode(model, folded, features), expected, atol=1e-4)
    assert isinstance(folded["W_enc"], jax.Array)


@pytest.mark.parametrize("x", [X, FAR_AWAY], ids=["near 0", "far away"])
def test_folding_is_exact_algebra(x: np.ndarray) -> None:
    """In float64 nothing but rounding is left between folded and unfolded, whatever the mean."""
    normalization = Normalization(*(np.asarray(value, np.float64) for value in estimate_dataset(x)))
    rng = np.random.default_rng(2)
    shapes = {"W_enc": (6, 11), "b_enc": (11,), "W_dec": (11, 6), "b_dec": (6,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    folded = fold(normalization, params)
    assert {name: value.shape for name, value in folded.items()} == shapes

    def features_and_reconstruction(params: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = np.maximum(x @ params["W_enc"] + params["b_enc"], 0)
        return features, features @ params["W_dec"] + params["b_dec"]

    raw = x.astype(np.float64)
    features, x_hat = features_and_reconstruction(params, normalize(normalization, raw))
    folded_features, folded_x_hat = features_and_reconstruction(folded, raw)
    assert features.any() and not features.all()
    np.testing.assert_allclose(folded_features, features, rtol=0, atol=1e-8)
    np.testing.assert_allclose(folded_x_hat, denormalize(normalization, x_hat), rtol=0, atol=1e-8)


def test_activations_that_do_not_vary_are_an_error() -> None:
    """No scale exists for them."""
    for estimate in (estimate_dataset, estimate_story):
        with pytest.raises(BadInput, match="all equal"):
            estimate(np.ones((4, 3), np.float32))
