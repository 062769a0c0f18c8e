"""One half decides whether a feature is on, the other how large it is."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.autoencoder.loss import Terms, l1_norm, squared_error, terms
from jax_sae.autoencoder.model import Autoencoder, Values, product


class Gated(Autoencoder):
    """f_i = relu(m_i) where g_i > 0, else 0, with p = (x - b_dec) W_enc, g = p + b_gate, m = p exp(r_mag) + b_mag.

    It minimises |x - x_hat|^2 + lambda sum_i relu(g_i) |W_dec_i| + |x - x_hat_gate|^2, x_hat_gate = relu(g) W_dec +
    b_dec without gradients of W_dec and b_dec. So the penalty shrinks the gate, not the feature, and the last term
    teaches the gate, which f itself cannot. Rajamanoharan et al. 2024 (https://arxiv.org/abs/2404.16014), equations 6
    to 8; the norms |W_dec_i| are 1 there.
    """

    settings: ClassVar[Mapping[str, Any]] = {
        "l1_coefficient": None,
        "decoder_norm": "unit",
    }
    penalties = ("l1_coefficient",)
    splits_features = True

    def setup(self) -> None:
        """Declare the parameters: b_gate[F], b_mag[F] and r_mag[F] in place of b_enc."""
        self.declare_weights()
        self.b_gate = self.param("b_gate", self.initial_bias(), (self.features,))
        self.b_mag = self.param("b_mag", self.initial_bias(), (self.features,))
        self.r_mag = self.param("r_mag", nn.initializers.zeros, (self.features,), jnp.float32)

    def gate_and_magnitude(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x[..., D] -> g and f, [..., F] each."""
        p = self.product(self.centred(x), self.W_enc)
        gate = p + self.b_gate
        return gate, jnp.where(gate > 0, nn.relu(p * jnp.exp(self.r_mag) + self.b_mag), 0.0)

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """relu(m) where g > 0."""
        del values
        return self.gate_and_magnitude(x)[1]

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|y - y_hat|^2 + lambda sum_i relu(g_i) |W_dec_i| + |y - y_hat_gate|^2, summed over tokens."""
        gate, features = self.gate_and_magnitude(x)
        open_gates = nn.relu(gate)
        W_dec, b_dec, frozen = jax.lax.stop_gradient((self.W_dec, self.b_dec, targets))  # a skip is in the targets
        by_gate = self.shards.over_features(product(open_gates, W_dec, self.precision)) + b_dec
        of_gate = squared_error(frozen, by_gate, weights)
        l1 = self.shards.over_features(l1_norm(open_gates, self.direction_norms(), weights))
        penalty = values["ramp"] * values["l1_coefficient"] * l1 + of_gate
        return terms(targets, self.decode(features), features, weights, penalty)


KIND = Gated
