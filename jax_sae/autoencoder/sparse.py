"""A TopK autoencoder without dense work on features that are 0, for few active features among many.

Of the features f[B, F] of a batch, K of each token may differ from 0: values[B, K] at indices[B, K]. `weighted_rows`,
`products_with_rows` and `sum_into_rows` are the products f W, (g W^T at those places) and f^T g. They go through the K
entries in turn, of all tokens at once: whole rows of D numbers are read or written, and no [B, F] or [B, K, D] is made.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jax_sae.autoencoder.selection import kept_by_counts, last_kept, sends_counts
from jax_sae.autoencoder.shards import WHOLE, Shards
from jax_sae.config import Precision
from jax_sae.precision import dot_general

Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""What the gradient needs: x - b_dec, W_enc, W_dec, values, indices."""


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def topk_reconstruct(
    x: jax.Array,
    W_enc: jax.Array,
    b_enc: jax.Array,
    W_dec: jax.Array,
    b_dec: jax.Array,
    k: jax.Array,
    most_k: int,
    precision: Precision,
    subtracts_bias: bool = True,
    shards: Shards = WHOLE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encode x[B, D], keep the k largest features of each token, decode (Gao et al. 2024, arXiv 2406.04093).

    f = relu((x - b_dec) W_enc + b_enc), all but the k largest of each token set to 0; x_hat = f W_dec + b_dec. Of equal
    features the first are kept. Values and gradients are those of the dense form, to float32's rounding. The product
    with W_enc is dense; all else takes B most_k D operations and a pass over each parameter.

    Args:
        x: [B, D].
        W_enc: [D, F].
        b_enc: [F].
        W_dec: [F, D].
        b_dec: [D].
        k: [] int32, from 1 to `most_k`; it may be traced, and differ between the members of a vmapped group.
        most_k: features of a token that are looked at, at most F of all parts.
        precision: of the products; 'tensorfloat32' rounds in that of x and W_enc alone. The gradient of b_dec is
            float32's in any.
        subtracts_bias: without it x takes the place of x - b_dec, and W_dec and b_dec may have another width than x.
        shards: in how many parts features lie; those given are this part's.

    Returns:
        x_hat [B, D]; this part's features in falling order, values [B, K] and indices [B, K] int32, K = min(most_k, F),
        where values are 0 from the last on that is kept. Only x_hat has a gradient.
    """
    pre = dot_general(x - b_dec if subtracts_bias else x, W_enc, (((1,), (0,)), ((), ())), precision) + b_enc
    F = W_enc.shape[-1]
    values, indices = jax.lax.top_k(jax.nn.relu(pre), min(most_k, F))
    if shards.feature == 1:
        is_kept = jnp.arange(most_k) < k
    elif sends_counts(F, most_k, shards):
        is_kept = kept_by_counts(values, k, shards) > 0
    else:
        value, place = last_kept(values, indices, F, k, most_k, shards)
        is_kept = (values > value) | ((values == value) & (indices <= place))
    values = jnp.where(is_kept, values, 0)
    return shards.over_features(weighted_rows(values, indices, W_dec, precision)) + b_dec, values, indices


def _forward(
    x: jax.Array,
    W_enc: jax.Array,
    b_enc: jax.Array,
    W_dec: jax.Array,
    b_dec: jax.Array,
    k: jax.Array,
    most_k: int,
    precision: Precision,
    subtracts_bias: bool,
    shards: Shards,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Kept]:
    x_hat, values, indices = topk_reconstruct(
        x, W_enc, b_enc, W_dec, b_dec, k, most_k, precision, subtracts_bias, shards
    )
    return (x_hat, values, indices), (x - b_dec if subtracts_bias else x, W_enc, W_dec, values, indices)


def _backward(
    most_k: int,
    precision: Precision,
    subtracts_bias: bool,
    shards: Shards,
    kept: Kept,
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    centred, W_enc, W_dec, values, indices = kept
    g, F = gradients[0], len(W_dec)
    d_values = jnp.where(values > 0, products_with_rows(g, indices, W_dec, precision), 0)
    d_b_enc = jnp.zeros(F, jnp.float32).at[indices].add(d_values)
    # d_x is summed without being made; where nobody asks for it, it is not computed
    d_b_dec = jnp.sum(g, 0)
    if subtracts_bias:
        d_b_dec = d_b_dec - shards.over_features(dot_general(W_enc, d_b_enc, (((1,), (0,)), ((), ())), "float32"))
    d_x = weighted_rows(d_values, indices, W_enc.T, precision)
    d_W_enc = sum_into_rows(d_values, indices, centred, F, precision).T
    d_W_dec = sum_into_rows(values, indices, g, F, precision)
    return d_x, d_W_enc, d_b_enc, d_W_dec, d_b_dec, None


topk_reconstruct.defvjp(_forward, _backward)


def weighted_rows(values: jax.Array, indices: jax.Array, W: jax.Array, precision: Precision) -> jax.Array:
    """[B, D], row b the sum over j of values[b, j] W[indices[b, j]]; W is [F, D]."""

    def add(total: jax.Array, entry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value, index = entry
        return total + _rounded(value, precision)[:, None] * _rounded(W[index], precision), None

    return jax.lax.scan(add, jnp.zeros((len(values), W.shape[1]), jnp.float32), (values.T, indices.T))[0]


def products_with_rows(g: jax.Array, indices: jax.Array, W: jax.Array, precision: Precision) -> jax.Array:
    """[B, K], entry b, j the inner product of g[b] and W[indices[b, j]]; g is [B, D], W is [F, D]."""
    g = _rounded(g, precision)
    return jax.lax.map(lambda index: jnp.sum(g * _rounded(W[index], precision), 1), indices.T).T


def sum_into_rows(values: jax.Array, indices: jax.Array, g: jax.Array, F: int, precision: Precision) -> jax.Array:
    """[F, D], row i the sum of values[b, j] g[b] over all b, j whose indices[b, j] is i; g is [B, D]."""
    g = _rounded(g, precision)

    def add(total: jax.Array, entry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value, index = entry
        return total.at[index].add(_rounded(value, precision)[:, None] * g), None

    return jax.lax.scan(add, jnp.zeros((F, g.shape[1]), jnp.float32), (values.T, indices.T))[0]


def _rounded(factor: jax.Array, precision: Precision) -> jax.Array:
    """A factor as `dot_general` rounds it, but for tensorfloat32."""
    return jax.lax.reduce_precision(factor, 8, 7) if precision == "bfloat16" else factor
