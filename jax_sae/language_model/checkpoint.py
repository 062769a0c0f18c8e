"""The files of a language model's weights -> the parameters of `decoder.py`, one layout for all families."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from jax_sae.config import WeightsDtype
from jax_sae.errors import BadInput
from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.families import Family
from jax_sae.language_model.hub import JSON_BYTES, find_weight_files, one_line, refuse_damaged_download
from jax_sae.language_model.torch_file import TensorReference, is_plain_name, open_torch_file, refuse_pointer

FLOATS = ("float32", "float16", "bfloat16", "float64")

ROWS_AT_A_TIME = 4096
"""A large tensor is converted and looked at in parts, so that it is not held twice."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, not read yet."""

    file: Path
    name: str  # as in the file
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    read_rows: Callable[[slice], np.ndarray] | None = None
    """Some rows, where they can be read by themselves."""


def load_parameters(
    tensors: Mapping[str, Tensor],
    where: Path,
    family: Family,
    model: Decoder,
    dtype: WeightsDtype,
    loaded: Mapping[str, Any],
    put: Callable[[np.ndarray], jax.Array],
) -> dict[str, Any]:
    """The parameters that `model` needs, read tensor by tensor, except for those in `loaded`; `put` onto devices.

    All names and shapes are held against config.json before any tensor is read. Norms and biases are kept in float32.

    Raises:
        BadInput: if a tensor is missing, misshapen, too much, or not finite.
    """
    _check(tensors, where, family, model)
    params = dict(traverse_util.flatten_dict(loaded))
    shared: dict[str, np.ndarray] = {}  # the last tensor that several modules share
    for path, shape in shapes_of(model).items():
        if path in params:
            continue
        name, part = tensor_of(path, family)
        tensor = tensors[name]
        kept = kept_in(path, dtype)
        if path[-1] == "embedding" and tensor.read_rows is not None:  # large, so it is never there twice
            params[path] = put(_converted(tensor, tensor.read_rows, shape, kept))
            continue
        if part is None:
            value = tensor.read()
        else:
            if name not in shared:
                shared = {name: tensor.read()}
            value = part(_out_first(shared[name], family), model.architecture)
            value = value.T if family.linear == "in_out" else value
        if path[-1] == "kernel" and family.linear == "out_in":
            value = value.T
        converted = _converted(tensor, value.__getitem__, shape, kept)
        if family.norm_scales_from_one and path[-1] == "scale":
            converted += 1
        params[path] = put(converted)
    return traverse_util.unflatten_dict(params)


def _out_first(value: np.ndarray, family: Family) -> np.ndarray:
    return value.T if family.linear == "in_out" else value


def _converted(
    tensor: Tensor, rows_of: Callable[[slice], np.ndarray], shape: tuple[int, ...], dtype: WeightsDtype
) -> np.ndarray:
    """In the dtype that it is kept in; BadInput for what is not finite there."""
    into = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    # aligned as a CPU's arrays of JAX are, which then takes it without a copy
    memory = np.empty(math.prod(shape) * into.itemsize + 64, np.uint8)
    first_byte = -memory.ctypes.data % 64
    out = memory[first_byte : first_byte + math.prod(shape) * into.itemsize].view(into).reshape(shape)
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which is refused
        for first in range(0, shape[0], ROWS_AT_A_TIME):
            rows = slice(first, min(first + ROWS_AT_A_TIME, shape[0]))
            value = rows_of(rows)
            if value.dtype.name not in FLOATS:
                raise BadInput(f"{tensor.file}: {tensor.name} is {value.dtype}; expected one of {', '.join(FLOATS)}")
            out[rows] = value
            if not np.isfinite(out[rows]).all():
                raise BadInput(f"{tensor.file}: {tensor.name} has values that are not finite in {dtype}")
    return out


