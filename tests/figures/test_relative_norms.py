"""Figures of dictionaries that write several places are drawn of whatever an evaluation can give."""

from dataclasses import asdict

import numpy as np
import pytest

from jax_sae.activations.places import Place
from jax_sae.analysis.relative_norms import relative_norms, summarized
from jax_sae.figures.frontier import FrontierPoint, frontier_figure
from jax_sae.figures.relative_norms import relative_norms_figure


@pytest.mark.parametrize("sides", [2, 5])
def test_each_dictionary_has_its_panel(sides: int) -> None:
    """A histogram of the second of two sides, a column for each of more; also where no feature fired."""
    places = [Place(f"{i}.resid_post", 3) for i in range(sides)]
    found = {}
    for name, fired in (("a $1$", 1.0), ("b", 0.5), ("c", 0.1), ("none", 0.0)):
        rng = np.random.default_rng(0)
        names, relative = relative_norms(rng.normal(size=(40, 3 * sides)), places)
        found[name] = asdict(summarized(names, relative, rng.uniform(size=40) < fired))
    figure = relative_norms_figure(found, dict.fromkeys(found, "topk"), "a run")
    assert figure._repr_png_().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"{name}: {its['compared']} features" for name, its in found.items()] and "b" in found
    if sides == 2:
        [bars] = figure.axes[0].patches
        np.testing.assert_array_equal(bars.get_data().values, found["a $1$"]["histograms"][1])


def test_linear_regression_is_a_line_of_the_frontier() -> None:
    """Beside that of PCA; without PCA, as with a skip, by itself."""
    figure = frontier_figure([FrontierPoint("F8", "topk", 4.0, 0.2)], None, "title", linear=0.4)
    assert figure._repr_png_()
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert "PCA, L0 directions" not in lines and list(lines["linear regression"]) == [0.4, 0.4]
