"""Checkpoints outlive this package's code, and using one member reads that member only."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import outcome
from running import never, stop_at

import jax_sae
from jax_sae.analysis.evaluation import evaluate
from jax_sae.config import Config
from jax_sae.errors import BadInput, RunFailed
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import named_leaves
from jax_sae.run.inspection import inspect_run
from jax_sae.run.orbax_calls import orbax
from jax_sae.run.train import train

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


@pytest.mark.long
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
    """A loaded autoencoder knows the settings of its run, and what those that were left out came to."""
    settled = replace(demo_config, activations=replace(demo_config.activations, exclude_first_tokens=0))
    assert jax_sae.load_autoencoder(demo_run, features=64).config == settled


ODD_NAMES = [
    *("lr[1e-3]", "a*b?", "back\\slash", "{x}", "100%", "spa ce", "$x^2$", "é日本", "logs:", "**", "a\nb", "~"),
    os.fsdecode(b"\xff"),
]
"""Names in which something below this package sees a pattern, another separator, an address, or no text at all."""

CONTENT = ({"members": {"F1": {"params": {"W": np.arange(6.0).reshape(2, 3)}}}, "other": {"n": np.int32(4)}}, {"x": 1})


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_run_may_have_any_name(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved there is read there, and nothing is written or left elsewhere."""
    directory = tmp_path / name / "run" / "checkpoints"
    links = tmp_path_factory.mktemp("links")
    monkeypatch.setattr("tempfile.tempdir", str(links))
    for step in (1, 2):
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(step, lambda: CONTENT)
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.read_run(2) == CONTENT[1]
        state = checkpoints.read_state(2)
        with pytest.raises(BadInput, match="no checkpoint at step 7"):
            checkpoints.step_or_newest(7)
    assert [n for n, _ in named_leaves(state)] == ["members/F1/params/W", "other/n"]
    assert state["members"]["F1"]["params"]["W"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [path.name for path in tmp_path.iterdir()] == [name] and len(list(directory.iterdir())) == 2
    assert not list(links.iterdir())


def test_a_name_is_refused_where_no_link_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained: a temporary folder that is not there, or whose own name is odd."""
    (tmp_path / "t[m]p").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t[m]p"))
    with pytest.raises(BadInput, match=r"characters that Orbax cannot write to, .* has such characters too"):
        Checkpoints(tmp_path / "lr[1e-3]")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(BadInput, match=r"No such file or directory.* set TMPDIR"):
        Checkpoints(tmp_path / "lr[1e-3]")
    assert not list((tmp_path / "t[m]p").iterdir())


@pytest.mark.long
def test_a_run_in_an_odd_place_is_resumed_used_inspected_and_evaluated(
    demo_run: Path, demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends in the bits of one in a plain place."""
    run = tmp_path / "proj[v2]" / r"lr*\$\frac$"
    assert not train(demo_config, run, resume=False, stop_requested=stop_at(7))
    assert train(demo_config, run, resume=True, stop_requested=never)
    assert outcome(run) == outcome(demo_run)
    sae, plain = (jax_sae.load_autoencoder(each, features=63, step=10) for each in (run, demo_run))
    assert np.array_equal(sae.params["W_enc"], plain.params["W_enc"])
    lines, good = inspect_run(run, verify=True)
    assert good and "\n".join(lines).count("verified, ") == 4
    evaluate(run, n_tokens=300)
    assert (run / "evaluation.json").exists() and (run / "figures" / "frontier.png").exists()
    assert "warning" not in capsys.readouterr().out


def damage(directory: Path, step: int) -> None:
    """Change one byte of the largest file of a step: that of the arrays."""
    file = max((path for path in (directory / str(step)).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def sabotage(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, int], Any]) -> None:
    """Let something happen to step 10 as soon as Orbax has committed it."""
    save = ocp.CheckpointManager.save

    def sabotaged(manager: ocp.CheckpointManager, step: int, **more: Any) -> bool:
        saved = save(manager, step, **more)
        if step == 10:
            change(Path(manager.directory), step)
        return saved

    monkeypatch.setattr(ocp.CheckpointManager, "save", sabotaged)


SABOTAGE: dict[str, tuple[Callable[[Path, int], Any], str]] = {
    "a changed byte": (damage, "the array |its arrays cannot be read"),
    "no arrays": (lambda directory, step: shutil.rmtree(directory / str(step) / "state"), "its arrays cannot be read"),
    "no step": (lambda directory, step: shutil.rmtree(directory / str(step)), "its JSON cannot be read"),
    "another checkpoint": (
        lambda directory, step: shutil.copytree(directory / "5", directory / str(step), dirs_exist_ok=True),
        "its digests are not those of what was saved",
    ),
}


@pytest.mark.parametrize(("change", "message"), SABOTAGE.values(), ids=SABOTAGE)
def test_what_is_not_on_disk_as_it_was_saved_is_no_checkpoint(
    change: Callable[[Path, int], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the cause; the save has failed, which is raised by the next one or at the end."""
    sabotage(monkeypatch, change)
    W = np.random.default_rng(0).normal(size=(64, 64))
    told = f"step 10 .* not what was saved: ({message}).*; the last one is at step 5"
    with pytest.raises(RunFailed, match=told), Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, lambda step=step: ({"W": W + step}, {}))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5] and checkpoints.read_state(5)["W"][0, 0] == W[0, 0] + 5
    assert (tmp_path / "10.damaged").exists() is (message != "its JSON cannot be read")


def test_a_run_whose_checkpoint_is_not_what_was_saved_fails_and_can_be_resumed(
    demo_config: Config, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go on to a summary, and the resume ends in the bits of a run without that."""
    run = tmp_path / "run"
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunFailed, match=r"step 10 .* is now 10.damaged; the last one is"),
    ):
        sabotage(patch, damage)
        train(demo_config, run, resume=False, stop_requested=never)
    assert not (run / "summary.json").exists()
    assert train(demo_config, run, resume=True, stop_requested=never)
    assert outcome(run) == outcome(demo_run)


@pytest.mark.long
def test_a_warning_of_orbax_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its narration is not. Given a name that it takes for a pattern, it warns that it found no parts, and goes on."""
    absl = logging.getLogger("absl")
    before = absl.level, absl.disabled, list(absl.filters), list(absl.handlers), list(warnings.filters)
    hook = sys.unraisablehook
    monkeypatch.setattr(absl, "level", logging.INFO)
    monkeypatch.setattr("jax_sae.run.saved_checkpoints.plain_path", contextlib.nullcontext)
    with Checkpoints(tmp_path / "lr[1e-3]") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, lambda: CONTENT)
            with pytest.raises(RunFailed, match=rf"step {step} .* not what was saved: its arrays cannot be read"):
                checkpoints.save(9, lambda: CONTENT)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning       while step 1 was saved, Orbax (ocdbt_utils.py) said: ")
    assert f"found in {tmp_path}/lr[1e-3]/1" in line
    assert sorted(path.name for path in (tmp_path / "lr[1e-3]").iterdir()) == ["1.damaged", "2.damaged"]
    assert not caplog.records  # nobody else sees it
    monkeypatch.undo()
    assert (absl.level, absl.disabled, list(absl.filters), list(absl.handlers), list(warnings.filters)) == before
    assert sys.unraisablehook is hook


def test_what_is_changed_while_orbax_works_is_changed_back_after_the_last_thread(tmp_path: Path) -> None:
    """In whatever order their calls begin and end; another library's log is not touched meanwhile."""
    absl, hook, filters = logging.getLogger("absl"), sys.unraisablehook, list(warnings.filters)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(orbax.called())
        second.enter_context(orbax.called())
        record = absl.makeRecord("absl", logging.WARNING, "/elsewhere/file.py", 1, "text", (), None)
        assert all(each.filter(record) for each in absl.filters)
        first.close()
        assert absl.filters and sys.unraisablehook is not hook
    assert not absl.filters and sys.unraisablehook is hook and warnings.filters == filters
