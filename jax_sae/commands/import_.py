"""Import a dictionary that another tool wrote into a new run, and measure it on real activations.

jax-sae import my_sae --to runs/my_sae
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
    """Import a dictionary of SAELens, dictionary_learning, sparsify, Gemma Scope and others (docs/import_export.md).

    Exit codes: 0 done, 1 a full disk, 2 bad input. What it is worth on a text is printed, with a warning where that is
    implausible.
    """

    source: tyro.conf.Positional[str]
    """A folder or file, or hf://owner/name/folder."""
    to: Path | None = None
    """The run's directory; without it, below runs, named after the source."""
    format: str = ""
    """Of the files, such as saelens; without it, as they look."""
    model: str = ""
    """Directory, .gguf file or Hugging Face id of the language model, in place of the one that the files name."""
    place: str = ""
    """Where its activations are from, such as 9.resid_post, in place of what the files say."""
    reads: tuple[str, ...] = ()
    """Places that a transcoder reads, in place of what the files say."""
    writes: tuple[str, ...] = ()
    """Places that it writes."""
    k: int | None = None
    """Active features a token, where the files do not say it."""
    scale: float | None = None
    """What activations are multiplied by before they are encoded, where the files do not say it."""
    text: str = ""
    """Hugging Face id, directory or file of a dataset, on which it is measured; without it, stories that come with the
    package."""
    tokens: int = 16_384
    """How many tokens of it."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae import")
        if options.place and (options.reads or options.writes):
            raise BadInput("--place is given, and --reads or --writes too; --place is of what writes where it reads")
        refuse_missing_platform()
        from jax_sae.api.importing import import_dictionary

        import_dictionary(
            options.source,
            options.to,
            format=options.format,
            model=options.model,
            place=options.place,
            reads=options.reads,
            writes=options.writes,
            k=options.k,
            scale=options.scale,
            text=options.text,
            tokens=options.tokens,
        )
        return 0

    return run_script(argv, work)
