"""The k largest features a token on average: the B k largest of a batch."""

import jax
import jax.numpy as jnp

from jax_sae.autoencoder.kinds.topk import TopK
from jax_sae.autoencoder.loss import Terms, terms
from jax_sae.autoencoder.model import Values
from jax_sae.autoencoder.selection import keep_largest_of_batch

FORGETTING = 0.99
"""Of the mean of thresholds, so that it is that of about the last hundred batches."""


class BatchTopK(TopK):
    """f = the B k largest of relu((x - b_dec) W_enc + b_enc) over a batch of B tokens, the others 0.

    It minimises |x - x_hat|^2 + alpha AuxK, as `topk` does. A token by itself has no batch: there f is what exceeds a
    threshold, the mean over batches of the smallest feature that was kept. Bussmann et al. 2024
    (https://arxiv.org/abs/2412.06410), equations 2 to 5; the mean is one that forgets, since parameters change.
    """

    couples_tokens = True
    encode_settings = ()

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """The candidates that exceed the threshold."""
        candidates = self.candidates(x)
        return jnp.where(self.sizes(candidates) > values["threshold"], candidates, 0.0)

    def keep(self, candidates: jax.Array, weights: jax.Array, values: Values) -> jax.Array:
        """The k largest candidates a token, on average over the batch's tokens; none of padding."""
        count = values["k"] * self.shards.over_tokens(jnp.sum(weights)).astype(jnp.int32)
        without_padding = jnp.where(weights[:, None] > 0, candidates, 0.0)
        return self.ranked(without_padding, lambda sizes: keep_largest_of_batch(sizes, count, self.shards))

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|y - y_hat|^2 + alpha AuxK, summed over tokens."""
        candidates = self.candidates(x)
        features = self.keep(candidates, weights, values)
        written = self.decode(features)
        auxk = self.auxk(lambda: candidates, targets - written, weights, values)
        return terms(targets, written, features, weights, auxk)._replace(smallest=self.smallest(features))

    def smallest(self, features: jax.Array) -> jax.Array:
        """The smallest feature above 0, as features are ranked, without a gradient; infinity where there is none."""
        sizes = jax.lax.stop_gradient(self.sizes(features))
        return self.shards.smallest(jnp.min(jnp.where(sizes > 0, sizes, jnp.inf)))

    @staticmethod
    def initial_memory() -> dict[str, jax.Array]:
        """The threshold, 0 at first, and the part of the mean that the batches so far make up."""
        return {"threshold": jnp.float32(0), "threshold_weight": jnp.float32(0)}

    @staticmethod
    def remember(memory: dict[str, jax.Array], terms: Terms) -> dict[str, jax.Array]:
        """The mean with this batch, unless nothing was active in it; divided by its weight, it has no bias to 0."""
        weight = FORGETTING * memory["threshold_weight"] + (1 - FORGETTING)
        mean = memory["threshold"] + (1 - FORGETTING) / weight * (terms.smallest - memory["threshold"])
        new = {"threshold": mean, "threshold_weight": weight}
        is_active = jnp.isfinite(terms.smallest)
        return memory | {name: jnp.where(is_active, new[name], memory[name]) for name in new}


KIND = BatchTopK
