"""A run of all six kinds: resumed bit for bit, loaded, measured and evaluated like any other."""

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from running import never, stop_at

import jax_sae
from jax_sae.activations.places import Place
from jax_sae.analysis.evaluation import evaluate
from jax_sae.autoencoder.kinds import kind_names
from jax_sae.config import Config, SweepConfig
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import named_leaves
from jax_sae.run.progress import Setup, restore
from jax_sae.run.train import train
from jax_sae.sweep import members
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete, sweep_members

SWEEP = SweepConfig(
    kinds=tuple(kind_names()),
    features=(61,),
    k=(1,),
    l1_coefficient=(2.0,),
    target_l0=(4.0,),
    learning_rates=(3e-3,),
    initialization=("transposed",),
    dead_after_tokens=(64,),
    resamples=(2,),
    decoder_bias=("mean",),
)


@pytest.fixture(scope="module")
def config(demo_config: Config) -> Config:
    """The small demo with a member of each kind; features are dead after a step, AuxK and resampling act."""
    return replace(demo_config, sweep=SWEEP)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stop."""
    out = tmp_path_factory.mktemp("sparse") / "run"
    assert train(config, out, resume=False, stop_requested=never)
    return out


def arrays(run: Path, step: int = 12) -> dict[str, np.ndarray]:
    """Every array of a checkpoint."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return dict(named_leaves(checkpoints.read_state(step)))


def test_a_resumed_run_has_the_same_bits(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters, moments, thresholds, counters of dead features, metrics; stopped before and after each resampling.

    Also with JAX_ENABLE_X64, which some programs set for themselves, at the start, in training and in what is measured
    at the end; and when it is resumed by a version with another default, which says that the run keeps its own.
    """
    run = tmp_path / "run"
    with jax.enable_x64(True):
        assert not train(config, run, resume=False, stop_requested=stop_at(3))
    assert not train(config, run, resume=True, stop_requested=stop_at(7))
    monkeypatch.setitem(members.GENERAL, "clip", 1e-3)
    capsys.readouterr()
    with jax.enable_x64(True):
        assert not train(config, run, resume=True, stop_requested=stop_at(11))
        assert f"it keeps the defaults of version {version('jax_sae')}: clip 0.001 -> 1.0" in capsys.readouterr().out
        assert train(config, run, resume=True, stop_requested=never)
    expected, found = arrays(whole), arrays(run)
    assert {name: array.dtype for name, array in found.items()} == {name: a.dtype for name, a in expected.items()}
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    assert (whole / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    summaries = [json.loads((each / "summary.json").read_text())["members"] for each in (whole, run)]
    assert summaries[0] == summaries[1]


def test_dead_features_were_there_to_be_resampled(whole: Path) -> None:
    """Else the test above states little: after steps 4 and 8 nothing is dead, and later there is."""
    of_steps = {step: arrays(whole, step) for step in (5, 10, 12)}
    for kind in ("topk", "batchtopk", "matryoshka"):
        silent = {step: its[f"members/{kind}-F61/memory/tokens_since_fired"] for step, its in of_steps.items()}
        assert {step: counts.max() for step, counts in silent.items()} == {5: 64, 10: 2 * 64, 12: 4 * 64}, kind


def test_what_is_loaded_is_what_was_measured(whole: Path) -> None:
    """L0 and FVU of summary.json are those of the evaluation, which uses the public encode and decode."""
    summary = {member["name"]: member for member in json.loads((whole / "summary.json").read_text())["members"]}
    record = evaluate(whole)
    assert [member["name"] for member in record["members"]] == list(summary) and len(summary) == 6
    for member in record["members"]:
        assert member["l0"] == pytest.approx(summary[member["name"]]["l0"], rel=1e-3)
        assert member["fvu"] == pytest.approx(summary[member["name"]]["fvu"], rel=1e-4)
        assert member["kind"] == summary[member["name"]]["kind"] == member["name"].split("-")[0]
    for figure in ("frontier", "feature_density", "training", "loss"):
        assert (whole / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_each_kind_encodes_as_it_says(whole: Path) -> None:
    """topk at most k; batchtopk and matryoshka what exceeds their threshold; jumprelu what exceeds each its own."""
    x = np.random.default_rng(0).normal(size=(50, 64)) * 10
    for kind in kind_names():
        sae = jax_sae.load_autoencoder(whole, name=f"{kind}-F61")
        assert sae.member == complete(sae.member) and sae.member.kind == kind
        features = np.asarray(sae.encode(x))
        assert features.min() == 0 and features.shape == (50, 61)
        on = features[features > 0]
        if kind == "topk":
            assert (features > 0).sum(1).max() <= 1
        if kind in ("batchtopk", "matryoshka"):
            assert 0 < float(sae.memory["threshold"]) < on.min()
        if kind == "jumprelu":
            assert np.all(np.where(features > 0, features, np.inf).min(0) > np.exp(sae.params["log_threshold"]))
        if sae.member.decoder_norm == "unit":
            np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=1), 1, atol=1e-6)


@pytest.mark.usefixtures("learning_nothing")
def test_a_checkpoint_of_the_version_before_can_be_used_but_not_resumed(config: Config, tmp_path: Path) -> None:
    """It has losses in place of metrics, members without a kind, and no memory."""
    plain = replace(config, sweep=SweepConfig(features=(8,), learning_rates=(1e-3,)))
    assert train(plain, tmp_path / "run", resume=False, stop_requested=never)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        run, state = checkpoints.read_run(12), checkpoints.read_state(12)
        run["members"] = {"F8": {"features": 8, "seed": 0, "learning_rate": 1e-3}}
        run["config"]["sweep"] = {"features": [8], "initialization": "torch", "encoder_bias": 0.0, "members": []}
        run["config"]["train"].pop("decay")
        state["members"]["F8"]["losses"] = state["members"]["F8"].pop("metrics")["loss_per_element"]
        old = Checkpoints(tmp_path / "old" / "checkpoints")
        with old:
            old.save(12, lambda: (state, run))
    sae, same = (jax_sae.load_autoencoder(tmp_path / name) for name in ("old", "run"))
    assert asdict(sae.member) == asdict(same.member)
    assert all(map(np.array_equal, jax.tree.leaves(sae.params), jax.tree.leaves(same.params)))
    setup = Setup(plain, make_groups(sweep_members(plain.sweep)), (Place("", 64),), run["inputs"])
    with pytest.raises(
        jax_sae.BadInput, match="whose checkpoints lack what a resume needs now; its members can be used"
    ):
        restore(setup, tmp_path / "old")
