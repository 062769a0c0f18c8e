"""BatchTopK whose first features reconstruct by themselves."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp

from jax_sae.autoencoder.kinds.batchtopk import BatchTopK
from jax_sae.autoencoder.loss import Terms, squared_error, terms
from jax_sae.autoencoder.model import Values, product

PARTS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Of the features in each prefix, as in the paper: each has about twice as many as the one before."""


class Matryoshka(BatchTopK):
    """`batchtopk`, minimising sum_m |x - x_hat_m|^2 + alpha AuxK, x_hat_m = f[:m] W_dec[:m] + b_dec.

    m runs over the first 1/32, 3/32, 7/32, 15/32 and all of the features, so that the first ones are general and later
    ones do not split or absorb them. Bussmann et al. 2025 (https://arxiv.org/abs/2503.17547), equations 3 and 4.
    """

    pads = False  # the prefixes are parts of its own number of features

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, values: Values) -> Terms:
        """sum_m |y - y_hat_m|^2 + alpha AuxK, summed over tokens; `squared_error` is that of all features."""
        candidates = self.candidates(x)
        features = self.keep(candidates, weights, values)
        written, errors = self.b_dec, []
        for by_part in self.by_parts(features):
            written = written + by_part
            errors.append(squared_error(targets, written, weights))
        penalty = sum(errors[:-1]) + self.auxk(lambda: candidates, targets - written, weights, values)
        return terms(targets, written, features, weights, penalty)._replace(smallest=self.smallest(features))

    def by_parts(self, features: jax.Array) -> list[jax.Array]:
        """What the features [B, F] between two ends of prefixes write, without b_dec, [B, D_written] each."""
        F = self.features * self.shards.feature
        ends = sorted({max(1, round(part * F)) for part in PARTS})

        def between(first: int) -> list[jax.Array]:
            """Of features that are the ones from `first` on among all."""
            spans = [(max(start - first, 0), min(end - first, self.features)) for start, end in pairwise([0, *ends])]
            return [
                product(features[:, start:end], self.W_dec[start:end], self.precision)
                if start < end
                else jnp.zeros((len(features), self.written_width), jnp.float32)
                for start, end in spans
            ]

        if self.shards.feature == 1:
            return between(0)
        its_first = [partial(between, part * self.features) for part in range(self.shards.feature)]
        written = jax.lax.switch(self.shards.feature_part(), its_first)
        return list(self.shards.over_features(jnp.stack(written)))


KIND = Matryoshka
