"""A full disk ends a run with one clear line and exit code 1; what was saved before stays, and the run can go on."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import finish, outcome
from running import REPOSITORY, never

from jax_sae.config import Config
from jax_sae.errors import BadInput, RunFailed
from jax_sae.run import checkpoints as checkpoints_module
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.train import train

FLAGS = [
    *("--activations.path", "x.npy", "--activations.block-tokens", "1024", "--activations.held-out-tokens", "500"),
    *("--sweep.features", "500", "--train.batch-tokens", "32", "--train.log-every", "1", "--out", "small/run"),
    *("--train.steps", "200", "--train.checkpoint-every", "10"),
]


def test_a_disk_too_small_for_the_run_is_refused_before_it_begins(
    demo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed, what is left, and no directory made."""
    full = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(BadInput, match=r"needs 4\.0\d MB of disk for 3 checkpoints, but .* has 2 MB left"):
        train(demo_config, tmp_path / "runs" / "run", resume=False, stop_requested=never)
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_failed_save_ends_the_run_at_the_next_step_and_leaves_nothing(
    demo_config: Config, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after the first checkpoint; afterwards the run goes on as if nothing had been."""
    out = tmp_path / "run"
    config = replace(demo_config, train=replace(demo_config.train, log_every=1))
    real = shutil.disk_usage

    def filling_up(path: Path) -> Any:
        return real(path)._replace(free=1000 if (out / "checkpoints" / "5").exists() else 10**12)

    steps: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", filling_up)
        save = Checkpoints.save

        def slow_save(self: Checkpoints, step: int, content: Any) -> None:
            save(self, step, content)
            if self._saving is not None:
                self._saving.exception()  # waits, so that the next step is where it can be noticed

        patched.setattr(Checkpoints, "save", slow_save)

        def record(done: int) -> bool:
            steps.append(done)
            return False

        with pytest.raises(RunFailed) as failure:
            train(config, out, resume=False, stop_requested=record)
    message = str(failure.value)
    assert "checkpoint at step 10 could not be written" in message and "No space left on device" in message
    assert "has 0.0 MB left, it needs 1.3 MB" in message and "the last one is at step 5" in message
    assert max(steps) == 10 and len((out / "metrics.jsonl").read_text().splitlines()) == 11
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["5"]
    assert train(config, out, resume=True, stop_requested=never)
    assert outcome(out)["digests"] == outcome(demo_run)["digests"]


def test_a_failure_of_the_last_save_is_not_lost(
    demo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no next step boundary: the end of the `with` block raises it, and the run is not called finished."""
    out = tmp_path / "run"
    config = replace(demo_config, train=replace(demo_config.train, steps=5))
    monkeypatch.setattr(
        checkpoints_module, "array_digest", lambda array: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(RunFailed, match="there is none before it"):
        train(config, out, resume=False, stop_requested=never)
    assert not (out / "summary.json").exists() and not any((out / "checkpoints").iterdir())


def run_on_small_disk(directory: Path, megabytes: int, filler: int) -> "subprocess.Popen[str]":
    """The run on a file system of its own of so many MB; once it has a checkpoint, `filler` MB are taken from it."""
    script = f"""
mount -t tmpfs -o size={megabytes}m none small
( while [ ! -d small/run/checkpoints/10 ]; do sleep 0.01; done; head -c {filler}M /dev/zero > small/filler ) &
filling=$!
{sys.executable} {REPOSITORY}/scripts/train_all.py {" ".join(FLAGS)}
code=$?
kill $filling
cp -r small/run kept 2>/dev/null
exit $code
"""
    return subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def can_mount() -> bool:
    """Whether this system lets an ordinary process mount a file system of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs `unshare` and a mount of its own")
@pytest.mark.parametrize(("filler", "message"), [(39, "No space left"), (60, "")], ids=["little", "nothing"])
def test_a_real_file_system_that_fills_up(filler: float, message: str, tmp_path: Path) -> None:
    """Little room: a checkpoint does not fit. None: not even a line of metrics. Either way the first one is good."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32))
    (tmp_path / "small").mkdir()
    text = finish(run_on_small_disk(tmp_path, 40, filler), 1)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "ake room, and go on with --resume" in errors[0]
    with Checkpoints(tmp_path / "kept" / "checkpoints", read_only=True) as checkpoints:
        assert 10 in checkpoints.steps()
        for step in checkpoints.steps():
            checkpoints.read_run(step)
            checkpoints.read_state(step)
    assert not [path for path in (tmp_path / "kept" / "checkpoints").iterdir() if "tmp" in path.name]


@pytest.mark.slow
def test_a_write_that_fails_although_there_was_room(tmp_path: Path) -> None:
    """A limit on the size of files, which nothing tells of beforehand: Orbax's own failure, in the background."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32))
    (tmp_path / "small").mkdir()

    command = [sys.executable, str(REPOSITORY / "scripts" / "train_all.py"), *FLAGS]
    process = subprocess.Popen(
        ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *command],  # in units of 1024 bytes
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    text = finish(process, 1)
    assert "error: the checkpoint at step 10 could not be written" in text and "there is none before it" in text
    assert not list((tmp_path / "small" / "run" / "checkpoints").iterdir())
