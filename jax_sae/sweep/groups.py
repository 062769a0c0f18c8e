"""Members -> groups whose members are stacked and computed together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_sae.activations.places import Columns, Place, columns
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import Autoencoder
from jax_sae.config import Member, Precision
from jax_sae.sweep.members import member_names

WIDEST_PADDING = 1.05
"""A member joins a group if that widens it by at most this factor: its padded features cost arithmetic."""


@dataclass(frozen=True)
class Form:
    """What members share that are computed together, each operation on all of them."""

    kind: type[Autoencoder]
    """The class, not its name: one that is defined anew in a notebook is compiled anew."""
    unit_decoder: bool
    resamples: int
    penalised: bool
    """Whether any of them has a penalty."""
    features: int
    """F of the stacked arrays."""
    most_k: int
    """The largest k, 0 where there is none."""
    columns: Columns | None = None
    """Those of a batch that they read; None: all."""

    @property
    def is_sparse(self) -> bool:
        """Whether anything but F limits how many features are active."""
        return self.penalised or self.most_k > 0

    @property
    def counts_tokens(self) -> bool:
        """Whether it is counted since when each feature has not fired."""
        return self.resamples > 0 or "auxk_coefficient" in self.kind.settings

    def model(self, width: int, precision: Precision) -> Autoencoder:
        """The Flax module of the members."""
        return self.kind(width, self.features, precision=precision, most_k=self.most_k, penalised=self.penalised)


@dataclass(frozen=True)
class Group:
    """Members of one place, one kind and nearly equal width, stacked along an axis M and padded to the widest."""

    members: tuple[Member, ...]
    names: tuple[str, ...]
    columns: Columns | None = None
    """Those of their place, in batches of several places side by side; None: all, of batches of one."""

    def width(self, of_batches: int) -> int:
        """D of the members; `of_batches` is the number of columns of a batch."""
        return of_batches if self.columns is None else self.columns[1] - self.columns[0]

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
            any(getattr(member, name) for member in self.members for name in kind.penalties),
            self.features,
            max(member.k or 0 for member in self.members),
            self.columns,
        )


def own_columns(x: Any, of: Form | Group) -> Any:
    """Those of x[..., D1 + D2 + ...] that members read: [..., D] of their place."""
    return x if of.columns is None else x[..., slice(*of.columns)]


def make_groups(members: Sequence[Member], places: Sequence[Place] = ()) -> tuple[Group, ...]:
    """Sort complete members into groups, by place and kind, narrowest first, and name them.

    F = 100, 767, 768, 1000 gives (100), (767, 768), (1000).

    Args:
        members: complete ones.
        places: whose columns a batch has, side by side. One, or none said: all members read the whole batch.
    """
    its_columns = columns(places) if len(places) > 1 else {}
    order = list(its_columns)
    kinds = list(dict.fromkeys(member.kind for member in members))
    in_order = sorted(
        zip(members, member_names(members), strict=True),
        key=lambda pair: (
            order.index(pair[0].place or "") if order else 0,
            kinds.index(pair[0].kind),
            pair[0].features,
        ),
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
        Group(tuple(m for m, _ in group), tuple(n for _, n in group), its_columns.get(group[0][0].place or ""))
        for group in groups
    )


def _together(member: Member) -> tuple[Any, ...]:
    """What has to be equal in members of a group, apart from their widths."""
    return member.place, member.kind, member.decoder_norm, member.resamples
