"""Write a page on the members of a run beside each other: the frontier, seeds, and which features they share.

jax-sae compare runs/demo_sparse
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a page on a run's members beside each other. Exit codes: 0 done, 1 a full disk, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    member: tuple[str, ...] = ()
    """Names of two members or more; without it, all of the run."""
    out: Path | None = None
    """A directory for the page; without it, `compare` in the run's."""
    step: int | None = None
    """The checkpoint; without it, the newest one."""
    tokens: int | None = None
    """Whole held-out stories up to this number of tokens are read; without it 50,000, or all there are."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae compare")
        refuse_missing_platform()
        from jax_sae.pages.compare import compare_members

        compare_members(options.run, options.member, out=options.out, step=options.step, tokens=options.tokens)
        return 0

    return run_script(argv, work)
