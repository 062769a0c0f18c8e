"""Which colour a thing has: by its name in every figure, and told apart by all who look."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from jax_sae.autoencoder.kinds import kind_names
from jax_sae.config import Member
from jax_sae.figures.colours import GREY, KINDS, OWN, SEQUENCE, line_looks, looks
from jax_sae.figures.curves import member_colours
from jax_sae.figures.drawing import DARK

SEEN = {  # by whom: what linear RGB becomes (Machado, Oliveira and Fernandes 2009)
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    """#RRGGBB -> linear RGB."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB -> CIELAB, in which 2.3 is a difference that is just noticed."""
    t = TO_XYZ @ np.clip(rgb, 0, 1) / (0.95047, 1, 1.08883)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", SEEN.values(), ids=SEEN)
def test_colours_are_told_apart(eye: np.ndarray) -> None:
    """Of any two kinds, and of numbers of features one after the other; all can be seen on white and on dark paper."""
    seen = [lab(eye @ linear(look.colour)) for look in (*KINDS.values(), *OWN)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15
    steps = [lab(eye @ linear(colour)) for colour in SEQUENCE]
    assert min(np.linalg.norm(np.diff(steps, axis=0), axis=1)) > 10
    markers = [look.marker for look in (*KINDS.values(), *OWN)]
    assert len(set(markers)) == len(markers)
    for colour in (*(look.colour for look in (*KINDS.values(), *OWN)), *SEQUENCE, GREY):
        for paper in ("#ffffff", DARK["figure.facecolor"]):
            low, high = sorted(TO_XYZ[1] @ linear(each) for each in (colour, paper))
            assert (high + 0.05) / (low + 0.05) > 1.9, (colour, paper)


def test_a_kind_has_its_colour_whatever_stands_beside_it() -> None:
    """Those of the package by a table; any other by its name; two of these have two colours."""
    assert set(KINDS) <= set(kind_names())
    own = ["mine:Kind", "mine:Other", "theirs:Kind", "theirs:Other"]
    alone = {kind: looks([kind])[kind] for kind in (*KINDS, *own)}
    assert looks([*KINDS, own[0]]) == looks([own[0], *KINDS]) == {kind: alone[kind] for kind in (*KINDS, own[0])}
    assert len({alone[kind] for kind in own}) > 1
    together = looks(own)
    assert len(set(together.values())) == 4 and looks(reversed(own)) == together
    assert set(line_looks([("topk", 64), ("relu", 64)]).values()) == {KINDS["topk"], KINDS["relu"]}
    members = [Member(64, kind=kind) for kind in KINDS]
    assert member_colours(members) == [look.colour for look in KINDS.values()]
    assert member_colours([Member(64, kind="topk", k=k) for k in (4, 8)])[1] == KINDS["topk"].colour


def test_members_have_one_colour_each_and_seeds_share_it() -> None:
    """However many there are; of one kind, numbers of features are a sequence, in any order and in every figure."""
    plain = [Member(F) for F in (768, 100, 1000, 767)]
    assert member_colours(plain) == [SEQUENCE[2], SEQUENCE[0], SEQUENCE[3], SEQUENCE[1]]
    lines = line_looks([("relu", F) for F in (100, 767, 768, 1000)])
    assert [look.colour for look in lines.values()] == list(SEQUENCE)
    for kinds in (("topk",), ("topk", "batchtopk")):
        members = [Member(F, kind=kind, k=k) for kind in kinds for F in (64, 128, 256) for k in (4, 8)]
        colours = member_colours(members)
        assert len(set(colours)) == len(members)
        seeds = [replace(member, seed=seed) for member in members for seed in range(3)]
        assert member_colours(seeds) == [colour for colour in colours for _ in range(3)]
