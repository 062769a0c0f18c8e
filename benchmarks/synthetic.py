"""How much of what activations are made of each kind finds, where it is known: sparse sums of true directions.

A token is the sum of a few of `true_features` > D random unit directions, the i-th in proportion to 1 / sqrt(i), with
coefficients uniform from 0.5 to 1.5, and noise if that is asked for; then normalised as activations are: mean 0, mean
squared norm D. A true direction is recovered if some row of W_dec has a cosine above 0.9 with it. All kinds are trained
side by side in one program. FVU and L0 are those of the last batches, as they are trained.

What a short run needs beyond the papers' settings stands in `members`: a feature counts as dead after a few batches,
not after 10 million tokens, and jumprelu's first threshold and window are 100 times as large, as its run is 100 times
as short.

    python benchmarks/synthetic.py
    python benchmarks/synthetic.py --steps 20000 --noise 0.1
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from timing import report

from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import METRICS, init_sweep, member_shapes, unstack, update_many

BATCHES = 100
"""Drawn at a time, anew for each dispatch."""


def main(
    width: int = 128,
    true_features: int = 256,
    features: int = 512,
    active: int = 5,
    batch_tokens: int = 512,
    steps: int = 4000,
    noise: float = 0.0,
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Print what each kind recovers.

    Args:
        width: D.
        true_features: number of true directions.
        features: F.
        active: true directions in a token.
        batch_tokens: B.
        steps: of training, a multiple of 100.
        noise: its norm relative to that of a token without it.
        seeds: of the initial values.
    """
    train = TrainConfig(steps=steps, batch_tokens=batch_tokens, schedule="linear", decay=0.3)
    names = {complete(member): name for name, member in members(features, active, 20 * batch_tokens, seeds)}
    groups = make_groups(tuple(names))
    forms = tuple(group.form for group in groups)
    true = jax.random.normal(jax.random.key(0), (true_features, width))
    true = true / jnp.linalg.norm(true, axis=1, keepdims=True)
    draw = jax.jit(lambda key: tokens(key, true, active, BATCHES * batch_tokens, noise))
    first = draw(jax.random.key(1))
    centre = first.mean(0)
    scale = jnp.sqrt(width / jnp.square(first - centre).sum(1).mean())
    weights = jnp.ones((BATCHES, batch_tokens))
    state = init_sweep(groups, width, train, {"zero": 0.0, "mean": 0.0, "geometric_median": 0.0})
    start = time.perf_counter()
    for step in range(0, steps, BATCHES):
        x = scale * (draw(jax.random.key(2 + step)) - centre)
        x = x.reshape(BATCHES, batch_tokens, width)
        state, metrics = update_many(state, x, weights, 0, BATCHES, step, forms=forms, train=train)
    of_members = iter(np.asarray(metrics.mean(0), np.float64))
    seconds = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    for group, stacked in zip(groups, state, strict=True):
        for member, its in zip(group.members, unstack(stacked, member_shapes(group, width, train)), strict=True):
            W_dec = its.params["W_dec"]
            cosines = jnp.max(true @ (W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True)).T, 1)
            told = dict(zip(METRICS, next(of_members), strict=True))
            rows.append(
                {
                    "kind": names[member],
                    "recovered %": 100 * float(jnp.mean(cosines > 0.9)),
                    "mean max cosine": float(jnp.mean(cosines)),
                    "FVU": float(told["loss_per_element"]),
                    "L0": float(told["l0"]),
                }
            )
    facts = {"D": width, "true": true_features, "F": features, "active": active, "B": batch_tokens, "steps": steps}
    report("synthetic", rows, **facts, noise=noise, seconds=round(seconds))


def members(features: int, active: int, dead_after_tokens: int, seeds: tuple[int, ...]) -> list[tuple[str, Member]]:
    """Every kind with what it needs, by its name in the table."""
    soon: dict[str, Any] = {"k": active, "dead_after_tokens": dead_after_tokens}
    wide: dict[str, Any] = {"bandwidth": 0.1, "initial_threshold": 0.1}
    found = []
    for seed in seeds:
        found += [
            ("relu", Member(features, seed, 3e-3, "relu", l1_coefficient=1.0)),
            ("topk", Member(features, seed, 3e-3, "topk", **soon)),
            ("batchtopk", Member(features, seed, 3e-3, "batchtopk", **soon)),
            ("matryoshka", Member(features, seed, 3e-3, "matryoshka", **soon)),
            ("jumprelu", Member(features, seed, 3e-3, "jumprelu", l0_coefficient=0.5, **wide)),
            ("jumprelu, target L0", Member(features, seed, 3e-3, "jumprelu", target_l0=active, **wide)),
            ("gated", Member(features, seed, 3e-3, "gated", l1_coefficient=3.0)),
        ]
    return found


def tokens(key: jax.Array, true: jax.Array, active: int, number: int, noise: float) -> jax.Array:
    """[number, D], each a sum of `active` different true directions [F, D], and noise."""
    ranks, sizes, rest = jax.random.split(key, 3)
    F, D = true.shape
    order = jax.random.gumbel(ranks, (number, F)) - 0.5 * jnp.log(jnp.arange(1, F + 1))
    _, which = jax.lax.top_k(order, active)  # drawn without replacement in proportion to 1 / sqrt(i)
    coefficients = jax.random.uniform(sizes, which.shape, minval=0.5, maxval=1.5)
    rows = jnp.arange(number)[:, None]
    x = jnp.zeros((number, F)).at[rows, which].set(coefficients) @ true
    return x + noise * jnp.sqrt(jnp.square(x).sum(1).mean() / D) * jax.random.normal(rest, x.shape)


if __name__ == "__main__":
    tyro.cli(main)
