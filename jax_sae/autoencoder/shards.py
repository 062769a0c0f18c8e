"""Sums over the parts in which a batch and a dictionary lie on several devices.

On a mesh (`jax_sae/sweep/mesh.py`) a device has some tokens of a batch, along the axis `data`, and some features of a
dictionary, along the axis `feature`. What a kind computes is then of these alone, and where it needs all of them, it
asks here. On one device each of these functions gives back what it is given, and nothing is compiled for it.

Gradients are those of the loss summed over the parts of the batch. A loss is not summed over the parts of a dictionary:
each of them computes it whole. So the gradient of a sum over features is passed on as it is, and of what all parts
share, such as b_dec in x - b_dec, each part has its own contribution, which are summed (Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, section 3, has the two as f and g).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

DATA, FEATURE, MEMBER = "data", "feature", "member"
"""Names of a mesh's axes."""


@dataclass(frozen=True)
class Shards:
    """In how many parts the tokens of a batch and the features of a dictionary lie."""

    data: int = 1
    feature: int = 1

    def over_features(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of the features of what each has computed of its own."""
        return _summed(x) if self.feature > 1 else x

    def for_features(self, x: jax.Array) -> jax.Array:
        """x itself, which is equal on all parts, to be used with each part's own features: its gradient is summed."""
        return _used(x) if self.feature > 1 else x

    def over_tokens(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of the batch; with a gradient, which is that of a loss summed over these parts."""
        return jax.lax.psum(x, DATA) if self.data > 1 else x

    def over_all(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of both; without a gradient."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over the parts of both; without a gradient."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def smallest(self, x: jax.Array) -> jax.Array:
        """The smallest over the parts of both; without a gradient."""
        return jax.lax.pmin(x, self.axes) if self.axes else x

    def any_feature(self, x: jax.Array) -> jax.Array:
        """Whether any of x, bool, is true on any part of the features."""
        any_here = jnp.any(x)
        return jax.lax.pmax(any_here.astype(jnp.int32), FEATURE) > 0 if self.feature > 1 else any_here

    def of_features(self, x: jax.Array) -> jax.Array:
        """x[..., n] of each part of the features side by side, [..., parts n], in the order of the features."""
        return jax.lax.all_gather(x, FEATURE, axis=x.ndim - 1, tiled=True) if self.feature > 1 else x

    def of_tokens(self, x: jax.Array) -> jax.Array:
        """x[n, ...] of each part of the batch, [parts n, ...], in the order of the tokens."""
        return jax.lax.all_gather(x, DATA, axis=0, tiled=True) if self.data > 1 else x

    def feature_part(self) -> jax.Array | int:
        """The number of this part of the features, from 0."""
        return jax.lax.axis_index(FEATURE) if self.feature > 1 else 0

    def data_part(self) -> jax.Array | int:
        """The number of this part of the batch, from 0."""
        return jax.lax.axis_index(DATA) if self.data > 1 else 0

    def feature_numbers(self, here: int) -> jax.Array:
        """[here] int32: the numbers of this part's features among those of all parts, which have `here` each."""
        return jnp.arange(here) + here * self.feature_part()

    @property
    def axes(self) -> tuple[str, ...]:
        """Those along which there are several parts."""
        return tuple(name for name, n in ((DATA, self.data), (FEATURE, self.feature)) if n > 1)


WHOLE = Shards()
"""All on one device."""


@jax.custom_vjp
def _summed(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, FEATURE)


_summed.defvjp(lambda x: (_summed(x), None), lambda _, g: (g,))


@jax.custom_vjp
def _used(x: jax.Array) -> jax.Array:
    return x


_used.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, FEATURE),))
