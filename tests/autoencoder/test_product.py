"""The matrix product with gradients of its own, and its precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.autoencoder.kinds.relu import ReLU
from jax_sae.autoencoder.model import decode, encode, init_params, product


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_gradients_are_those_that_jax_derives(leading: tuple[int, ...]) -> None:
    """Of both factors, with any leading axes, alone and under vmap."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, W = jax.random.normal(keys[0], (*leading, 4)), jax.random.normal(keys[1], (3, 4, 5))
    g = jax.random.normal(keys[2], (3, *leading, 5))

    def ours(x: jax.Array, W: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(product(x, W, "float32")) * g)

    def plain(x: jax.Array, W: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.matmul(x, W, precision="highest")) * g)

    for wrap in (lambda f: lambda x, W, g: f(x, W[0], g[0]), lambda f: jax.vmap(f, (None, 0, 0))):
        for found, expected in zip(
            wrap(jax.grad(ours, (0, 1)))(x, W, g), wrap(jax.grad(plain, (0, 1)))(x, W, g), strict=True
        ):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_rounds_the_factors_and_nothing_else() -> None:
    """The result is the float32 product of rounded factors, to float32's accuracy; gradients likewise."""
    x, W = jax.random.normal(jax.random.key(0), (8, 64)), jax.random.normal(jax.random.key(1), (64, 16))
    g = jax.random.normal(jax.random.key(2), (8, 16))
    y, backward = jax.vjp(lambda x, W: product(x, W, "bfloat16"), x, W)
    dx, dW = backward(g)
    xr, Wr, gr = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, W, g))
    for found, expected in ((y, xr @ Wr), (dx, gr @ Wr.T), (dW, xr.T @ gr)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(y) - np.asarray(x, np.float64) @ np.asarray(W, np.float64)).max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "tensorfloat32", "bfloat16"])
def test_precision_of_a_reconstruction(precision: str) -> None:
    """Each precision is within its own rounding of float64; parameters and result are float32."""
    model = ReLU(32, 48, precision=precision)  # type: ignore[arg-type]
    params = init_params(model, 0)
    x = jax.random.normal(jax.random.key(1), (100, 32))
    found = decode(model, params, encode(model, params, {}, x))
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    exact = np.maximum(np.asarray(x, np.float64) @ p["W_enc"] + p["b_enc"], 0) @ p["W_dec"] + p["b_dec"]
    error = np.abs(np.asarray(found) - exact).max()
    assert found.dtype == jnp.float32
    assert error < {"float32": 1e-6, "tensorfloat32": 2e-3, "bfloat16": 2e-2}[precision]
    assert (error > 1e-4) == (precision == "bfloat16")
