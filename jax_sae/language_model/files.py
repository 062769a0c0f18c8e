"""The files of a language model: what it is made of, and its parameters when they are asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_sae.config import WeightsDtype
from jax_sae.language_model.architectures import Architecture
from jax_sae.language_model.checkpoint import Tensor, load_parameters, open_checkpoint
from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.families import family_of, read_architecture
from jax_sae.language_model.gguf_file import open_gguf
from jax_sae.language_model.hub import find_model_files, read_json


@dataclass(frozen=True)
class ModelFiles:
    """A language model on this machine, not read yet."""

    path: Path
    """Its directory, or its .gguf file."""
    model_type: str
    architecture: Architecture
    open: Callable[[], Mapping[str, Tensor]]
    """Its tensors, not read yet."""

    def parameters(
        self, model: Decoder, dtype: WeightsDtype, loaded: Mapping[str, Any], put: Callable[[np.ndarray], jax.Array]
    ) -> dict[str, Any]:
        """Those that `model` needs, but for those in `loaded`, each given to `put`; errors as of `load_parameters`."""
        family = family_of({"model_type": self.model_type}, str(self.path))
        return load_parameters(self.open(), self.path, family, model, dtype, loaded, put)


def open_model(name: str, path: Path | None = None) -> ModelFiles:
    """The files of a name: a directory, a .gguf file, or an id on the hub; `path` is where they were found before.

    Raises:
        BadInput: if there are none, they are damaged, or of a family that is not run.
    """
    path = path or find_model_files(name)
    if path.suffix == ".gguf" and path.is_file():
        config, tensors = open_gguf(path)
        return ModelFiles(path, config["model_type"], read_architecture(config, str(path)), lambda: tensors)
    config_file = path / "config.json"
    config = read_json(config_file)
    architecture = read_architecture(config, str(config_file))
    family = family_of(config, str(config_file))
    return ModelFiles(path, config["model_type"], architecture, lambda: open_checkpoint(path, family))
