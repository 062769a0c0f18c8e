"""Write a member of a run in the layout of another tool, with a model card; or push it to the hub.

jax-sae export runs/demo_sparse --member topk-F256-k8 --format saelens --to exported
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script
from jax_sae.formats.dictionary import Format


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a member in the layout of another tool. Exit codes: 0 done, 1 a full disk or no answer, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    to: Path
    """A folder that is empty, or not there yet; it is written as a whole or not at all."""
    format: Format = "safetensors"
    """safetensors is this project's own, and holds everything; docs/import_export.md says what the others hold."""
    member: tuple[str, ...] = ()
    """Name of the member; of circuit_tracer several, one a layer from 0 on. Without it, all of the run."""
    step: int | None = None
    """The checkpoint; without it, the newest one."""
    push: str | None = None
    """A repository on the Hugging Face hub, user/repo, to which the folder is uploaded afterwards."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae export")
        refuse_missing_platform()
        from jax_sae.api.run import open_run
        from jax_sae.streams import say

        run = open_run(options.run)
        folder = run.export(
            options.member or run.names, options.format, options.to, step=options.step, push=options.push
        )
        say([f"written       {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}"])
        if options.push is not None:
            say([f"uploaded      to {options.push}"])
        return 0

    return run_script(argv, work)
