"""The training step as a fraction of the rate that `jnp.dot` reaches in the same process.

A member's step is five matrix products of 2 B D F operations each. For each F the same five products are timed alone
(x W_enc, f W_dec, e W_dec^T, f^T e, x^T g), each as one call of `jnp.dot` on arrays in the order that suits it, in turn
with whole steps: activation function, loss, biases, Adam, the guard against divergence and all. 1 would mean that
nothing but the products takes time.

Sweeps: the starting experiment's four widths, 16 seeds of F = 768 and one member alone, one of F = 16384; as groups, as
the package builds them, as one padded vmap, and each member in a program of its own, one after another.

    python benchmarks/train_step.py --batch-tokens 256 1024 4096
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from stepping import stepper
from timing import ratios, report, seconds

from jax_sae.config import Member, Precision, SweepConfig, TrainConfig
from jax_sae.sweep.groups import Group, make_groups
from jax_sae.sweep.members import sweep_members

D = 768
SWEEPS = {
    "100, 767, 768, 1000": SweepConfig(features=(100, 767, 768, 1000)),
    "768": SweepConfig(features=(768,)),
    "16 seeds of 768": SweepConfig(features=(768,), seeds=tuple(range(16))),
    "16384": SweepConfig(features=(16384,)),
}
JAX_PRECISION = {"float32": "highest", "tensorfloat32": "high", "bfloat16": "default"}


def main(
    batch_tokens: tuple[int, ...] = (256, 1024, 4096),
    sweeps: tuple[str, ...] = tuple(SWEEPS),
    rounds: int = 7,
    precision: Precision = "float32",
) -> None:
    """Print the fraction for every sweep, batch and way to run it.

    Args:
        batch_tokens: values of B.
        sweeps: which of the sweeps.
        rounds: how often each is timed, in turn.
        precision: of the products, in the step and alone.
    """
    rows: list[dict[str, Any]] = []
    for name in sweeps:
        for B in batch_tokens:
            members = sweep_members(SWEEPS[name])
            operations = 10 * B * D * sum(member.features for member in members)
            steps = min(64, max(4, round(3e11 / operations)))
            functions = {f"dot {F}": products(B, F, steps, precision) for F in {member.features for member in members}}
            functions |= ways(members, steps, TrainConfig(batch_tokens=B, precision=precision))
            times = seconds(functions, rounds)
            ideal = [sum(times[f"dot {member.features}"][i] for member in members) for i in range(rounds)]
            for way in (way for way in times if not way.startswith("dot")):
                rows.append(
                    {
                        "members": name,
                        "B": B,
                        "run as": way,
                        "ms a step": [1e3 * t / steps for t in times[way]],
                        "GF/s": [steps * operations / t / 1e9 for t in times[way]],
                        "fraction of jnp.dot": ratios(ideal, times[way]),
                    }
                )
    report("train_step", rows, D=D, precision=precision)


def products(B: int, F: int, steps: int, precision: Precision) -> Callable[[], Any]:
    """The five products of a member, alone, for as many steps."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x, f, W = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(((B, D), (B, F), (D, F)))
    )
    xT, fT, WT = jnp.array(x.T), jnp.array(f.T), jnp.array(W.T)

    @jax.jit
    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, precision=JAX_PRECISION[precision], preferred_element_type=jnp.float32)

    # on a CPU, XLA has no bfloat16 products with float32 sums for all shapes
    if precision == "bfloat16" and jax.default_backend() == "cpu":
        dot = jax.jit(jnp.dot)
    return lambda: [[dot(x, W), dot(f, WT), dot(x, W), dot(fT, x), dot(xT, f)] for _ in range(steps)][-1]


def ways(members: tuple[Member, ...], steps: int, train: TrainConfig) -> dict[str, Callable[[], Any]]:
    """Functions that take that many steps of the members on the same batches."""
    x = jax.random.normal(jax.random.key(0), (steps, train.batch_tokens, D))
    groups = make_groups(members)
    found: dict[str, Callable[[], Any]] = {"groups": stepper(groups, train, x)}
    if len(groups) > 1:
        together = sum((group.members for group in groups), ()), sum((group.names for group in groups), ())
        found["one padded vmap"] = stepper((Group(*together),), train, x)
    if len(members) > 1:
        alone = [stepper(make_groups((member,)), train, x) for member in members]
        found["one after another"] = lambda: [step() for step in alone]
    return found


if __name__ == "__main__":
    tyro.cli(main)
