"""The optimiser against Optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sae.sweep.optimizer import scale_by_adam


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.0, 0.99), (0.9, 0.0)])
def test_adam_equals_optaxs(beta1: float, beta2: float) -> None:
    """Forty steps with gradients of very different sizes, some of them zero: updates and state."""
    ours, theirs = scale_by_adam(beta1, beta2), optax.scale_by_adam(beta1, beta2)
    params = {"W": jnp.zeros((7, 5)), "b": jnp.zeros(5)}
    state, expected_state = ours.init(params), theirs.init(params)
    update = jax.jit(ours.update)
    for key in jax.random.split(jax.random.key(0), 40):
        g = {"W": jax.random.normal(key, (7, 5)) * 10.0 ** jnp.arange(-6, 1)[:, None], "b": jnp.arange(5.0)}
        updates, state = update(g, state)
        expected, expected_state = theirs.update(g, expected_state)
        for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)  # averages may cancel
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert found.dtype == wanted.dtype
        largest = np.abs(wanted).max(-1, keepdims=True) if wanted.ndim else 0
        assert (np.abs(found - wanted) <= 1e-6 * largest).all()
