"""The k largest features of each token."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.autoencoder.loss import Terms, squared_error, terms
from jax_sae.autoencoder.model import Autoencoder, Values, product
from jax_sae.autoencoder.selection import keep_largest_of_rows


class TopK(Autoencoder):
    """f = the k largest of relu((x - b_dec) W_enc + b_enc), the others 0, minimising |x - x_hat|^2 + alpha AuxK.

    AuxK = |e - e_hat|^2, e = x - x_hat without a gradient, e_hat = what the D / 2 largest dead features of the token
    make of it, without a bias: so dead features learn what the others miss. Gao et al. 2024
    (https://arxiv.org/abs/2406.04093), sections 2.3 and A.2; alpha = `auxk_coefficient`.
    """

    settings: ClassVar[Mapping[str, Any]] = {
        "k": 32,
        "auxk_coefficient": 1 / 32,
        "decoder_norm": "unit",
        "decoder_bias": "geometric_median",
    }
    penalties = ("auxk_coefficient",)

    def candidates(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> relu((x - b_dec) W_enc + b_enc), [..., F]."""
        return nn.relu(self.pre_activations(x - self.b_dec))

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """The k largest candidates of each token."""
        return keep_largest_of_rows(self.candidates(x), values["k"], self.most_k)

    def loss(self, x: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|x - x_hat|^2 + alpha AuxK, summed over tokens."""
        candidates = self.candidates(x)
        features = keep_largest_of_rows(candidates, values["k"], self.most_k)
        x_hat = self.decode(features)
        return terms(x, x_hat, features, weights, self.auxk(candidates, x, x_hat, weights, values))

    def auxk(
        self, candidates: jax.Array, x: jax.Array, x_hat: jax.Array, weights: jax.Array, values: Values
    ) -> jax.Array:
        """Alpha AuxK, summed over tokens; 0 where no feature is dead."""
        if not self.penalised:
            return jnp.float32(0)
        most = min(self.features, max(1, self.width // 2))
        dead, missed = values["dead"], jax.lax.stop_gradient(x - x_hat)

        def of_dead(candidates: jax.Array, W_dec: jax.Array) -> jax.Array:
            features = keep_largest_of_rows(jnp.where(dead, candidates, 0.0), jnp.int32(most), most)
            return squared_error(missed, product(features, W_dec, self.precision), weights)

        def of_none(candidates: jax.Array, W_dec: jax.Array) -> jax.Array:
            del candidates, W_dec
            return jnp.float32(0)

        error = jax.lax.cond(values["any_dead"], of_dead, of_none, candidates, self.W_dec)
        return values["auxk_coefficient"] * error


KIND = TopK
