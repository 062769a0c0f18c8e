"""Say what a run's directory holds: members, steps, last losses, checkpoints; --verify checks every digest.

jax-sae inspect runs/demo --verify
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a run's directory holds. Exit codes: 0 all is well, 1 a checkpoint is damaged, 2 there is no run."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    verify: bool = False
    """Read every array of every checkpoint, and compare it with its sha256."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae inspect")
        from jax_sae.run.inspection import inspect_run

        lines, is_good = inspect_run(options.run, verify=options.verify)
        print("\n".join(lines))
        return 0 if is_good else 1

    return run_script(argv, work)
