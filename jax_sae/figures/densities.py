"""How often features fire."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sae.figures.colours import looks
from jax_sae.figures.drawing import ink, new_figure, write_title


def density_figure(
    histograms: Mapping[str, tuple[np.ndarray, np.ndarray]],
    kinds: Mapping[str, str],
    dead: Mapping[str, int],
    tokens: int,
    dense: float,
    title: str,
) -> Any:
    """A histogram of the features' density for each autoencoder, on common axes, logarithmic.

    Args:
        histograms: by name, as `density_histogram` gives them; at least one.
        kinds: of the autoencoders, by name; each has its colour.
        dead: features that never fired, which no histogram shows, by name.
        tokens: N, on which both were counted.
        dense: the density above which a feature is dense.
        title: of the figure.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.ticker import MultipleLocator

    columns = min(4, len(histograms))
    rows = -(-len(histograms) // columns)
    figure = new_figure(figsize=(max(6.0, 3.4 * columns), 1 + 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    look = looks(kinds.values())
    for axes, (name, (edges, counts)) in zip(grid.flat, histograms.items(), strict=False):
        axes.stairs(counts, edges, fill=True, color=look[kinds[name]].colour)
        axes.axvline(np.log10(dense), color=ink(), linestyle="--", linewidth=1)
        axes.set_title(f"{name}: {dead[name]:,} of {dead[name] + counts.sum():,} dead", fontsize="small")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MultipleLocator(1))
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * 10.0**x:.6g}%")
        axes.tick_params(labelsize="x-small")
    for axes in grid.flat[len(histograms) :]:
        axes.set_axis_off()
    for axes in grid.flat[len(histograms) - columns : len(histograms)]:  # nothing is below them
        axes.tick_params(labelbottom=True)
    figure.supxlabel(
        f"of {tokens:,} tokens, the part on which a feature fires, logarithmic (dashed: {dense:.0%})", fontsize="small"
    )
    figure.supylabel("features", fontsize="small")
    write_title(figure, title)
    return figure
