"""Where the features of dictionaries with several written places write."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sae.figures.colours import looks
from jax_sae.figures.drawing import new_figure, write_title

MOST_COLUMNS = 3


def relative_norms_figure(found: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str], title: str) -> Any:
    """Relative decoder norms, a panel for each dictionary.

    Of two sides, the histogram of the second one's: features of the first alone stand at 0, shared ones at a half,
    those of the second alone at 1. Of more, a column for each side, whose colours are its histogram.

    Args:
        found: what `analysis.relative_norms` says of each dictionary, by its name; at least one.
        kinds: of the dictionaries, by name; a histogram has the colour of its kind.
        title: of the figure.

    Returns:
        A matplotlib `Figure`.
    """
    across = min(MOST_COLUMNS, len(found))
    down = -(-len(found) // across)
    figure = new_figure(figsize=(5 * across, 1 + 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    look = looks(kinds.values())
    for axes, (name, its) in zip(panels, found.items(), strict=False):
        axes.set_title(f"{name}: {its['compared']:,} features", fontsize="small", parse_math=False)
        edges = np.array(its["edges"])
        if len(its["sides"]) == 2:
            first, second = its["sides"]
            axes.stairs(its["histograms"][1], edges, fill=True, color=look[kinds[name]].colour)
            axes.set_xlabel(f"norm at {second} / (at {first} + at {second})", parse_math=False)
            axes.set_ylabel("features")
            axes.set_xlim(0, 1)
            continue
        counts = np.array(its["histograms"], float).T
        image = axes.imshow(
            np.where(counts > 0, counts, np.nan), origin="lower", aspect="auto", extent=(0, counts.shape[1], 0, 1)
        )
        figure.colorbar(image, ax=axes, label="features")
        axes.set_xticks(np.arange(counts.shape[1]) + 0.5, its["sides"], rotation=45, ha="right", fontsize="x-small")
        axes.set_ylabel("relative norm")
    for axes in panels[len(found) :]:
        axes.axis("off")
    write_title(figure, f"{title}\nrelative decoder norms, in units of each place's normalisation")
    return figure
