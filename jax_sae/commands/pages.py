"""Write pages on the features of a run's members, to be opened with a browser: what they fire on, and what they do.

jax-sae pages runs/demo_sparse
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
    """Write pages on the features of a run's members. Exit codes: 0 done, 1 a full disk, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    member: tuple[str, ...] = ()
    """Names of members; without it, all of the run."""
    out: Path | None = None
    """A directory for the pages; without it, `pages` in the run's."""
    step: int | None = None
    """The checkpoint; without it, the newest one."""
    tokens: int | None = None
    """Whole stories up to this number of tokens are read; without it 200,000, or all there are."""
    training_text: bool = False
    """Read the text that the run was trained on, in place of the held-out one."""
    text: tuple[str, ...] = ()
    """Texts of your own: the pages show what is active on each of their tokens."""
    labels: Path | None = None
    """A JSON file with labels from elsewhere: {"MEMBER": {"FEATURE": "label"}}."""
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 - it is frozen
    """On how many devices; without these, on those that the run was trained on, if they are here, else on one."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae pages")
        check_ranges(options.mesh, "--mesh.{}".format)
        refuse_missing_platform()
        from jax_sae.pages.make import feature_pages

        feature_pages(
            options.run,
            options.member,
            out=options.out,
            step=options.step,
            tokens=options.tokens,
            training_text=options.training_text,
            texts=options.text,
            labels=options.labels,
            mesh=options.mesh,
        )
        return 0

    return run_script(argv, work)
