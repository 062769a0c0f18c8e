"""Say what the features of a run tell of labelled texts, beside raw activations and PCA: sparse probes.

jax-sae probe runs/demo_sparse --texts my_texts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import refuse_missing_platform, run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Probe every member of a run with a few features each. Exit codes: 0 done, 1 a full disk, 2 bad input."""

    run: tyro.conf.Positional[Path]
    """Directory of a run; it may be training."""
    texts: Path | None = None
    """A .csv or .jsonl file with the columns text and label, or a folder of them; without it, the 113 sets of the
    package sae-probes, if it is installed."""
    ks: tuple[int, ...] = (1, 2, 5, 16)
    """How many features a probe may use."""
    step: int | None = None
    """The checkpoint; without it, the newest one."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        options = read_options(Options, argv, "jax-sae probe")
        refuse_missing_platform()
        from jax_sae.analysis.probing import probe_run

        probe_run(options.run, options.texts, options.ks, options.step)
        return 0

    return run_script(argv, work)
