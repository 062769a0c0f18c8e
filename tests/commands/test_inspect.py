"""`jax-sae inspect`: what a run holds, and whether it still is what was saved."""

import shutil
from pathlib import Path

import pytest
from running import never, stop_at

from jax_sae.commands.inspect import main
from jax_sae.config import Config
from jax_sae.run.train import train


def flip_the_largest_file(checkpoint: Path) -> None:
    """One bit in the middle of the file that holds most arrays."""
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_good_run(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Members, their last losses, checkpoints; each verified where that is asked for."""
    before = {path: path.stat().st_mtime_ns for path in demo_run.rglob("*")}
    assert main([str(demo_run)]) == 0
    quick = capsys.readouterr().out
    assert main([str(demo_run), "--verify"]) == 0
    thorough = capsys.readouterr().out
    for text in (quick, thorough):
        assert "12 steps, finished" in text and "loss/element at step 12" in text
        assert all(f"\n{name} " in text for name in ("F8", "F63", "F64", "F83", "5", "10", "12"))
    assert "--verify compares each with its digest" in quick and "verified" not in quick
    assert thorough.count("verified, 70 arrays") == 3
    assert before == {path: path.stat().st_mtime_ns for path in demo_run.rglob("*")}


def test_a_damaged_checkpoint_is_named(demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only reading the arrays shows a flipped bit; exit code 1, and the others are still verified."""
    run = Path(shutil.copytree(demo_run, tmp_path / "run"))
    flip_the_largest_file(run / "checkpoints" / "10")
    assert main([str(run)]) == 0
    capsys.readouterr()
    assert main([str(run), "--verify"]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "damaged: " in lines["10"] and "verified" in lines["5"] and "verified" in lines["12"]
    shutil.rmtree(run / "checkpoints" / "12")
    (run / "checkpoints" / "12").mkdir()
    assert main([str(run)]) == 1
    assert "damaged: its JSON cannot be read" in capsys.readouterr().out


@pytest.mark.long
def test_runs_that_are_not_finished(demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped, with a line of metrics that is being written; and one without a checkpoint."""
    assert not train(demo_config, tmp_path / "run", resume=False, stop_requested=stop_at(6))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "mem')
    capsys.readouterr()
    assert main([str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "not finished, newest checkpoint at step 6" in printed and "loss/element at step 6" in printed
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main([str(tmp_path / "run"), "--verify"]) == 0
    assert "not finished, no checkpoint yet" in capsys.readouterr().out
    assert train(demo_config, tmp_path / "run", resume=True, stop_requested=never)


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2; --debug shows where it came from."""
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "holds no run" in error
    assert main([str(tmp_path), "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: ")
