"""What dictionaries of one placement are held against: the mean, PCA of what is written, linear maps of what is read.

PCA of the targets with F directions is a floor of whatever has F features and no skip. Linear maps are no floor of
features behind a ReLU; `autoencoder/regression.py` says what they bound. Where several places are written, all of it is
in units of each place's normalisation, as the dictionaries' own numbers are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_sae.analysis.loss_recovered import Reconstruct
from jax_sae.analysis.measure import Measured, Placement, units_of
from jax_sae.autoencoder.baselines import Scatter, baselines, principal_directions
from jax_sae.autoencoder.regression import Regression, predicted, regression, regression_fvu
from jax_sae.trained import TrainedAutoencoder


@dataclass(frozen=True, eq=False)
class Floors:
    """What the held-out tokens say of a placement without any training."""

    mean: np.ndarray
    """[D_written] float64, of the targets, in the language model's own scale."""
    units: np.ndarray
    """[D_written] float64, what targets are multiplied by before they are measured."""
    eigenvalues: np.ndarray
    """[D_written] float64, of the scatter of the targets in these units, largest first."""
    directions: np.ndarray
    """[D_written, D_written] float64, those of PCA, in rows."""
    linear: Regression | None
    """Of the targets on the inputs; None where these are the same places, of which it is PCA."""


def floors_of(measured: Measured, placement: Placement, sae: TrainedAutoencoder) -> Floors:
    """Those of a placement; `sae` is any dictionary of it."""
    its, units = measured.targets[placement], units_of(sae)
    eigenvalues, directions = principal_directions(
        Scatter(its.mean * units, its.matrix * np.outer(units, units), its.tokens)
    )
    pairs = measured.pairs.get(placement)
    linear = None if pairs is None else regression(pairs, units)
    return Floors(its.mean, units, eigenvalues, directions, linear)


def without_training(floors: Floors, features: int, l0: float) -> dict[str, Reconstruct]:
    """What can be put into a language model, by name: PCA with F and with L0 directions, or linear maps."""

    def pca(n: int) -> Reconstruct:
        V = floors.directions[:n]
        return lambda x, lengths: ((x - floors.mean) * floors.units) @ V.T @ V / floors.units + floors.mean

    def linear_map(found: Regression, n: int | None) -> Reconstruct:
        return lambda x, lengths: predicted(found, x, n)

    if (found := floors.linear) is None:
        return {pca_name(floors, n): pca(n) for n in (features, round(l0))}
    return {linear_name(found, n): linear_map(found, n) for n in (features, None)}


def pca_name(floors: Floors, directions: int) -> str:
    """What PCA with that many directions is called; all of them is the most."""
    return f"PCA with {min(directions, len(floors.eigenvalues))} directions"


def linear_name(linear: Regression, directions: int | None) -> str:
    """What the linear map with that many directions is called; None: with all."""
    most = len(linear.explained)
    return f"a linear map of rank {most if directions is None else min(directions, most)}"


def baselines_record(
    floors: Floors, tokens: int, features: int, l0: float, skip: bool, losses: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """FVU, MSE and losses of what needs no training, beside a dictionary with F features, ready for JSON.

    Args:
        floors: of its placement.
        tokens: how many were measured.
        features: F.
        l0: mean number of active features.
        skip: whether it has one; then PCA is none of its floors, and is left out.
        losses: of each name in `without_training`, what is known.
    """
    of = baselines(floors.eigenvalues, tokens, features, l0)

    def numbers(fvu: float, **more: Any) -> dict[str, Any]:
        return {**more, "fvu": fvu, "explained_variance": 1 - fvu, "mse": fvu * of.mean_mse}

    def pca(directions: float, fvu: float) -> dict[str, Any] | None:
        if skip:
            return None
        return numbers(fvu, directions=directions) | dict(losses.get(pca_name(floors, round(directions)), {}))

    record = {
        "mean": numbers(of.mean_fvu),
        "pca_features": pca(features, of.pca_features_fvu),
        "pca_l0": pca(l0, of.pca_l0_fvu),
    }
    if (linear := floors.linear) is not None:
        for name, n in (("linear_features", features), ("linear", None)):
            rank = len(linear.explained) if n is None else n
            its = losses.get(linear_name(linear, n), {})
            record[name] = numbers(regression_fvu(linear, rank), directions=rank) | dict(its)
    return record
