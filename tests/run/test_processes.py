"""Two processes train one run: the losses of one, the same bits each time, and one end for both."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from processes import TRAIN, finish, outcome, start
from running import REPOSITORY

from jax_sae import load_autoencoder
from jax_sae.commands.train import main
from jax_sae.errors import BadInput
from jax_sae.processes import CLUSTERS, Meeting, detected, meeting
from jax_sae.run.inspection import inspect_run

TWO_DEVICES = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
NEVER = 100_000
CLOSE = 1e-5
"""Of losses on different layouts, as docs/many_devices.md promises."""


@dataclass(frozen=True)
class Own:
    """What one process has that the other one does not."""

    flags: tuple[str, ...] = ()
    directory: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


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
def flags(beginnings: str) -> list[str]:
    """Of a small sweep on a text, of which each process reads its own stories."""
    sweep = "--sweep.kinds topk batchtopk --sweep.features 64 62 --sweep.k 4 --sweep.learning-rates 0.001"
    train = "--train.steps 40 --train.batch-tokens 64 --train.log-every 5 --train.checkpoint-every 20"
    blocks = "--activations.block-tokens 1024 --activations.held-out-tokens 500"
    return f"--config demo --text.path {beginnings} {blocks} {sweep} --sweep.initialization independent {train}".split()


@pytest.fixture(scope="module")
def of_rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a sweep on an array of rows, that does not end and saves often."""
    file = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(file, np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32))
    train = f"--train.steps {NEVER} --train.batch-tokens 64 --train.log-every 5 --train.checkpoint-every 10"
    blocks = "--activations.block-tokens 1024 --activations.held-out-tokens 500 --activations.norm-limit 100"
    return f"--activations.path {file} {blocks} --sweep.kinds topk --sweep.features 32 --sweep.k 4 {train}".split()


def two(flags: list[str], directory: Path, *each: Own, script: Path = TRAIN) -> list[subprocess.Popen[str]]:
    """Begin two processes of a run with two devices each, `each` with some flags of its own, and where it works."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    begun = []
    for i, own in enumerate(each or (Own(), Own())):
        environment = {"XLA_FLAGS": TWO_DEVICES, "JAX_PLATFORMS": "cpu", **own.environment}
        begun.append(start([*flags, *own.flags, *meet, str(i)], own.directory or directory, script, **environment))
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
    """By this process on one device."""
    run = tmp_path_factory.mktemp("one") / "run"
    with as_in_a_process_of_its_own():
        assert main([*flags, "--out", str(run)]) == 0
    return run


@contextmanager
def as_in_a_process_of_its_own() -> Iterator[None]:
    """The normalisation is estimated from as many tokens as there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_sae.run.train.NORMALIZATION_TOKENS", 16_384)
        yield


