"""`jax-sae` finds its subcommands, and the scripts of the repository are the same."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
from running import REPOSITORY

from jax_sae.commands import COMMANDS, main, module_of

SCRIPTS = {
    "train_all": "train",
    "feature_pages": "pages",
    "compare_members": "compare",
    "evaluate": "evaluate",
    "steer": "steer",
    "probe": "probe",
    "export": "export",
    "import_dictionary": "import",
    "inspect_run": "inspect",
    "harvest_activations": "harvest",
    "export_torch_activations": "export-activations",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_line_and_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One help lists all; each explains its own flags."""
    assert main(["--help"]) == 0
    assert f"\n  {name:18}  {COMMANDS[name]}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: jax-sae {name} " in text and "--debug" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["--config", "x"], "unknown command '--config'; there are train, evaluate, inspect, "),
        (["train", "--train.step", "3"], "unknown flag --train.step; did you mean --train.steps?"),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2, as what is no flag."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_without_a_word_it_helps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`jax-sae`, and `python -m jax_sae`."""
    monkeypatch.setattr(sys, "argv", ["jax-sae"])
    assert main() == 0
    expected = capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jax_sae", run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out == expected != ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_its_command(script: str) -> None:
    """The same function; each command has a script."""
    assert set(SCRIPTS.values()) == set(COMMANDS)
    names = runpy.run_path(str(REPOSITORY / "scripts" / f"{script}.py"))
    command = importlib.import_module(module_of(SCRIPTS[script]))
    assert names["main"] is command.main and Path(command.__file__).parent.name == "commands"
