"""Normalisations: estimate one, apply it, undo it, fold it into an autoencoder's parameters.

A normalisation is x_n = (x - mean) * scale. The kinds differ in where the two numbers come from:

- dataset: mean[D] of the training activations, scale so that the mean of |x_n|^2 is D (Anthropic, April 2024 update);
- story: of each story, scalar mean and unbiased standard deviation over all its T * D numbers, scale = sqrt(D) / std;
- none: mean 0 and scale 1.

Where activations have the columns of several places side by side, each place has its own, as if it were alone.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.activations.places import Columns, Place, columns, own_columns
from jax_sae.config import Normalization as Kind
from jax_sae.errors import BadInput

Array = TypeVar("Array", np.ndarray, jax.Array)


PerToken = Literal["layer_norm", "norm"]
"""Normalisations of each token by itself, which some dictionaries of other tools were trained on: nothing is fitted."""

LAYER_NORM_EPSILON = 1e-5


class Normalization(NamedTuple):
    """Two arrays that broadcast against activations [..., D]: x_n = (x - mean) * scale."""

    mean: np.ndarray | np.floating | jax.Array
    scale: np.ndarray | np.floating | jax.Array
    """[]; of several places [D1 + D2 + ...], equal numbers for the columns of each."""


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
    refuse_equal(not std > 0, len(x))
    return Normalization(np.float32(mean), np.float32(np.sqrt(x.shape[-1]) / std))


def refuse_equal(is_equal: bool, tokens: int, place: str = "") -> None:
    """Raise BadInput if a story's activations, at a place, are all equal."""
    if is_equal:
        raise BadInput(
            f"{f'at {place}: ' if place else ''}a story of {tokens} tokens has activations that are all equal; it "
            "cannot be normalised by itself"
        )


def estimate_story_traced(x: jax.Array) -> Normalization:
    """`estimate_story` of a traced story: in float32, and differentiable; the scale is infinite where there is none."""
    x = x.astype(jnp.float32)
    return Normalization(jnp.mean(x), jnp.sqrt(x.shape[-1]) / jnp.std(x, ddof=1))


def estimate_stories(x: jax.Array, used: jax.Array, places: Sequence[Place]) -> tuple[Normalization, list[jax.Array]]:
    """`estimate_story` of each row of x[R, T, D1 + D2 + ...] at each place, of the tokens used[R, T]; in float32.

    Returns:
        The normalisation, mean and scale [R, 1, D1 + D2 + ...]; and for each place whether the numbers of a row are all
        equal [R] bool, so that no scale exists.
    """
    tokens = used.sum(-1)
    each, is_equal = [], []
    for first, last in columns(places).values():
        at_place, D = x[:, :, first:last], last - first
        largest = jnp.where(used, at_place.max(-1), -jnp.inf).max(-1)
        spread = largest - jnp.where(used, at_place.min(-1), jnp.inf).min(-1)
        mean = jnp.where(used, at_place.mean(-1), 0).sum(-1) / tokens
        squares = jnp.square((at_place - mean[:, None, None]) / spread[:, None, None])  # none is beyond float32
        variance = jnp.where(used, squares.mean(-1), 0).sum(-1) * D / (tokens * D - 1)
        scale = jnp.sqrt(D / variance) / spread
        each.append([jnp.repeat(number[:, None, None], D, axis=-1) for number in (mean, scale)])
        is_equal.append(spread == 0)
    return Normalization(*(jnp.concatenate(numbers, axis=-1) for numbers in zip(*each, strict=True))), is_equal


def normalize_tokens(kind: PerToken, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token x[..., D] normalised by itself, and mean and scale [..., 1] by which it goes back: y scale + mean.

    layer_norm: (x - mean) / (std + 1e-5), with the unbiased std of its D numbers. norm: x sqrt(D) / |x|; 0 stays 0.
    """
    x = jnp.asarray(x, jnp.float32)
    if kind == "norm":
        norms = jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True))
        scale = jnp.where(norms > 0, norms / jnp.sqrt(jnp.float32(x.shape[-1])), 1)
        return x / scale, jnp.zeros_like(scale), scale
    mean = jnp.mean(x, -1, keepdims=True)
    scale = jnp.std(x, -1, keepdims=True, ddof=1)
    return (x - mean) / (scale + LAYER_NORM_EPSILON), mean, scale


def of_each_place(
    estimate: Callable[[np.ndarray], Normalization], x: np.ndarray, places: Sequence[Place]
) -> Normalization:
    """What `estimate` makes of the columns of each place of x[N, D1 + D2 + ...], side by side.

    Raises:
        BadInput: as `estimate`, with the name of the place.
    """
    if len(places) == 1:
        return estimate(x)
    each = []
    for place, (first, last) in zip(places, columns(places).values(), strict=True):
        try:
            mean, scale = estimate(np.ascontiguousarray(x[:, first:last]))
        except BadInput as error:
            raise BadInput(f"at {place.name}: {error}") from error
        each.append(Normalization(*(np.broadcast_to(number, place.width) for number in (mean, scale))))
    return Normalization(*(np.concatenate(numbers) for numbers in zip(*each, strict=True)))


def of_places(normalization: Normalization, its: Sequence[Columns] | None) -> Normalization:
    """That of some places, in their order, of that of all; of one as `estimate` made it; unchanged where None."""
    if its is None:
        return normalization
    mean, scale = map(np.asarray, normalization)
    if len(its) > 1:
        return Normalization(own_columns(mean, its), own_columns(np.broadcast_to(scale, mean.shape), its))
    return Normalization(mean[slice(*its[0])], scale[its[0][0]] if scale.ndim else scale)


def for_story(kind: Kind, fitted: Normalization, x: np.ndarray, places: Sequence[Place]) -> Normalization:
    """The normalisation of a story x[T, D]: its own with kind 'story', else the one that was fitted for all."""
    return of_each_place(estimate_story, x, places) if kind == "story" else fitted


def normalize(normalization: Normalization, x: Array) -> Array:
    """x in the language model's scale -> normalised."""
    return (x - normalization.mean) * normalization.scale


def denormalize(normalization: Normalization, x: Array) -> Array:
    """Normalised x -> in the language model's scale."""
    return x / normalization.scale + normalization.mean


def fold(
    normalization: Normalization, params: dict[str, Array], written: Normalization | None = None
) -> dict[str, Array]:
    """Parameters that do on raw activations what `params` do on normalised ones, with the same features.

    W_enc <- s W_enc, b_enc <- b_enc - (s mean) W_enc, W_dec <- W_dec / t, b_dec <- b_dec / t + m, with the mean and the
    scale s of what is read, and m and t of what is `written` (None: the same); of dictionaries whose encoder sees x
    itself, not x - b_dec (relu, jumprelu, and all that write other places than they read). With a skip W_skip <- s
    W_skip / t, and b_dec loses mean times that. A `story` normalisation changes from story to story and cannot be
    folded.
    """
    mean, scale = normalization
    to_mean, to_scale = normalization if written is None else written
    folded = {
        "W_enc": params["W_enc"] * np.reshape(scale, (-1, 1)),
        "b_enc": params["b_enc"] - (mean * scale) @ params["W_enc"],
        "W_dec": params["W_dec"] / to_scale,
        "b_dec": params["b_dec"] / to_scale + to_mean,
    }
    if "W_skip" in params:
        folded["W_skip"] = params["W_skip"] * np.reshape(scale, (-1, 1)) / to_scale
        folded["b_dec"] = folded["b_dec"] - mean @ folded["W_skip"]
    return folded
