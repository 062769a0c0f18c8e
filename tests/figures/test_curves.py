"""Which colour a member has."""

from jax_sae.config import Member
from jax_sae.figures.curves import member_colours


def test_the_starting_experiment_has_its_colours() -> None:
    """F = 100 green, 767 blue, 768 red, 1000 orange, in any order; the demo's four alike."""
    members = [Member(768), Member(100), Member(1000), Member(767)]
    assert member_colours(members, 768) == ["tab:red", "tab:green", "tab:orange", "tab:blue"]
    assert member_colours([Member(8), Member(63), Member(64), Member(83)], 64)[1] == "tab:blue"


def test_no_two_members_share_a_colour() -> None:
    """However many there are of each kind."""
    members = [Member(features, seed) for features in (100, 767, 768, 1000) for seed in range(5)]
    assert len(set(member_colours(members, 768))) == len(members)
    assert len(set(member_colours(members[:2], 768))) == 2
