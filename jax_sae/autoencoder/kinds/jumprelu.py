"""Features above a learned threshold of their own."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.autoencoder.loss import Terms, terms
from jax_sae.autoencoder.model import Autoencoder, Values


def _window(z: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """K((z - threshold) / bandwidth) / bandwidth, K = 1 from -1/2 to 1/2: how dense z are around the threshold."""
    return (jnp.abs(z - threshold) < bandwidth / 2) / bandwidth


@jax.custom_vjp
def jump(z: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """z where z > threshold, else 0; d/dthreshold = -threshold K((z - threshold) / bandwidth) / bandwidth."""
    del bandwidth
    return jnp.where(z > threshold, z, 0.0)


@jax.custom_vjp
def step(z: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """1 where z > threshold, else 0; d/dthreshold = -K((z - threshold) / bandwidth) / bandwidth, and 0 for z."""
    del bandwidth
    return (z > threshold).astype(z.dtype)


Inputs = tuple[jax.Array, jax.Array, jax.Array]


def _jump_backward(inputs: Inputs, g: jax.Array) -> Inputs:
    z, threshold, bandwidth = inputs
    g_threshold = -threshold * jnp.sum(g * _window(z, threshold, bandwidth), 0)
    return jnp.where(z > threshold, g, 0.0), g_threshold, jnp.zeros_like(bandwidth)


def _step_backward(inputs: Inputs, g: jax.Array) -> Inputs:
    z, threshold, bandwidth = inputs
    g_threshold = -jnp.sum(g * _window(z, threshold, bandwidth), 0)
    return jnp.zeros_like(z), g_threshold, jnp.zeros_like(bandwidth)


jump.defvjp(lambda *inputs: (jump(*inputs), inputs), _jump_backward)
step.defvjp(lambda *inputs: (step(*inputs), inputs), _step_backward)


class JumpReLU(Autoencoder):
    """f_i = z_i where z_i > theta_i, else 0, z = x W_enc + b_enc, minimising |x - x_hat|^2 + lambda |f|_0.

    Or, with a `target_l0` in place of lambda, |x - x_hat|^2 + D (L0 / target_l0 - 1)^2 with L0 the mean of |f|_0 over
    the batch. theta = exp(log_threshold). Where f jumps it has no useful gradient; theta gets that of the expected
    loss, estimated with the pre-activations in a window of width `bandwidth` sqrt(D) around it. Rajamanoharan et al.
    2024 (https://arxiv.org/abs/2407.14435), equations 9 to 12, and appendix for the target. There |x|^2 is 1 on
    average, with our `dataset` normalisation D: hence the factors sqrt(D) and D. theta begins at `initial_threshold`
    sqrt(D). The paper's 0.001 for both needs some 1e5 steps until L0 is at its target; from 0.1 it is there after
    hundreds (docs/LOG.md).

    With a `frequency_coefficient` mu there is also mu D sum_i max(0, p_i / `frequency_limit` - 1), p_i the part of the
    batch's tokens on which feature i fires. It presses on features that fire too often to mean something; L0 alone does
    not care which features it is made of. Gemma Scope 2 (DeepMind 2025) trains with a target and such a penalty; its
    announcement has no formula, so this one is ours.
    """

    settings: ClassVar[Mapping[str, Any]] = {
        "l0_coefficient": None,
        "target_l0": None,
        "frequency_coefficient": 0.0,
        "frequency_limit": 0.1,
        "bandwidth": 0.05,
        "initial_threshold": 0.1,
        "decoder_norm": "unit",
    }
    penalties = ("l0_coefficient", "target_l0", "frequency_coefficient")
    couples_tokens = True  # with a target
    splits_features = True

    initial_threshold: float = 0.1

    def setup(self) -> None:
        """Declare the parameters: log_threshold[F] besides the four."""
        super().setup()
        start = nn.initializers.constant(math.log(self.initial_threshold * self.width**0.5), jnp.float32)
        self.log_threshold = self.param("log_threshold", start, (self.features,))

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """The pre-activations that exceed their threshold."""
        del values
        z = self.pre_activations(x)
        return jnp.where(z > jnp.exp(self.log_threshold), z, 0.0)

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|y - y_hat|^2 + lambda |f|_0, or D (L0 / target - 1)^2, summed over tokens."""
        shards = self.shards
        # a padded threshold is 1, which a window may reach
        is_own = shards.feature_numbers(self.features) < values["features"]
        threshold = jnp.exp(jnp.where(is_own, self.log_threshold, 0.0))
        bandwidth = values["bandwidth"] * self.width**0.5
        z = self.pre_activations(x)
        features = jump(z, threshold, bandwidth)
        fires = weights[:, None] * step(z, threshold, bandwidth)
        active = shards.over_features(jnp.sum(fires))
        has_target = values["target_l0"] > 0
        here = jnp.sum(weights)  # the tokens of this part of the batch, whose share of the loss this is
        tokens, target = jnp.maximum(shards.over_tokens(here), 1), jnp.where(has_target, values["target_l0"], 1)
        off_target = here * self.written_width * jnp.square(shards.over_tokens(active) / tokens / target - 1)
        penalty = jnp.where(has_target, off_target, values["l0_coefficient"] * active)
        if self.is_weighed("frequency_coefficient"):
            too_often = nn.relu(shards.over_tokens(jnp.sum(fires, 0)) / tokens / values["frequency_limit"] - 1)
            of_frequency = here * self.written_width * shards.over_features(jnp.sum(jnp.where(is_own, too_often, 0)))
            penalty = penalty + values["frequency_coefficient"] * of_frequency
        return terms(targets, self.decode(features), features, weights, values["ramp"] * penalty)

    @staticmethod
    def fresh_bias(name: str, width: int, values: Values) -> jax.Array:
        """The initial log_threshold; 0 of b_enc."""
        is_threshold = name == "log_threshold"
        return jnp.log(values["initial_threshold"] * width**0.5) if is_threshold else jnp.float32(0)


KIND = JumpReLU
