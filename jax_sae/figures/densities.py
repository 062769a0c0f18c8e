"""How often features fire."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sae.figures.drawing import COLOURS, new_figure, write_title


def density_figure(
    histograms: Mapping[str, tuple[np.ndarray, np.ndarray]],
    dead: Mapping[str, int],
    tokens: int,
    dense: float,
    title: str,
) -> Any:
    """A histogram of log10 of the features' density for each autoencoder, on common axes.

    Args:
        histograms: by name, as `density_histogram` gives them; at least one.
        dead: features that never fired, which no histogram shows, by name.
        tokens: N, on which both were counted.
        dense: the density above which a feature is dense.
        title: of the figure.

    Returns:
        A matplotlib `Figure`.
    """
    columns = min(4, len(histograms))
    rows = -(-len(histograms) // columns)
    figure = new_figure(figsize=(max(6.0, 3.4 * columns), 1 + 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, (edges, counts)) in zip(grid.flat, histograms.items(), strict=False):
        axes.stairs(counts, edges, fill=True, color=COLOURS[0])
        axes.axvline(np.log10(dense), color=COLOURS[1], linestyle="--", linewidth=1)
        axes.set_title(f"{name}: {dead[name]:,} of {dead[name] + counts.sum():,} dead", fontsize="small")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(histograms) :]:
        axes.set_axis_off()
    for axes in grid.flat[len(histograms) - columns : len(histograms)]:  # nothing is below them
        axes.tick_params(labelbottom=True)
    figure.supxlabel(
        f"log10 of the fraction of {tokens:,} tokens on which a feature fires (dashed: {dense:.0%})", fontsize="small"
    )
    figure.supylabel("features", fontsize="small")
    write_title(figure, title)
    return figure
