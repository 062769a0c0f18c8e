"""The command line: flags, directories, resuming and signals. What it refuses stands in test_bad_input.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import REPOSITORY

from jax_sae.commands.flags import parse
from jax_sae.commands.process import caches
from jax_sae.commands.train import main
from jax_sae.config import Member
from jax_sae.config_tables import option_names
from jax_sae.run.directory import choose_directory
from jax_sae.run.settings import base

DEMO = REPOSITORY / "configs" / "demo.toml"
FIVE = "features=5,kind=topk,k=2"
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
    """Call the command line."""
    return main(argv)


def test_what_the_environment_says_of_compiled_programs_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it says nothing, reliability/test_clean_end.py holds where they are."""
    names = ["JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"]
    names += ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_PYTHON_CLIENT_PREALLOCATE"]
    for name in names:
        monkeypatch.setenv(name, "set by the user")
    with caches() as lines:
        assert [os.environ[name] for name in names] == ["set by the user"] * 4 and not lines


@pytest.mark.long
@pytest.mark.usefixtures("learning_nothing")
def test_runs_are_numbered_and_every_setting_is_a_flag(tmp_path: Path) -> None:
    """runs/demo, then runs/demo-2, with members one by one; the contract's examples are accepted."""
    flags = [*SMALL, "--sweep.features", "4", "--sweep.learning-rates", "1e-3", "3e-3", "--sweep.seeds", "0", "1"]
    assert run(*flags, "--train.seed", "1") == 0
    of_members = ["--sweep.features", "--sweep.members", "features=3,seed=2,learning_rate=1e-2", FIVE]
    assert run("--config", str(DEMO), *SMALL[3:], *of_members) == 0
    config = json.loads(Path("runs/demo/config.json").read_text())
    assert config["sweep"]["learning_rates"] == [1e-3, 3e-3] and config["train"]["seed"] == 1
    assert len(json.loads(Path("runs/demo/summary.json").read_text())["members"]) == 4
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2"]
    config = json.loads(Path("runs/demo-2/config.json").read_text())
    assert config["train"]["seed"] == 0
    members = config["sweep"]["members"]
    given = [{name: value for name, value in member.items() if value is not None} for member in members]
    assert given == [
        {"features": 3, "seed": 2, "learning_rate": 1e-2, "kind": "relu"},
        {"features": 5, "seed": 0, "kind": "topk", "k": 2},
    ]


@pytest.mark.usefixtures("learning_nothing")
def test_resume_and_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """More steps are allowed; another batch size is not, and the difference is named."""
    assert run(*SMALL, "--out", "x") == 0
    assert run("--out", "x", "--resume", "--train.batch-tokens", "64") == 2
    assert "train.batch_tokens 32 -> 64" in capsys.readouterr().err
    assert run("--out", "x", "--resume", "--train.steps", "8") == 0
    assert sorted(int(path.name) for path in Path("x/checkpoints").iterdir()) == [4, 6, 8]
    assert run(*SMALL, "--config", str(DEMO), "--out", "x", "--resume") == 2
    assert "beyond train.steps 6" in capsys.readouterr().err


FORMS: list[tuple[list[str], str, object]] = [
    (["--train.steps", "3"], "train.steps", 3),
    (["--train.steps=3"], "train.steps", 3),
    (["--train.batch_tokens", "3"], "train.batch_tokens", 3),
    (["--train.steps", "3", "--train.steps", "4"], "train.steps", 4),
    (["--sweep.encoder-bias", "-1e-3"], "sweep.encoder_bias", (-1e-3,)),
    (["--sweep.learning-rates", "1e-3", "-2"], "sweep.learning_rates", (1e-3, -2.0)),
    (["--sweep.features=3", "--resume"], "sweep.features", (3,)),
    (["--sweep.features"], "sweep.features", ()),
    (["--sweep.members", "seed=1, features=3"], "sweep.members", (Member(3, 1),)),
    (["--text.path", "-"], "text.path", "-"),
    (["--text.path="], "text.path", ""),
    (["--text.path", "a=b --c"], "text.path", "a=b --c"),
    (["--train.batching", "story"], "train.batching", "story"),
]


