"""Let a language model write with a feature raised, set or taken away: texts side by side, and what it costs.

jax-sae steer runs/demo_sparse --member topk-F256-k8 --feature 17 --prompt "Once upon a time"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script
from jax_sae.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write texts with a feature added to, set or taken away, and without. Exit codes: 0 done, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    member: str
    """Name of the member that the feature is of."""
    feature: int
    """Number of the feature, from 0."""
    prompt: str
    """What the texts begin with."""
    strength: tuple[float, ...] = ()
    """What is added to the feature at every token, in its own units, one after the other; without any, 0.25, 0.5, 1
    and 2 times its largest value on held-out tokens."""
    clamp: bool = False
    """Set the feature to the strength instead, and keep what the member does not reconstruct."""
    ablate: bool = False
    """Take the feature away: set it to 0."""
    tokens: int = 60
    """Most tokens that are written after the prompt."""
    seeds: tuple[int, ...] = (0, 1)
    """A text is written for each."""
    temperature: float = 0.8
    """Of the draws; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Tokens are drawn among the likeliest that together have at least this probability."""
    step: int | None = None
    """The checkpoint; without it, the newest one."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae steer")
        if options.clamp and options.ablate:
            raise BadInput("--clamp and --ablate are both given; --ablate is --clamp --strength 0: give one of them")
        refuse_missing_platform()
        from jax_sae.api.run import open_run

        open_run(options.run).steer(
            options.member,
            options.feature,
            options.prompt,
            options.strength,
            how="ablate" if options.ablate else "clamp" if options.clamp else "add",
            max_new_tokens=options.tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seeds=options.seeds,
            step=options.step,
        )
        return 0

    return run_script(argv, work)
