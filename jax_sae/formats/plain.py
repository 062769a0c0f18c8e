"""This project's own files: `dictionary.safetensors`, and what the arrays mean in `dictionary.json`.

They hold every dictionary there is, by the names and in the shapes of `Dictionary`.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jax_sae.formats.asked import NOTHING, Asked
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.tensors import Facts, open_tensors, read_facts
from jax_sae.language_model.torch_file import is_plain_name

CONFIG, WEIGHTS = "dictionary.json", "dictionary.safetensors"
FORMAT, VERSION = "jax_sae dictionary", 1
KINDS = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
VECTORS = ("threshold", "r_mag", "b_mag")


def write(dictionary: Dictionary, folder: Path) -> Dictionary:
    """Write a dictionary into a folder that is there; returns the same, as it is held there."""
    held = {field.name: getattr(dictionary, field.name) for field in fields(Dictionary)}
    arrays = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
    said = {name: value for name, value in held.items() if name not in arrays and value is not None}
    said["metadata"] = dict(dictionary.metadata)
    content = {"format": FORMAT, "version": VERSION, **said}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    save_file(arrays, folder / WEIGHTS)
    return dictionary


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a folder.

    Raises:
        BadInput: if it is damaged, or of a later version.
    """
    said = read_facts(path / CONFIG)
    if said.text("format") != FORMAT or said.size("version") != VERSION:
        raise said.bad("version" if said.text("format") == FORMAT else "format", f"{FORMAT!r}, version 1, was expected")
    tensors = open_tensors(path / WEIGHTS)
    b_enc, b_dec = tensors.vector("b_enc"), tensors.vector("b_dec")
    F, more = len(b_enc), dict[str, Any]()
    W_enc = tensors.encoder("W_enc", features=F, width=None, stated="as it is")
    W_dec = tensors.decoder("W_dec", features=F, width=len(b_dec), stated="as it is")
    if "W_skip" in tensors:
        more["W_skip"] = np.asarray(tensors.array("W_skip"), np.float32)
    more |= {name: tensors.vector(name, length=F) for name in VECTORS if name in tensors}
    tensors.refuse_others()
    normaliser = said.one_of("normaliser", ("", "layer_norm", "norm"), "") or None
    return Dictionary(
        said.one_of("kind", KINDS, ""),  # type: ignore[arg-type]
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        said.flag("subtracts_b_dec", False),
        **more,
        k=said.size("k"),
        normaliser=normaliser,  # type: ignore[arg-type]
        before_norm_weights=said.flag("before_norm_weights", False),
        reads=asked.reads or _names(said, "reads"),
        writes=asked.writes or _names(said, "writes"),
        widths_read=_widths(said, "widths_read"),
        widths_written=_widths(said, "widths_written"),
        model=asked.model or said.text("model"),
        metadata=said.part("metadata").content,
    )


def _names(said: Facts, key: str) -> tuple[str, ...]:
    names = said.content.get(key, [])
    if not isinstance(names, list) or not all(map(is_plain_name, names)):
        raise said.bad(key, "a list of places was expected")
    return tuple(names)


def _widths(said: Facts, key: str) -> tuple[int, ...]:
    widths = said.content.get(key, [])
    if not isinstance(widths, list) or not all(type(width) is int and 0 < width < 2**31 for width in widths):
        raise said.bad(key, "a list of whole numbers above 0 was expected")
    return tuple(widths)
