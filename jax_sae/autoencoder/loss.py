"""What training minimises: sums over the tokens of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Terms(NamedTuple):
    """The loss of a batch, squared_error + penalty, and what is told of it; sums over its tokens."""

    squared_error: jax.Array
    """[] sum_b weights_b |x_b - x_hat_b|^2."""
    penalty: jax.Array
    """[] all else that is minimised."""
    fired: jax.Array
    """[F] float32, tokens on which each feature is above 0."""
    smallest: jax.Array
    """[] the smallest feature above 0, for kinds that remember it; else 0."""


def terms(
    x: jax.Array, x_hat: jax.Array, features: jax.Array, weights: jax.Array, penalty: jax.Array | float = 0.0
) -> Terms:
    """The terms of a reconstruction x_hat[B, D] with features[B, F], and of a penalty."""
    active = jnp.where(features > 0, weights[:, None], 0.0)
    return Terms(squared_error(x, x_hat, weights), jnp.float32(penalty), jnp.sum(active, 0), jnp.float32(0))


def squared_error(x: jax.Array, x_hat: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of squared errors, sum_b weights_b |x_b - x_hat_b|^2.

    A sum, not a mean, over tokens and over D, as in the source experiment; Adam does not see the difference.

    Args:
        x: [B, D], normalised activations.
        x_hat: [B, D], their reconstructions.
        weights: [B], 1 for a token, 0 for padding, whose x and x_hat may be any finite numbers.
    """
    error = jnp.where(weights[:, None] > 0, x_hat - x, 0.0)  # 0 times a square that overflows would be NaN
    return jnp.sum(weights[:, None] * jnp.square(error))


def l1_norm(features: jax.Array, norms: jax.Array, weights: jax.Array) -> jax.Array:
    """sum_b weights_b sum_i features_bi norms_i, of features[B, F] none of which is below 0, and norms[F]."""
    return jnp.sum(jnp.where(weights[:, None] > 0, features, 0.0), 0) @ norms


def loss_per_element(total: jax.Array, tokens: jax.Array, width: int) -> jax.Array:
    """A sum over so many tokens, divided by their number and by D, in (normalised units)^2; 0 without tokens."""
    return total / (jnp.maximum(tokens, 1) * width)
