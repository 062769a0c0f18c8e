"""Flags over a file over the defaults: what is kept, what is left out and said, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import SMALL, usual_signals

from jax_sae.commands.flags import parse
from jax_sae.commands.train import main
from jax_sae.config import Config, Member, ModelConfig
from jax_sae.config_tables import config_with, flatten, load_settings
from jax_sae.errors import BadInput
from jax_sae.run.settings import Layer, base, merge

DEMO = Layer("demo", load_settings(Path("demo")))
SPARSE = Layer(
    "sparse.toml",
    {
        **{"sweep.kinds": ("relu", "jumprelu", "topk"), "sweep.features": (256,), "sweep.learning_rates": (3e-3,)},
        **{"sweep.l1_coefficient": (1.0, 2.0), "sweep.target_l0": (4.0, 8.0, 16.0), "sweep.k": (4, 8, 16)},
        **{"sweep.bandwidth": (0.05,), "train.steps": 4000},
    },
)
AS_PUBLISHED = Layer("published", load_settings(Path("tinystories_33m_as_published")))
SPARSE_33M = Layer("33m", load_settings(Path("tinystories_33m_sparse")))
OWN = Layer(
    "own.toml",
    {"activations.path": "own.npz", "activations.array": "x", "sweep.kinds": ("jumprelu",), "sweep.target_l0": (4.0,)},
)
K_THREE = (Member(5, kind="topk", k=3), Member(3, initialization="torch"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Away from the repository, where only the package holds the demo."""
    monkeypatch.chdir(tmp_path)
    with usual_signals():
        yield


MERGED: dict[str, tuple[Layer, dict[str, Any], dict[str, Any], list[str]]] = {
    "flags count": (DEMO, {"train.steps": 3, "sweep.features": (4,)}, {}, []),
    "no k of relu": (
        *(SPARSE, {"sweep.kinds": ("topk",)}),
        dict.fromkeys(("sweep.l1_coefficient", "sweep.target_l0", "sweep.bandwidth"), ()),
        ["sweep.l1_coefficient, sweep.target_l0, sweep.bandwidth of sparse.toml: kind 'topk' does not have it"],
    ),
    "another start": (
        *(DEMO, {"sweep.initialization": ("transposed",)}, {"sweep.encoder_bias": ()}),
        ["sweep.encoder_bias of demo: it belongs to sweep.initialization = 'orthogonal'"],
    ),
    "directions kept at norm 1": (
        *(SPARSE_33M, {"sweep.decoder_norm": ("unit",)}, {"sweep.initial_norm": ()}),
        ["sweep.initial_norm of 33m: sweep.decoder_norm = 'unit' makes it 1"],
    ),
    "fewer features": (
        *(SPARSE, {"sweep.features": (8,)}, {"sweep.k": (4, 8), "sweep.target_l0": (4.0, 8.0)}),
        ["sweep.target_l0 16, sweep.k 16 of sparse.toml: the member has 8 features"],
    ),
    "a lambda for a target": (
        *(SPARSE, {"sweep.l0_coefficient": (5.0,)}, {"sweep.target_l0": ()}),
        ["sweep.target_l0 of sparse.toml: sweep.l0_coefficient is given instead"],
    ),
    "rows for stories": (
        AS_PUBLISHED,
        {"activations.path": "x.npy"},
        {name: flatten(Config())[name] for name in ("model.path", "model.layer", "text.path")},
        ["model.path, model.layer, text.path of published: activations.path is given instead"],
    ),
    "stories for rows": (
        *(OWN, {"model.path": "m"}, {"activations.path": "", "activations.array": ""}),
        ["activations.path, activations.array of own.toml: model.path is given instead"],
    ),
    "rows and a model in one breath": (
        *(OWN, {"activations.path": "x.npy", "model.path": "m"}, {}),
        ["model.path of the command line: activations.path is given instead"],
    ),
    "members for lists": (
        *(SPARSE, {"sweep.members": K_THREE}),
        {
            **{name: flatten(Config())[name] for name in ("sweep.kinds", "sweep.features", "sweep.learning_rates")},
            **dict.fromkeys(("sweep.l1_coefficient", "sweep.target_l0", "sweep.k", "sweep.bandwidth"), ()),
        },
        [
            "sweep.kinds, sweep.features, sweep.learning_rates of sparse.toml: sweep.members is given instead",
            "sweep.l1_coefficient, sweep.target_l0, sweep.k of sparse.toml: explicit members are not combined with "
            "lists",
            "sweep.bandwidth of sparse.toml: kind 'topk' or 'relu' does not have it",
        ],
    ),
    "members and what they stand for": (
        *(Layer("the defaults", {}), {"sweep.members": (Member(3),), "sweep.features": (4,)}, {}),
        ["sweep.features of the command line: sweep.members is given instead"],
    ),
}


