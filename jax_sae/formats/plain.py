"""This project's own files: `dictionary.safetensors`, and what the arrays mean in `dictionary.json`.

They hold every dictionary there is, by the names and in the shapes of `Dictionary`.
"""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jax_sae.formats.dictionary import Dictionary

VERSION = 1


def write(dictionary: Dictionary, folder: Path) -> Dictionary:
    """Write a dictionary into a folder that is there; returns the same, as it is held there."""
    held = {field.name: getattr(dictionary, field.name) for field in fields(Dictionary)}
    arrays = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
    said = {name: value for name, value in held.items() if name not in arrays and value is not None}
    said["metadata"] = dict(dictionary.metadata)
    content = {"format": "jax_sae dictionary", "version": VERSION, **said}
    (folder / "dictionary.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(arrays, folder / "dictionary.safetensors")
    return dictionary