@pytest.fixture(scope="module")
def two_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two, features of two of them beside each other, rows of a batch over both, weights in parts among all."""
    folder = tmp_path_factory.mktemp("two")
    said = [finish(each, 0) for each in two([*flags, "--out", "run", *MESH], folder, script=ACCELERATORS)]
    assert "processes     2, at 127.0.0.1" in said[0]
    assert re.search(r"\nweights .* in parts, 26.* kB on each of 4 devices\n", said[0]), said[0]
    assert "held-out FVU" in said[0] and "held-out FVU" not in said[1]  # the first tells
    return folder / "run"


ACCELERATORS = REPOSITORY / "tests" / "train_on_accelerators.py"
MESH = ["--mesh.data", "2", "--mesh.feature", "2"]


def losses(run: Path) -> np.ndarray:
    """[lines, members] of metrics.jsonl."""
    lines = [json.loads(line)["members"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[its["loss_per_element"] for its in line.values()] for line in lines])


@pytest.mark.slow
def test_losses_are_those_of_one_process(one_run: Path, two_run: Path) -> None:
    """Which share the stories of a text, and whose activations stay on the devices."""
    np.testing.assert_allclose(losses(two_run), losses(one_run), rtol=CLOSE)
    one, both = (json.loads((run / "summary.json").read_text())["members"] for run in (one_run, two_run))
    np.testing.assert_allclose([m["fvu"] for m in both], [m["fvu"] for m in one], rtol=1e-4)
    assert [m["dead_features"] for m in both] == [m["dead_features"] for m in one]
    its, other = (load_autoencoder(run, name=one[0]["name"]) for run in (one_run, two_run))
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    np.testing.assert_allclose(other(x), its(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_each_writes_its_slices_and_a_damaged_one_is_named(two_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(two_run, tmp_path / "run"))
    checkpoint = run / "checkpoints" / "40"
    folders = [checkpoint / "state" / f"ocdbt.process_{i}" for i in (0, 1)]
    written = [sum(path.stat().st_size for path in folder.rglob("*")) for folder in folders]
    assert min(written) > max(written) / 3, written
    table = json.loads((checkpoint / "digests" / "metadata").read_text())["arrays"]
    assert set(table["members/topk-F62/params/W_enc"]) == {"0:64, 0:32", "0:64, 32:62"}
    lines, good = inspect_run(run, verify=True)
    assert good and "\n".join(lines).count("verified, ") == 2
    path = max(folders[1].rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    lines, good = inspect_run(run, verify=True)
    assert not good
    assert re.search(
        r"40 .* damaged: the slice members/\S+\[\d.*:\d+\] (does not have the digest|cannot be read)", lines[-1]
    )


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not(one_run: Path, two_run: Path, tmp_path: Path) -> None:
    """By two processes; by one on one device it has the losses. And two go on with what one saved."""
    runs = {"two": two_run, "one": two_run, "of one": one_run}
    for name, run in runs.items():
        shutil.copytree(run, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "40")
        (tmp_path / name / "summary.json").unlink()
    for each in two(["--out", "two", "--resume"], tmp_path, script=ACCELERATORS):
        finish(each, 0)
    assert outcome(tmp_path / "two") == outcome(two_run)
    with as_in_a_process_of_its_own():
        one = ["--mesh.data", "1", "--mesh.feature", "1"]
        assert main(["--out", str(tmp_path / "one"), "--resume", *one]) == 0
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(one_run), rtol=CLOSE)
    members = ["--mesh.data", "1", "--mesh.feature", "1", "--mesh.member", "4"]  # most have nothing of a member
    said = [finish(each, 0) for each in two(["--out", "of one", "--resume", *members], tmp_path)]
    assert "not the same bits" in said[0] and "not the same bits" not in said[1]
    assert re.search(r"\nweights .*, whole on each of 2 devices\n", said[0]), said[0]
    np.testing.assert_allclose(losses(tmp_path / "of one"), losses(one_run), rtol=CLOSE)


@pytest.mark.slow
def test_one_that_is_killed_ends_the_other_and_a_signal_to_one_saves_both(of_rows: list[str], tmp_path: Path) -> None:
    """The first is killed while they save: the other hears at once; of another one it is told after SECONDS_UNHEARD.

    What was half written is no checkpoint. They go on, and end together at a step.
    """
    checkpoints = tmp_path / "run" / "checkpoints"
    both = two([*of_rows, "--out", "run", *MESH], tmp_path)
    until_there_is(checkpoints, "10", both)
    until_there_is(checkpoints, "*.orbax-checkpoint-tmp", both)
    both[0].kill()
    both[0].communicate(timeout=60)
    _, error = both[1].communicate(timeout=60)
    assert both[1].returncode not in (0, None)
    assert "error: another process of this run is gone; start all of them again, with --resume" in error
    before = newest(checkpoints)
    both = two(["--out", "run", "--resume"], tmp_path)
    until_there_is(checkpoints, str(before + 20), both)
    both[1].send_signal(signal.SIGTERM)
    said = [finish(each, 143) for each in both]
    assert f"resuming      run at step {before}" in said[0] and f"at step {newest(checkpoints)};" in said[0]
    _, good = inspect_run(tmp_path / "run", verify=True)
    assert good and not list(checkpoints.glob("*tmp*"))


def newest(checkpoints: Path) -> int:
    """The last step at which there is one."""
    return max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_processes_with_different_settings_or_versions_end_with_a_line_of_one(
    of_rows: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "optax-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = Own(("--train.seed", "1"), environment={"PYTHONPATH": paths})
    both = two([*of_rows, "--out", "run"], tmp_path, Own(("--train.seed", "0")), own)
    first, second = finish(both[0], 2), finish(both[1], 1)
    told = f"the processes of this run differ: optax {version('optax')} in number 0, 0.0.1 in number 1; train.seed 0 in"
    assert told in first and first.count("error: ") == 1
    assert "error" not in second
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_read_other_files_end_with_a_line_of_one(of_rows: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        np.save(folder / "x.npy", np.full((2000, 16), i, np.float32))
    flags = [*of_rows, "--activations.path", "x.npy", "--out", str(tmp_path / "run")]
    both = two(flags, tmp_path, *(Own(directory=folder) for folder in folders))
    first, second = finish(both[0], 2), finish(both[1], 1)
    assert re.search(
        r"the processes of this run differ: activations .{12} in number 0, .{12} in number 1;.*on the same", first
    )
    assert "error" not in second and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_of_them_cannot_read_saves_all(of_rows: list[str], tmp_path: Path) -> None:
    """Its file is damaged while they train; it says so, and both end at a step from which they can go on."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32))
    flags = [*of_rows, "--activations.path", "x.npy", "--out", str(tmp_path / "run")]
    both = two(flags, tmp_path, *(Own(directory=folder) for folder in folders))
    until_there_is(tmp_path / "run" / "checkpoints", "10", both)
    np.lib.format.open_memmap(folders[1] / "x.npy", mode="r+")[:] = np.nan
    first, second = finish(both[0], 1), finish(both[1], 2)
    step = newest(tmp_path / "run" / "checkpoints")
    assert "error" not in first
    assert re.search(rf"error: .* activations are not finite; .*; saved at step {step}: go on with", second), second
    _, good = inspect_run(tmp_path / "run", verify=True)
    assert good


@pytest.mark.slow
def test_processes_without_a_common_disk_end_with_a_line_of_one(of_rows: list[str], tmp_path: Path) -> None:
    """Each writes to a folder of its own here, under the same name."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    both = two([*of_rows, "--out", "run"], tmp_path, *(Own(directory=folder) for folder in folders))
    first, second = finish(both[0], 1), finish(both[1], 2)
    assert "error" not in first
    assert re.search("error: run on .* is not the directory that the first process writes to; --out has to lie", second)
    assert not (folders[0] / "run" / "config.json").exists() and not (folders[1] / "run").exists()


def until_there_is(folder: Path, pattern: str, processes: list[subprocess.Popen[str]]) -> None:
    """Wait for a file or folder, as long as the processes live."""
    end = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert time.monotonic() < end and all(each.poll() is None for each in processes), [
            each.communicate() for each in processes if each.poll() is not None
        ]
        time.sleep(0.002)


if sys.platform != "linux":
    pytestmark = pytest.mark.skip("processes meet on loopback; tried on Linux alone")
