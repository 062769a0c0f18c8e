"""ReLU features, plain or with an L1 penalty."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from jax_sae.autoencoder.loss import Terms, l1_norm, terms
from jax_sae.autoencoder.model import Autoencoder, Values


class ReLU(Autoencoder):
    """f = relu(x W_enc + b_enc), minimising |x - x_hat|^2 + lambda sum_i f_i |W_dec_i|.

    Weighting by the norms of the directions keeps f from shrinking while W_dec grows, without a constraint: Anthropic,
    "Circuits Updates - April 2024", Training Sparse Autoencoders, which also clips gradients to 1 and begins with small
    directions. With lambda = 0 it is the plain autoencoder, which begins with every feature active, as a random
    projection (docs/LOG.md, "Recipe"), and is not clipped.
    """

    settings: ClassVar[Mapping[str, Any]] = {"l1_coefficient": 0.0, "initial_norm": 0.1}
    penalties = ("l1_coefficient",)
    splits_features = True

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of the sparse autoencoder or, without a penalty, of the plain one."""
        if given.get("l1_coefficient"):
            return cls.settings
        return {**cls.settings, "clip": 0.0, "initialization": "orthogonal", "encoder_bias": 2.0}

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """relu(x W_enc + b_enc)."""
        del values
        return nn.relu(self.pre_activations(x))

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|y - y_hat|^2 + lambda sum_i f_i |W_dec_i|, summed over tokens."""
        features = self.encode(x, values)
        written = self.decode(features)
        if not self.is_weighed("l1_coefficient"):
            return terms(targets, written, features, weights)
        l1 = self.shards.over_features(l1_norm(features, self.direction_norms(), weights))
        penalty = values["ramp"] * values["l1_coefficient"] * l1
        return terms(targets, written, features, weights, penalty)


KIND = ReLU
