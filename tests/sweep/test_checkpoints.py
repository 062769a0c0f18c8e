"""Checkpoints outlive this package's code, and using one member reads that member only."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_sae
from jax_sae.config import Config
from jax_sae.errors import BadInput, RunFailed
from jax_sae.sweep.checkpoints import Checkpoints

PLAIN_ORBAX = """
import importlib.abc, sys, warnings
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "jax_sae":
            raise ImportError("jax_sae is not installed")
sys.meta_path.insert(0, Blocker())
try:
    import jax_sae
    sys.exit("jax_sae could be imported")
except ImportError:
    pass
import numpy as np
import orbax.checkpoint as ocp
state = ocp.PyTreeCheckpointer().restore(sys.argv[1] + "/state")
np.savez(sys.argv[2], **state["members"]["F63"]["params"], mean=state["normalization"]["mean"])
"""


def test_plain_orbax_reads_a_checkpoint_where_this_package_is_absent(demo_run: Path, tmp_path: Path) -> None:
    """The same arrays as through the API, at the member's own width."""
    checkpoint = demo_run / "checkpoints" / "5"
    subprocess.run(
        [sys.executable, "-c", PLAIN_ORBAX, str(checkpoint.absolute()), str(tmp_path / "x.npz")],
        check=True,
        cwd=tmp_path,
    )
    plain = np.load(tmp_path / "x.npz")
    sae = jax_sae.load_autoencoder(demo_run, features=63, step=5)
    assert plain["W_enc"].shape == (64, 63)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert np.array_equal(plain[name], sae.params[name])
    assert np.array_equal(plain["mean"], sae.normalization.mean)


def test_a_checkpoint_holds_arrays_and_json_only(demo_run: Path) -> None:
    """Everything that resuming needs, and nothing that names a class of this package."""
    with Checkpoints(demo_run / "checkpoints", read_only=True) as checkpoints:
        run, state = checkpoints.read_run(10), checkpoints.read_state(10)
    assert run["step"] == 10 and run["tokens"] == 640
    assert {"position", "config", "members", "versions"} <= set(run)
    member = state["members"]["F63"]
    assert set(member) == {"params", "optimizer", "metrics"}
    assert {f"0.{moment}.{name}" for moment in ("mu", "nu") for name in member["params"]} < set(member["optimizer"])
    assert all(type(value) is np.ndarray for value in member["optimizer"].values())
    for path in (demo_run / "checkpoints" / "10").rglob("*"):
        if path.is_file():
            assert b"jax_sae.sweep" not in path.read_bytes()


def test_only_the_chosen_members_arrays_are_read(demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Orbax is asked for are four parameters and the normalisation."""
    asked: list[set[str]] = []
    original = Checkpoints.read_state

    def recording(self: Checkpoints, step: int, wanted=lambda tree: tree):  # type: ignore[no-untyped-def]
        state = original(self, step, wanted)
        asked.append(set(state["members"]))
        assert set(state["members"]["F64"]) == {"params"}
        return state

    monkeypatch.setattr(Checkpoints, "read_state", recording)
    jax_sae.load_autoencoder(demo_run, features=64)
    assert asked == [{"F64"}]


def test_missing_steps_and_runs_are_named(demo_run: Path, tmp_path: Path) -> None:
    """With what there is instead; nothing is created."""
    with pytest.raises(BadInput, match="no checkpoint at step 7; there are 5, 10, 12"):
        jax_sae.load_autoencoder(demo_run, features=64, step=7)
    with pytest.raises(BadInput, match="does not exist"):
        jax_sae.load_autoencoder(tmp_path / "nothing", features=64)
    assert not (tmp_path / "nothing").exists()


def test_saving_a_step_twice_is_an_error(tmp_path: Path) -> None:
    """Nothing is overwritten without a word, and what is there stays."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, lambda: ({"a": np.ones(3)}, {}))
        checkpoints.save(2, lambda: ({"a": np.ones(3)}, {}))
        checkpoints.save(1, lambda: ({"a": np.zeros(3)}, {}))
        with pytest.raises(RunFailed, match="step 1 could not be written"):
            checkpoints.save(3, lambda: ({"a": np.zeros(3)}, {}))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.read_state(1)["a"].tolist() == [1, 1, 1]


def test_config_survives(demo_run: Path, demo_config: Config) -> None:
    """A loaded autoencoder knows the settings of its run."""
    assert jax_sae.load_autoencoder(demo_run, features=64).config == demo_config
