"""A sweep's lists become members: complete, checked, named, and grouped by what has to be equal."""

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from running import REPOSITORY

from jax_sae.activations.places import Place
from jax_sae.autoencoder.kinds import kind_names
from jax_sae.config import Member, SweepConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import (
    complete,
    describe_member,
    member_names,
    recorded_member,
    settings_of,
    sweep_members,
    with_features,
)
from jax_sae.sweep.optimizer import traced_settings

SPARSE = SweepConfig(
    kinds=("relu", "topk", "jumprelu", "gated"),
    features=(64,),
    l1_coefficient=(0.5, 2.0),
    k=(4, 8),
    target_l0=(6.0,),
    seeds=(0, 1),
)


def test_each_kind_is_combined_with_the_lists_that_it_has() -> None:
    """relu and gated with lambdas, topk with k, jumprelu with targets, all with seeds, which are innermost."""
    found = [
        (m.kind, m.l1_coefficient or m.k or m.target_l0, m.seed) for m in sweep_members(SPARSE) if m.features == 64
    ]
    by_kind = {"relu": (0.5, 2.0), "topk": (4, 8), "jumprelu": (6.0,), "gated": (0.5, 2.0)}
    assert found == [(kind, value, seed) for kind, values in by_kind.items() for value in values for seed in (0, 1)]


def test_what_is_not_said_is_the_kinds_default() -> None:
    """Unit directions but for relu, 1/32 of AuxK, thresholds from 0.1, clipping at 1; None where there is no such."""
    for kind in kind_names():
        needed = {"gated": {"l1_coefficient": 1.0}, "jumprelu": {"l0_coefficient": 1.0}}.get(kind, {})
        member = complete(Member(64, kind=kind, **needed))  # type: ignore[arg-type]
        assert member.decoder_norm == ("free" if kind == "relu" else "unit")
        is_plain = kind == "relu"  # without a penalty
        assert member.initialization == ("orthogonal" if is_plain else "transposed")
        assert (member.encoder_bias, member.clip) == ((2.0, 0.0) if is_plain else (0.0, 1.0))
        is_topk = kind in ("topk", "batchtopk", "matryoshka")
        assert (member.k, member.auxk_coefficient) == ((32, 1 / 32) if is_topk else (None, None))
        assert member.decoder_bias == ("geometric_median" if is_topk else "zero")
        thresholds = (member.bandwidth, member.initial_threshold)
        assert thresholds == ((0.05, 0.1) if kind == "jumprelu" else (None, None))
        assert member.learning_rate == 0.1 / 8 and member.resamples == 0
        assert complete(member) == member
    assert complete(Member(8)).l1_coefficient == 0
    sparse = complete(Member(8, l1_coefficient=0.5))
    assert (sparse.initialization, sparse.encoder_bias, sparse.clip) == ("transposed", 0.0, 1.0)
    assert complete(Member(8, initialization="torch")).encoder_bias == 0


def test_a_feature_is_dead_after_a_tenth_of_the_run_or_ten_million_tokens() -> None:
    """So that AuxK acts in short runs too; what a member says counts."""
    short, long = TrainConfig(steps=100, batch_tokens=50), TrainConfig(steps=10**6, batch_tokens=4096)
    member = complete(Member(8, kind="topk", k=2))
    assert traced_settings(member, short)["dead_after_tokens"] == 500
    assert traced_settings(member, long)["dead_after_tokens"] == 10_000_000
    assert traced_settings(replace(member, dead_after_tokens=7), long)["dead_after_tokens"] == 7


def test_a_recorded_member_is_as_it_began_whatever_defaults_are_now() -> None:
    """Settings of version 0.3, which had no clip and other defaults, and of this one."""
    of_0_3 = {"features": 8, "seed": 0, "learning_rate": 1e-3, "kind": "jumprelu", "target_l0": 2.0, "bandwidth": 0.001}
    of_0_3 |= {"initial_threshold": 0.001, "decoder_norm": "unit", "initialization": "transposed", "initial_norm": 1.0}
    of_0_3 |= {"encoder_bias": 0.0, "decoder_bias": "zero", "dead_after_tokens": 10_000_000, "resamples": 0}
    assert settings_of(recorded_member(of_0_3)) == {
        **of_0_3,
        "clip": 0.0,
        "frequency_coefficient": 0.0,
        "frequency_limit": 0.1,
    }
    now = complete(Member(8, kind="jumprelu", target_l0=2.0))
    assert recorded_member(settings_of(now)) == now


def test_rates_cannot_be_scaled_where_none_is_given() -> None:
    """The default has its own law."""
    with pytest.raises(BadInput, match="multiplies learning rates, but a member has none"):
        sweep_members(SweepConfig(features=(8,), scale_learning_rates=True))


def test_names_say_what_tells_members_apart() -> None:
    """The kind in a sweep of several, and each setting that differs among members of one kind and width."""
    assert member_names(sweep_members(SPARSE))[:5] == [
        "relu-F64-lambda0.5-seed0",
        "relu-F64-lambda0.5-seed1",
        "relu-F64-lambda2.0-seed0",
        "relu-F64-lambda2.0-seed1",
        "topk-F64-k4-seed0",
    ]
    lists = replace(SPARSE, kinds=("topk",), l1_coefficient=(), target_l0=(), seeds=(0,), warmup=(0.0, 0.1), k=(4,))
    assert member_names(sweep_members(lists)) == ["F64-warmup0.0", "F64-warmup0.1"]
    for sweep in (SPARSE, lists, SweepConfig(features=(3, 4), initialization=("torch", "orthogonal"))):
        names = member_names(sweep_members(sweep))
        assert len(set(names)) == len(names)


