"""What should be known of a run that ended well, but not as it was meant."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_sae.autoencoder.kinds import kind_named
from jax_sae.config import SETTINGS

OFF_TARGET = 0.1
"""A member missed its target if its L0 is off by more than this part of it."""
MANY = 0.1
"""Many features are dead if they are more than this part of all."""
NOT_SPARSE = 0.25
"""A penalty had no effect if more than this part of the features is active."""
MOST_LINES = 6


def advice(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for the screen: which members missed their target, felt no penalty or have many dead features; what helps.

    Args:
        members: of `summary.json`; those that diverged are left out, since that is said elsewhere.
    """
    found = [
        f"{member['name']} {what}"
        for member in members
        if member["diverged_at_step"] is None
        for what in (_off_target(member), _no_penalty(member), _many_dead(member))
        if what
    ]
    more = [f"advice        and {len(found) - MOST_LINES} more; summary.json has l0 and dead_features of each member"]
    return [f"advice        {line}" for line in found[:MOST_LINES]] + (more if len(found) > MOST_LINES else [])


def _off_target(member: Mapping[str, Any]) -> str:
    target, l0 = member.get("target_l0"), member["l0"]
    if target is None or abs(l0 - target) <= OFF_TARGET * target:
        return ""
    nearer = f"initial_threshold {'above' if l0 > target else 'below'} {member['initial_threshold']:g}"
    return f"has an L0 of {l0:.1f} where {target:g} was asked for: take more steps, or an {nearer}"


def _no_penalty(member: Mapping[str, Any]) -> str:
    names = [name for name in ("l1_coefficient", "l0_coefficient") if member.get(name)]
    if not names or member["l0"] <= NOT_SPARSE * member["features"]:
        return ""
    said = f"{names[0]} {member[names[0]]:g}"
    return f"is not sparse, L0 {member['l0']:.1f} of {member['features']:,}: {said} had little effect; raise it"


def _many_dead(member: Mapping[str, Any]) -> str:
    dead, F = member["dead_features"], member["features"]
    is_sparse = any(member.get(name) for name, facts in SETTINGS.items() if facts.sparsity)
    if not is_sparse or dead <= MANY * F:
        return ""
    revive = "resamples of 2 to 4"
    if "auxk_coefficient" in kind_named(member["kind"]).settings:
        revive = "dead_after_tokens below a tenth of the run's tokens, so that AuxK has time"
    return f"has {dead:,} of {F:,} features that are active on no held-out token: fewer features or {revive} may help"
