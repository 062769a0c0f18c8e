"""Settings and devices -> the mesh on which a sweep lies, and why."""

import math
from collections.abc import Sequence

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

    With `mesh.auto`, and for several processes that name none, sizes that are not given are chosen: of the layouts of
    all devices whose state fits into the devices and in which no member is computed twice, the one in which a device
    sends least in a step (`bytes_sent`). Where none has all devices, of those with most.

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
        possible = _layouts(config, asked, groups, width, devices)
        data, member, feature = possible[0] if possible else (data or 1, member or 1, feature or 1)
        sends = bytes_sent(config, groups, width, data, feature) / member
        why.append(f"a device sends {size(sends)} in a step, the least of {len(possible)} layouts of as many devices")
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
        return None, [f"mesh          one device of {devices}"] if asked.auto else []
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


def _layouts(
    config: Config, asked: MeshConfig, groups: Sequence[Group], width: int, devices: int
) -> list[tuple[int, int, int]]:
    """Parts (data, member, feature), with what is asked for, of as many devices as can be; the least sent is first."""
    shapes = [padded_shape(member_shapes(group, width, config.train)) for group in groups]
    needed = sum(2 * len(group.names) * n_bytes(shape) for group, shape in zip(groups, shapes, strict=True))
    room = PART_OF_MEMORY * memory_of_device()
    found = [
        (data, member, feature)
        for member in ([asked.member] if asked.member else range(1, devices + 1))
        for feature in ([asked.feature] if asked.feature else range(1, devices // member + 1))
        for data in ([asked.data] if asked.data else range(1, devices // (member * feature) + 1))
        if data * member * feature <= devices and _can_be(config, asked, groups, data, member, feature)
    ]
    fitting = [its for its in found if needed / (its[1] * its[2]) <= room]
    fitting = fitting or [its for its in found if its[1] * its[2] == max(each[1] * each[2] for each in found)]
    most = max((math.prod(its) for its in fitting), default=0)

    def sent_by(its: tuple[int, int, int]) -> tuple[float, int, int]:
        data, member, feature = its
        return bytes_sent(config, groups, width, data, feature) / member, feature, data

    return sorted((its for its in fitting if math.prod(its) == most), key=sent_by)


def _can_be(config: Config, asked: MeshConfig, groups: Sequence[Group], data: int, member: int, feature: int) -> bool:
    """Whether batch, features and kinds can lie in so many parts, with no member computed twice unless asked for."""
    if not asked.member and any(len(group.names) % member for group in groups):
        return False
    try:
        _refuse(config, groups, data, feature)
    except BadInput:
        return False
    return True


def bytes_sent(config: Config, groups: Sequence[Group], width: int, data: int, feature: int) -> float:
    """About how many bytes a device sends in a step: of each member its gradients, and what its features write.

    2 (n - 1) / n of an array that n devices sum, as in a ring (docs/scaling.md); what else is sent is small.
    """
    B, total = config.train.batch_tokens, 0.0
    for group in groups:
        read = group.width(width)
        written = sum(group.form.written) or read
        gradients = 4 * (read + written) * group.features / feature
        total += len(group.names) * 2 * (data - 1) / data * gradients
        total += len(group.names) * 2 * (feature - 1) / feature * 4 * B / data * written
    return total
