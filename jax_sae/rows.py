"""Numbers as people have them -> arrays; and rows in few shapes, so that few programs are compiled."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.errors import BadInput

MOST_DOUBLED = 1024
"""Up to so many rows a program's number is a power of two; beyond, rows that are only padding would cost too much."""


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is traced, as in a jitted function: known by shape and dtype, and not by its values."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def as_array(numbers: Any, name: str) -> np.ndarray | jax.Array:
    """Numbers or nested lists of them, a NumPy or JAX array, a torch tensor on any device -> an array, as they are.

    Args:
        numbers: what a caller gave; traced arrays are given back.
        name: of the argument, for errors.

    Raises:
        BadInput: if these are no numbers, or complex ones, or lists of different lengths.
    """
    array = numbers
    if not isinstance(numbers, jax.Array | np.ndarray):
        try:
            if hasattr(numbers, "detach"):  # a torch tensor, perhaps in bfloat16, which NumPy does not have
                tensor = numbers.detach().cpu()
                array = np.asarray(tensor.float() if tensor.is_floating_point() else tensor)
            else:
                array = np.asarray(numbers)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).split("\n")[0]
            raise BadInput(f"{name} is a {type(numbers).__name__}, not an array of numbers ({reason})") from error
    real = (np.bool_, np.integer, np.floating)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in real):
        raise BadInput(f"{name} has the dtype {array.dtype}; real numbers were expected, such as float32")
    return array


def as_float32(numbers: Any, name: str) -> np.ndarray | jax.Array:
    """`as_array`, and as float32; a JAX array of float32 is given back."""
    array = in_numpy(as_array(numbers, name)) if not _is_float32(numbers) else numbers
    if not isinstance(array, np.ndarray):
        return jnp.asarray(array, jnp.float32)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, as on any device
        return array.astype(np.float32, copy=False)


def widened(tree: Any) -> Any:
    """The tree with every array in float32: what is kept in fewer bits takes less memory, but computes as precisely."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def padded_rows(rows: int) -> int:
    """How many rows are computed for that many: a power of two; from 1024 on, an eighth of one more or less."""
    power = 1 << (rows - 1).bit_length() if rows else 1
    step = power if power <= MOST_DOUBLED else power // 8
    return -(-max(rows, 1) // step) * step


def by_rows(compute: Callable[..., jax.Array], x: np.ndarray | jax.Array, *more: np.ndarray | jax.Array) -> jax.Array:
    """compute(x) for x[..., I] and a function of rows [N, I] -> [N, O] that are independent; with few different N.

    It may take `more` arrays of the same tokens.

    JAX compiles a program for each shape and keeps it, so rows of zeros are added up to `padded_rows`, and taken away
    again. On a CPU both are done by NumPy, without a program, and without a copy of what has the right shape already.
    """
    rows = math.prod(x.shape[:-1])
    flat = [each if each.ndim == 2 else in_numpy(each).reshape(rows, each.shape[-1]) for each in (x, *more)]
    return unpadded(compute(*(padded(each, (padded_rows(rows),)) for each in flat)), (rows,), x.shape[:-1])


def padded(x: np.ndarray | jax.Array, sizes: tuple[int, ...]) -> np.ndarray | jax.Array:
    """x with zeros behind, so that its first axes have these sizes."""
    if x.shape[: len(sizes)] == sizes:
        return x
    x = in_numpy(x)
    if isinstance(x, np.ndarray):  # in a tenth of the time of np.pad
        more = np.zeros((*sizes, *x.shape[len(sizes) :]), x.dtype)
        more[tuple(map(slice, x.shape))] = x
        return more
    behind = [(0, size - axis) for size, axis in zip(sizes, x.shape, strict=False)]
    return jnp.pad(x, behind + [(0, 0)] * (x.ndim - len(sizes)))


def unpadded(computed: jax.Array, sizes: tuple[int, ...], leading: tuple[int, ...]) -> jax.Array:
    """Those of computed[..., O] that are no padding, sizes of its first axes; these then have the shape `leading`."""
    shape = (*leading, *computed.shape[len(sizes) :])
    if computed.shape == shape:
        return computed
    part = tuple(slice(size) for size in sizes)
    array = in_numpy(computed)[part].reshape(shape)
    if not isinstance(array, np.ndarray):
        return array
    return jax.device_put(array, computed.sharding if computed.committed else None)  # jnp.asarray has a program


def _is_float32(numbers: Any) -> bool:
    return isinstance(numbers, jax.Array) and numbers.dtype == jnp.float32


def in_numpy(array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The same memory as an array of NumPy, where it can see it: of a CPU, not traced, not divided among devices."""
    if isinstance(array, jax.Array) and not is_traced(array):
        devices = array.devices()
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            return np.asarray(array)
    return array
