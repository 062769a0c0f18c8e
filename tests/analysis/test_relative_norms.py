"""Relative decoder norms are those of the definition, whatever the size of a direction; dead features do not count."""

import numpy as np
import pytest

from jax_sae.activations.places import Place
from jax_sae.analysis.relative_norms import relative_norms, sides_of, summarized

PLACES = [Place("0.resid_post", 3), Place("1.resid_post", 2), Place("2.resid_post", 4)]


def test_norms_are_those_of_the_definition() -> None:
    """At each place, over their sum; a row of any size has the same, and one of zeros has none."""
    W = np.random.default_rng(0).normal(size=(6, 9))
    W[3] *= 1e-200
    W[4, :5] = 0
    W[5] = 0
    sides, found = relative_norms(W, PLACES)
    assert sides == [place.name for place in PLACES]
    with np.errstate(invalid="ignore"):
        norms = np.stack(
            [
                np.linalg.norm(W[:, a:b] * [[1], [1], [1], [1e200], [1], [1]], axis=1)
                for a, b in ((0, 3), (3, 5), (5, 9))
            ],
            1,
        )
        np.testing.assert_allclose(found, norms / norms.sum(1, keepdims=True))
    np.testing.assert_array_equal(found[4], [0, 0, 1])
    assert np.isnan(found[5]).all()
    its = summarized(sides, found, np.array([True] * 6))
    assert (its.compared, its.left_out) == (5, 1) and its.shared is None
    assert np.array(its.histograms).sum(1).tolist() == [5, 5, 5] and sum(its.largest) == 5
    np.testing.assert_allclose(its.mean, np.nanmean(found, 0))


def test_of_two_models_each_is_a_side_and_their_features_are_told_apart() -> None:
    """Over all places of a model; only, shared, only by the limits; those that never fired are left out."""
    names = ["base:0.resid_post", "tuned:0.resid_post", "base:1.z"]
    assert sides_of(names) == ["base", "tuned", "base"]
    assert sides_of(names[::2]) == names[::2] and sides_of(["0.z", "1.z"]) == ["0.z", "1.z"]
    parts = np.array([0, 0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95, 1.0, 0.5])
    W = np.stack([(1 - parts) * 0.3, -parts, (1 - parts) * 0.7], 1) * 7
    sides, found = relative_norms(W, [Place(name, 1) for name in names])
    assert sides == ["base", "tuned"]
    np.testing.assert_allclose(found, np.stack([1 - parts, parts], 1), atol=1e-12)
    fired = np.arange(10) < 9
    its = summarized(sides, np.round(found, 12), fired)
    assert (its.compared, its.left_out) == (9, 1)
    assert (its.only_first, its.shared, its.only_second) == pytest.approx((2 / 9, 3 / 9, 2 / 9))
    none = summarized(sides, found, np.zeros(10, bool))
    assert (none.compared, none.mean, none.shared) == (0, None, None)
