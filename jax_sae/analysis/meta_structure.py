"""Whether a dictionary's directions are sums of fewer ones: a small dictionary, trained on the rows of W_dec.

Features that split a wider one share part of their direction. A batchtopk autoencoder with a quarter as many features,
of which `K` are active on a direction, finds such parts (Bussmann et al. 2024, "Showing SAE latents are not atomic
using meta-SAEs"). How much of their variance it explains says little by itself, because directions lie in fewer
dimensions than there are; so the same is trained on random directions of the same mean and covariance.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jax_sae.activations.normalize import estimate_dataset, normalize
from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import init_sweep, update_many
from jax_sae.trained import trained_members

FRACTION, K = 4, 4
"""Directions a meta-feature, and active meta-features a direction, on average."""

STEPS, BATCH = 1500, 256
STEPS_AT_A_TIME = 50
FEWEST = 32
"""Directions, with fewer of which there is nothing to find."""

SHOWN = 10
"""Directions of a meta-feature that are kept."""


@dataclass(frozen=True, eq=False)
class MetaStructure:
    """What a small dictionary makes of F directions."""

    explained: float
    """Of the variance of the directions at norm 1, the part that it explains."""
    random_explained: float
    """The same of random directions of the same mean and covariance, with a dictionary of their own."""
    l0: float
    """Meta-features that are active on a direction, on average."""
    used: np.ndarray
    """[M], on how many directions each meta-feature is active."""
    largest: np.ndarray
    """[M, SHOWN] int32, the directions on which it is largest; -1 where there are fewer."""
    value: np.ndarray
    """[M, SHOWN] float32."""


def meta_structure(directions: np.ndarray) -> MetaStructure | None:
    """Train a small dictionary on directions [F, D], at norm 1; None with fewer than `FEWEST` that are not 0."""
    norms = np.linalg.norm(directions, axis=1)
    number = np.flatnonzero(norms > 0)
    if len(number) < FEWEST:
        return None
    rows = (directions[number] / norms[number, None]).astype(np.float32)
    its_features, explained = _trained(rows)
    _, random_explained = _trained(_random_like(rows))
    order = np.argsort(-its_features, axis=0, kind="stable")[:SHOWN].T
    value = np.take_along_axis(its_features.T, order, 1)
    largest = np.where(value > 0, number[order], -1).astype(np.int32)
    fires = its_features > 0
    return MetaStructure(explained, random_explained, float(fires.sum(1).mean()), fires.sum(0), largest, value)


def _trained(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """What a dictionary trained on rows [F, D] makes of them, [F, M], and the part of the variance that it explains."""
    F, D = rows.shape
    B = min(BATCH, F)
    train = TrainConfig(steps=STEPS, batch_tokens=B)
    groups = make_groups([complete(Member(max(K, F // FRACTION), kind="batchtopk", k=K))])
    forms = tuple(group.form for group in groups)
    normalization = estimate_dataset(rows)
    x = normalize(normalization, rows)
    state = init_sweep(groups, D, train, {"zero": 0.0, "mean": 0.0, "geometric_median": 0.0})
    rng, weights = np.random.default_rng(0), jnp.ones((STEPS_AT_A_TIME, B))
    order = np.zeros(0, int)
    for step in range(0, STEPS, STEPS_AT_A_TIME):
        while len(order) < STEPS_AT_A_TIME * B:
            order = np.append(order, rng.permutation(F))
        taken, order = np.split(order, [STEPS_AT_A_TIME * B])
        batches = jnp.asarray(x[taken]).reshape(STEPS_AT_A_TIME, B, D)
        state, _ = update_many(state, batches, weights, 0, STEPS_AT_A_TIME, step, forms=forms, train=train)
    [sae] = trained_members(groups, state, normalization, train).values()
    features = sae.encode(rows)
    error = np.square(rows - np.asarray(sae.decode(features)), dtype=np.float64).sum()
    return np.asarray(features), float(1 - error / np.square(rows - rows.mean(0), dtype=np.float64).sum())


def _random_like(rows: np.ndarray) -> np.ndarray:
    """As many normal rows [F, D] of the same mean and covariance."""
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    normal = np.random.default_rng(0).standard_normal(rows.shape)
    return (rows.mean(0) + (normal * np.sqrt(np.maximum(values, 0))) @ vectors.T).astype(np.float32)
