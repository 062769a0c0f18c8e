"""Files of a dictionary -> the record, whatever tool wrote them: the table of formats, and how each is recognised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jax_sae.errors import BadInput
from jax_sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    plain,
    qwen_scope,
    saelens,
    sparsify,
)
from jax_sae.formats.asked import NOTHING, Asked
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.tensors import open_tensors

Reader = Callable[[Path, Asked], Dictionary]


@dataclass(frozen=True)
class Format:
    """A tool's way to keep a dictionary."""

    read: Reader
    files: tuple[str, ...] = ()
    """Those that a folder of it has; where a folder has those of several formats, the first in the table counts."""
    tensors: tuple[str, ...] = ()
    """Those that a .pt file of it has, where the file's name does not say it."""
    name: str = ""
    """A pattern that a file's own name fits."""


FORMATS: dict[str, Format] = {
    "saelens": Format(saelens.read, ("cfg.json", "sae_weights.safetensors")),
    "sparsify": Format(sparsify.read, ("cfg.json", "sae.safetensors")),
    "gemma_scope": Format(gemma_scope.read, ("params.npz",), name="params.npz"),
    "gemma_scope_2": Format(gemma_scope.read_2, ("params.safetensors",), name="params.safetensors"),
    "llama_scope": Format(llama_scope.read, ("hyperparams.json", "checkpoints/final.safetensors")),
    "llamascopium": Format(llama_scope.read_llamascopium, ("config.json", "sae_weights.safetensors")),
    "circuit_tracer": Format(circuit_tracer.read, ("layer_*.safetensors",), name="layer_*.safetensors"),
    "qwen_scope": Format(qwen_scope.read, name="layer*.sae.pt"),
    "openai": Format(openai.read, tensors=("pre_bias", "latent_bias")),
    "goodfire": Format(goodfire.read, tensors=("encoder_linear.weight", "decoder_linear.weight")),
    "dictionary_learning": Format(dictionary_learning.read, ("ae.pt",), ("encoder.weight", "decoder.weight"), "ae.pt"),
    "safetensors": Format(plain.read, ("dictionary.json", "dictionary.safetensors")),
}
"""Every format that is read, by the name that `--format` takes. docs/import_export.md says what each one holds."""


def read_dictionary(path: Path, format: str = "", asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a folder or file.

    Args:
        path: of it.
        format: a name in `FORMATS`; '': as the files look.
        asked: what the files may not say.

    Raises:
        BadInput: if there are no such files, they are of no known format, damaged, or hold what the record cannot.
    """
    if not path.exists():
        raise BadInput(f"{path}: there is no such file or folder")
    if format and format not in FORMATS:
        raise BadInput(f"--format is {format!r}; {', '.join(FORMATS)} are known")
    with naming(path):
        return FORMATS[format or recognised(path)].read(path, asked)


def is_dictionary(path: Path) -> bool:
    """Whether a folder or file looks like one of a known format."""
    try:
        return bool(recognised(path))
    except BadInput:
        return False


def recognised(path: Path) -> str:
    """The format that a folder's or a file's names and tensors look like.

    Raises:
        BadInput: if it looks like none.
    """
    if path.is_dir():
        for name, its in FORMATS.items():
            if its.files and all(next(path.glob(file), None) for file in its.files):
                return name
        if list(path.glob("W_enc_*.safetensors")):
            return "circuit_tracer"  # which says why a cross-layer transcoder is refused
        there = sorted(entry.name for entry in path.iterdir())
        raise BadInput(
            f"{path}: no format of dictionaries has these files: {', '.join(there[:8])}{', ...' * (len(there) > 8)}; "
            "give the folder or file of one dictionary, or --format"
        )
    for name, its in FORMATS.items():
        if its.name and path.match(its.name):
            return name
    if path.suffix in (".pt", ".pth", ".bin"):
        tensors = open_tensors(path)
        for name, its in FORMATS.items():
            if its.tensors and all(tensor in tensors for tensor in its.tensors):
                return name
        if {"W_enc", "threshold"} <= set(tensors.stored):
            return "dictionary_learning"
    raise BadInput(
        f"{path}: neither its name nor its tensors tell its format; give --format, one of {', '.join(FORMATS)}"
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of what is in files say in which."""
    try:
        yield
    except BadInput as error:
        if str(path) in str(error):
            raise
        raise BadInput(f"{path}: {error}") from error
