"""Settings and devices -> the mesh on which a sweep lies, and why."""

from collections.abc import Sequence
from math import gcd

import jax
from jax.sharding import Mesh

from jax_sae.config import Config, MeshConfig
from jax_sae.errors import BadInput
from jax_sae.processes import several
from jax_sae.run.memory import memory_of_device, n_bytes, size
from jax_sae.sweep.groups import Group
from jax_sae.sweep.mesh import make_mesh
from jax_sae.sweep.update import member_shapes, padded_shape

PART_OF_MEMORY = 0.5
"""Of a device's memory that a sweep may take when a mesh is chosen; blocks of activations lie there too."""


def choose_mesh(config: Config, groups: Sequence[Group], width: int) -> tuple[Mesh | None, list[str]]:
    """The mesh that the settings ask for, None for one device; and lines that say what lies where, and why.

    With `mesh.auto`, sizes that are not given are chosen, one after the other: `feature` as small as the memory of a
    device allows, since it sends what features write at each step; then `member` as large as it can be without
    computing a member twice, since it sends nothing; then `data`, as far as it divides a batch.

    Args:
        config: of the run.
        groups: of its members.
        width: the number of columns of a batch.

    Raises:
        BadInput: if there are fewer devices than the mesh has, or a batch, features or a kind cannot be split so.
    """
    asked, devices = config.mesh, jax.device_count()
    if several() and asked == MeshConfig():
        asked = MeshConfig(auto=True)
    data, member, feature = asked.data, asked.member, asked.feature
    why: list[str] = []
    if asked.auto:
        left = devices // ((data or 1) * (member or 1) * (feature or 1))
        if feature is None:
            feature, reason = _feature_parts(config, groups, width, left, (data or 1) * (member or 1))
            left //= feature
            why.append(reason)
        if member is None:
            member = max(n for n in range(1, left + 1) if left % n == 0 and _fits_members(groups, n))
            left //= member
            why.append(f"member {member}, which sends nothing and computes no member twice")
        if data is None:
            data = gcd(left, config.train.batch_tokens) if config.train.batching == "tokens" else 1
            data = data if all(_splits_tokens(group) for group in groups) else 1
            why.append(f"data {data}, what divides a batch of what is left")
    data, member, feature = data or 1, member or 1, feature or 1
    needed = data * member * feature
    if needed > devices:
        raise BadInput(
            f"the mesh has data {data} x member {member} x feature {feature} = {needed} devices, but there are "
            f"{devices}; give smaller numbers, or mesh.auto"
        )
    if several() and needed < devices:
        raise BadInput(
            f"the mesh has data {data} x member {member} x feature {feature} = {needed} devices, but the processes "
            f"have {devices}, and each has to take part; give numbers whose product that is, or train.batch_tokens "
            "that it divides"
        )
    if needed == 1:
        return None, [f"mesh          one device of {devices}: {'; '.join(why)}"] if asked.auto else []
    _refuse(config, groups, data, feature)
    lines = [f"mesh          data {data} x member {member} x feature {feature} of {devices} devices"]
    lines += [f"              {reason}" for reason in why]
    twice = [(-len(group.names) % member, group) for group in groups]
    if sum(n for n, _ in twice):
        which = ", ".join(f"{n} beside {' '.join(group.names)}" for n, group in twice if n)
        lines.append(f"note          places for members that stay empty, each computed for nothing: {which}")
    return make_mesh(data, member, feature), lines


def _refuse(config: Config, groups: Sequence[Group], data: int, feature: int) -> None:
    """Raise BadInput if a batch, or the features of a member, cannot lie in so many parts."""
    if data > 1 and config.train.batching == "story":
        raise BadInput(f"mesh.data is {data}, but with story batching a batch is one story; use tokens, or mesh.member")
    if config.train.batch_tokens % data:
        raise BadInput(
            f"mesh.data is {data}, which does not divide train.batch_tokens, {config.train.batch_tokens}; "
            f"the next that it divides is {-(-config.train.batch_tokens // data) * data}"
        )
    for group in groups:
        kind, widest = group.form.kind, max(group.members, key=lambda member: member.features)
        if feature > 1 and not kind.splits_features:
            raise BadInput(
                f"mesh.feature is {feature}, but kind {widest.kind} does not say that its features may lie on several "
                "devices (splits_features, docs/add_a_kind.md); use mesh.member or mesh.data"
            )
        if widest.features % feature:
            name, more = group.names[group.members.index(widest)], -(-widest.features // feature) * feature
            raise BadInput(
                f"mesh.feature is {feature}, which does not divide {widest.features}, the features of {name}; the next "
                f"that it divides is {more}"
            )
        if data > 1 and not _splits_tokens(group):
            raise BadInput(
                f"mesh.data is {data}, but the loss of kind {widest.kind} is no sum over tokens, and the kind does not "
                "say that it sums over parts of a batch (splits_features, docs/add_a_kind.md); use mesh.member"
            )


def _splits_tokens(group: Group) -> bool:
    """Whether rows of a batch may lie on several devices."""
    return group.form.kind.splits_features or not group.form.kind.couples_tokens


def _fits_members(groups: Sequence[Group], parts: int) -> bool:
    """Whether so many parts have equally many members of each group."""
    return all(len(group.names) % parts == 0 for group in groups)


def _feature_parts(config: Config, groups: Sequence[Group], width: int, most: int, others: int) -> tuple[int, str]:
    """The smallest number of parts of the features with which the sweep fits into the devices; and why."""
    shapes = [padded_shape(member_shapes(group, width, config.train)) for group in groups]
    needed = sum(2 * len(group.names) * n_bytes(shape) for group, shape in zip(groups, shapes, strict=True))
    widest = [max(member.features for member in group.members) for group in groups]
    fitting = [n for n in range(1, most + 1) if most % n == 0 and all(F % n == 0 for F in widest)]
    if not all(group.form.kind.splits_features for group in groups):
        fitting = [1]
    room = PART_OF_MEMORY * memory_of_device()
    parts = next((n for n in fitting if needed / n <= room * max(1, others)), fitting[-1])
    return parts, f"feature {parts}, as the sweep takes {size(needed)} and a device has {size(memory_of_device())}"