@pytest.mark.parametrize(("lower", "flags", "changed", "left_out"), MERGED.values(), ids=MERGED)
def test_what_a_flag_makes_meaningless_is_left_out_and_said(
    lower: Layer, flags: dict[str, Any], changed: dict[str, Any], left_out: list[str]
) -> None:
    """All else is as the file and the flags say."""
    merged = merge(lower, flags)
    assert merged.config == config_with({**lower.settings, **flags, **changed})
    assert [line.removeprefix("left out      ") for line in merged.lines if line.startswith("left")] == left_out


TOPK = Layer("t.toml", {"sweep.kinds": ("topk",), "sweep.features": (256,)})
REFUSED: dict[str, tuple[Layer, dict[str, Any], str]] = {
    "within the flags": (
        *(SPARSE, {"sweep.kinds": ("topk",), "sweep.l1_coefficient": (1.0,)}),
        "sweep.l1_coefficient is 1.0, but kind 'topk' does not have it; gated, relu have",
    ),
    "within the file": (
        *(Layer("f.toml", {"sweep.kinds": ("topk",), "sweep.l1_coefficient": (1.0,)}), {"train.steps": 4}),
        "sweep.l1_coefficient is 1.0, but kind 'topk' does not have it; gated, relu have "
        "(sweep.l1_coefficient and sweep.kinds of f.toml)",
    ),
    "a flag that the file makes meaningless": (
        *(TOPK, {"sweep.target_l0": (4.0,)}),
        "sweep.target_l0 is 4.0, but kind 'topk' does not have it; jumprelu have (sweep.kinds of t.toml)",
    ),
    "k above the features of the file": (
        *(TOPK, {"sweep.k": (300,)}),
        "sweep.k is 300, but the member has 256 features; give at most that (sweep.features of t.toml)",
    ),
    "a default above the features of a flag": (
        *(TOPK, {"sweep.features": (8,)}),
        "sweep.k is 32, but the member has 8 features; give at most that",
    ),
    "two of which a kind needs one": (
        *(SPARSE, {"sweep.l0_coefficient": (1.0,), "sweep.target_l0": (4.0,)}),
        "kind 'jumprelu' needs sweep.l0_coefficient or sweep.target_l0, one of them, not sweep.l0_coefficient 1 and "
        "sweep.target_l0 4",
    ),
    "another flag than the one that would help": (
        *(AS_PUBLISHED, {"activations.norm_limit": 9.0}),
        "activations.norm_limit is 9.0, but it needs tokens that do not depend on the rest of their story",
    ),
}


