"""What autoencoders of every kind share: parameters, their initial values, and the decoder.

It knows nothing of language models, normalisation or sweeps. Parameters have the names and shapes of the field:
W_enc[D, F], b_enc[F], W_dec[F, D], b_dec[D]; row i of W_dec is the direction of feature i. What a kind computes from
them, and what else it has, stands in its file in `kinds/`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.autoencoder.loss import Terms
from jax_sae.config import Initialization, Precision
from jax_sae.precision import dot_general

Initializer = Callable[..., jax.Array]
Params = dict[str, jax.Array]
"""W_enc[D, F], b_enc[F], W_dec[F, D], b_dec[D], float32, and what a kind has besides or in place of b_enc."""
Values = Mapping[str, jax.Array]
"""A member's settings and what it remembers, by name: k, l1_coefficient, threshold, ..."""


def torch_linear(fan_in: int) -> Initializer:
    """Values of torch.nn.Linear, weight and bias alike: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return partial(jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound)


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
    """An autoencoder of width D with F features: x_hat = decode(encode(x)), decode(f) = f W_dec + b_dec.

    A kind is a subclass: it says how to `encode`, and which `loss` is minimised.

    initialization:
        'torch': W and b of both layers as torch.nn.Linear draws them (fan-in D for the encoder, F for the decoder).
        'orthogonal': W_dec with orthonormal rows (columns, where F > D), W_enc its transpose, so that with every
        feature active x is projected onto F random directions; b_enc = `encoder_bias`, b_dec = -`encoder_bias` * the
        sum of W_dec's rows, so that x = 0 is reconstructed as 0. It knows nothing of the data.
        'transposed': rows of W_dec in random directions, of norm `initial_norm`, W_enc its transpose, biases 0.
    most_k: the largest k of the members that are computed together; 0 where there is none, or it is not known.
    penalised: whether any of them has a penalty above 0, so that it is computed.
    is_trained: whether products have the gradients of `product`, fast in a step, but of reverse mode only.
    """

    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of a member with this kind's defaults: those that only some kinds have, and others where they differ.

    None: has to be given; of several that are None, one of them.
    """
    penalties: ClassVar[tuple[str, ...]] = ()
    """Those settings that weigh a term of the loss, which is not there if all are 0."""
    encode_settings: ClassVar[tuple[str, ...]] = ()
    """Those settings that `encode` reads."""
    couples_tokens: ClassVar[bool] = False
    """Whether the loss is other than a sum over tokens, so that it cannot be computed a part of a batch at a time."""
    pads: ClassVar[bool] = True
    """Whether it may be computed beside wider members, with features of zeros up to their number."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings that a member of this kind has where it does not say otherwise; `given` is what it says."""
        del given
        return cls.settings

    width: int
    features: int
    initialization: Initialization = "torch"
    encoder_bias: float = 0.0
    initial_norm: float = 1.0
    precision: Precision = "float32"
    most_k: int = 0
    penalised: bool = True
    is_trained: bool = True

    def setup(self) -> None:
        """Declare the parameters."""
        self.declare_weights()
        self.b_enc = self.param("b_enc", self.initial_bias(), (self.features,))

    def declare_weights(self) -> None:
        """Declare those parameters that every kind has."""
        D, F = self.width, self.features
        if self.initialization == "torch":
            self.W_enc = self.param("W_enc", torch_linear(D), (D, F))
            self.W_dec = self.param("W_dec", torch_linear(F), (F, D))
            self.b_dec = self.param("b_dec", torch_linear(F), (D,))
            return
        if self.initialization == "orthogonal":
            self.W_dec = self.param("W_dec", nn.initializers.orthogonal(dtype=jnp.float32), (F, D))
        else:
            self.W_dec = self.param("W_dec", random_directions(self.initial_norm), (F, D))
        self.W_enc = self.param("W_enc", lambda key: self.W_dec.T)
        self.b_dec = self.param("b_dec", lambda key: -self.encoder_bias * self.W_dec.sum(0))

    def initial_bias(self) -> Initializer:
        """Initial values of the encoder's bias."""
        if self.initialization == "torch":
            return torch_linear(self.width)
        return nn.initializers.constant(self.encoder_bias, jnp.float32)

    def product(self, x: jax.Array, W: jax.Array) -> jax.Array:
        """x[..., I] W[I, O] -> [..., O]."""
        if self.is_trained:
            return product(x, W, self.precision)
        return dot_general(x, W, (((x.ndim - 1,), (0,)), ((), ())), self.precision)

    def pre_activations(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> x W_enc + b_enc, [..., F]."""
        return self.product(x, self.W_enc) + self.b_enc

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """x[..., D] -> features [..., F], none below 0, as they are used once training is over."""
        raise NotImplementedError

    def decode(self, features: jax.Array) -> jax.Array:
        """features[..., F] -> reconstruction [..., D]."""
        return self.product(features, self.W_dec) + self.b_dec

    def loss(self, x: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """What training minimises, on a batch x[B, D] with weights[B], 1 for a token and 0 for padding.

        Beyond the settings, `values` has `ramp`, from 0 to 1 during the warm-up of the penalty, and, for kinds with
        AuxK, `dead`[F] bool and `any_dead` bool.
        """
        raise NotImplementedError

    @staticmethod
    def initial_memory() -> dict[str, jax.Array]:
        """What a member of this kind remembers besides its parameters, before the first step."""
        return {}

    @staticmethod
    def remember(memory: dict[str, jax.Array], terms: Terms) -> dict[str, jax.Array]:
        """The memory after a batch with these terms."""
        del terms
        return memory

    @staticmethod
    def fresh_bias(name: str, width: int, values: Values) -> jax.Array:
        """What an entry of a parameter [F] is set to when its feature is resampled; width is D."""
        del name, width, values
        return jnp.float32(0)


def random_directions(norm: float) -> Initializer:
    """Rows uniformly distributed on the sphere of that radius."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return norm * unit_rows(jax.random.normal(key, shape, jnp.float32))

    return init


def row_norms(W: jax.Array) -> jax.Array:
    """W[F, D] -> |W_i| [F]; where a row is 0, its norm has the gradient 0, not NaN."""
    squares = jnp.sum(jnp.square(W), -1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def unit_rows(W: jax.Array) -> jax.Array:
    """W[F, D] with each row divided by its norm; rows of zeros stay."""
    norms = row_norms(W)[:, None]
    return W / jnp.where(norms > 0, norms, 1)


def along_the_sphere(gradient: jax.Array, W: jax.Array) -> jax.Array:
    """The gradient [F, D] without its part along each row of W[F, D], whose rows have norm 1, or are 0."""
    return gradient - jnp.sum(gradient * W, -1, keepdims=True) * W


def init_params(model: Autoencoder, seed: int) -> Params:
    """Initial parameters of a member, a function of its own seed, kind and width alone."""
    declared = model.init(jax.random.key(seed), method=lambda model: model.W_dec)  # `setup` declares all of them
    return dict(declared["params"])


def encode(model: Autoencoder, params: Params, values: Values, x: jax.Array) -> jax.Array:
    """x[..., D] -> features [..., F] of the autoencoder with these parameters and values."""
    return cast(jax.Array, model.apply({"params": params}, x, values, method="encode"))


def decode(model: Autoencoder, params: Params, features: jax.Array) -> jax.Array:
    """features[..., F] -> reconstruction [..., D] of the autoencoder with these parameters."""
    return cast(jax.Array, model.apply({"params": params}, features, method="decode"))


def loss(model: Autoencoder, params: Params, values: Values, x: jax.Array, weights: jax.Array) -> Terms:
    """The terms of the loss of the autoencoder with these parameters and values, on a batch x[B, D] with weights[B]."""
    return cast(Terms, model.apply({"params": params}, x, weights, values, method="loss"))