def test_groups_are_of_one_kind_decoder_norm_and_number_of_resamplings() -> None:
    """And of nearly equal width, but matryoshka of equal width; k and lambda may differ, the largest k counts."""
    groups = make_groups(sweep_members(SPARSE))
    assert [(group.members[0].kind, len(group.members), group.form.most_k) for group in groups] == [
        ("relu", 4, 0),
        ("topk", 4, 8),
        ("jumprelu", 2, 0),
        ("gated", 4, 0),
    ]
    lists = SweepConfig(kinds=("topk",), features=(63, 64), k=(2,), decoder_norm=("unit", "free"), resamples=(0, 1))
    assert len(make_groups(sweep_members(lists))) == 4
    matryoshka = SweepConfig(kinds=("matryoshka", "topk"), features=(63, 64), k=(2,))
    assert [group.names for group in make_groups(sweep_members(matryoshka))] == [
        ("matryoshka-F63",),
        ("matryoshka-F64",),
        ("topk-F63", "topk-F64"),
    ]


def test_a_penalty_is_left_out_only_if_no_member_of_the_group_has_one() -> None:
    """lambda = 0 beside others is computed with them; alone it is the plain autoencoder."""
    plain, both = SweepConfig(features=(8,)), SweepConfig(features=(8,), l1_coefficient=(0.0, 1.0))
    for sweep, penalised in ((plain, False), (both, True)):
        [group] = make_groups(sweep_members(sweep))
        assert bool(group.form.weighs) == group.form.is_sparse == penalised
    [group] = make_groups(sweep_members(SweepConfig(kinds=("topk",), features=(64,), auxk_coefficient=(0.0,))))
    assert not group.form.weighs and group.form.is_sparse


def test_learning_rates_can_scale_with_the_number_of_features() -> None:
    """1 / sqrt(F / 2^14): doubled for a quarter of 2^14 features."""
    sweep = SweepConfig(features=(2**12, 2**14, 2**16), learning_rates=(1e-3,), scale_learning_rates=True)
    assert [member.learning_rate for member in sweep_members(sweep)] == pytest.approx([2e-3, 1e-3, 5e-4])


def test_a_single_value_is_that_of_explicit_members_that_do_not_say_otherwise() -> None:
    """And whose kind has it."""
    members = (Member(8, kind="topk", k=3), Member(8, kind="topk"), Member(8))
    sweep = SweepConfig(members=members, k=(5,), initialization=("orthogonal",))
    assert [member.k for member in sweep_members(sweep)] == [3, 5, None]
    assert {member.initialization for member in sweep_members(sweep)} == {"orthogonal"}
    with pytest.raises(BadInput, match=r"sweep\.k has 2 values, but explicit members are not combined"):
        sweep_members(replace(sweep, k=(2, 5)))


def test_a_description_leaves_out_what_goes_without_saying() -> None:
    """Defaults of the kind, what it does not have, and how a member begins; k is always said."""
    assert describe_member(complete(Member(8, 1, 1e-2))) == "features 8, seed 1, learning rate 0.01"
    topk = complete(Member(64, 0, 1e-3, "topk", initialization="orthogonal", auxk_coefficient=0.5))
    assert describe_member(topk) == "features 64, seed 0, learning rate 0.001, kind topk, k 32, auxk coefficient 0.5"
    assert "l1_coefficient" not in settings_of(topk) and settings_of(topk)["initial_norm"] == 1


def test_without_a_number_of_features_it_depends_on_the_width() -> None:
    """Eight times as many; explicit members have their own."""
    assert with_features(SweepConfig(), [Place("", 64)]).features == (512,)
    for sweep in (SPARSE, SweepConfig(members=(Member(3),))):
        assert with_features(sweep, [Place("", 64)]) == sweep


def test_a_setting_is_said_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field of `Member` in a copy of the package: list, flag, help, default, range, name, record, step have it."""
    shutil.copytree(REPOSITORY / "jax_sae", tmp_path / "jax_sae", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    config, last = tmp_path / "jax_sae" / "config.py", "    resamples: int | None ="
    line = 'setting(default=0.5, label="turn", check=positive, most=4, traced="float32", before=0.25)'
    source = config.read_text().replace(
        last, f'    turning: float | None = {line}\n    """How much it turns."""\n{last}'
    )
    config.write_text(source)
    for name in [name for name in sys.modules if name.split(".")[0] == "jax_sae"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    new, tables, names, flags, optimizer = (
        importlib.import_module(f"jax_sae.{name}")
        for name in ("config", "config_tables", "sweep.members", "commands.flags", "sweep.optimizer")
    )
    try:
        assert new.__file__ == str(config)
        table = {"sweep": {"features": 8, "turning": [1, 2.5]}}
        members = names.sweep_members(tables.config_from_dict(table, "a file").sweep)
        assert names.member_names(members) == ["F8-turn1.0", "F8-turn2.5"]
        assert names.settings_of(members[1])["turning"] == 2.5 and names.complete(new.Member(8)).turning == 0.5
        assert names.recorded_member({"features": 8}).turning == 0.25
        assert optimizer.traced_settings(members[1], new.TrainConfig())["turning"] == 2.5
        assert flags.parse(["--sweep.turning", "3"]).settings == {"sweep.turning": (3.0,)}
        for value, limit in ((-1.0, ""), (5.0, " and up to 4")):
            with pytest.raises(ValueError, match=rf"sweep.turning is {value}; a number above 0{limit} was expected"):
                names.sweep_members(new.SweepConfig(features=(8,), turning=(value,)))
        with pytest.raises(SystemExit):
            flags.parse(["--help"])
        assert "How much it turns." in capsys.readouterr().out
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "jax_sae"]:
            del sys.modules[name]  # and the package's own come back
