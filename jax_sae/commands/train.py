"""Train every autoencoder of a sweep at once: settings and a directory in, a run out; new ones and those resumed.

jax-sae train --config demo_sparse
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_sae.command_line import run_script
from jax_sae.config import Config, config_from_dict, config_to_dict, validate
from jax_sae.errors import BadInput
from jax_sae.flags import Arguments, parse
from jax_sae.language_model.hub import read_json
from jax_sae.stop_signals import Signals

MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "model.path",
    "text.path",
    "text.config",
    "text.tokenizer",
    "activations.path",
    "activations.mask",
)

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures", "summary.json")
"""What a run leaves, with config.json."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code, as `run_script`, and 130 or 143 after Ctrl-C or SIGTERM.

    A first signal saves at the next step boundary and ends; a second one ends at once.
    """

    def work() -> int:
        arguments = parse(argv)
        out = choose_directory(arguments)
        config = settings_to_resume(arguments, out, argv) if arguments.resume else arguments.settings
        validate(config)
        from jax_sae.activations.interruptible import Stopped
        from jax_sae.sweep.train import train

        with Signals() as signals:
            try:
                finished = train(config, out, resume=arguments.resume, stop_requested=lambda step: signals.received > 0)
            except Stopped:
                print("stopped before training began; there was nothing to save")
                finished = False
        return 0 if finished else 128 + signals.received

    return run_script(argv, work)


def choose_directory(arguments: Arguments) -> Path:
    """The directory of the run, which for a new one does not hold a run yet.

    Raises:
        BadInput: if --out holds a run, or part of one, and --resume is not given, if there is no run to resume, or if
            --out cannot be a directory.
    """
    default, out = Path("runs") / arguments.config.stem, arguments.out
    try:
        numbered = [default]
        while numbered[-1].exists():
            numbered.append(default.with_name(f"{default.name}-{len(numbered) + 1}"))
        if arguments.resume:
            runs = [path for path in (numbered if out is None else [out]) if holds_run(path)]
            if not runs:
                raise BadInput(f"{out or default} holds no run to resume; start one without --resume")
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
        name = out or default
        raise BadInput(f"--out {name} cannot be a run's directory: {error.strerror}; give it another name") from error


def holds_run(directory: Path) -> bool:
    """Whether a run was started in a directory."""
    return (directory / "config.json").exists()


def settings_to_resume(arguments: Arguments, out: Path, argv: Sequence[str]) -> Config:
    """The settings with which the run in `out` goes on: its own, changed where flags say so and that is allowed.

    With --config on the command line the settings are those of the file and the flags, as for a new run, so that the
    command that started a run resumes it with --resume added; without, those in the run's config.json and the flags.

    Raises:
        BadInput: naming every setting that differs from the run's and must not.
    """
    saved = read_json(out / "config.json")
    saved.pop("versions", None)
    own = config_from_dict(saved, str(out / "config.json"))
    config = arguments.settings
    if not any(flag == "--config" or flag.startswith("--config=") for flag in argv):
        config = parse(argv, own).settings
    before, now = flatten(config_to_dict(own)), flatten(config_to_dict(config))
    refused = [
        f"{name} {before[name]!r} -> {now[name]!r}"
        for name in before
        if before[name] != now[name] and name not in MAY_CHANGE_ON_RESUME
    ]
    if refused:
        raise BadInput(
            f"{out} was started with other settings ({'; '.join(refused)}); resume with its own, or start a new run"
        )
    return config


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {dotted name: value}."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