@pytest.mark.parametrize(("lower", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_is_refused(lower: Layer, flags: dict[str, Any], message: str) -> None:
    """Within one origin, and where a flag would have to go; the message names the file."""
    with pytest.raises(BadInput) as error:
        merge(lower, flags)
    assert str(error.value).startswith(message)


MODEL = ["--model.path", "jax_sae/demo/model"]
PLAIN = {"sweep.initialization": ("orthogonal",), "sweep.encoder_bias": (2.0,), "sweep.learning_rates": (3e-3,)}
DEFAULTS = {name: flatten(Config())[name] for name in (*PLAIN, "train.steps", "train.batch_tokens", "sweep.features")}
OF_DEMO = {"model.path": "jax_sae/demo/model", "text.path": "jax_sae/demo/stories"}
SPARSE_DEMO = {**OF_DEMO, "sweep.features": (256,), "train.steps": 4000, "sweep.initialization": ()}
BASES: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "nothing": ([], "demo", {**OF_DEMO, **PLAIN}),
    "sizes": (["--sweep.features", "4", "--model.layer", "1"], "demo", {**OF_DEMO, **PLAIN}),
    "the demo's own model": ([*MODEL, "--activations.path="], "demo", {**OF_DEMO, **PLAIN}),
    "plain members": (["--sweep.members", "features=4"], "demo", {"sweep.encoder_bias": (2.0,)}),
    "a lambda of 0": (["--sweep.kinds", "relu", "--sweep.l1-coefficient", "0"], "demo", {**OF_DEMO, **PLAIN}),
    "a kind": (["--sweep.kinds", "topk"], "demo_sparse", {**SPARSE_DEMO, "sweep.k": (4, 8, 16)}),
    "a lambda": (["--sweep.l1-coefficient", "5"], "demo_sparse", {**SPARSE_DEMO, "sweep.kinds": ("relu",)}),
    "a target": (["--sweep.kinds", "jumprelu"], "demo_sparse", {**SPARSE_DEMO, "sweep.target_l0": (4, 8, 16)}),
    "members of a kind": (["--sweep.members", "features=4,kind=topk,k=2"], "demo_sparse", OF_DEMO),
    "activations": (["--activations.path", "x.npy"], "sweep", DEFAULTS),
    "activations and a kind": (["--activations.path", "x", "--sweep.kinds", "topk"], "sweep", DEFAULTS),
    "a model": (["--model.path", "other"], "sweep", DEFAULTS),
    "two models": (
        ["--model.models", "base=a", "tuned=b"],
        "sweep",
        {**DEFAULTS, "model.models": ("base=a", "tuned=b")},
    ),
    "two models over a file": (["--config", "demo", "--model.models", "a=b"], "demo", {"model.path": ModelConfig.path}),
    "a text": ([*MODEL, "--text.path", "mine.jsonl"], "sweep", {**DEFAULTS, "text.path": "mine.jsonl"}),
    "a file": (["--config", "demo", "--activations.path", "x.npy"], "demo", PLAIN),
}


@pytest.mark.parametrize(("argv", "name", "settings"), BASES.values(), ids=BASES)
def test_the_demo_belongs_to_the_demo(argv: list[str], name: str, settings: dict[str, Any]) -> None:
    """Other kinds start from its sparse brother, other data from the defaults."""
    arguments = parse(argv)
    run, lower = base(arguments.config, arguments.settings)
    merged = merge(lower, arguments.settings)
    assert run == name
    assert {key: value for key, value in flatten(merged.config).items() if key in settings} == settings
    assert not any("l1_coefficient" in line for line in merged.lines if line.startswith("left out"))


def test_a_run_says_first_where_its_settings_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    """On rows of width 8, with 8 times as many features; and, when it goes on, from its own config."""
    np.save("x.npy", np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32))
    argv = ["--activations.path", "x.npy", *SMALL[2:]]
    Path("k.toml").write_text("[sweep]\nkinds = 'topk'\nk = [3, 4]\nseeds = 0\n")
    assert main([*argv, "--config", "k.toml", "--sweep.k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "settings      from k.toml: sweep.kinds topk"
    assert lines[1].startswith("settings      from the command line: activations.path x.npy, train.steps 6, ")
    assert lines[1].endswith("sweep.k 2") and not lines[2].startswith("settings")
    assert json.loads(Path("runs/k/config.json").read_text())["sweep"]["features"] == [64]
    for flags in ([], ["--config", "k.toml", "--sweep.k", "2", *argv]):
        assert main([*flags, "--train.steps", "6", "--resume", "--out", "runs/k"]) == 0
    assert "settings      from runs/k/config.json: " in capsys.readouterr().out
    assert main(["--config", "k.toml", *argv, "--sweep.k", "3", "--resume"]) == 2
    assert "sweep.k (2,) -> (3,)" in capsys.readouterr().err
