"""Config -> named members -> groups whose members are stacked and vmapped."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jax_sae.config import Member

WIDEST_PADDING = 1.05
"""A member joins a group if that widens it by at most this factor: its padded features cost arithmetic."""


def member_names(members: Sequence[Member]) -> list[str]:
    """One name a member, unique: F768, with -seed1 and -lr0.001 where these tell members apart."""
    same_width = Counter(member.features for member in members)
    names = []
    for member in members:
        name = f"F{member.features}"
        if same_width[member.features] > 1:
            others = [other for other in members if other.features == member.features]
            if len({other.seed for other in others}) > 1:
                name += f"-seed{member.seed}"
            if len({other.learning_rate for other in others}) > 1:
                name += f"-lr{member.learning_rate!r}"
        names.append(name)
    return names


@dataclass(frozen=True)
class Group:
    """Members of nearly equal width, stacked along a leading axis M and padded to the widest."""

    members: tuple[Member, ...]
    names: tuple[str, ...]

    @property
    def features(self) -> int:
        """F of the stacked arrays."""
        return max(member.features for member in self.members)


def make_groups(members: Sequence[Member]) -> tuple[Group, ...]:
    """Sort members into groups, narrowest first; F = 100, 767, 768, 1000 gives (100), (767, 768), (1000)."""
    groups: list[list[tuple[Member, str]]] = []
    for member, name in sorted(zip(members, member_names(members), strict=True), key=lambda pair: pair[0].features):
        if groups and member.features <= WIDEST_PADDING * groups[-1][0][0].features:
            groups[-1].append((member, name))
        else:
            groups.append([(member, name)])
    return tuple(Group(tuple(m for m, _ in group), tuple(n for _, n in group)) for group in groups)
