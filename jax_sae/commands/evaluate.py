"""Say what the members of a run are worth on held-out stories: evaluation.json, tables, figures.

jax-sae evaluate runs/demo
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script
from jax_sae.config import MeshConfig, check_ranges


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate every member of a run on held-out stories. Exit codes: 0 done, 1 a full disk, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    step: int | None = None
    """The checkpoint to evaluate; without it, the newest one."""
    tokens: int | None = None
    """Held-out tokens, whole stories up to this number; without it, the run's activations.held_out_tokens."""
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 - it is frozen
    """On how many devices; without these, on those that the run was trained on, if they are here, else on one."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae evaluate")
        check_ranges(options.mesh, "--mesh.{}".format)
        refuse_missing_platform()
        from jax_sae.analysis.evaluation import evaluate

        evaluate(options.run, options.step, options.tokens, mesh=options.mesh)
        return 0

    return run_script(argv, work)
