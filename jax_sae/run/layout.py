"""Settings and devices -> the mesh on which a sweep lies, and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from jax_sae.activations.places import Place, total_width
from jax_sae.activations.sources import Source
from jax_sae.activations.story_sources import StorySource
from jax_sae.config import Config, MeshConfig
from jax_sae.errors import BadInput
from jax_sae.language_model.checkpoint import kept_shapes
from jax_sae.language_model.pretrained import LanguageModel
from jax_sae.processes import first_says, several
from jax_sae.run.memory import memory_of_device, n_bytes, size
from jax_sae.sweep.groups import Group, make_groups
from jax_sae.sweep.members import recorded_member
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


def mesh_to_look(config: Config, facts: Mapping[str, Any], asked: MeshConfig) -> tuple[Mesh | None, list[str]]:
    """The mesh on which a run's members are looked at, None for one device; and lines that say so.

    It is the one that is asked for or, without that, the run's own, as far as its devices are here. Members are looked
    at one after the other, so devices of the axis `member` share tokens, as those of `data` do.

    Args:
        config: the settings of the checkpoint.
        facts: its JSON.
        asked: what is to stand in place of the run's own `mesh`, if it says anything.

    Raises:
        BadInput: if more devices are asked for than there are, or as `choose_mesh` with `auto`.
    """
    mine, here = asked if asked != MeshConfig() else config.mesh, jax.device_count()
    if several() or (here == 1 and asked == MeshConfig() == config.mesh):
        return None, []
    parts = mine.data or 1, mine.member or 1, mine.feature or 1
    if mine.auto and math.prod(parts) <= here:
        members = tuple(recorded_member(each) for each in facts["members"].values())
        places = [Place(**place) for place in facts.get("places", ())]
        found, _ = choose_mesh(replace(config, mesh=mine), make_groups(members, places), total_width(places))
        parts = (1, 1, 1) if found is None else tuple(found.shape.values())
    data, member, feature = parts
    if (needed := math.prod(parts)) > here:
        wanted = f"data {data} x member {member} x feature {feature} = {needed} devices"
        if mine is asked:
            raise BadInput(f"the mesh has {wanted}, but there are {here}; give smaller numbers")
        return None, [f"mesh          one device: the run had {wanted}, and there are {here}"]
    if needed == 1:
        return None, [f"mesh          one device of {here}; --mesh.data {here} takes all"] if here > 1 else []
    return make_mesh(data * member, 1, feature), [
        f"mesh          tokens in {data * member} parts x features in {feature}, of {here} devices"
    ]


def share_models(
    sources: Sequence[Source], devices: Sequence[jax.Device], beside: int, whole: bool = False
) -> tuple[list[Source], list[str]]:
    """Sources whose language models lie on several devices, which share stories; and a line that says how.

    Weights lie whole on each of them or, where a device lacks room for that, in parts among them.

    Args:
        sources: others than stories stay as they are.
        devices: of this process, or of all processes.
        beside: bytes that a device has to have room for besides; of a CPU, that its memory has.
        whole: whether all blocks are run, and not only those up to the places that are read.
    """
    shared: dict[int, dict[str, LanguageModel]] = {}
    lines: list[str] = []
    for source in sources:
        if not isinstance(source, StorySource) or id(source.models) in shared:
            continue
        models = list(source.models.values())
        its = [replace(lm.model, layer=lm.model.architecture.num_layers) if whole else lm.model for lm in models]
        needed = sum(n_bytes(kept_shapes(model, lm.dtype)) for model, lm in zip(its, models, strict=True))
        taken = needed * (len(devices) if jax.default_backend() == "cpu" else 1) + beside  # of which parts share memory
        room = first_says(memory_of_device())
        in_parts = taken > room or any(lm.model.mesh is not None for lm in models)
        shared[id(source.models)] = {name: lm.spread(devices, in_parts) for name, lm in source.models.items()}
        how = f"in parts, {size(needed / len(devices))} on each" if in_parts else "whole on each"
        lines = [f"weights       {size(needed)} of language models, {how} of {len(devices)} devices"]
    return [
        replace(source, models=shared[id(source.models)]) if isinstance(source, StorySource) else source
        for source in sources
    ], lines


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
    room = PART_OF_MEMORY * first_says(memory_of_device())
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
