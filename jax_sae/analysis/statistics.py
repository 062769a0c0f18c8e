"""How well activations are reconstructed, and how the features fire: sums over tokens, and metrics made of them.

Tokens come a batch at a time, of any size. Sums are float64, the mean and the variance are merged batch by batch, so
metrics are those of the whole set, whatever its split into batches, and a large mean costs no digits.

An autoencoder is known here by its numbers alone, in the language model's own scale: activations x[B, D], features
[B, F], none below 0 and on where above 0, and reconstructions x_hat[B, D]. Names of metrics are those of SAELens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jax_sae.autoencoder.metrics import fraction_of_variance_unexplained
from jax_sae.errors import BadInput

DENSE = 0.1
"""A feature that fires on more than this fraction of the tokens is too dense to mean something by itself."""

BINS_PER_DECADE = 4


@dataclass(frozen=True, eq=False)
class Sums:
    """What is known of the tokens so far; sums are over tokens."""

    mean: np.ndarray
    """[D] float64, of x."""
    fired: np.ndarray
    """[F] int64, tokens on which each feature is above 0."""
    tokens: int = 0
    zero_tokens: int = 0
    """Tokens with x = 0, which have no direction."""
    variance: float = 0.0
    """Of |x - mean|^2."""
    squared_error: float = 0.0
    """Of |x - x_hat|^2."""
    norm_in: float = 0.0
    """Of |x|."""
    norm_out: float = 0.0
    """Of |x_hat|."""
    squared_norm_out: float = 0.0
    """Of |x_hat|^2."""
    product: float = 0.0
    """Of x . x_hat."""
    cosine: float = 0.0
    """Of x . x_hat / (|x| |x_hat|), over tokens with x != 0; 0 where x_hat = 0."""
    norm_ratio: float = 0.0
    """Of |x_hat| / |x|, over tokens with x != 0."""
    activation: float = 0.0
    """Of the features."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of an autoencoder on N tokens; plain numbers, ready for JSON; means are over tokens."""

    tokens: int
    """N."""
    zero_tokens: int
    """Tokens with x = 0, left out of `cossim` and `l2_ratio`, which they do not have."""
    explained_variance: float
    """1 - `fvu`."""
    fvu: float
    """sum_n |x_n - x_hat_n|^2 / sum_n |x_n - mean|^2; the mean is that of all N tokens, one number for each of D."""
    mse: float
    """sum_n |x_n - x_hat_n|^2 / (N D), per element; SAELens' `mse` is D times this."""
    cossim: float | None
    """Mean of x . x_hat / (|x| |x_hat|), 0 for a token with x_hat = 0; None if x = 0 on all."""
    l2_norm_in: float
    """Mean of |x|."""
    l2_norm_out: float
    """Mean of |x_hat|."""
    l2_ratio: float | None
    """Mean of |x_hat| / |x|; None if x = 0 on all tokens."""
    relative_reconstruction_bias: float | None
    """gamma = sum_n |x_hat_n|^2 / sum_n x_n . x_hat_n: x_hat / gamma has the least squared error of all multiples.

    Below 1: shrunk. A good reconstruction that is not parallel to x is shorter than x with gamma = 1, so this, and not
    `l2_ratio`, tells what a penalty shrinks. None where the denominator is 0. Rajamanoharan et al. 2024
    (https://arxiv.org/abs/2404.16014), equations 9 and 10 of its later versions; the first had another formula.
    """
    l0: float
    """Mean number of features above 0."""
    l1: float
    """Mean sum of the features."""
    features: int
    """F."""
    dead_features: int
    """Features that fired on none of the N tokens: with fewer tokens there are more."""
    dense_features: int
    """Features that fired on more than 10 % of the tokens."""


def no_tokens(width: int, features: int) -> Sums:
    """Sums over no tokens, for D = `width` and F = `features`."""
    return Sums(np.zeros(width), np.zeros(features, np.int64))


