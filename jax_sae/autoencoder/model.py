"""One autoencoder: x_hat = decode(encode(x)), encode(x) = relu(x W_enc + b_enc), decode(f) = f W_dec + b_dec.

It knows nothing of language models, normalisation or sweeps. Parameters have the names and shapes of the field:
W_enc[D, F], b_enc[F], W_dec[F, D], b_dec[D]; row i of W_dec is the direction of feature i.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.config import Initialization, Precision
from jax_sae.precision import dot_general

Initializer = Callable[..., jax.Array]
Params = dict[str, jax.Array]
"""W_enc[D, F], b_enc[F], W_dec[F, D], b_dec[D], float32."""


def torch_linear(fan_in: int) -> Initializer:
    """Values of torch.nn.Linear, weight and bias alike: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return partial(jax.random.uniform, minval=-bound, maxval=bound)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, W: jax.Array, precision: Precision) -> jax.Array:
    """x[..., I] W[I, O] -> [..., O], with dL/dx = g W^T and dL/dW = x^T g in the same precision.

    The gradients are those that JAX derives. They are written out because of the order of x^T g: JAX computes g^T x and
    transposes it, which XLA does not undo under vmap, and each pass of the optimiser then strides through memory.
    """
    return dot_general(x, W, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _product_forward(x: jax.Array, W: jax.Array, precision: Precision) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, W, precision), (x, W)


def _product_backward(
    precision: Precision, factors: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, W = factors
    leading = tuple(range(x.ndim - 1))
    return (
        dot_general(g, W, (((g.ndim - 1,), (1,)), ((), ())), precision),
        dot_general(x, g, ((leading, leading), ((), ())), precision),
    )


product.defvjp(_product_forward, _product_backward)


class Autoencoder(nn.Module):
    """A ReLU autoencoder of width D with F features.

    initialization:
        'torch': W and b of both layers as torch.nn.Linear draws them (fan-in D for the encoder, F for the decoder).
        'orthogonal': W_dec with orthonormal rows (columns, where F > D), W_enc its transpose, so that with every
        feature active x is projected onto F random directions; b_enc = `encoder_bias`, b_dec = -`encoder_bias` * the
        sum of W_dec's rows, so that x = 0 is reconstructed as 0. It knows nothing of the data.
    """

    width: int
    features: int
    initialization: Initialization = "torch"
    encoder_bias: float = 0.0
    precision: Precision = "float32"

    def setup(self) -> None:
        """Declare the four parameters."""
        D, F = self.width, self.features
        if self.initialization == "torch":
            self.W_enc = self.param("W_enc", torch_linear(D), (D, F))
            self.b_enc = self.param("b_enc", torch_linear(D), (F,))
            self.W_dec = self.param("W_dec", torch_linear(F), (F, D))
            self.b_dec = self.param("b_dec", torch_linear(F), (D,))
        else:
            self.W_dec = self.param("W_dec", nn.initializers.orthogonal(), (F, D))
            self.W_enc = self.param("W_enc", lambda key: self.W_dec.T)
            self.b_enc = self.param("b_enc", nn.initializers.constant(self.encoder_bias), (F,))
            self.b_dec = self.param("b_dec", lambda key: -self.encoder_bias * self.W_dec.sum(0))

    def encode(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> features [..., F], none below 0."""
        return nn.relu(product(x, self.W_enc, self.precision) + self.b_enc)

    def decode(self, features: jax.Array) -> jax.Array:
        """features[..., F] -> reconstruction [..., D]."""
        return product(features, self.W_dec, self.precision) + self.b_dec

    def __call__(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> reconstruction [..., D]."""
        return self.decode(self.encode(x))


def init_params(model: Autoencoder, seed: int) -> Params:
    """Initial parameters of a member, a function of its own seed and width alone."""
    return model.init(jax.random.key(seed), jnp.zeros((1, model.width)))["params"]


def encode(params: Params, x: jax.Array) -> jax.Array:
    """x[..., D] -> features [..., F] of the autoencoder with these parameters."""
    return _apply(params, x, "encode")


def decode(params: Params, features: jax.Array) -> jax.Array:
    """features[..., F] -> reconstruction [..., D] of the autoencoder with these parameters."""
    return _apply(params, features, "decode")


def reconstruct(params: Params, x: jax.Array, precision: Precision = "float32") -> jax.Array:
    """x[..., D] -> reconstruction [..., D] of the autoencoder with these parameters."""
    return _apply(params, x, "__call__", precision)


def _apply(params: Params, x: jax.Array, method: str, precision: Precision = "float32") -> jax.Array:
    D, F = params["W_enc"].shape
    return cast(jax.Array, Autoencoder(D, F, precision=precision).apply({"params": params}, x, method=method))
