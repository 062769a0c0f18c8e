"""The training step of the starting experiment as a fraction of the rate that `jnp.dot` reaches in the same process.

A member's step is five matrix products of 2 B D F operations each. For each F the same five products are timed alone
(x W_enc, f W_dec, e W_dec^T, f^T e, x^T g), in turn with the whole step of all members: activation function, loss,
biases, Adam and all. 1 would mean that nothing but the products takes time.

    python benchmarks/train_step.py --batch-tokens 4096
"""

import json
import statistics

import jax
import jax.numpy as jnp
import tyro
from timing import seconds, spread

from jax_sae.config import SweepConfig, TrainConfig, sweep_members
from jax_sae.sweep.members import make_groups
from jax_sae.sweep.update import init_sweep, update_many

FEATURES, D, STEPS = (100, 767, 768, 1000), 768, 4


def main(batch_tokens: int = 4096, rounds: int = 7) -> None:
    """Print the fraction for the sweep as it is built, and for each member alone.

    Args:
        batch_tokens: B.
        rounds: how often each is timed, in turn.
    """
    B = batch_tokens
    x = jax.random.normal(jax.random.key(0), (STEPS, B, D))
    weights = jnp.ones((STEPS, B))
    train = TrainConfig(batch_tokens=B)
    dot = jax.jit(jnp.dot)

    def products(F: int):
        f, W = jax.random.normal(jax.random.key(F), (B, F)), jax.random.normal(jax.random.key(1), (D, F))
        x0, xT, fT, WT = x[0], jnp.array(x[0].T), jnp.array(f.T), jnp.array(W.T)
        return lambda: [dot(x0, W), dot(f, WT), dot(x0, W), dot(fT, x0), dot(xT, f)]

    def step(features: tuple[int, ...]):
        sweep = SweepConfig(features=features)
        state = [init_sweep(make_groups(sweep_members(sweep)), D, sweep, train)]

        def run() -> jax.Array:
            state[0], losses = update_many(state[0], x, weights, 0, STEPS, train=train)
            return losses

        return run

    functions = {f"dot {F}": products(F) for F in FEATURES}
    functions |= {f"F = {F} alone": step((F,)) for F in FEATURES} | {"all four": step(FEATURES)}
    times = seconds(functions, rounds)
    results = {}
    for name, widths in [(f"F = {F} alone", (F,)) for F in FEATURES] + [("all four", FEATURES)]:
        ideal = [sum(parts) for parts in zip(*(times[f"dot {F}"] for F in widths), strict=True)]
        each = [seconds / STEPS for seconds in times[name]]
        ratios = [a / b for a, b in zip(ideal, each, strict=True)]
        rate = 10 * B * D * sum(widths) / statistics.median(each) / 1e9
        results[name] = {"ratio": statistics.median(ratios), "seconds": statistics.median(each), "gflops": rate}
        print(f"{name:14} B = {B}: {spread(each)} s a step, {rate:.0f} GF/s, fraction of jnp.dot {spread(ratios)}")
    print(json.dumps({"benchmark": "train_step", "B": B, "device": jax.devices()[0].device_kind, "results": results}))


if __name__ == "__main__":
    tyro.cli(main)
