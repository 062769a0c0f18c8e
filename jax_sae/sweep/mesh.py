"""A sweep on a mesh of devices: which part of each array lies on which device.

A mesh has three axes, and an array lies in parts along those that it has:

    member     members of a group, M; they send each other nothing
    data       rows of a batch, B; the gradients of a step are summed, once for a group
    feature    features of a member, F; what they write is summed, once for a batch

Along the others it is there as often as there are devices. The step itself is that of one device (`update.py`), with
those sums where `jax_sae/autoencoder/shards.py` is asked for them. A state is in the same order on any mesh, so that a
checkpoint does not know on how many devices it was made.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae.autoencoder.shards import DATA, FEATURE, MEMBER, Shards
from jax_sae.language_model.devices import put_onto
from jax_sae.sweep.resampling import OF_NO_FEATURE


def make_mesh(data: int, member: int, feature: int) -> Mesh:
    """A mesh of the first data * member * feature devices, those of a feature axis beside each other."""
    devices = np.array(jax.devices()[: data * member * feature])
    return Mesh(devices.reshape(data, member, feature), (DATA, MEMBER, FEATURE), axis_types=(AxisType.Auto,) * 3)


def shards_of(mesh: Mesh) -> Shards:
    """In how many parts the tokens of a batch and the features of a member lie."""
    return Shards(mesh.shape[DATA], mesh.shape[FEATURE])


def specs(state: Any) -> Any:
    """Of each array of stacked states, along which axes of the mesh it lies in parts."""
    return jax.tree_util.tree_map_with_path(_spec, state)


def _spec(path: tuple[Any, ...], array: Any) -> P:
    """Of an array [M, ...]: which of its axes are features follows from its name."""
    name = getattr(path[-1], "key", "")
    fields = {getattr(each, "name", "") for each in path}
    if fields & {"params", "mu", "nu"} or name == "tokens_since_fired":
        return P(MEMBER, *spec_of_parameter(name, array.ndim - 1))
    return P(MEMBER)


def spec_of_parameter(name: str, ndim: int) -> P:
    """Of a parameter of one member, or what an optimiser keeps for it: which of its axes are features."""
    if name == "W_enc":
        return P(None, FEATURE)
    if name == "W_dec":
        return P(FEATURE, None)
    return P(FEATURE) if ndim == 1 and name not in OF_NO_FEATURE else P()


def filled(state: Any, parts: int) -> Any:
    """Stacked states [M, ...] with copies of the last member, up to a multiple of the mesh's parts."""

    def fill(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return np.concatenate([array, *[array[-1:]] * (-len(array) % parts)])

    return jax.tree.map(fill, state)


def spread(state: Any, mesh: Mesh) -> Any:
    """States of a sweep, stacked by groups, put onto a mesh; each device is given its part alone."""
    state = tuple(filled(group, mesh.shape[MEMBER]) for group in state)
    return jax.tree.map(lambda array, spec: put_onto(NamedSharding(mesh, spec), array), state, specs(state))


def computed_on(mesh: Mesh, states: Callable[[], Any]) -> Any:
    """What `states` gives, stacked states, computed on a mesh: each device computes its part, as far as XLA can."""
    parts = mesh.shape[MEMBER]

    def begun() -> Any:
        def fill(array: jax.Array) -> jax.Array:
            return jnp.concatenate([array, *[array[-1:]] * (-len(array) % parts)])

        return jax.tree.map(fill, states())

    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(jax.eval_shape(begun)))
    return jax.jit(begun, out_shardings=where)()


def parameters_on(mesh: Mesh, parameters: Callable[[], dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """What `parameters` gives, those of one member, computed on a mesh, each device its features, as far as XLA can."""
    shapes = jax.eval_shape(parameters)
    where = {name: NamedSharding(mesh, spec_of_parameter(name, shape.ndim)) for name, shape in shapes.items()}
    return jax.jit(parameters, out_shardings=where)()


def batches_on(mesh: Mesh, x: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
    """Batches x[batches, B, D] and weights[batches, B], put onto a mesh; each device is given its rows alone."""
    along = (P(None, DATA, None), P(None, DATA))
    its = (put_onto(NamedSharding(mesh, spec), array) for array, spec in zip((x, weights), along, strict=True))
    return next(its), next(its)


def of_members(mesh: Mesh, x: jax.Array) -> jax.Array:
    """x[m, ...] of each part of the members, [M, ...], on all devices."""
    return jax.lax.all_gather(x, MEMBER, axis=0, tiled=True) if mesh.shape[MEMBER] > 1 else x