def add_tokens(sums: Sums, x: ArrayLike, features: ArrayLike, x_hat: ArrayLike) -> Sums:
    """The sums with B more tokens; B may be 0.

    Mean and variance are merged as Chan, Golub and LeVeque do (1983, https://doi.org/10.1080/00031305.1983.10483115).

    Args:
        sums: of the tokens before, from `no_tokens` or this function.
        x: [B, D], activations.
        features: [B, F], encode(x).
        x_hat: [B, D], decode(features).

    Raises:
        BadInput: if the shapes do not fit, a number is not finite, or a feature is negative.
    """
    x, features, x_hat = np.asarray(x), np.asarray(features), np.asarray(x_hat)
    D, F = len(sums.mean), len(sums.fired)
    if x.shape != (len(x), D) or x_hat.shape != x.shape or features.shape != (len(x), F):
        raise BadInput(
            f"x, features and x_hat have the shapes {x.shape}, {features.shape} and {x_hat.shape}; expected [B, {D}], "
            f"[B, {F}] and [B, {D}]: are they of this autoencoder?"
        )
    if not len(x):
        return sums
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(x_hat).all() and features.max(initial=0) < np.inf):
        raise BadInput(
            "an activation, feature or reconstruction is not finite; evaluate a checkpoint before the divergence"
        )
    if not features.min(initial=0) >= 0:
        raise BadInput(f"a feature is {features.min()}; 0 or more was expected: 0 is off, and above 0 is on")

    B = len(x)
    tokens = sums.tokens + B
    mean = x.mean(0)
    shift = mean - sums.mean
    norm_in, norm_out = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    product = np.einsum("bd,bd->b", x, x_hat)
    in_or_1, out_or_1 = np.where(norm_in > 0, norm_in, 1), np.where(norm_out > 0, norm_out, 1)
    return Sums(
        mean=sums.mean + shift * (B / tokens),
        fired=sums.fired + np.count_nonzero(features, axis=0),
        tokens=tokens,
        zero_tokens=sums.zero_tokens + int(np.sum(norm_in == 0)),
        variance=sums.variance + float(np.square(x - mean).sum() + shift @ shift * (sums.tokens * B / tokens)),
        squared_error=sums.squared_error + float(np.square(x - x_hat).sum()),
        norm_in=sums.norm_in + float(norm_in.sum()),
        norm_out=sums.norm_out + float(norm_out.sum()),
        squared_norm_out=sums.squared_norm_out + float(np.square(x_hat).sum()),
        product=sums.product + float(product.sum()),
        cosine=sums.cosine + float((product / in_or_1 / out_or_1).sum()),  # x = 0 adds 0, as x_hat = 0 does
        norm_ratio=sums.norm_ratio + float((norm_out / in_or_1)[norm_in > 0].sum()),
        activation=sums.activation + float(features.sum(dtype=np.float64)),
    )


def metrics(sums: Sums) -> Metrics:
    """The metrics of all tokens that were added.

    Raises:
        BadInput: if there are none, or their activations are all equal, so that no FVU exists.
    """
    N, D = sums.tokens, len(sums.mean)
    if not sums.variance > 0:
        raise BadInput(f"the {N} activations are all equal, so there is no variance to explain; evaluate more tokens")
    directed = N - sums.zero_tokens
    fvu = fraction_of_variance_unexplained(np.array([sums.squared_error]), sums.variance)
    return Metrics(
        tokens=N,
        zero_tokens=sums.zero_tokens,
        explained_variance=1 - fvu,
        fvu=fvu,
        mse=sums.squared_error / (N * D),
        cossim=sums.cosine / directed if directed else None,
        l2_norm_in=sums.norm_in / N,
        l2_norm_out=sums.norm_out / N,
        l2_ratio=sums.norm_ratio / directed if directed else None,
        relative_reconstruction_bias=sums.squared_norm_out / sums.product if sums.product else None,
        l0=float(sums.fired.sum() / N),
        l1=sums.activation / N,
        features=len(sums.fired),
        dead_features=int(np.sum(sums.fired == 0)),
        dense_features=int(np.sum(sums.fired > DENSE * N)),
    )


def feature_density(sums: Sums) -> np.ndarray:
    """The fraction of tokens on which each feature fires, [F] float64 from 0 to 1.

    Raises:
        BadInput: if there are no tokens.
    """
    if not sums.tokens:
        raise BadInput("there are no tokens, so features have no density; evaluate at least one story")
    return sums.fired / sums.tokens


def density_histogram(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """How many features have which log10 of their density; features that never fire are in no bin.

    Returns:
        (edges [K + 1] float64, in log10 of the density, counts [K] int64): bins of a quarter of a decade, from the
        decade of 1 token in N up to every token, the same for all autoencoders on the same tokens. A bin holds its
        left edge; the last one its right edge, 0, too.

    Raises:
        BadInput: if there are no tokens.
    """
    feature_density(sums)
    decades = max(1, int(np.ceil(np.log10(sums.tokens))))
    edges = np.linspace(-decades, 0, decades * BINS_PER_DECADE + 1)
    counts, _ = np.histogram(np.log10(sums.fired[sums.fired > 0]) - np.log10(sums.tokens), edges)
    return edges, counts
