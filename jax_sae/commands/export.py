"""Write a member of a run in the layout of another tool, with a model card; and upload it to the hub.

jax-sae export runs/demo_sparse --member topk-F256-k8 --format saelens --to exported
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script
from jax_sae.errors import BadInput
from jax_sae.formats.dictionary import Format, Tool
from jax_sae.streams import say


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a member in the layout of another tool. Exit codes: 0 done, 1 a full disk or no answer, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    to: Path
    """A folder that is empty, or not there yet; it is written as a whole or not at all."""
    format: Literal[Format, Tool] = "safetensors"
    """safetensors is this project's own, and holds everything; docs/import_export.md says what others hold. neuronpedia
    and circuit_tracer_features are of features: they come from a pass over the held-out text, as pages do."""
    member: tuple[str, ...] = ()
    """Name of the member; of circuit_tracer several, one a layer from 0 on. Without it, all of the run."""
    step: int | None = None
    """The checkpoint; without it, the newest one."""
    tokens: int | None = None
    """Of files of features: whole stories up to this number of tokens are read; without it 200,000."""
    push: str | None = None
    """A repository on the Hugging Face hub, user/repo, to which the folder is uploaded afterwards."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae export")
        refuse_missing_platform()
        from jax_sae.language_model.hub import check_repository, push_folder

        if options.push is not None:
            check_repository(options.push)
        if options.format == "neuronpedia" or options.format == "circuit_tracer_features":
            from jax_sae.pages.for_tools import feature_files

            feature_files(
                options.run, options.member, options.format, options.to, step=options.step, tokens=options.tokens
            )
        elif options.tokens is not None:
            raise BadInput(f"--tokens is of files of features, and --format is {options.format}; leave --tokens out")
        else:
            from jax_sae.api.run import open_run

            run = open_run(options.run)
            folder = run.export(options.member or run.names, options.format, options.to, step=options.step)
            say([f"written       {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}"])
        if options.push is not None:
            push_folder(options.to, options.push)
            say([f"uploaded      to {options.push}"])
        return 0

    return run_script(argv, work)
