"""Dead features are set to activations that are reconstructed badly, and begin anew."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.autoencoder.model import Autoencoder, Params, Values, decode, encode, row_norms, unit_rows

OF_NO_FEATURE = ("b_dec", "W_skip")
"""Parameters that belong to no feature, which stay as they are."""
ENCODER_NORM = 0.2
"""Of a resampled feature's encoder, as a part of the mean norm of the others."""


def resampling_steps(resamples: int, steps: int) -> np.ndarray:
    """After which steps it is done, `resamples` times: evenly spread, neither at the start nor at the end."""
    return np.round(np.arange(1, resamples + 1) * steps / (resamples + 1)).astype(np.int32)


def resample(
    model: Autoencoder,
    params: Params,
    moments: Any,
    values: Values,
    dead: jax.Array,
    x: jax.Array,
    weights: jax.Array,
    key: jax.Array,
    targets: jax.Array | None = None,
) -> tuple[Params, Any]:
    """Set dead features to tokens of a batch, drawn in proportion to their squared loss |y - y_hat|^4.

    W_dec_i becomes the direction of y - b_dec, with the mean norm of the living features' directions (of all, if none
    lives); y is what a skip leaves of the targets. The column of W_enc becomes the same direction or, where others are
    read than written, that of x, with 0.2 of the mean norm of those features' columns. Biases and Adam's moments of
    the feature begin anew. Shapes are static: every feature draws a token, only the dead ones use it. Bricken et al.
    2023, "Towards Monosemanticity", appendix "Neuron Resampling".

    Args:
        model: of the member.
        params: its parameters.
        moments: Adam's state, with `mu` and `nu` like `params`.
        values: its settings and what it remembers.
        dead: [F] bool; none of padded features.
        x: [B, D].
        weights: [B].
        key: random.
        targets: [B, D_written]; None: x itself.
    """
    targets = x if targets is None else targets
    writes_others = bool(model.written) and targets is not x
    if model.skip:
        targets = targets - x @ params["W_skip"]
    written = decode(model.clone(skip=False), params, encode(model, params, values, x))
    loss = jnp.where(weights > 0, jnp.sum(jnp.square(targets - written), -1), 0.0)
    shards, F = model.shards, len(dead)
    loss, x, targets = (shards.of_tokens(each) for each in (loss, x, targets))  # any token may be drawn
    cumulated = jnp.cumsum(jnp.square(loss / jnp.maximum(jnp.max(loss), 1e-30)))
    uniform = jax.random.uniform(key, (F * shards.feature,), jnp.float32)  # the same on all parts
    drawn = jnp.searchsorted(cumulated, (1 - uniform[shards.feature_numbers(F)]) * cumulated[-1])
    rows = jnp.minimum(drawn, len(x) - 1)
    directions = unit_rows(targets[rows] - params["b_dec"])
    read = unit_rows(x[rows]) if writes_others else directions
    is_own = row_norms(params["W_dec"]) > 0  # a padded feature is 0
    lives = jnp.where(shards.any_feature(is_own & ~dead), is_own & ~dead, is_own)
    living = jnp.maximum(shards.over_features(jnp.sum(lives)), 1)

    def mean_norm(W: jax.Array) -> jax.Array:
        return shards.over_features(jnp.sum(jnp.where(lives, row_norms(W), 0))) / living

    new = {
        "W_dec": mean_norm(params["W_dec"]) * directions,
        "W_enc": ENCODER_NORM * mean_norm(params["W_enc"].T) * read.T,
        **{name: params[name] for name in OF_NO_FEATURE if name in params},
    }
    for name in [name for name in params if name not in new]:  # a set's order differs from process to process
        new[name] = jnp.full_like(params[name], model.fresh_bias(name, model.width, values))

    def where_dead(name: str, value: jax.Array, old: jax.Array) -> jax.Array:
        if name in OF_NO_FEATURE:
            return old
        return jnp.where(dead[:, None] if name == "W_dec" else dead, value, old)

    params = {name: where_dead(name, new[name], params[name]) for name in params}
    moments = moments._replace(
        **{
            each: {name: where_dead(name, jnp.zeros_like(old), old) for name, old in getattr(moments, each).items()}
            for each in ("mu", "nu")
        }
    )
    return params, moments
