"""The losses of a run while it goes on, as a figure in a notebook."""

import time

from jax_sae.figures.curves import loss_figure, member_colours
from jax_sae.language_model.hub import one_line
from jax_sae.run.progress import Progress, Setup
from jax_sae.streams import Shown, in_notebook, say
from jax_sae.sweep.members import member_names, sweep_members

MOST_OF_THE_TIME = 0.05
"""The part of the time that may go into drawing."""


class Live:
    """One output of a cell, drawn anew every second, or less often where drawing takes long; elsewhere nothing."""

    def __init__(self, setup: Setup) -> None:
        """Before the first step."""
        self._setup, self._is_on, self._shown = setup, in_notebook(), Shown()
        self._due = time.perf_counter() + 1

    def show(self, progress: Progress, is_last: bool = False) -> None:
        """Draw the losses up to here, if it is time to, or the last time; a figure that fails ends nothing."""
        start = time.perf_counter()
        if not self._is_on or not progress.step or (start < self._due and not is_last):
            return
        names, config = self._setup.names(), self._setup.config
        order = [names.index(name) for name in member_names(sweep_members(config.sweep))]
        colours = member_colours([self._setup.members()[i] for i in order])
        losses = progress.losses[: progress.step, order]
        title = f"step {progress.step:,} of {config.train.steps:,}"
        try:
            names = [names[i] for i in order]
            self._shown.show(loss_figure(names, colours, losses, [0.0] * len(names), title, zoomed=True))
        except Exception as error:  # of matplotlib, its settings and fonts
            self._is_on = False
            say([f"warning       losses could not be drawn ({one_line(error)}); training goes on"])
        end = time.perf_counter()
        self._due = end + max(1.0, (end - start) / MOST_OF_THE_TIME)
