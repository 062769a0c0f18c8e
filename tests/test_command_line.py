"""The command line: flags, directories, resuming, and errors in one line with exit code 2."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import REPOSITORY

from jax_sae.command_line import main

DEMO = REPOSITORY / "configs" / "demo.toml"
SMALL = [
    *("--sweep.features", "4", "64", "--train.steps", "6", "--train.checkpoint-every", "4", "--train.log-every", "2"),
    *("--train.batch-tokens", "32", "--train.warmup", "0"),
    *("--activations.block-tokens", "256", "--activations.held-out-tokens", "500"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty directory; signals have their usual effect again afterwards."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*argv: str) -> int:
    """Call the command line with the demo as its default config."""
    return main(list(argv), DEMO)


def test_runs_are_numbered_and_every_setting_is_a_flag(tmp_path: Path) -> None:
    """runs/demo, then runs/demo-2; the contract's examples are accepted."""
    flags = [*SMALL, "--sweep.learning-rates", "1e-3", "3e-3", "--sweep.seeds", "0", "1", "--model.layer", "1"]
    assert run(*flags) == 0 and run(*SMALL) == 0
    config = json.loads(Path("runs/demo/config.json").read_text())
    assert config["sweep"]["learning_rates"] == [1e-3, 3e-3] and config["model"]["layer"] == 1
    assert len(json.loads(Path("runs/demo/summary.json").read_text())["members"]) == 8
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2"]
    assert json.loads(Path("runs/demo-2/config.json").read_text())["model"]["layer"] == 2


def test_explicit_members(tmp_path: Path) -> None:
    """On the command line, with the parts that may be left out."""
    assert run(*SMALL, "--out", "x", "--sweep.members", "features=3,seed=2,learning_rate=1e-2", "features=5") == 0
    members = json.loads(Path("x/config.json").read_text())["sweep"]["members"]
    assert members == [
        {"features": 3, "seed": 2, "learning_rate": 1e-2},
        {"features": 5, "seed": 0, "learning_rate": 1e-3},
    ]


def test_resume_and_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """More steps are allowed; another batch size is not, and the difference is named."""
    assert run(*SMALL, "--out", "x") == 0
    assert run("--out", "x", "--resume", "--train.batch-tokens", "64") == 2
    assert "train.batch_tokens 32 -> 64" in capsys.readouterr().err
    assert run("--out", "x", "--resume", "--train.steps", "8") == 0
    assert sorted(int(path.name) for path in Path("x/checkpoints").iterdir()) == [4, 6, 8]
    assert run(*SMALL, "--config", str(DEMO), "--out", "x", "--resume") == 2
    assert "beyond train.steps 6" in capsys.readouterr().err


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    """What the cases below name."""
    np.save(tmp_path / "nan.npy", np.full((800, 4), np.nan, np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(400, np.float32))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((REPOSITORY / "jax_sae/demo/model/config.json").read_text())
    (tmp_path / "broken" / "pytorch_model.bin").write_bytes(b"no weights")
    (tmp_path / "stories.jsonl").write_text('{"story": "A fox."}\n' * 40)
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n' * 40)


BAD = {
    "unknown model": (["--model.path", "nobody/nothing"], "cannot load language model 'nobody/nothing'"),
    "unknown text": (["--text.path", "nobody/nothing"], "cannot load dataset 'nobody/nothing'"),
    "unknown tokenizer": (["--text.tokenizer", "nobody/nothing"], "cannot load tokenizer 'nobody/nothing'"),
    "layer": (["--model.layer", "7"], "layer 7: the model has 4 blocks; valid are 0 to 4"),
    "column": (["--text.path", "stories.jsonl"], "no column 'text' in the split 'train'; there are 'story'"),
    "split": (["--text.split", "dev"], "no split 'dev'; there are 'train', 'validation'"),
    "validation split": (["--text.validation-split", "dev"], "no split 'dev'"),
    "no text": (["--text.path", "empty.jsonl"], "has any tokens"),
    "features": (["--sweep.features", "0"], "sweep.features is 0"),
    "batch": (["--train.batch-tokens", "-4"], "train.batch_tokens is -4"),
    "steps": (["--train.steps", "0"], "train.steps is 0"),
    "unknown flag": (["--train.step", "3"], "unknown flag --train.step; did you mean --train.steps?"),
    "missing config": (["--config", "no.toml"], "cannot read the config no.toml"),
    "used directory": (["--out", "used"], "already holds a run; go on with it by --resume, or give --out another name"),
    "nothing to resume": (["--resume"], "runs/demo holds no run to resume"),
    "damaged weights": (["--model.path", "broken"], "pytorch_model.bin"),
    "nan": (["--activations.path", "nan.npy"], "not finite"),
    "one dimension": (["--activations.path", "flat.npy"], "[N, D]"),
    "no activations": (["--activations.path", "gone.npy"], "no such file or directory"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], message: str, bad_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, and no directory of a run that never began."""
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not Path("runs").exists()


def test_a_value_of_the_wrong_type_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """As the command-line library words it."""
    with pytest.raises(SystemExit) as end:
        run("--train.steps", "many")
    assert end.value.code == 2 and "--train.steps" in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """With its default."""
    with pytest.raises(SystemExit) as end:
        run("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(
        flag in text for flag in ("--train.batch-tokens", "--sweep.learning-rates", "--activations.path", "--resume")
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends(number: int, code: int, tmp_path: Path) -> None:
    """In a process of its own: the run stops at a step boundary, and resumes from there."""
    flags = [*SMALL, "--train.steps", "100000", "--train.checkpoint-every", "100000", "--out", "x"]
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_all.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "x" / "metrics.jsonl").exists() or not (tmp_path / "x" / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    (step,) = [int(path.name) for path in (tmp_path / "x" / "checkpoints").iterdir()]
    lines = (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] <= step < 100000
    assert run("--out", "x", "--resume", "--train.steps", str(step + 3)) == 0
