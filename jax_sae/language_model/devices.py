"""On which devices a language model lies: on one, whole on each of several, or in parts among them.

Several share texts, each of them runs the whole network on its own. Where the network does not fit into one, its
matrices lie in parts, and each is put together on all devices just before it is used and dropped after it, as fully
sharded training does it (Rajbhandari et al. 2020, "ZeRO", section 5.3). So a device keeps a part of all, and beside
that one matrix at a time, whatever the family.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = "rows"
"""The one axis of a mesh of devices that share texts."""

LAUNCHING = threading.Lock()
"""Held while a program is started in which devices wait for each other. A thread that reads ahead starts such programs
beside the one that trains, and every device has to be given them in one order."""

FITS = 0.9
"""Of a device's memory that a language model may take whole: what it computes has to have room, too."""


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Of devices that share texts."""
    return Mesh(np.array(devices), (ROWS,), axis_types=(AxisType.Auto,))


def mesh_of_rows(x: jax.Array) -> Mesh | None:
    """Of the devices that share the rows of x; None where one has all."""
    return mesh_of(_in_order(x.devices())) if len(x.devices()) > 1 else None


def devices_of(params: Mapping[str, Any]) -> list[jax.Device]:
    """Where parameters are, in the order of `jax.devices()`."""
    first = jax.tree.leaves(params)[0]
    return _in_order(first.devices()) if isinstance(first, jax.Array) else jax.devices()[:1]


def _in_order(devices: Iterable[jax.Device]) -> list[jax.Device]:
    return sorted(devices, key={device: i for i, device in enumerate(jax.devices())}.__getitem__)


def spread(params: Mapping[str, Any], devices: Sequence[jax.Device], in_parts: bool = False) -> Mapping[str, Any]:
    """Parameters whole on each of the devices, or in parts among them; `harvest` then runs stories on all at once."""
    return cast(Mapping[str, Any], jax.tree.map(lambda each: placed(each, devices, in_parts), params))


def placed(array: Any, devices: Sequence[jax.Device], in_parts: bool) -> jax.Array:
    """A parameter, whole on each of the devices, or in parts among them; of one, on the first without a copy."""
    if len(devices) == 1:
        is_apart = isinstance(array, jax.Array) and len(array.devices()) > 1
        return jax.device_put(array, devices[0] if is_apart else None, may_alias=True)
    spec = spec_of(array.shape, len(devices)) if in_parts else P()
    return put_onto(NamedSharding(mesh_of(devices), spec), array)


def spec_of(shape: Sequence[int], parts: int) -> P:
    """Along which axis a parameter lies in so many parts: a matrix along the last that they divide, others are whole.

    Of embeddings [V, D] that is D, so that each device has a part of the vector of every token.
    """
    if len(shape) < 2:
        return P()
    axis = next((axis for axis in reversed(range(len(shape))) if shape[axis] % parts == 0), None)
    return P() if axis is None else P(*[None] * axis, ROWS)


def where_it_fits(shapes: Sequence[jax.ShapeDtypeStruct]) -> tuple[list[jax.Device], bool]:
    """The devices that parameters of these shapes lie on, and whether in parts: if one is too small.

    They are of this process, or of all processes where its own are too small for the parts.
    """
    devices = jax.local_devices()
    room = (devices[0].memory_stats() or {}).get("bytes_limit")  # none of a CPU, whose devices have one memory
    needed = sum(shape.size * shape.dtype.itemsize for shape in shapes)
    if room is None or needed <= FITS * room:
        return devices[:1], False
    devices = devices if needed <= FITS * room * len(devices) else jax.devices()
    return devices, len(devices) > 1


def put_together(W: jax.Array, x: jax.Array, mesh: Mesh) -> jax.Array:
    """A matrix that lies in parts, whole on every device; not before x, which it is to be used with, is known."""
    W = jax.lax.with_sharding_constraint(
        W + zero_after(x).astype(W.dtype), NamedSharding(mesh, spec_of(W.shape, mesh.size))
    )
    return jax.lax.with_sharding_constraint(W, NamedSharding(mesh, P()))


def own_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    """x[B, ...] with as many rows on each device; whole on every device where B does not divide, as of one text."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS) if len(x) % mesh.size == 0 else P()))


def zero_after(x: jax.Array) -> jax.Array:
    """0, known only when x is: else XLA makes the matrices of all blocks ready before it begins with the first.

    (On a CPU it drops `lax.optimization_barrier` before it decides on the order.)
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x).ravel()[0], jnp.int32)
    return jnp.minimum(bits & 0x7FFFFFFF, 0)


def in_rows(devices: Sequence[jax.Device], *arrays: Any, axis: int = 0) -> Any:
    """Arrays, or None, with as many rows, those of `axis`, on each of several devices; for one as they are."""
    if len(devices) == 1:
        return arrays
    there = NamedSharding(mesh_of(devices), P(*[None] * axis, ROWS))
    return jax.tree.map(partial(put_onto, there), arrays)


def put_onto(sharding: NamedSharding, array: Any) -> jax.Array:
    """An array where a sharding says; each device is given its part alone.

    Of devices of several processes, all of which have the same array, or have it in parts on the same devices already.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return _moved(sharding)(array)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def seen_by_all(x: Any) -> Any:
    """The same, whole on each device where other processes have parts of it, so that NumPy can see it in each."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return _moved(NamedSharding(mesh_of(_in_order(x.devices())), P()))(x)


@lru_cache(maxsize=64)
def _moved(sharding: NamedSharding) -> Any:
    """A program that puts an array where a sharding says, from other parts of the same devices."""
    return jax.jit(lambda x: x, out_shardings=sharding)
