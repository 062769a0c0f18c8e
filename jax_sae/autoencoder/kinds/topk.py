"""The k largest features of each token."""

from collections.abc import Callable, Mapping
from functools import partial
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
    splits_features = True
    encode_settings: ClassVar[tuple[str, ...]] = ("k",)

    def candidates(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> relu((x - b_dec) W_enc + b_enc), [..., F]."""
        return nn.relu(self.pre_activations(self.centred(x)))

    def ranked(self, candidates: jax.Array, keep: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The candidates [..., F] that are the largest, as `keep` chooses them and sets the others to 0.

        Where several places are written, by what they write there, f_i |W_dec_i| summed over the places, as Minder et
        al. 2025 (https://arxiv.org/abs/2504.02922), section 2, rank the features of crosscoders.
        """
        if len(self.written) < 2:
            return keep(candidates)
        return jnp.where(keep(self.sizes(candidates)) > 0, candidates, 0.0)

    def sizes(self, features: jax.Array) -> jax.Array:
        """features[..., F] as they are ranked, without gradients of the directions."""
        return features if len(self.written) < 2 else features * jax.lax.stop_gradient(self.direction_norms())

    def encode(self, x: jax.Array, values: Values) -> jax.Array:
        """The k largest candidates of each token."""
        if not self.most_k:
            return self.ranked(self.candidates(x), lambda sizes: keep_largest_of_any(sizes, values["k"], self.shards))
        keep = partial(keep_largest_of_rows, k=values["k"], most_k=self.most_k, shards=self.shards)
        return self.ranked(self.candidates(x), keep)

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """|y - y_hat|^2 + alpha AuxK, summed over tokens."""
        if len(self.written) < 2 and is_sparse_faster(self.features, self.most_k):
            return self.sparse_loss(x, targets, weights, values)
        candidates = self.candidates(x)
        keep = partial(keep_largest_of_rows, k=values["k"], most_k=self.most_k, shards=self.shards)
        features = self.ranked(candidates, keep)
        written = self.decode(features)
        auxk = self.auxk(lambda: candidates, targets - written, weights, values)
        return terms(targets, written, features, weights, auxk)

    def sparse_loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """The same without dense work on inactive features."""
        written, active, places = topk_reconstruct(
            x,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            values["k"],
            self.most_k,
            self.precision,
            not self.written,
            self.shards,
        )
        fired = jnp.zeros(self.features, jnp.float32).at[places].add(jnp.where(active > 0, weights[:, None], 0.0))
        auxk = self.auxk(lambda: self.candidates(x), targets - written, weights, values)
        return Terms(squared_error(targets, written, weights), auxk, fired, jnp.float32(0))

    def auxk(
        self, candidates: Callable[[], jax.Array], error: jax.Array, weights: jax.Array, values: Values
    ) -> jax.Array:
        """Alpha AuxK of an error y - y_hat [B, D_written], summed over tokens; not computed if no feature is dead."""
        if not self.is_weighed("auxk_coefficient"):
            return jnp.float32(0)
        most = min(self.features * self.shards.feature, max(1, self.written_width // 2))
        dead, missed = values["dead"], jax.lax.stop_gradient(error)

        def of_dead() -> jax.Array:
            features = keep_largest_of_rows(jnp.where(dead, candidates(), 0.0), jnp.int32(most), most, self.shards)
            written = self.shards.over_features(product(features, self.W_dec, self.precision))
            remaining = squared_error(missed, written, weights)
            # others that are computed with it may have dead ones
            return jnp.where(self.shards.any_feature(dead), remaining, 0.0)

        return values["auxk_coefficient"] * jax.lax.cond(values["any_dead"], of_dead, lambda: jnp.float32(0))


KIND = TopK
