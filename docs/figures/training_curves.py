"""Draw the curves of docs/recipes.md from a run of docs/figures/training_curves.toml.

python docs/figures/training_curves.py runs/training_curves docs/figures/training_curves.png

An SVG stands beside the PNG, and NAME-dark.png and NAME-dark.svg are the same on dark paper.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import jax_sae
from jax_sae.figures.colours import OWN
from jax_sae.figures.drawing import new_figure, save_light_and_dark

run, picture = jax_sae.open_run(sys.argv[1]), Path(sys.argv[2])
metrics = run.metrics()
STEPS_A_POINT = 20
PANELS: dict[str, dict[str, Any]] = {
    "healthy": {"kind": "relu", "l1_coefficient": 2.0, "clip": 1.0, "learning_rate": 0.1 / 256**0.5},
    "learning rate too high": {"learning_rate": 0.2},
    "learning rate too low": {"learning_rate": 2e-4},
    "no clipping, no decay": {"clip": 0.0},
    "L1 too strong": {"l1_coefficient": 64.0},
    "resampled three times": {"resamples": 3},
    "features die (topk, AuxK)": {"kind": "topk"},
    "finds its target (jumprelu)": {"kind": "jumprelu"},
}
"""Its member has these settings."""
CURVES = (
    ("loss_per_element", "reconstruction loss", "-"),
    ("penalty_per_element", "penalty", "--"),
    ("l0", "active features a token (right)", ":"),
)


def named(settings: dict[str, Any]) -> str:
    """The one member that has them."""
    (found,) = [n for n, its in run.members.items() if all(getattr(its, k) == v for k, v in settings.items())]
    return found


def draw() -> Any:
    """A panel each, with the same axes: loss and penalty on the left, active features on the right."""
    figure = new_figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for axes, (title, settings) in zip(panels, PANELS.items(), strict=True):
        right, its = axes.twinx(), metrics[named(settings)]
        for look, (metric, label, line) in zip(OWN, CURVES, strict=False):
            values = np.asarray(its[metric], np.float64)
            values = values[: len(values) // STEPS_A_POINT * STEPS_A_POINT].reshape(-1, STEPS_A_POINT).mean(1)
            steps = STEPS_A_POINT * (np.arange(len(values)) + 1)
            on = right if metric == "l0" else axes
            on.plot(steps, np.where(values > 0, values, np.nan), line, color=look.colour, linewidth=1.8, label=label)
        axes.set(yscale="log", ylim=(3e-4, 3), title=title)
        right.set(yscale="log", ylim=(0.3, 300))
        right.yaxis.set_major_formatter("{x:g}")
        for each in (axes, right):
            each.minorticks_off()
        axes.grid(alpha=0.3)
        if (column := axes.get_subplotspec().colspan.start) < 3:
            right.set_yticklabels([])
        elif column == 3:
            right.set_ylabel("active features a token")
        if column == 0:
            axes.set_ylabel("per element")
        if axes.get_subplotspec().rowspan.start == 1:
            axes.set_xlabel("step")
    handles = [*axes.get_lines(), *right.get_lines()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


save_light_and_dark(draw, picture)