@pytest.mark.parametrize(("number", "form"), list(enumerate(FORMS)))
def test_every_form_of_a_flag_is_read(number: int, form: tuple[list[str], str, object]) -> None:
    """Wherever it stands among others, which keep their values: some of the forms alone, or in the midst of others."""
    (argv, name, value), around = form, ([], ["--debug"], ["--out", "x"])[number % 3]
    arguments = parse([*around, *argv, *around])
    assert arguments.settings == {name: value}
    assert arguments.out == (Path("x") if "--out" in around else None)
    assert arguments.resume == ("--resume" in argv)


def test_the_last_config_counts(tmp_path: Path) -> None:
    """For the settings as for the name of the run."""
    for steps in (3, 4):
        (tmp_path / f"s{steps}.toml").write_text(f"[train]\nsteps = {steps}\n")
    for last in (["--config", "s4.toml"], ["--config=s4.toml"]):
        arguments = parse(["--config", "s3.toml", *last])
        name, lower = base(arguments.config, arguments.settings)
        assert lower.settings == {"train.steps": 4}
        assert choose_directory(arguments.out, arguments.resume, name) == Path("runs/s4")


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its default, and with its text: of lists of a sweep, that of the member's setting."""
    monkeypatch.setenv("COLUMNS", "98")  # one column
    with pytest.raises(SystemExit) as end:
        run("--help")
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert end.value.code == 0
    flags = [f"--{name.replace('_', '-')}" for name in (*option_names(), "resume")]
    assert [flag for flag in flags if f" {flag} " not in text] == []
    assert "--sweep.k [INT [INT ...]] topk, batchtopk, matryoshka (default 32): active features a token." in text
    assert "--sweep.seeds [INT [INT ...]] Seeds of the initial values. (default: 0)" in text


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves_and_ends(tmp_path: Path) -> None:
    """By SIGHUP, when nothing can be written any more: the run stops at a step boundary, and resumes from there.

    Ctrl-C and SIGTERM: reliability/test_resume.py.
    """
    flags = [*SMALL, "--sweep.features", "4", "--train.steps", "100000", "--train.checkpoint-every", "100000"]
    flags += ["--out", "x"]
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_all.py"), *flags]
    ours, theirs = os.openpty()
    with open(ours, "rb") as terminal:
        process = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.set_blocking(ours, False)
        told, deadline = b"", time.monotonic() + 120
        while not (tmp_path / "x" / "metrics.jsonl").exists() or not (tmp_path / "x" / "metrics.jsonl").stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            told += terminal.read() or b""
            time.sleep(0.05)
        terminal.close()
        os.kill(process.pid, signal.SIGHUP)
    assert process.wait(120) == 129, told
    assert b"Traceback" not in told
    (step,) = [int(path.name) for path in (tmp_path / "x" / "checkpoints").iterdir()]
    lines = (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] <= step < 100000
    assert run("--out", "x", "--resume", "--train.steps", str(step + 3)) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Also while a long dispatch is under way, in which Python's own handlers wait; nothing is saved then."""
    flags = [
        "--train.steps",
        "100000",
        "--train.log-every",
        "100000",
        "--train.checkpoint-every",
        "100000",
        "--out",
        "x",
    ]
    flags += ["--train.batch-tokens", "1024", "--activations.held-out-tokens", "500", "--sweep.features", "3000"]
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_all.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "x" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)  # to be inside the compiler or the first dispatch, of 64 steps
    os.kill(process.pid, signal.SIGTERM)
    assert process.stderr is not None
    while "stopping: saving first" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not [path for path in (tmp_path / "x" / "checkpoints").iterdir() if path.name.isdigit()]
