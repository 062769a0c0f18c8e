"""The k largest features of each token."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.autoencoder.loss import Terms, squared_error, terms
from jax_sae.autoencoder.model import Autoencoder, Values, product
from jax_sae.autoencoder.selection import keep_largest_of_any, keep_largest_of_rows
from jax_sae.autoencoder.sparse import topk_reconstruct


def is_sparse_faster(features: int, most_k: int) -> bool:
    """Whether a step is faster without dense work on inactive features (docs/performance.md).

    Measured on CPUs. Elsewhere the dense form is taken, which also gives the same bits each time.
    """
    return jax.default_backend() == "cpu" and features >= 64 * most_k


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
    encode_settings: ClassVar[tuple[str, ...]] = ("k",)

    def candidates(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> relu((x - b_dec) W_enc + b_enc), [..., F]."""
        return nn.relu(self.pre_activations(x - self.b_dec))

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """The k largest candidates of each token."""
        if not self.most_k:
            return keep_largest_of_any(self.candidates(x), values["k"])
        return keep_largest_of_rows(self.candidates(x), values["k"], self.most_k)

    def loss(self, x: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|x - x_hat|^2 + alpha AuxK, summed over tokens."""
        if is_sparse_faster(self.features, self.most_k):
            return self.sparse_loss(x, weights, values)
        candidates = self.candidates(x)
        features = keep_largest_of_rows(candidates, values["k"], self.most_k)
        x_hat = self.decode(features)
        return terms(x, x_hat, features, weights, self.auxk(lambda: candidates, x - x_hat, weights, values))

    def sparse_loss(self, x: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """The same without dense work on inactive features."""
        x_hat, active, places = topk_reconstruct(
            x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, values["k"], self.most_k, self.precision
        )
        fired = jnp.zeros(self.features, jnp.float32).at[places].add(jnp.where(active > 0, weights[:, None], 0.0))
        auxk = self.auxk(lambda: self.candidates(x), x - x_hat, weights, values)
        return Terms(squared_error(x, x_hat, weights), auxk, fired, jnp.float32(0))

    def auxk(
        self, candidates: Callable[[], jax.Array], error: jax.Array, weights: jax.Array, values: Values
    ) -> jax.Array:
        """Alpha AuxK of an error x - x_hat [B, D], summed over tokens; 0, and not computed, if no feature is dead."""
        if not self.penalised:
            return jnp.float32(0)
        most = min(self.features, max(1, self.width // 2))
        dead, missed = values["dead"], jax.lax.stop_gradient(error)

        def of_dead() -> jax.Array:
            features = keep_largest_of_rows(jnp.where(dead, candidates(), 0.0), jnp.int32(most), most)
            remaining = squared_error(missed, product(features, self.W_dec, self.precision), weights)
            return jnp.where(jnp.any(dead), remaining, 0.0)  # others that are computed with it may have dead ones

        return values["auxk_coefficient"] * jax.lax.cond(values["any_dead"], of_dead, lambda: jnp.float32(0))


KIND = TopK
