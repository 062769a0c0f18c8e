"""Normalisations do what their formulas say, can be undone, and fold."""

import jax
import numpy as np
import pytest

from jax_sae.activations.normalize import denormalize, estimate_dataset, estimate_story, fold, normalize
from jax_sae.autoencoder.model import Autoencoder
from jax_sae.config import Member, SweepConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.sweep.update import init_member

X = np.random.default_rng(0).normal(3.0, 5.0, (200, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)


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
    params = init_member(Member(11), 6, SweepConfig(), TrainConfig()).params
    model = Autoencoder(6, 11)
    folded = fold(normalization, params)
    features = model.apply({"params": params}, normalize(normalization, X), method="encode")
    np.testing.assert_allclose(model.apply({"params": folded}, X, method="encode"), features, atol=1e-5)
    expected = denormalize(normalization, model.apply({"params": params}, normalize(normalization, X)))
    np.testing.assert_allclose(model.apply({"params": folded}, X), expected, atol=1e-4)
    assert isinstance(folded["W_enc"], jax.Array)


def test_activations_that_do_not_vary_are_an_error() -> None:
    """No scale exists for them."""
    for estimate in (estimate_dataset, estimate_story):
        with pytest.raises(BadInput, match="all equal"):
            estimate(np.ones((4, 3), np.float32))
