"""Members -> groups whose members are stacked and computed together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_sae.activations.places import Columns, Place, columns, own_columns
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import Autoencoder
from jax_sae.autoencoder.shards import WHOLE, Shards
from jax_sae.config import Member, Precision
from jax_sae.errors import BadInput
from jax_sae.sweep.members import member_names, placement_of

WIDEST_PADDING = 1.05
"""A member joins a group if that widens it by at most this factor: its padded features cost arithmetic."""


@dataclass(frozen=True)
class Form:
    """What members share that are computed together, each operation on all of them."""

    kind: type[Autoencoder]
    """The class, not its name: one that is defined anew in a notebook is compiled anew."""
    unit_decoder: bool
    resamples: int
    weighs: tuple[str, ...]
    """Those settings that weigh a penalty, and are above 0 in any of them."""
    features: int
    """F of the stacked arrays."""
    most_k: int
    """The largest k, 0 where there is none."""
    reads: tuple[Columns, ...] | None = None
    """Those columns of a batch that they read, a pair a place; None: all."""
    writes: tuple[Columns, ...] | None = None
    """Those that they write; None: those that they read, of one place."""
    skip: bool = False
    shards: Shards = WHOLE
    """On a mesh, in how many parts their features and the tokens of a batch lie."""

    @property
    def written(self) -> tuple[int, ...]:
        """Their widths, as `Autoencoder.written` has them."""
        return tuple(last - first for first, last in self.writes or ())

    @property
    def is_sparse(self) -> bool:
        """Whether anything but F limits how many features are active."""
        return bool(self.weighs) or self.most_k > 0

    @property
    def counts_tokens(self) -> bool:
        """Whether it is counted since when each feature has not fired."""
        return self.resamples > 0 or "auxk_coefficient" in self.kind.settings

    def model(self, width: int, precision: Precision) -> Autoencoder:
        """The Flax module of the members, of a part of their features on a mesh; `width` is what they read."""
        return self.kind(
            width,
            self.features // self.shards.feature,
            written=self.written,
            skip=self.skip,
            precision=precision,
            most_k=self.most_k,
            weighs=self.weighs,
            shards=self.shards,
        )


@dataclass(frozen=True)
class Group:
    """Members of one placement, one kind and nearly equal F, stacked along an axis M and padded to the widest."""

    members: tuple[Member, ...]
    names: tuple[str, ...]
    reads: tuple[Columns, ...] | None = None
    """Columns of the places that they read, in batches of several places side by side; None: all, of batches of one."""
    writes: tuple[Columns, ...] | None = None
    """Those that they write; None: of autoencoders, which write the one place that they read."""

    def width(self, of_batches: int) -> int:
        """D of what the members read; `of_batches` is the number of columns of a batch."""
        return of_batches if self.reads is None else sum(last - first for first, last in self.reads)

    @property
    def features(self) -> int:
        """F of the stacked arrays."""
        return max(member.features for member in self.members)

    @property
    def form(self) -> Form:
        """What its members share."""
        first, kind = self.members[0], kind_named(self.members[0].kind)
        return Form(
            kind,
            first.decoder_norm == "unit",
            first.resamples or 0,
            tuple(name for name in kind.penalties if any(getattr(member, name) for member in self.members)),
            self.features,
            max(member.k or 0 for member in self.members),
            self.reads,
            self.writes,
            bool(first.skip),
        )


def inputs_and_targets(x: Any, of: Form | Group) -> tuple[Any, Any]:
    """Those of x[..., D1 + D2 + ...] that members read, and those that they write; the same array of autoencoders."""
    inputs = own_columns(x, of.reads)
    return inputs, inputs if of.writes in (None, of.reads) else own_columns(x, of.writes)


def make_groups(members: Sequence[Member], places: Sequence[Place] = ()) -> tuple[Group, ...]:
    """Sort complete members into groups, by place and kind, narrowest first, and name them.

    F = 100, 767, 768, 1000 gives (100), (767, 768), (1000).

    Args:
        members: complete ones.
        places: whose columns a batch has, side by side. One, or none said: all members read the whole batch.
    """
    its_columns = columns(places) if len(places) > 1 else {}
    there = [place.name for place in places]
    order = sorted(
        dict.fromkeys(placement_of(member) for member in members),
        key=lambda its: (its[0] is None, there.index(its[0]) if its[0] in there else 0),  # dictionaries as they come
    )
    kinds = list(dict.fromkeys(member.kind for member in members))
    in_order = sorted(
        zip(members, member_names(members), strict=True),
        key=lambda pair: (order.index(placement_of(pair[0])), kinds.index(pair[0].kind), pair[0].features),
    )
    groups: list[list[tuple[Member, str]]] = []
    for member, name in in_order:
        for group in groups:
            first = group[0][0]
            widest = WIDEST_PADDING * first.features if kind_named(member.kind).pads else first.features
            if member.features <= widest and _together(member) == _together(first):
                group.append((member, name))
                break
        else:
            groups.append([(member, name)])
    return tuple(
        Group(tuple(m for m, _ in group), tuple(n for _, n in group), *_columns_of(group[0][0], its_columns))
        for group in groups
    )


def _columns_of(
    member: Member, its_columns: Mapping[str, Columns]
) -> tuple[tuple[Columns, ...] | None, tuple[Columns, ...] | None]:
    """What a member reads and what it writes, as `Group` has them."""
    if member.reads and not its_columns:
        raise BadInput(
            f"a member reads {' and '.join(member.reads)} and writes {' and '.join(member.writes or ())}, but the "
            "places whose columns a batch has are not said"
        )
    if not member.reads:
        return ((its_columns[member.place or ""],) if its_columns else None), None
    reads, writes = (tuple(its_columns[name] for name in names or ()) for names in (member.reads, member.writes))
    return reads, writes


def _together(member: Member) -> tuple[Any, ...]:
    """What has to be equal in members of a group, apart from their widths."""
    return *placement_of(member), member.kind, member.decoder_norm, member.resamples
