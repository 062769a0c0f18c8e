"""Where a run is: a new directory, or one that is resumed."""

import os
from pathlib import Path

from jax_sae.config import Config
from jax_sae.config_tables import config_from_dict
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import read_json

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures", "summary.json")
"""What a run leaves, with config.json."""


def choose_directory(out: Path | None, resume: bool, name: str) -> Path:
    """The directory of the run, where `out` is None `runs/name`; for a new run it does not hold one yet.

    Raises:
        BadInput: if `out` holds a run, or part of one, and is not to be resumed, if there is no run to resume, or if
            `out` cannot be a directory.
    """
    default = Path("runs") / name
    try:
        numbered = [default]
        while numbered[-1].exists():
            numbered.append(default.with_name(f"{default.name}-{len(numbered) + 1}"))
        if resume:
            runs = [path for path in (numbered if out is None else [out]) if holds_run(path)]
            if not runs:
                raise BadInput(
                    f"{out or default} holds no run to resume; name one by --out, or start one without --resume"
                )
            return runs[-1]
        if out is None:
            return numbered[-1]
        if holds_run(out):
            raise BadInput(f"{out} already holds a run; go on with it by --resume, or give --out another name")
        if left := [name for name in RUN_FILES if (out / name).exists()]:
            raise BadInput(
                f"{out} holds part of a run ({', '.join(left)}), but no config.json; give --out another name, or "
                "move that away"
            )
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            problem = "is read-only" if there.is_dir() else "is a file"
            raise BadInput(f"--out {out} cannot be a run's directory: {there} {problem}; give it another name")
        return out
    except OSError as error:  # such as a name that is too long
        wanted = out or default
        raise BadInput(f"--out {wanted} cannot be a run's directory: {error.strerror}; give it another name") from error


def holds_run(directory: Path) -> bool:
    """Whether a run was started in a directory."""
    return (directory / "config.json").exists()


def refuse_no_run(directory: Path) -> None:
    """Raise BadInput unless a run was started in a directory."""
    if not holds_run(directory):
        raise BadInput(
            f"{directory} holds no run: there is no config.json; give the directory of one, such as runs/demo"
        )


def read_config(directory: Path) -> Config:
    """The settings of the run in a directory, from its `config.json`.

    Raises:
        BadInput: if there is no run, or the file is not what a run wrote.
    """
    refuse_no_run(directory)
    saved = read_json(directory / "config.json")
    saved.pop("versions", None)
    return config_from_dict(saved, str(directory / "config.json"))
