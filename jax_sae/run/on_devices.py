"""The state of a sweep on a mesh <-> slices of its members' arrays, as they stand in a checkpoint.

A checkpoint knows of no mesh: each member's arrays are there under its name, at its own number of features, whatever
else lay beside them. Nothing is sent from one device to another: what a device holds of a group's arrays, M members
side by side, is cut into slices of the members' arrays, and the other way round.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_sae.autoencoder.shards import MEMBER
from jax_sae.run.digests import from_flat, named_leaves, to_flat
from jax_sae.run.slices import Index, Slices, common, place, whole
from jax_sae.sweep.mesh import specs, spread
from jax_sae.sweep.update import MemberState, padded_shape, stack

Read = Callable[[Mapping[str, set[Index]]], Mapping[str, Mapping[Index, np.ndarray]]]
"""Gives slices of arrays of members, by the names that they have in a checkpoint."""


def saved(state: MemberState) -> dict[str, Any]:
    """What of a member's state stands in a checkpoint, by its names there."""
    memory = {"memory": state.memory} if state.memory else {}
    return {"params": state.params, "optimizer": to_flat(state.opt_state), **memory}


def slices_of(group: MemberState, shapes: Sequence[MemberState]) -> list[dict[str, Any]]:
    """Of each member of a group what a checkpoint holds of it, in slices; here are those that this process writes.

    A slice that lies on several devices is written by one of them: of one array by the first, of the next by another.

    Args:
        group: the members' states, stacked and padded, on a mesh.
        shapes: of each member, at its own number of features.
    """
    members: list[dict[str, Any]] = [{} for _ in shapes]
    likes = [dict(named_leaves(saved(shape))) for shape in shapes]
    for number, (name, array) in enumerate(named_leaves(saved(group))):
        part = array.sharding.shard_shape(array.shape)
        copies = len(array.sharding.device_set) * math.prod(part) // math.prod(array.shape)
        held = [
            (_index(shard.index, array.shape), np.asarray(shard.data))
            for shard in array.addressable_shards
            if shard.replica_id == number % copies
        ]
        for i, like in enumerate(likes):
            shape = like[name].shape
            here = {}
            for ((first, last), *rest), its in held:
                index = common(tuple(rest), whole(shape))
                if first <= i < last and index is not None:
                    here[index] = np.asarray(its[i - first][place(index, tuple(rest))])
            slice_shape = tuple(min(n, most) for n, most in zip(part[1:], shape, strict=True))
            members[i][name] = Slices(shape, array.dtype, slice_shape, here)
    return members


def put_together(
    read: Read, names: Sequence[str], states: Sequence[MemberState], shapes: Sequence[MemberState], mesh: Mesh
) -> MemberState:
    """The inverse of `slices_of`, on any mesh: the stacked state of a group; a process reads what its devices need.

    Args:
        read: gives slices; it is called once.
        names: of the members.
        states: of the members; what is not in a checkpoint is taken of them: their settings, and whether they diverged.
        shapes: of the members.
        mesh: where the state is put.
    """
    padded = padded_shape(list(shapes))
    parts = mesh.shape[MEMBER]
    M = -(-len(names) // parts) * parts
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((M, *leaf.shape), leaf.dtype), padded)
    lies = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), stacked, specs(stacked))
    likes = [dict(named_leaves(saved(shape))) for shape in shapes]
    arrays, shardings = (dict(named_leaves(saved(tree))) for tree in (stacked, lies))

    def of_members(name: str, index: Index) -> Iterator[tuple[int, str, Index]]:
        """Rows of a part of a stacked array, and of what they are: empty places have copies of the last member."""
        (first, last), *rest = index
        for row in range(first, last):
            i = min(row, len(names) - 1)
            its = common(tuple(rest), whole(likes[i][name].shape))
            if its is not None:
                yield row - first, f"members/{names[i]}/{name}", its

    wanted: dict[str, set[Index]] = {}
    for name, array in arrays.items():
        for there in shardings[name].addressable_devices_indices_map(array.shape).values():
            for _, of_member, index in of_members(name, _index(there, array.shape)):
                wanted.setdefault(of_member, set()).add(index)
    found = read(wanted)

    def made(name: str) -> jax.Array:
        array = arrays[name]

        def part(there: tuple[slice, ...] | None) -> np.ndarray:
            index = _index(there, array.shape)
            rows = np.zeros([last - first for first, last in index], array.dtype)
            for row, of_member, its in of_members(name, index):
                at: Any = (row, *place(its, index[1:]))
                rows[at] = found[of_member][its]
            return rows

        return jax.make_array_from_callback(array.shape, shardings[name], part)

    nothing: dict[str, Any] = {"params": {}, "opt_state": (), "memory": {}}
    (others,) = spread((stack([each._replace(**nothing) for each in states], padded._replace(**nothing)),), mesh)
    optimizer = {name: made(f"optimizer/{name}") for name in to_flat(padded.opt_state)}
    return others._replace(
        params={name: made(f"params/{name}") for name in padded.params},
        opt_state=from_flat(padded.opt_state, optimizer),
        memory={name: made(f"memory/{name}") for name in padded.memory},
    )


def _index(there: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Index:
    """JAX's slices of an array as numbers."""
    return tuple(its.indices(n)[:2] for its, n in zip(there or (), shape, strict=True))
