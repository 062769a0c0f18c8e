"""A run from start to end: what it leaves, that resuming changes nothing, and that PCA is never beaten."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import outcome
from running import never, stop_at

from jax_sae.activations.blocks import filled
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import named_leaves
from jax_sae.run.train import train


def final_state(out: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint."""
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        return dict(named_leaves(checkpoints.read_state(checkpoints.step_or_newest(None))))


def test_a_run_leaves_what_the_contract_names(demo_run: Path, demo_config: Config) -> None:
    """Files, keys and numbers of steps."""
    config = json.loads((demo_run / "config.json").read_text())
    assert config["train"]["steps"] == 12 and config["model"]["layer"] == 2
    assert {"jax_sae", "jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(config["versions"])
    lines = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["tokens"] for line in lines] == [128, 256, 384, 512, 640, 768]
    assert set(lines[0]["members"]) == {"F8", "F63", "F64", "F83"}
    assert set(lines[0]["members"]["F8"]) == {"loss_per_element", "penalty_per_element", "l0", "learning_rate"}
    assert sorted(int(path.name) for path in (demo_run / "checkpoints").iterdir()) == [5, 10, 12]
    for figure in ("loss.png", "loss_zoomed.png", "training.png"):
        assert (demo_run / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((demo_run / "summary.json").read_text())
    assert [member["name"] for member in summary["members"]] == ["F8", "F63", "F64", "F83"]
    for member in summary["members"]:
        assert member["steps"] == 12 and member["tokens"] == 768 and member["diverged_at_step"] is None
        assert 0 < member["fvu"] < 10 and member["loss_per_element"] > 0
    assert summary["harvest_tokens_per_second"] > 0 and summary["train_tokens_per_second"] > 0


def test_summary_loss_is_the_mean_of_the_last_percent_of_steps(demo_run: Path) -> None:
    """Of 12 steps that is the last one, which the checkpoint keeps."""
    summary = json.loads((demo_run / "summary.json").read_text())
    state = final_state(demo_run)
    for member in summary["members"]:
        for metric in ("loss_per_element", "penalty_per_element"):
            values = state[f"members/{member['name']}/metrics/{metric}"]
            assert values.shape == (12,)
            assert member[metric] == pytest.approx(float(values[-1]), rel=1e-6)


def test_the_floor_is_never_beaten(demo_config: Config, tmp_path: Path) -> None:
    """Narrow members, trained until they are close to it; the floor falls with F and is 0 from D on."""
    config = replace(
        demo_config,
        sweep=replace(demo_config.sweep, features=(2, 63, 64), learning_rates=(1e-2,)),
        train=replace(
            demo_config.train, steps=300, batch_tokens=128, schedule="cosine", checkpoint_every=300, log_every=50
        ),
        activations=replace(demo_config.activations, block_tokens=8192),
    )
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    members = json.loads((tmp_path / "run" / "summary.json").read_text())["members"]
    floors = [member["pca_floor_fvu"] for member in members]
    assert floors[0] > floors[1] > floors[2] == 0
    assert all(member["fvu"] >= member["pca_floor_fvu"] for member in members)
    assert members[0]["fvu"] < 1.2 * members[0]["pca_floor_fvu"]
    assert members[0]["fvu_over_floor"] >= 1 and members[2]["fvu_over_floor"] is None


@pytest.mark.parametrize("batching", ["tokens", pytest.param("story", marks=pytest.mark.long)])
def test_resume_is_bit_equal(
    demo_config: Config,
    tmp_path: Path,
    batching: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped inside a block, twice, and resumed: every array and every line of metrics as if never stopped.

    And all stories that were read count, and not twice, although the run ends inside a block.

    What never stops goes from block to block and from checkpoint to checkpoint in one dispatch; what is stopped has one
    for each step.
    """
    normalization = "dataset" if batching == "tokens" else "story"
    config = replace(
        demo_config,
        activations=replace(
            demo_config.activations, normalization=normalization, block_tokens=1024, exclude_first_tokens=2
        ),
        sweep=replace(demo_config.sweep, features=(63, 64)),
        train=replace(demo_config.train, batching=batching, log_every=1, steps=23),
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr("jax_sae.run.train.SECONDS_A_DISPATCH", 1e6)
        dispatched: list[int] = []
        assert train(config, straight, resume=False, stop_requested=lambda step: bool(dispatched.append(step)))
    assert len(set(dispatched)) < (15 if batching == "tokens" else 25)
    assert not train(config, stopped, resume=False, stop_requested=stop_at(6))
    assert not train(config, stopped, resume=True, stop_requested=stop_at(14))
    assert train(config, stopped, resume=True, stop_requested=never)
    expected, found = final_state(straight), final_state(stopped)
    assert set(expected) == set(found)
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    assert (straight / "metrics.jsonl").read_text() == (stopped / "metrics.jsonl").read_text()
    names = ("tokens_excluded", "empty_stories", "cut_stories", "tokens_cut")
    summaries = [json.loads((out / "summary.json").read_text()) for out in (straight, stopped)]
    counts = [{name: summary[name] for name in names} for summary in summaries]
    assert counts[0] == counts[1] and counts[0]["tokens_excluded"] >= 2 * 23 * 64 // 300
    assert f"excluded      {counts[0]['tokens_excluded']:,} tokens at the start" in capsys.readouterr().out


def test_activations_that_stay_on_the_device_train_to_the_same_bits(
    demo_config: Config, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is a GPU; stopped and resumed. While a block is made no other one is in memory."""
    monkeypatch.setattr("jax_sae.activations.story_sources.stays_on_device", lambda: True)
    shapes: list[tuple[int, ...]] = []

    def making(*args: Any) -> Any:
        assert not [x for x in jax.live_arrays() if x.shape in shapes]
        block, norms = yield from filled(*args)
        assert isinstance(block, jax.Array)
        shapes.append(block.shape)
        return block, norms

    monkeypatch.setattr("jax_sae.activations.batches.filled", making)
    assert not train(demo_config, tmp_path / "run", resume=False, stop_requested=stop_at(6))
    assert train(demo_config, tmp_path / "run", resume=True, stop_requested=never)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (demo_run / "metrics.jsonl").read_text()
    expected, found = final_state(demo_run), final_state(tmp_path / "run")
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    assert set(shapes) == {(7, 64, 64)} and len(shapes) > 4


def test_a_run_killed_before_its_first_checkpoint_begins_again(demo_config: Config, tmp_path: Path) -> None:
    """Resuming it is the same as starting it; and one killed before its summary gets it."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(demo_config, out, resume=False, stop_requested=interrupt)
    assert (out / "metrics.jsonl").read_text() and not list((out / "checkpoints").iterdir())
    assert train(demo_config, out, resume=True, stop_requested=never)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    assert train(demo_config, out, resume=True, stop_requested=never)
    assert json.loads((out / "summary.json").read_text())["members"] == summary["members"]


def interrupt(done: int) -> bool:
    """A `stop_requested` that is the end of the process once two steps are done."""
    if done > 1:
        raise KeyboardInterrupt
    return False


def test_a_finished_run_is_left_alone(demo_config: Config, demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming says so and changes no file but the lock, which some versions of filelock touch."""
    files = [path for path in demo_run.rglob("*") if path.is_file() and path.name != ".lock"]
    before = [path.stat().st_mtime_ns for path in files]
    assert train(demo_config, demo_run, resume=True, stop_requested=never)
    assert "it is finished" in capsys.readouterr().out
    assert before == [path.stat().st_mtime_ns for path in files]
    assert set(files) == {path for path in demo_run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_one_harvest_serves_a_sweep(demo_config: Config, tmp_path: Path) -> None:
    """A bare array of another width, given as activations.path, trains; its last rows are held out."""
    x = np.random.default_rng(0).normal(size=(3000, 20)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    config = replace(
        demo_config,
        activations=replace(demo_config.activations, path=str(tmp_path / "x.npy")),
        sweep=replace(demo_config.sweep, features=(5, 20)),
    )
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out_tokens"] == 300


def test_bad_input_leaves_no_directory(demo_config: Config, tmp_path: Path) -> None:
    """The run's directory is made once every input is known to be good."""
    x = np.full((3000, 20), np.nan, np.float32)
    np.save(tmp_path / "x.npy", x)
    config = replace(demo_config, activations=replace(demo_config.activations, path=str(tmp_path / "x.npy")))
    with pytest.raises(BadInput, match="not finite"):
        train(config, tmp_path / "run", resume=False, stop_requested=never)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_blocks_made_ahead_give_the_same_bits(
    demo_config: Config, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thread, as on an accelerator, or in pieces, as by several processes; also after a stop.

    No block is made that no step needs. Pieces are made after each step, as large a share of the next block.
    """
    made: list[str] = []
    pieces: list[tuple[int, float]] = []
    done = [0]

    def harvest(*given: Any) -> Any:
        made.append(threading.current_thread().name)
        making = filled(*given)
        while True:
            try:
                share = next(making)
            except StopIteration as ended:
                return ended.value
            pieces.append((done[0], share))
            yield share

    def stop(step: int) -> Any:
        def requested(now: int) -> bool:
            done[0] = now
            return now >= step

        return requested

    monkeypatch.setattr("jax_sae.activations.batches.filled", harvest)
    monkeypatch.setattr("jax_sae.activations.story_sources.stays_on_device", lambda: True)
    of_each = {}
    for how in ("when needed", "thread", "pieces"):
        monkeypatch.setattr("jax_sae.run.ahead.by_a_thread", lambda how=how: how == "thread")
        monkeypatch.setattr("jax_sae.run.ahead.in_pieces", lambda how=how: how == "pieces")
        made.clear()
        pieces.clear()
        out = tmp_path / how
        assert not train(demo_config, out, resume=False, stop_requested=stop(4))
        assert train(demo_config, out, resume=True, stop_requested=stop(100))
        assert outcome(out) == outcome(demo_run)
        of_each[how] = len(made)
        assert any(name.startswith("harvest") for name in made) == (how == "thread")
    before, last = [share for step, share in pieces if step == 3][-2:]  # after one of a block's three
    assert before < 1 / 3 <= last < 1
    assert all(0 <= n - of_each["when needed"] <= 1 for n in of_each.values())  # the one when the stop came
