"""Train every autoencoder of a sweep at once: settings and a directory in, a run out; new ones and those resumed.

jax-sae train --config demo_sparse
"""

import os
from collections.abc import Sequence
from pathlib import Path

from jax_sae.commands.flags import Arguments, parse
from jax_sae.commands.process import BROKEN_PIPE, refuse_missing_platform, run_script
from jax_sae.commands.stop_signals import Signals
from jax_sae.errors import BadInput
from jax_sae.streams import reader_is_gone

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures", "summary.json")
"""What a run leaves, with config.json."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code, as `run_script`, and 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.

    A first signal, or the end of the program that reads what is told, saves at the next step boundary and ends; a
    second Ctrl-C or SIGTERM ends at once.
    """

    def work() -> int:
        arguments = parse(argv)
        from jax_sae.activations.interruptible import Stopped
        from jax_sae.commands.settings import base, merge, settings_to_resume
        from jax_sae.run.train import train

        name, lower = base(arguments.config, arguments.settings)
        out = choose_directory(arguments, name)
        if arguments.resume:
            settings = settings_to_resume(out, lower if arguments.config else None, arguments.settings)
        else:
            settings = merge(lower, arguments.settings)
        refuse_missing_platform()
        with Signals() as signals:
            if not signals.is_listening:
                print(
                    "note          this is not the main thread: Ctrl-C and other signals are not heard here", flush=True
                )

            def stop_requested(step: int) -> bool:
                return signals.received > 0 or reader_is_gone()

            try:
                finished = train(
                    settings.config,
                    out,
                    resume=arguments.resume,
                    stop_requested=stop_requested,
                    first_lines=settings.lines,
                )
            except Stopped:
                print("stopped before training began; there was nothing to save")
                finished = False
        return 0 if finished else 128 + (signals.received or BROKEN_PIPE)

    return run_script(argv, work)


def choose_directory(arguments: Arguments, name: str) -> Path:
    """The directory of the run, without --out `runs/name`; for a new run it does not hold one yet.

    Raises:
        BadInput: if --out holds a run, or part of one, and --resume is not given, if there is no run to resume, or if
            --out cannot be a directory.
    """
    default, out = Path("runs") / name, arguments.out
    try:
        numbered = [default]
        while numbered[-1].exists():
            numbered.append(default.with_name(f"{default.name}-{len(numbered) + 1}"))
        if arguments.resume:
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
