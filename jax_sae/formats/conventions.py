"""What tools say differently of one dictionary: whether b_dec is subtracted, and what a place is called."""

from dataclasses import replace
from typing import Any

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.scaling import times_matrix
from jax_sae.language_model.places import transformer_lens_name, when


def with_b_dec(dictionary: Dictionary, *, subtracted: bool) -> Dictionary:
    """The same dictionary, whose encoder sees x - b_dec or x: its biases make up for it, in float64.

    Raises:
        BadInput: if it is to be subtracted, and what is written is not as wide as what is read.
    """
    if dictionary.subtracts_b_dec == subtracted:
        return dictionary
    if dictionary.width != len(dictionary.b_dec):
        raise BadInput(
            f"b_dec of width {len(dictionary.b_dec)} cannot be subtracted from x of width {dictionary.width}"
        )
    more = times_matrix(dictionary.b_dec, dictionary.W_enc) * (1 if subtracted else -1)
    changed = {"b_enc": dictionary.b_enc + more}
    if dictionary.r_mag is not None and dictionary.b_mag is not None:
        changed["b_mag"] = dictionary.b_mag + np.exp(dictionary.r_mag.astype(np.float64)) * more
    biases: dict[str, Any] = {name: bias.astype(np.float32) for name, bias in changed.items()}
    return replace(dictionary, subtracts_b_dec=subtracted, **biases)


def one_place(dictionary: Dictionary, format: str) -> None:
    """Raise BadInput if it reads or writes several places, for a format that names one of each."""
    for does, places in (("reads", dictionary.reads), ("writes", dictionary.writes)):
        if len(places) > 1 or len(getattr(dictionary, f"widths_{'read' if does == 'reads' else 'written'}")) > 1:
            raise BadInput(
                f"it {does} {len(places)} places side by side ({', '.join(places)}); {format} has no word for that: "
                "export it as safetensors"
            )


def is_transcoder(dictionary: Dictionary) -> bool:
    """Whether it writes another place than it reads, or other numbers at the same one: it has a skip."""
    return (
        dictionary.reads != dictionary.writes
        or dictionary.width != len(dictionary.b_dec)
        or dictionary.W_skip is not None
    )


def hook_name(places: tuple[str, ...]) -> str | None:
    """What TransformerLens calls the one place; as it is called here where that is no name of ours; None if unknown."""
    if len(places) != 1:
        return None
    return transformer_lens_name(places[0]) if when(places[0]) else places[0]
