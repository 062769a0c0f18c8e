"""A dictionary, or several, into a folder in the layout of a tool, with a model card beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jax_sae.errors import BadInput
from jax_sae.formats import circuit_tracer, dictionary_learning, plain, saelens, sparsify
from jax_sae.formats.dictionary import Dictionary, Format
from jax_sae.formats.folder import new_folder
from jax_sae.formats.model_card import model_card

OF_ONE = {
    "safetensors": plain.write,
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
    "sparsify": sparsify.write,
}


def export(
    dictionaries: Mapping[str, Dictionary], format: Format, folder: Path, sweep: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write dictionaries into a new folder: all of it, or nothing.

    Args:
        dictionaries: by their names; more than one for circuit_tracer only.
        format: whose layout it is to have.
        folder: where; it is empty, or not there yet.
        sweep: what the model card tells of all members of a run, a row each.

    Raises:
        BadInput: if there is no such format, it cannot hold them, or the folder is not empty or cannot be made.
        RunFailed: if a file cannot be written.
    """
    if format not in get_args(Format):
        raise BadInput(f"format is {format!r}; one of {', '.join(get_args(Format))} was expected")
    names = list(dictionaries)
    if format != "circuit_tracer" and len(names) != 1:
        raise BadInput(f"{len(names)} members are given ({', '.join(names)}); a folder of {format} holds one")
    with new_folder(folder) as partial:
        try:
            if format == "circuit_tracer":
                held = circuit_tracer.write(list(dictionaries.values()), partial)
            else:
                held = OF_ONE[format](dictionaries[names[0]], partial)
        except BadInput as error:
            raise BadInput(f"{', '.join(names)} cannot be written for {format}: {error}") from error
        (partial / "README.md").write_text(model_card(held, names, format, sweep, len(names)))
