"""What a member costs, of each kind: alone, and among eighteen members of its kind and width in one sweep.

Of each kind the step of one member and of eighteen, with six sparsities and three seeds, are timed in turn; the ratio
is time per member among eighteen to time alone, so 1 or less means that company costs nothing. The plain autoencoder
(relu with lambda = 0) stands beside them: what a kind costs beyond it.

    python benchmarks/kinds.py
    python benchmarks/kinds.py --width 768 --features 1536 --batch-tokens 1024 --rounds 3
"""

from collections.abc import Callable
from typing import Any

import jax
import tyro
from stepping import stepper
from timing import ratios, report, seconds

from jax_sae.config import SweepConfig, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members

SPARSITIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"l1_coefficient": (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)},
    "gated": {"l1_coefficient": (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)},
    "jumprelu": {"target_l0": (4.0, 8.0, 12.0, 16.0, 24.0, 32.0)},
    "topk": {"k": (4, 8, 12, 16, 24, 32)},
    "batchtopk": {"k": (4, 8, 12, 16, 24, 32)},
    "matryoshka": {"k": (4, 8, 12, 16, 24, 32)},
}


def main(
    width: int = 64,
    features: int = 256,
    batch_tokens: int = 512,
    rounds: int = 5,
    kinds: tuple[str, ...] = tuple(SPARSITIES),
) -> None:
    """Print milliseconds a step and member, and ratios.

    Args:
        width: D.
        features: F.
        batch_tokens: B.
        rounds: how often each is timed, in turn.
        kinds: which of them; plain is relu with lambda = 0.
    """
    operations = 10 * batch_tokens * width * features
    steps = max(2, min(64, round(2e10 / operations)))
    x = jax.random.normal(jax.random.key(0), (steps, batch_tokens, width))
    train = TrainConfig(batch_tokens=batch_tokens, steps=10**6)
    functions: dict[str, Callable[[], Any]] = {}
    for name in kinds:
        kind, lists = name.replace("plain", "relu"), SPARSITIES[name]
        seeds = tuple(range(3 if lists else 18))
        eighteen = sweep_members(SweepConfig(kinds=(kind,), features=(features,), seeds=seeds, **lists))
        functions[f"{name} 1"] = stepper(make_groups(eighteen[-1:]), train, x)
        functions[f"{name} 18"] = stepper(make_groups(eighteen), train, x)
    times = seconds(functions, rounds)
    rows = []
    for name in kinds:
        alone, among = ([t / steps / n for t in times[f"{name} {n}"]] for n in (1, 18))
        rows.append(
            {
                "kind": name,
                "ms alone": [1e3 * t for t in alone],
                "ms among 18": [1e3 * t for t in among],
                "among 18 / alone": ratios(among, alone),
                "alone / plain alone": ratios(alone, [t / steps for t in times[f"{kinds[0]} 1"]]),
            }
        )
    report("kinds", rows, D=width, F=features, B=batch_tokens, rounds=rounds)


if __name__ == "__main__":
    tyro.cli(main)