def _check(tensors: Mapping[str, Tensor], where: Path, family: Family, model: Decoder) -> None:
    """Raise BadInput unless the tensors are those of such a network; a head is needed where it is used."""
    architecture = model.architecture
    block = re.compile(re.escape(family.block).replace(re.escape("{i}"), r"(\d+)"))
    blocks = {match[1] for name in tensors if (match := block.match(name))}
    if architecture.num_layers > len(blocks):  # said before a network of so many blocks is looked into
        raise BadInput(
            f"{where}: config.json asks for {architecture.num_layers} blocks, the weights have {len(blocks)}: they "
            "do not belong together"
        )
    whole, expected = Decoder(architecture, architecture.num_layers), dict[str, tuple[int, ...]]()
    for path, shape in shapes_of(whole).items():
        name, part = tensor_of(path, family)
        out, *rest = shape[::-1] if path[-1] == "kernel" else shape
        out += expected[name][0] if part is not None and name in expected else 0  # modules that share it lie in a row
        expected[name] = (out, *rest)
    if family.linear == "in_out":
        kernels = {tensor_of(path, family)[0] for path in shapes_of(whole) if path[-1] == "kernel"}
        expected |= {name: expected[name][::-1] for name in kernels}
    head = tensor_of(("lm_head", "kernel"), family)[0]
    if model.layer < architecture.num_layers and head not in tensors:
        expected.pop(head, None)
    known = (*(f"{name}." for module, name in family.outside.items() if module != "lm_head"),)
    for name, tensor in tensors.items():
        is_of_the_network = (name.startswith(known) or block.match(name)) and not name.endswith(family.constants)
        if is_of_the_network and name not in expected:
            raise BadInput(
                f"{tensor.file}: holds {tensor.name}, which a language model with this config.json does not have: they "
                "do not belong together"
            )
    for name, shape in expected.items():
        if name not in tensors:
            raise BadInput(f"{where}: the weights lack {name}; config.json needs it")
        if (found := tensors[name].shape) != shape:
            raise BadInput(
                f"{tensors[name].file}: {tensors[name].name} has the shape {shortened(found)}, config.json asks for "
                f"{shape}"
            )


@cache
def shapes_of(model: Decoder) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each parameter, by its path in the tree."""
    method = "logits" if model.layer == model.architecture.num_layers else None  # which alone makes an untied head
    tree = jax.eval_shape(partial(model.init, method=method), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def kept_in(path: tuple[str, ...], dtype: WeightsDtype) -> WeightsDtype:
    """In what a parameter is kept: norms and biases always in float32."""
    return dtype if path[-1] in ("kernel", "embedding") else "float32"


def kept_shapes(model: Decoder, dtype: WeightsDtype) -> list[jax.ShapeDtypeStruct]:
    """The shapes of all parameters as they are kept."""
    return [jax.ShapeDtypeStruct(shape, kept_in(path, dtype)) for path, shape in shapes_of(model).items()]


def tensor_of(path: tuple[str, ...], family: Family) -> tuple[str, Callable[[np.ndarray, Any], np.ndarray] | None]:
    """("h_0", "attn", "q_proj", "kernel") -> its tensor's name, without prefix, and the part of it, if not all."""
    *modules, leaf = path
    suffix = "bias" if leaf == "bias" else "weight"
    if not modules[0].startswith("h_"):
        return f"{family.outside[modules[0]]}.{suffix}", None
    inside = "/".join(modules[1:])
    return f"{family.block.format(i=modules[0][2:])}{family.inside[inside]}.{suffix}", family.parts.get(inside)


def open_checkpoint(directory: Path, family: Family) -> dict[str, Tensor]:
    """The tensors in a directory's weights by their names, without the family's prefix.

    Raises:
        BadInput: if files are damaged, or hold a tensor twice.
    """
    tensors: dict[str, Tensor] = {}
    for file in find_weight_files(directory):
        refuse_pointer(file)
        refuse_damaged_download(file)
        for tensor in _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file):
            if not is_plain_name(tensor.name):
                raise BadInput(f"{file}: the name of a tensor, {tensor.name[:80]!a}, is too long or cannot be printed")
            prefix = next((prefix for prefix in family.prefixes if tensor.name.startswith(prefix)), "")
            name = tensor.name.removeprefix(prefix)
            if name in tensors:
                other = tensors[name]
                raise BadInput(f"{file}: holds {tensor.name}, but {other.file} holds it too, as {other.name}")
            tensors[name] = tensor
    return tensors


def _open_torch(file: Path) -> Iterator[Tensor]:
    content = open_torch_file(file)
    if isinstance(content, TensorReference):
        raise BadInput(f"{file}: holds a single tensor; the weights of a model were expected")
    for name, reference in content.items():
        yield Tensor(file, name, reference.shape, reference.read)


def _open_safetensors(file: Path) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    def read(name: str, rows: slice | None = None) -> np.ndarray:
        try:
            with safe_open(file, framework="np") as content:
                return content.get_tensor(name) if rows is None else content.get_slice(name)[rows]
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # the latter: unknown dtypes
            raise BadInput(f"{file}: {name} cannot be read ({one_line(error)})") from error

    try:
        with file.open("rb") as content:
            header = int.from_bytes(content.read(8), "little")
        if header > JSON_BYTES:
            raise SafetensorError(f"its header claims to have {header} bytes")
        with safe_open(file, framework="np") as content:
            shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{file}: not a whole safetensors file ({one_line(error)}); get it again") from error
    for name, shape in shapes.items():
        yield Tensor(file, name, shape, partial(read, name), partial(read, name))
