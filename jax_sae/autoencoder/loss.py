"""What training minimises."""

import jax
import jax.numpy as jnp


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


def loss_per_element(squared_error: jax.Array, weights: jax.Array, width: int) -> jax.Array:
    """The squared error divided by the number of tokens and by D, in (normalised units)^2; 0 without tokens."""
    return squared_error / (jnp.maximum(jnp.sum(weights), 1) * width)
