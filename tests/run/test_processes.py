"""Two processes train one run: the losses of one, the same bits each time, and one end for both."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import finish, outcome, start

from jax_sae import load_autoencoder
from jax_sae.errors import BadInput
from jax_sae.processes import CLUSTERS, Meeting, detected, meeting

TWO_DEVICES = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
NEVER = 100_000
CLOSE = 1e-4
"""Of losses on different layouts: W_enc begins as W_dec's transpose here, where roundings weigh more (test_mesh.py)."""


def test_where_processes_meet_is_said_whole_or_not_at_all() -> None:
    assert meeting(None, None, None) is None
    assert meeting("10.0.0.1:1234", 4, 3) == Meeting("10.0.0.1:1234", 4, 3)
    for given, problem in (
        (("h:1", None, 0), "--num-processes is missing"),
        ((None, 2, None), "--coordinator and --process-id is missing"),
        (("h", 2, 0), "HOST:PORT"),
        (("h:99999", 2, 0), "HOST:PORT"),
        (("h:1", 0, 0), "above 0"),
        (("h:1", 2, 2), "from 0 to 1"),
    ):
        with pytest.raises(BadInput, match=problem):
            meeting(*given)


def test_a_launcher_is_seen_where_it_starts_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task of Slurm, or one host of TPUs, trains alone."""
    for name in (name for pair in CLUSTERS.values() for name in pair):
        monkeypatch.delenv(name, raising=False)
    assert detected() is None
    for said, wanted in ((("1", "n1"), None), (("8", "n[1-8]"), "Slurm's srun")):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", said[0])
        monkeypatch.setenv("SLURM_STEP_NODELIST", said[1])
        assert detected() == wanted
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # as for sbatch alone
    assert detected() is None
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    for hosts, wanted in (("a", None), ("a,b", "TPU")):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
        assert detected() == wanted


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a small sweep on an array of rows."""
    file = tmp_path_factory.mktemp("data") / "x.npy"
    rng = np.random.default_rng(0)
    active = rng.random((4000, 40)) * (rng.random((4000, 40)) < 0.1)
    np.save(file, (active @ rng.standard_normal((40, 16))).astype(np.float32))
    sweep = "--sweep.kinds topk batchtopk --sweep.features 64 --sweep.k 4 --sweep.learning-rates 0.001 0.002"
    train = "--train.steps 40 --train.batch-tokens 64 --train.log-every 5 --train.checkpoint-every 20"
    blocks = "--activations.block-tokens 1024 --activations.held-out-tokens 500 --activations.norm-limit 100"
    return f"--activations.path {file} {blocks} {sweep} {train}".split()


def two(flags: list[str], directory: Path, *each: list[str]) -> list[subprocess.Popen[str]]:
    """Begin two processes of a run with two devices each, `each` with some flags of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    own = each or ([], [])
    begun = [
        start([*flags, *its, *meet, str(i)], directory, XLA_FLAGS=TWO_DEVICES, JAX_PLATFORMS="cpu")
        for i, its in enumerate(own)
    ]
    BEGUN.extend(begun)
    return begun


BEGUN: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True, scope="module")
def none_is_left_behind() -> Iterator[None]:
    """Whatever a test that fails leaves running."""
    yield
    for process in BEGUN:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def one_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process on one device."""
    folder = tmp_path_factory.mktemp("one")
    finish(start([*flags, "--out", "run"], folder), 0)
    return folder / "run"


@pytest.fixture(scope="module")
def two_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two, features of two of them beside each other, rows of a batch over both."""
    folder = tmp_path_factory.mktemp("two")
    said = [finish(each, 0) for each in two([*flags, "--out", "run", *MESH], folder)]
    assert "processes     2, at 127.0.0.1" in said[0]
    assert "held-out FVU" in said[0] and "held-out FVU" not in said[1]  # the first tells
    return folder / "run"


MESH = ["--mesh.data", "2", "--mesh.feature", "2"]


def losses(run: Path) -> np.ndarray:
    """[lines, members] of metrics.jsonl."""
    lines = [json.loads(line)["members"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[its["loss_per_element"] for its in line.values()] for line in lines])


@pytest.mark.slow
def test_losses_are_those_of_one_process(one_run: Path, two_run: Path) -> None:
    np.testing.assert_allclose(losses(two_run), losses(one_run), rtol=CLOSE)
    one, both = (json.loads((run / "summary.json").read_text())["members"] for run in (one_run, two_run))
    np.testing.assert_allclose([m["fvu"] for m in both], [m["fvu"] for m in one], rtol=1e-4)
    assert [m["dead_features"] for m in both] == [m["dead_features"] for m in one]
    its, other = (load_autoencoder(run, name=one[0]["name"]) for run in (one_run, two_run))
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    np.testing.assert_allclose(other(x), its(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_ends_both_at_a_step_and_they_go_on_to_the_same_bits(
    flags: list[str], two_run: Path, tmp_path: Path
) -> None:
    """Then the same checkpoint goes on by one process on one device."""
    both = two([*flags, "--out", "run", *MESH, "--train.steps", str(NEVER)], tmp_path)
    until_there_is(tmp_path / "run" / "checkpoints" / "20", both)
    both[1].send_signal(signal.SIGTERM)
    said = [finish(each, 143) for each in both]
    assert "stopped and saved at step" in said[0]
    newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert f"at step {newest};" in said[0]


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not(
    flags: list[str], one_run: Path, two_run: Path, tmp_path: Path
) -> None:
    """By two processes; by one on one device it has the losses."""
    for name in ("two", "one"):
        shutil.copytree(two_run, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "40")
        (tmp_path / name / "summary.json").unlink()
    for each in two(["--out", "two", "--resume"], tmp_path):
        finish(each, 0)
    assert outcome(tmp_path / "two") == outcome(two_run)
    one = ["--mesh.data", "1", "--mesh.feature", "1"]
    said = finish(start(["--out", "one", "--resume", *one], tmp_path), 0)
    assert "not the same bits" in said
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(one_run), rtol=CLOSE)


@pytest.mark.slow
def test_one_that_is_killed_ends_the_other(flags: list[str], tmp_path: Path) -> None:
    """The first, which the other hears at once; of another one it is told after SECONDS_UNHEARD."""
    both = two([*flags, "--out", "run", *MESH, "--train.steps", str(NEVER)], tmp_path)
    until_there_is(tmp_path / "run" / "checkpoints" / "20", both)
    both[0].kill()
    both[0].communicate(timeout=60)
    _, error = both[1].communicate(timeout=60)
    assert both[1].returncode not in (0, None)
    assert "error: another process of this run is gone; start all of them again, with --resume" in error


@pytest.mark.slow
def test_processes_with_different_settings_end_with_a_line_of_one(flags: list[str], tmp_path: Path) -> None:
    both = two([*flags, "--out", "run"], tmp_path, ["--train.seed", "0"], ["--train.seed", "1"])
    first, second = finish(both[0], 2), finish(both[1], 1)
    assert "error: the processes of this run differ: train.seed 0 in number 0, 1 in number 1" in first
    assert "error" not in second
    assert not (tmp_path / "run").exists()


def until_there_is(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Wait for a file or folder, as long as the processes live."""
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end and all(each.poll() is None for each in processes), [
            each.communicate() for each in processes if each.poll() is not None
        ]
        time.sleep(0.05)


if sys.platform != "linux":
    pytestmark = pytest.mark.skip("processes meet on loopback; tried on Linux alone")
