"""Train every autoencoder of a sweep at once: settings and a directory in, a run out; new ones and those resumed.

jax-sae train --config demo_sparse
"""

from collections.abc import Sequence
from signal import SIGTERM

from jax_sae.commands.flags import parse
from jax_sae.commands.process import BROKEN_PIPE, refuse_missing_platform, run_script
from jax_sae.commands.stop_signals import Signals
from jax_sae.processes import is_first, join, meeting, several
from jax_sae.streams import quiet, reader_is_gone


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code, as `run_script`, and 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.

    A first signal, or the end of the program that reads what is told, saves at the next step boundary and ends; a
    second Ctrl-C or SIGTERM ends at once. Several processes train a run together where the flags, or the environment of
    a launcher, say so; a signal to one of them ends all at the same step.
    """

    def work() -> int:
        arguments = parse(argv)
        from jax_sae.activations.interruptible import Stopped
        from jax_sae.run.directory import choose_directory
        from jax_sae.run.settings import base, merge, settings_to_resume
        from jax_sae.run.train import train

        others = meeting(arguments.coordinator, arguments.num_processes, arguments.process_id)
        name, lower = base(arguments.config, arguments.settings)
        out = choose_directory(arguments.out, arguments.resume, name)
        if arguments.resume:
            settings = settings_to_resume(out, lower if arguments.config else None, arguments.settings)
        else:
            settings = merge(lower, arguments.settings)
        joined = join(others)
        refuse_missing_platform()
        with quiet(not is_first(), warns=False), Signals() as signals:
            if not signals.is_listening:
                print(
                    "note          this is not the main thread: Ctrl-C and other signals are not heard here", flush=True
                )

            def stop_requested(step: int) -> bool:
                return signals.received > 0 or reader_is_gone()

            try:
                finished = bool(
                    train(
                        settings.config,
                        out,
                        resume=arguments.resume,
                        stop_requested=stop_requested,
                        first_lines=(*settings.lines, *joined),
                        loggers=arguments.loggers,
                    )
                )
            except Stopped:
                print("stopped before training began; there was nothing to save")
                finished = False
        return 0 if finished else 128 + (signals.received or (SIGTERM if several() else BROKEN_PIPE))

    return run_script(argv, work)
