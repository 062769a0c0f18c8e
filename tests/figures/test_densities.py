"""Figures are drawn of whatever an evaluation can give, and show every autoencoder."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_sae.analysis.statistics import add_tokens, density_histogram, metrics, no_tokens
from jax_sae.autoencoder.baselines import pca_curve
from jax_sae.figures.colours import GREY, KINDS
from jax_sae.figures.densities import density_figure
from jax_sae.figures.drawing import dark, new_figure, save_figure
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
    files = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert {name: content[:5] for name, content in files.items()} == {
        "frontier.png": b"\x89PNG\r",
        "frontier.svg": b"<?xml",
    }
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines if not str(line.get_label()).startswith("_")}
    assert set(lines) == {"PCA, L0 directions", "relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"}
    np.testing.assert_array_equal(lines["relu"].get_xydata(), [(4, 1 / 4), (8, 1 / 8), (16, 1 / 16)])
    [relu] = [line for line in right.lines if line.get_label() == "relu"]
    np.testing.assert_array_equal(relu.get_xydata(), [(4, 1 - 0.1 / 4), (16, 1 - 0.1 / 16)])
    listed = [text.get_text() for text in figure.legends[0].get_texts()]
    assert listed[:2] == ["1 relu-4: 4.0, 0.25, 0.975", "2 relu-8: 8.0, 0.125"] and len(listed) == 18
    assert {kind: (line.get_color(), line.get_marker()) for kind, line in lines.items() if kind in KINDS} == {
        kind: (look.colour, look.marker) for kind, look in KINDS.items()
    }


def test_numbers_of_points_do_not_lie_on_each_other() -> None:
    """Nor on a marker, nor outside; where six points are one, they stand around it."""
    alike = [FrontierPoint(f"{kind}-{k}", kind, k, 1 / k) for kind in KINDS for k in (4, 8)]
    for points in (POINTS, alike):
        figure = frontier_figure(points, PCA, "title")
        figure.draw_without_rendering()
        for axes in figure.axes:
            numbers = [text.get_window_extent() for text in axes.texts]
            assert len(numbers) >= 12 and not any(a.overlaps(b) for a, b in combinations(numbers, 2))
            markers = [at for line in axes.lines for at in line.get_transform().transform(line.get_xydata())]
            assert not any(box.contains(*at) for box in numbers for at in markers if len(markers) < 200)
            assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for box in numbers for x, y in box.corners())


def test_a_figure_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal figures are equal bytes; if one's SVG fails, both files stay; on dark paper lines keep their colours."""

    def figure() -> Any:
        made = new_figure(figsize=(3, 2), layout="constrained")
        made.subplots().plot([1, 2], color=GREY, marker="o")
        return made

    def written() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    save_figure(figure(), tmp_path / "a.png")
    before = written()
    save_figure(figure(), tmp_path / "a.png")
    assert written() == before and set(before) == {"a.png", "a.svg"}
    broken = figure()
    broken.axes[0].plot([3, 1])
    savefig = broken.savefig

    def fail(file: Path, format: str, **settings: Any) -> None:
        if format == "svg":
            raise OSError("the disk is full")
        savefig(file, format=format, **settings)

    monkeypatch.setattr(broken, "savefig", fail)
    with pytest.raises(OSError, match="full"):
        save_figure(broken, tmp_path / "a.png")
    assert written() == before
    with dark():
        made = figure()
    assert made.get_facecolor()[0] < 0.1 and figure().get_facecolor()[0] == 1
    assert [line.get_color() for line in made.axes[0].lines] == [line.get_color() for line in figure().axes[0].lines]


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
    figure = density_figure(histograms, dict.fromkeys(dead, "topk"), dead, 200, 0.1, "title")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == [f"F{i}: {dead[f'F{i}']} of 30 dead" for i in range(n)]
    assert all(axes.patches[0].get_data().values.sum() == 30 - dead[f"F{i}"] for i, axes in enumerate(panels))
