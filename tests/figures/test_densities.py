"""Figures are drawn of whatever an evaluation can give, and show every autoencoder."""

from pathlib import Path

import numpy as np
import pytest

from jax_sae.analysis.statistics import add_tokens, density_histogram, metrics, no_tokens
from jax_sae.autoencoder.baselines import pca_curve
from jax_sae.figures import drawing
from jax_sae.figures.densities import density_figure
from jax_sae.figures.drawing import save_figure
from jax_sae.figures.frontier import FrontierPoint, frontier_figure

EIGENVALUES = np.geomspace(100, 0.1, 16)
POINTS = [
    FrontierPoint(f"{kind}-{k}", kind, k, 1 / k, 1 - 0.1 / k if k != 8 else None)
    for kind in ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
    for k in (16, 4, 8)
]


PCA = pca_curve(EIGENVALUES)


def test_each_kind_is_a_line_in_the_order_of_l0(tmp_path: Path) -> None:
    """With all its points, beside the line of PCA; loss recovered where it is known; all are listed with numbers."""
    figure = frontier_figure(POINTS, PCA, "title")
    save_figure(figure, tmp_path / "new" / "frontier.png")
    assert (tmp_path / "new" / "frontier.png").stat().st_size > 10_000
    assert figure._repr_png_().startswith(b"\x89PNG")  # which a notebook shows
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines if not str(line.get_label()).startswith("_")}
    assert set(lines) == {"PCA, L0 directions", "relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"}
    np.testing.assert_array_equal(lines["relu"].get_xydata(), [(4, 1 / 4), (8, 1 / 8), (16, 1 / 16)])
    [relu] = [line for line in right.lines if line.get_label() == "relu"]
    np.testing.assert_array_equal(relu.get_xydata(), [(4, 1 - 0.1 / 4), (16, 1 - 0.1 / 16)])
    listed = [text.get_text() for text in figure.legends[0].get_texts()]
    assert listed[:2] == ["1 relu-4: 4.0, 0.25, 0.975", "2 relu-8: 8.0, 0.125"] and len(listed) == 18
    assert {line.get_color() for line in lines.values()} > set(drawing.COLOURS[:6])


@pytest.mark.parametrize(
    "points",
    [
        POINTS[:1],
        [FrontierPoint("dead", "relu", 0.0, 1.0)],
        [FrontierPoint("perfect", "relu", 500.0, 0.0)],
        [FrontierPoint("dead", "relu", 0.0, 2.0), FrontierPoint("dense", "relu", 16.0, 1e-7)],
    ],
)
def test_a_frontier_of_few_points_is_drawn(points: list[FrontierPoint]) -> None:
    """One point, none active, all directions, without a language model: one panel then."""
    figure = frontier_figure(points, PCA, "title")
    assert figure._repr_png_() and len(figure.axes) == (2 if points[0].ce_loss_score is not None else 1)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_every_density_has_its_panel(n: int) -> None:
    """With its dead features named, and all features in the bars or among the dead."""
    rng = np.random.default_rng(0)
    histograms, dead = {}, {}
    for i in range(n):
        features = np.maximum(rng.normal(size=(200, 30)) - np.linspace(0, 5, 30), 0)
        x = rng.normal(size=(200, 2))
        sums = add_tokens(no_tokens(2, 30), x, features, x)
        histograms[f"F{i}"], dead[f"F{i}"] = density_histogram(sums), metrics(sums).dead_features
    figure = density_figure(histograms, dead, 200, 0.1, "title")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == [f"F{i}: {dead[f'F{i}']} of 30 dead" for i in range(n)]
    assert all(axes.patches[0].get_data().values.sum() == 30 - dead[f"F{i}"] for i, axes in enumerate(panels))
