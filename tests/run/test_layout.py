"""Which mesh is chosen for a sweep, and what is refused; no devices are needed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jax_sae.autoencoder.kinds import kind_named
from jax_sae.config import Config, MeshConfig, SweepConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.run import layout
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import settings_of, sweep_members

D = 64


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(data, member, feature) for a sweep, on so many devices of so much memory; and what is said."""

    def chosen(sweep: SweepConfig, mesh: MeshConfig, devices: int = 8, memory: float = 80e9, **train: Any) -> Any:
        monkeypatch.setattr(layout.jax, "device_count", lambda: devices)
        monkeypatch.setattr(layout, "memory_of_device", lambda: memory)
        monkeypatch.setattr(layout, "make_mesh", lambda *parts: parts)
        config = Config(sweep=sweep, mesh=mesh, train=replace(TrainConfig(batch_tokens=512), **train))
        found, lines = layout.choose_mesh(config, make_groups(sweep_members(sweep)), D)
        return found, "\n".join(lines)

    return chosen


def seeds(n: int, features: int = 256, kind: str = "relu") -> SweepConfig:
    """Members that differ in nothing but their seed."""
    return SweepConfig(kinds=(kind,), features=(features,), seeds=tuple(range(n)))


AUTO = MeshConfig(auto=True)


def test_one_device_unless_a_mesh_is_named(choose: Any) -> None:
    assert choose(seeds(8), MeshConfig()) == (None, "")
    assert choose(seeds(8), AUTO, devices=1)[0] is None


def test_the_layout_that_sends_least_is_chosen(choose: Any) -> None:
    """Members send nothing; of the rest features send 8 B D bytes, rows 16 D F."""
    assert choose(seeds(8), AUTO)[0] == (1, 8, 1)
    assert choose(seeds(2, 4096), AUTO)[0] == (1, 2, 4)
    assert choose(seeds(2, 64), AUTO)[0] == (4, 2, 1)
    assert choose(seeds(3, 64), AUTO)[0] == (8, 1, 1)  # not 3 members on 8 devices: two of these would be idle
    assert choose(seeds(2, 4096), replace(AUTO, data=4))[0] == (4, 2, 1)
    assert "a device sends 0" in choose(seeds(8), AUTO)[1]


def test_what_does_not_fit_into_a_device_lies_in_parts_of_its_features(choose: Any) -> None:
    """Although so large a batch sends less by its gradients."""
    one = seeds(1, 2**20)
    state = 2 * D * 2**20 * 12
    assert choose(one, AUTO, memory=20 * state, batch_tokens=2**24)[0] == (8, 1, 1)
    assert choose(one, AUTO, memory=1.2 * state, batch_tokens=2**24)[0] == (2, 1, 4)
    assert choose(one, AUTO, memory=0.01 * state)[0] == (1, 1, 8)  # as small as can be; the plan tells whether it does


def test_places_that_stay_empty_are_told(choose: Any) -> None:
    found, said = choose(seeds(3), MeshConfig(member=2))
    assert found == (1, 2, 1) and "1 beside F256-seed0 F256-seed1 F256-seed2" in said


@pytest.mark.parametrize(
    ("sweep", "mesh", "train", "problem"),
    [
        (seeds(1), MeshConfig(data=16), {}, "data 16 x member 1 x feature 1 = 16 devices, but there are 8"),
        (seeds(1), MeshConfig(data=3), {}, "does not divide train.batch_tokens, 512; the next that it divides is 513"),
        (seeds(1, 250), MeshConfig(feature=4), {}, "does not divide 250, the features of F250; the next .* is 252"),
        (seeds(1), MeshConfig(data=2), {"batching": "story"}, "with story batching a batch is one story"),
        (seeds(1, kind="run.test_layout:Own"), MeshConfig(feature=2), {}, "does not say that its features may lie on"),
        (seeds(1, kind="run.test_layout:Own"), MeshConfig(data=2), {}, "is no sum over tokens"),
    ],
)
def test_what_cannot_lie_in_parts_is_refused(
    choose: Any, sweep: SweepConfig, mesh: MeshConfig, train: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BadInput, match=problem):
        choose(sweep, mesh, **train)


class Own(kind_named("relu")):  # type: ignore[misc]
    """A kind from elsewhere, which couples tokens and knows of no parts."""

    splits_features = False
    couples_tokens = True


def test_a_run_is_looked_at_on_its_own_mesh_where_its_devices_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else on one device, which is said; what is asked for stands in its place, and has to be there."""
    axes = ("data", "member", "feature")
    monkeypatch.setattr(layout, "make_mesh", lambda *parts: SimpleNamespace(shape=dict(zip(axes, parts, strict=True))))
    sweep = seeds(2)
    facts = {
        "members": {str(i): settings_of(member) for i, member in enumerate(sweep_members(sweep))},
        "places": [{"name": "", "width": D}],
    }

    def look(devices: int, own: MeshConfig, asked: MeshConfig = MeshConfig()) -> tuple[Any, str]:  # noqa: B008
        monkeypatch.setattr(layout.jax, "device_count", lambda: devices)
        mesh, lines = layout.mesh_to_look(Config(sweep=sweep, mesh=own), facts, asked)
        return mesh and tuple(mesh.shape.values()), "\n".join(lines)

    own = MeshConfig(data=2, member=2, feature=2)
    assert look(8, own)[0] == (4, 1, 2)  # members are looked at one after the other
    assert look(8, own, MeshConfig(feature=4))[0] == (1, 1, 4)
    assert look(8, AUTO)[0] == (8, 1, 1)
    for mesh in (own, MeshConfig(data=4, auto=True)):
        found, said = look(1, mesh)
        assert found is None
        assert "one device: the run had data" in said
    assert look(1, MeshConfig()) == look(1, AUTO) == (None, "")
    assert "one device of 8" in look(8, MeshConfig())[1]
    with pytest.raises(BadInput, match="has data 8 x member 1 x feature 1 = 8 devices, but there are 4"):
        look(4, own, MeshConfig(data=8))
