"""A run's losses while it goes on: as a figure in its directory, and in a notebook as an output of a cell."""

import time
from pathlib import Path

from jax_sae.figures.curves import loss_figure, member_colours
from jax_sae.figures.drawing import save_figure
from jax_sae.language_model.hub import one_line
from jax_sae.run.progress import Progress, Setup
from jax_sae.run.run_figures import training_figures
from jax_sae.streams import Shown, in_notebook, say

FIRST_AFTER, FIRST_IN_A_NOTEBOOK = 15.0, 1.0
"""Seconds of training before it is drawn for the first time, and the least between one time and the next."""
MOST_OF_THE_TIME = 0.05
"""The part of the time that may go into drawing."""


class Live:
    """Losses up to a step, drawn now and then, and less often where drawing takes long."""

    def __init__(self, setup: Setup, out: Path | None) -> None:
        """Before the first step of a run in a directory, or in none."""
        self._setup, self._out, self._shown = setup, out, Shown() if in_notebook() else None
        self._least = FIRST_IN_A_NOTEBOOK if self._shown else FIRST_AFTER
        self._is_on = bool(self._shown or out)
        self._due = time.perf_counter() + self._least

    def show(self, progress: Progress, is_last: bool = False) -> None:
        """Draw the losses up to here if it is time to, in a notebook at the end too; what fails ends nothing."""
        start = time.perf_counter()
        if not self._is_on or not progress.step or (start < self._due and not (is_last and self._shown)):
            return
        try:
            if self._shown:
                self._shown.show(_losses(self._setup, progress))
            elif self._out:
                for file, make in training_figures(self._out, self._setup, progress).items():
                    save_figure(make(), file)
        except Exception as error:  # of matplotlib, its settings and fonts, or of a full disk
            self._is_on = False
            say([f"warning       losses could not be drawn ({one_line(error)}); training goes on"])
        end = time.perf_counter()
        self._due = end + max(self._least, (end - start) / MOST_OF_THE_TIME)


def _losses(setup: Setup, progress: Progress) -> object:
    order = setup.in_order()
    names, colours = [setup.names()[i] for i in order], member_colours([setup.members()[i] for i in order])
    title = f"step {progress.step:,} of {setup.config.train.steps:,}"
    return loss_figure(names, colours, progress.losses[: progress.step, order], [0.0] * len(names), title, zoomed=True)
