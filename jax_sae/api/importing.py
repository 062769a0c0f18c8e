"""Dictionaries of other tools, for a program."""

from collections.abc import Sequence
from pathlib import Path

from jax_sae.analysis.importing import TOKENS, import_files
from jax_sae.api.run import Run, open_run
from jax_sae.config import TextConfig
from jax_sae.formats.asked import Asked


def import_dictionary(
    source: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "",
    model: str | Path = "",
    place: str = "",
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    k: int | None = None,
    scale: float | None = None,
    text: str = "",
    tokens: int = TOKENS,
) -> Run:
    """Import a dictionary that another tool wrote into a new run, and measure it where its language model is at hand.

        run = jax_sae.import_dictionary("layer_12/width_16k/average_l0_82", model="gemma-2-2b")
        [sae] = (run[name] for name in run)

    Args:
        source: a folder or file, or hf://owner/name/folder.
        out: the run's directory; None: below `runs`, named after the source.
        format: of the files, such as "saelens"; '': as they look.
        model: the language model, in place of the one that the files name.
        place: where its activations are from, in place of what the files say; of an autoencoder.
        reads: the same of another dictionary, which also writes.
        writes: the places that it writes.
        k: active features a token, where the files do not say it.
        scale: what activations are multiplied by before they are encoded, where the files do not say it.
        text: on which it is measured, as text.path of a run's settings; '': stories that come with the package.
        tokens: how many of it.

    Raises:
        BadInput: if the files cannot be read, do not say enough, do not belong to the language model, or `out` holds a
            run.
        RunFailed: if the run cannot be written.
    """
    reads = (place,) if place else tuple(reads)
    asked = Asked(str(model), reads, tuple(writes) or ((place,) if place else ()), k, scale)
    directory = import_files(
        str(source), Path(out) if out else None, format, asked, TextConfig(path=text) if text else None, tokens
    )
    return open_run(directory)
