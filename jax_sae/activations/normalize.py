"""Normalisations: estimate one, apply it, undo it, fold it into an autoencoder's parameters.

A normalisation is x_n = (x - mean) * scale. The kinds differ in where the two numbers come from:

- dataset: mean[D] of the training activations, scale so that the mean of |x_n|^2 is D (Anthropic, April 2024 update);
- story: of each story, scalar mean and unbiased standard deviation over all its T * D numbers, scale = sqrt(D) / std;
- none: mean 0 and scale 1.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.config import Normalization as Kind
from jax_sae.errors import BadInput

Array = TypeVar("Array", np.ndarray, jax.Array)


class Normalization(NamedTuple):
    """Two arrays that broadcast against activations [..., D]: x_n = (x - mean) * scale."""

    mean: np.ndarray | np.floating | jax.Array
    scale: np.ndarray | np.floating | jax.Array


def identity(width: int) -> Normalization:
    """The normalisation that changes nothing."""
    return Normalization(np.zeros(width, np.float32), np.ones((), np.float32))


def estimate_dataset(x: np.ndarray) -> Normalization:
    """Of rows x[N, D]: their mean, and sqrt(D / mean |x - mean|^2); computed in float64, kept in float32.

    Raises:
        BadInput: if the rows do not vary, so that no scale exists.
    """
    mean = x.mean(0, dtype=np.float64)
    variance = np.mean([np.square(row - mean).sum() for row in x])
    if not variance > 0:
        raise BadInput(
            f"the {len(x)} activations that were read for the normalisation are all equal; "
            "there is nothing to learn from them"
        )
    return Normalization(mean.astype(np.float32), np.float32(np.sqrt(x.shape[1] / variance)))


def estimate_story(x: np.ndarray) -> Normalization:
    """Of one story x[T, D]: its scalar mean, and sqrt(D) / std with the unbiased standard deviation.

    Raises:
        BadInput: if all T * D numbers are equal, so that no scale exists.
    """
    mean, std = x.mean(dtype=np.float64), x.std(dtype=np.float64, ddof=1)
    if not std > 0:
        raise BadInput(
            f"a story of {len(x)} tokens has activations that are all equal; it cannot be normalised by itself"
        )
    return Normalization(np.float32(mean), np.float32(np.sqrt(x.shape[-1]) / std))


def estimate_story_traced(x: jax.Array) -> Normalization:
    """`estimate_story` of a traced story: in float32, and differentiable; the scale is infinite where there is none."""
    x = x.astype(jnp.float32)
    return Normalization(jnp.mean(x), jnp.sqrt(x.shape[-1]) / jnp.std(x, ddof=1))


def for_story(kind: Kind, fitted: Normalization, x: np.ndarray) -> Normalization:
    """The normalisation of a story x[T, D]: its own with kind 'story', else the one that was fitted for all."""
    return estimate_story(x) if kind == "story" else fitted


def normalize(normalization: Normalization, x: Array) -> Array:
    """x in the language model's scale -> normalised."""
    return (x - normalization.mean) * normalization.scale


def denormalize(normalization: Normalization, x: Array) -> Array:
    """Normalised x -> in the language model's scale."""
    return x / normalization.scale + normalization.mean


def fold(normalization: Normalization, params: dict[str, Array]) -> dict[str, Array]:
    """Parameters that do on raw activations what `params` do on normalised ones, with the same features.

    W_enc <- s W_enc, b_enc <- b_enc - (s mean) W_enc, W_dec <- W_dec / s, b_dec <- b_dec / s + mean; of kinds whose
    encoder sees x itself, not x - b_dec (relu, jumprelu). A `story` normalisation changes from story to story and
    cannot be folded.
    """
    mean, scale = normalization
    return {
        "W_enc": params["W_enc"] * scale,
        "b_enc": params["b_enc"] - (mean * scale) @ params["W_enc"],
        "W_dec": params["W_dec"] / scale,
        "b_dec": params["b_dec"] / scale + mean,
    }
