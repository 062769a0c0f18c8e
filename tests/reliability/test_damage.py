"""Whatever happens to the files of a checkpoint: it is noticed, or it changes no value."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processes import outcome
from running import never, stop_at

import jax_sae
from jax_sae.config import Config, SweepConfig
from jax_sae.errors import BadInput
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import array_digest, named_leaves
from jax_sae.run.saved_checkpoints import Damaged, Tree
from jax_sae.run.train import train

FLIPS = 6
"""Bits that are flipped in each file."""


def flipped(data: bytes, bit: int) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def read(run: Path, step: int) -> tuple[Tree, dict[str, bytes]]:
    """JSON and arrays of a checkpoint, with their dtypes and shapes."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        facts, state = checkpoints.read_run(step), checkpoints.read_state(step)
    arrays = {name: f"{array.dtype}{array.shape}".encode() + array.tobytes() for name, array in named_leaves(state)}
    return facts, arrays


@pytest.fixture
def run(demo_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, with checkpoints at 5, 10 and 12."""
    return Path(shutil.copytree(demo_run, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("learning_nothing")
def test_no_damage_of_any_file_gives_other_values(
    demo_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each file of the newest step in turn: bits flipped, cut at three places, emptied, deleted.

    Orbax does not read all of its files; damage in those changes nothing. In what it reads, all of it is noticed. Of a
    run with one member, since each of a hundred damages takes the time to read it.
    """
    config, run = replace(demo_config, sweep=SweepConfig(features=(256,), learning_rates=(1e-3,))), tmp_path / "run"
    assert train(config, run, resume=False, stop_requested=never)
    capfd.readouterr()
    chance, expected = np.random.default_rng(0), read(run, 12)
    noticed: dict[str, list[bool]] = {}
    for path in sorted(path for path in (run / "checkpoints" / "12").rglob("*") if path.is_file()):
        data = path.read_bytes()
        damages: list[bytes | None] = [flipped(data, int(bit)) for bit in chance.integers(0, 8 * len(data), FLIPS)]
        for content in [*damages, data[: len(data) // 2], data[:-1], b"", None]:
            path.unlink() if content is None else path.write_bytes(content)
            try:
                assert read(run, 12) == expected, f"{path} was damaged, and other values were returned"
                is_noticed = False
            except Damaged as error:
                assert "step 12" in str(error) and "the others are at 5, 10" in str(error)
                is_noticed = True
            noticed.setdefault(path.relative_to(run / "checkpoints" / "12").as_posix(), []).append(is_noticed)
            path.write_bytes(data)
    assert read(run, 12) == expected
    assert not capfd.readouterr().err  # one error each, no pages from the threads of others
    assert all(noticed["run/metadata"]) and all(noticed["digests/metadata"]) and all(noticed["state/manifest.ocdbt"])
    largest = max(noticed, key=lambda name: (run / "checkpoints" / "12" / name).stat().st_size)
    assert sum(noticed[largest]) >= 0.7 * len(noticed[largest]), (
        "the file of the arrays, which has bytes without use too"
    )
    silent = {name for name, results in noticed.items() if not any(results)}
    assert all("commit_success" in name or "_CHECKPOINT_METADATA" in name or "ocdbt" in name for name in silent)


def test_a_flipped_bit_changes_the_digest_of_its_array_and_of_no_other() -> None:
    """200 of 200, wherever the bit lies."""
    arrays = {f"array{i}": np.random.default_rng(i).normal(size=(16, 16)).astype(np.float32) for i in range(8)}
    chance = np.random.default_rng(1)
    for trial in range(200):
        name, bit = f"array{trial % 8}", int(chance.integers(0, 16 * 16 * 32))
        wrong = np.frombuffer(flipped(arrays[name].tobytes(), bit), np.float32).reshape(16, 16)
        changed = {**arrays, name: wrong}
        assert [n for n in arrays if array_digest(arrays[n]) != array_digest(changed[n])] == [name]


def rewrite(run: Path, step: int, change: Callable[[Tree, Tree], None]) -> None:
    """Save a step again with other arrays or JSON, but the digests that it had."""
    directory = run / "checkpoints"
    with Checkpoints(directory, read_only=True) as checkpoints:
        facts, state = checkpoints.read_run(step), checkpoints.read_state(step)
    digests = (directory / str(step) / "digests" / "metadata").read_bytes()
    change(state, facts)
    shutil.rmtree(directory / str(step))
    newer = [path for path in directory.iterdir() if path.name.isdigit() and int(path.name) > step]
    for path in newer:
        path.rename(run / path.name)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(step, lambda: (state, facts))
    for path in newer:
        (run / path.name).rename(path)
    (directory / str(step) / "digests" / "metadata").write_bytes(digests)


def flip_a_weight(state: Tree, facts: Tree) -> None:
    """One bit of one weight of the member F64."""
    W_enc = state["members"]["F64"]["params"]["W_enc"].copy()
    W_enc.view(np.uint32)[3, 5] ^= 1 << 20
    state["members"]["F64"]["params"]["W_enc"] = W_enc


def move_the_position(state: Tree, facts: Tree) -> None:
    """The data would go on elsewhere."""
    facts["position"]["batch"] += 1


def drop_a_moment(state: Tree, facts: Tree) -> None:
    """An array is gone, as if it had never been there."""
    del state["members"]["F8"]["optimizer"]["0.mu.b_dec"]


def add_an_array(state: Tree, facts: Tree) -> None:
    """An array that nobody saved."""
    state["members"]["F8"]["optimizer"]["0.mu.b"] = np.zeros(3, np.float32)


def reshape(state: Tree, facts: Tree) -> None:
    """The same bytes in another shape."""
    state["members"]["F8"]["params"]["W_enc"] = state["members"]["F8"]["params"]["W_enc"].reshape(8, 64)


WRONG = {
    "a bit of a weight": (flip_a_weight, "the array members/F64/params/W_enc does not have the digest"),
    "position": (move_the_position, "its JSON does not have the digest"),
    "an array less": (drop_a_moment, "the array members/F8/optimizer/0.mu.b_dec is missing"),
    "an array more": (add_an_array, "the array members/F8/optimizer/0.mu.b has no digest"),
    "another shape": (reshape, "the array members/F8/params/W_enc does not have the digest"),
}


OFTEN = ("a bit of a weight", "position")


@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(*its, id=name, marks=[] if name in OFTEN else [pytest.mark.long]) for name, its in WRONG.items()],
)
def test_an_explicit_step_raises_and_a_resumed_run_falls_back(
    change: Callable[[Tree, Tree], None],
    message: str,
    run: Path,
    demo_run: Path,
    demo_config: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Changes that Orbax reads without complaint. Falling back ends in the same bits, and the damaged step is kept."""
    rewrite(run, 12, change)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints, pytest.raises(Damaged, match=message):
        checkpoints.read_run(12)
        checkpoints.read_state(12)
    if "F64" in message:
        for step in (12, None):
            with pytest.raises(BadInput, match=f"step 12 in .* is damaged: {message}"):
                jax_sae.load_autoencoder(run, features=64, step=step)
        assert jax_sae.load_autoencoder(run, features=63).step == 12  # its own arrays are good
    if "missing" in message or "has no digest" in message:
        return  # a resume finds them as it finds the others
    assert train(demo_config, run, resume=True, stop_requested=never)
    printed = capsys.readouterr().out
    assert message in printed and "going on from step 10; it is now 12.damaged" in printed
    assert outcome(run) == outcome(demo_run)
    assert (run / "checkpoints" / "12.damaged").is_dir()


@pytest.mark.long
def test_an_empty_step_and_a_damaged_one_are_passed_over(
    run: Path, demo_run: Path, demo_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bad ones: both are named, and the third newest is used."""
    shutil.rmtree(run / "checkpoints" / "12")
    (run / "checkpoints" / "12").mkdir()
    rewrite(run, 10, flip_a_weight)
    assert train(demo_config, run, resume=True, stop_requested=never)
    printed = capsys.readouterr().out
    assert "step 12" in printed and "step 10" in printed and printed.count("going on from step 5") == 2
    assert outcome(run) == outcome(demo_run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"5", "10", "12", "10.damaged", "12.damaged"}


@pytest.mark.long
def test_when_all_are_damaged_the_run_is_refused_and_left_as_it_is(run: Path, demo_config: Config) -> None:
    """It does not begin again without a word."""
    for step in (5, 10, 12):
        (run / "checkpoints" / str(step) / "digests" / "metadata").unlink()

    def files() -> list[tuple[Path, int]]:
        paths = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
        return sorted((path, path.stat().st_mtime_ns) for path in paths)

    before = files()
    with pytest.raises(BadInput, match="no checkpoint that is whole: the checkpoint at step 12"):
        train(demo_config, run, resume=True, stop_requested=never)
    assert files() == before


def test_lines_of_metrics_after_the_checkpoint_and_damaged_ones(
    demo_run: Path, demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a killed run wrote after its last checkpoint is written again; a line that is none is removed and named."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not train(demo_config, tmp_path / "run", resume=False, stop_requested=stop_at(3))
    with open(metrics, "a") as file:
        file.write('{"step": 6, "tokens": 1, "members": {}}\n{"step": 8, "tok')
    assert not train(demo_config, tmp_path / "run", resume=True, stop_requested=stop_at(7))
    expected = (demo_run / "metrics.jsonl").read_text().splitlines()
    lines = metrics.read_text().splitlines()
    assert lines == expected[:4] and "no line of metrics" not in capsys.readouterr().out
    metrics.write_text("\n".join([lines[0], "nonsense", *lines[2:]]) + "\n")
    assert train(demo_config, tmp_path / "run", resume=True, stop_requested=never)
    assert "line 2 is no line of metrics; it was removed" in capsys.readouterr().out
    assert metrics.read_text().splitlines() == [expected[0], *expected[2:]]
