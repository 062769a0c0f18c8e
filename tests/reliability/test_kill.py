"""A process that is killed loses nothing: restarted with --resume, it ends in the same bits as if never disturbed."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from processes import finish, outcome, start

pytestmark = pytest.mark.slow

TRIALS = 6
FLAGS = [
    *("--activations.path", "x.npy", "--activations.block-tokens", "4096", "--activations.held-out-tokens", "1000"),
    *("--sweep.features", "32", "900", "--sweep.learning-rates", "1e-3", "3e-3"),
    *(
        "--train.steps",
        "120",
        "--train.batch-tokens",
        "128",
        "--train.checkpoint-every",
        "20",
        "--train.log-every",
        "5",
    ),
    *("--out", "run"),
]


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 12,000 rows of width 192: a state of 17 MB, which is written in a tenth of a second."""
    path = tmp_path_factory.mktemp("activations") / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(12_000, 192)).astype(np.float32))
    return path


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed."""

    run: Path
    training: float
    """Seconds from its first line of metrics to its end."""
    save: float
    """Seconds that a save takes."""


@pytest.fixture(scope="module")
def undisturbed(activations: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Watched, to learn when to disturb others."""
    directory = tmp_path_factory.mktemp("undisturbed")
    (directory / "x.npy").symlink_to(activations)
    run = directory / "run"
    process = start(FLAGS, directory)
    wait_for(process, lambda: lines_of_metrics(run) > 0)
    begun = time.monotonic()
    wait_for(process, lambda: is_saving(run))
    saving = time.monotonic()
    wait_for(process, lambda: not is_saving(run))
    saved = time.monotonic()
    finish(process, 0)
    return Undisturbed(run, time.monotonic() - begun, saved - saving)


def lines_of_metrics(run: Path) -> int:
    """How many there are."""
    return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0


def is_saving(run: Path) -> bool:
    """Whether there is a checkpoint that is not whole."""
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(directory: Path, flags: list[str], delay: float, *, in_save: bool) -> bool:
    """Start, and kill after a delay from the first metrics or the beginning of a save on; whether it was saving."""
    run = directory / "run"
    lines = lines_of_metrics(run)
    process = start(flags, directory)
    wait_for(process, lambda: lines_of_metrics(run) != lines)
    if in_save:
        wait_for(process, lambda: is_saving(run))
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0)  # 0: it was quicker
    return is_saving(run)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_at_a_random_moment(trial: int, activations: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Odd trials at any moment of the training, even ones while a checkpoint is half written.

    How long a save takes depends on what else the machine does: where one had ended, the next is killed sooner.
    """
    chance, flags, run = random.Random(trial), FLAGS, tmp_path / "run"
    (tmp_path / "x.npy").symlink_to(activations)
    if trial % 2:
        kill(tmp_path, flags, chance.uniform(0, undisturbed.training), in_save=False)
    else:
        delay = chance.uniform(0, undisturbed.save)
        while not kill(tmp_path, flags, delay, in_save=True):
            assert not (run / "summary.json").exists(), "it was never killed inside a save"
            flags, delay = [*FLAGS, "--resume"], delay / 2
    finish(start([*FLAGS, "--resume"], tmp_path), 0)
    assert outcome(run) == outcome(undisturbed.run)
    assert not [path for path in run.rglob("*") if "tmp" in path.name or "partial" in path.name]


def test_killed_again_and_again(activations: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Four times in one run, each time in a save or soon after it began."""
    (tmp_path / "x.npy").symlink_to(activations)
    for trial in range(4):
        flags = FLAGS if trial == 0 else [*FLAGS, "--resume"]
        kill(tmp_path, flags, random.Random(100 + trial).uniform(0, 2 * undisturbed.save), in_save=True)
    finish(start([*FLAGS, "--resume"], tmp_path), 0)
    assert outcome(tmp_path / "run") == outcome(undisturbed.run)
