"""`jax-sae evaluate`: tables on the screen, files below the run, one line and exit code 2 for what cannot be used."""

import json
import shutil
from pathlib import Path

import pytest

from jax_sae.commands.evaluate import main


@pytest.fixture(scope="module")
def run(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return Path(shutil.copytree(demo_run, tmp_path_factory.mktemp("evaluated") / "run"))


def test_a_run_is_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every member stands in both tables; the files that are named exist; the bar ends full."""
    assert main([str(run), "--tokens", "300", "--step", "10"]) == 0
    printed, bars = capsys.readouterr()
    assert all(printed.count(f"\n{name} ") == 2 for name in ("F8", "F63", "F64", "F83"))
    found = json.loads((run / "evaluation-step10.json").read_text())
    tokens = found["tokens"]
    assert tokens < 300 and "held out: 100%" in bars and f" {tokens}/{tokens} " in bars
    assert f"of {found['tokens']:,} held-out tokens: a feature is dead if it is never on in these" in printed
    *_, written, figures = printed.splitlines()
    names = [written.removeprefix("written       "), *figures.removeprefix("figures       ").split(", ")]
    assert len(names) == 3 and all(Path(name).is_file() for name in names)
    assert f"{found['members'][0]['fvu']:.4g}" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "7"], "has no checkpoint at step 7; there are 5, 10, 12"),
        (["--tokens", "0"], "number of held-out tokens is 0"),
        (["--tokens", "many"], "--tokens is 'many'; a whole number was expected"),
        (["--steps", "5"], "unknown flag --steps; did you mean --step?"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2."""
    assert main([str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another directory, none at all; --debug shows where it came from."""
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main([]) == 2
    assert "run is missing" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
