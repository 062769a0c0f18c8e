"""What dictionaries of every kind share: parameters, their initial values, and the decoder.

A dictionary makes features of inputs x[B, D], and of these what it writes, y_hat[B, D_written], which is to be like
targets y. An autoencoder is the one whose targets are its inputs. A transcoder has others. A crosscoder reads and
writes the activations of several places side by side.

It knows nothing of language models, normalisation or sweeps. Parameters have the names and shapes of the field:
W_enc[D, F], b_enc[F], W_dec[F, D_written], b_dec[D_written]; row i of W_dec is the direction of feature i. What a kind
computes from them, and what else it has, stands in its file in `kinds/`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.autoencoder.loss import Terms
from jax_sae.autoencoder.shards import WHOLE, Shards
from jax_sae.config import Initialization, Precision
from jax_sae.errors import BadInput
from jax_sae.precision import dot_general

Initializer = Callable[..., jax.Array]
Params = dict[str, jax.Array]
"""W_enc[D, F], b_enc[F], W_dec[F, D_written], b_dec[D_written], float32; with a skip W_skip[D, D_written]; and what a
kind has besides or in place of b_enc."""
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
    """A dictionary that reads D numbers, with F features: y_hat = decode(encode(x)), decode(f) = f W_dec + b_dec.

    A kind is a subclass: it says how to `encode`, and which `loss` is minimised. It is written once for autoencoders
    and all others: it takes `centred(x)` for what its paper calls x - b_dec, and `direction_norms()` for |W_dec_i|.

    written: widths of the places that are written, side by side; empty for an autoencoder, which writes what it reads.
    skip: y_hat = f W_dec + b_dec + x W_skip. The last term is taken off the targets before a kind's `loss` sees them.

    initialization:
        'torch': W and b of both layers as torch.nn.Linear draws them (fan-in D for the encoder, F for the decoder).
        'orthogonal': W_dec with orthonormal rows (columns, where F > D), W_enc its transpose, so that with every
        feature active x is projected onto F random directions; b_enc = `encoder_bias`, b_dec = -`encoder_bias` * the
        sum of W_dec's rows, so that x = 0 is reconstructed as 0. It knows nothing of the data.
        'transposed': rows of W_dec in random directions, of norm `initial_norm`, W_enc its transpose, biases 0.
        'independent': rows of W_dec so too, columns of W_enc in random directions of their own, of norm 1, biases 0.
    most_k: the largest k of the members that are computed together; 0 where there is none, or it is not known.
    weighs: those of `penalties` that are above 0 in any of them, so that their terms are computed; None: all are.
    is_trained: whether products have the gradients of `product`, fast in a step, but of reverse mode only.
    shards: on a mesh, in how many parts features and tokens lie; `features` are then those of a part.
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
    splits_features: ClassVar[bool] = False
    """Whether its features may lie on several devices: `self.shards` is then asked for each sum over features."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings that a member of this kind has where it does not say otherwise; `given` is what it says."""
        del given
        return cls.settings

    width: int
    features: int
    written: tuple[int, ...] = ()
    skip: bool = False
    initialization: Initialization = "torch"
    encoder_bias: float = 0.0
    initial_norm: float = 1.0
    precision: Precision = "float32"
    most_k: int = 0
    weighs: tuple[str, ...] | None = None
    is_trained: bool = True
    shards: Shards = WHOLE

    def setup(self) -> None:
        """Declare the parameters."""
        self.declare_weights()
        self.b_enc = self.param("b_enc", self.initial_bias(), (self.features,))

    def declare_weights(self) -> None:
        """Declare those parameters that every kind has."""
        D, F, D_written = self.width, self.features, self.written_width
        if self.skip:
            self.W_skip = self.param("W_skip", nn.initializers.zeros, (D, D_written), jnp.float32)
        if self.initialization == "torch":
            self.W_enc = self.param("W_enc", torch_linear(D), (D, F))
            self.W_dec = self.param("W_dec", torch_linear(F), (F, D_written))
            self.b_dec = self.param("b_dec", torch_linear(F), (D_written,))
            return
        if self.initialization == "orthogonal":
            self.W_dec = self.param("W_dec", nn.initializers.orthogonal(dtype=jnp.float32), (F, D_written))
        else:
            self.W_dec = self.param("W_dec", random_directions(self.initial_norm), (F, D_written))
        self.b_dec = self.param("b_dec", lambda key: -self.encoder_bias * self.W_dec.sum(0))
        if self.initialization == "independent":
            self.W_enc = self.param("W_enc", lambda key: random_directions(1.0)(key, (F, D)).T)
            return
        if D != D_written:
            raise BadInput(
                f"initialization {self.initialization!r} makes W_enc the transpose of W_dec, but {D} numbers are read "
                f"and {D_written} written; use 'independent' or 'torch'"
            )
        self.W_enc = self.param("W_enc", lambda key: self.W_dec.T)

    @property
    def written_width(self) -> int:
        """D_written, of all places that are written."""
        return sum(self.written) or self.width

    def initial_bias(self) -> Initializer:
        """Initial values of the encoder's bias."""
        if self.initialization == "torch":
            return torch_linear(self.width)
        return nn.initializers.constant(self.encoder_bias, jnp.float32)

    def is_weighed(self, *settings: str) -> bool:
        """Whether any of these penalties is to be computed."""
        return self.weighs is None or not set(settings).isdisjoint(self.weighs)

    def product(self, x: jax.Array, W: jax.Array) -> jax.Array:
        """x[..., I] W[I, O] -> [..., O]."""
        if self.is_trained:
            return product(x, W, self.precision)
        return dot_general(x, W, (((x.ndim - 1,), (0,)), ((), ())), self.precision)

    def pre_activations(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> x W_enc + b_enc, [..., F]."""
        return self.product(x, self.W_enc) + self.b_enc

    def centred(self, x: jax.Array) -> jax.Array:
        """x - b_dec for an autoencoder; x for others, whose b_dec is of what they write (Dunefsky et al. 2024)."""
        return x if self.written else x - self.shards.for_features(self.b_dec)

    def direction_norms(self) -> jax.Array:
        """|W_dec_i|, [F]; the sum of those at each written place, where there are several.

        That is what a feature of a crosscoder costs: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features
        and Model Diffing", which finds that the root of the sum of squares makes features seem shared that are not.
        """
        if len(self.written) < 2:
            return row_norms(self.W_dec)
        first, norms = 0, jnp.zeros(self.features)
        for width in self.written:
            norms, first = norms + row_norms(self.W_dec[:, first : first + width]), first + width
        return norms

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """x[..., D] -> features [..., F], none below 0, as they are used once training is over."""
        raise NotImplementedError

    def decode(self, features: jax.Array) -> jax.Array:
        """features[..., F] -> what they write, without a skip, [..., D_written]."""
        return self.shards.over_features(self.product(features, self.W_dec)) + self.b_dec

    def past_the_features(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> x W_skip, [..., D_written]."""
        return self.product(x, self.W_skip)

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """What training minimises, on a batch x[B, D] with weights[B], 1 for a token and 0 for padding.

        `targets`[B, D_written] are what is to be written, x itself for an autoencoder; with a skip, what it leaves.

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


def decode(model: Autoencoder, params: Params, features: jax.Array, x: jax.Array | None = None) -> jax.Array:
    """features[..., F] -> what the dictionary with these parameters writes, [..., D_written].

    With a skip, x[..., D] are the inputs that the features were made of; else they do not matter.
    """
    written = cast(jax.Array, model.apply({"params": params}, features, method="decode"))
    if not model.skip:
        return written
    return written + cast(jax.Array, model.apply({"params": params}, x, method="past_the_features"))


def loss(
    model: Autoencoder,
    params: Params,
    values: Values,
    x: jax.Array,
    weights: jax.Array,
    targets: jax.Array | None = None,
) -> Terms:
    """The terms of the loss of the dictionary with these parameters and values, on a batch x[B, D] with weights[B].

    `targets`[B, D_written] are what it is to write; None: x.
    """
    targets = x if targets is None else targets
    if model.skip:
        targets = targets - cast(jax.Array, model.apply({"params": params}, x, method="past_the_features"))
    return cast(Terms, model.apply({"params": params}, x, targets, weights, values, method="loss"))
