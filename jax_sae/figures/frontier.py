"""The frontier of sparsity and quality: FVU, and loss recovered, against L0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jax_sae.autoencoder.baselines import PcaCurve
from jax_sae.figures.colours import GREY, line_looks
from jax_sae.figures.drawing import ink, new_figure, plain_logarithms, write_title

Line = tuple[str, int]
"""The kind and F of the points of a line."""
BESIDE = np.array(
    [
        (distance * np.cos(angle), distance * np.sin(angle))
        for distance in (8, 11, 15, 20, 26)
        for angle in np.pi * (0.5 + np.arange(12) / 6)
    ]
)
"""Where the number of a point may stand, in points of print; the first place that is free is taken."""


@dataclass(frozen=True)
class FrontierPoint:
    """One autoencoder in the figure of the frontier."""

    name: str
    kind: str
    l0: float
    fvu: float
    ce_loss_score: float | None = None
    """Against the zero ablation, as in SAELens; None where there was no language model."""
    features: int = 0
    """F: points of one kind and F are a line."""

    @property
    def line(self) -> Line:
        """The line that it is on."""
        return self.kind, self.features


def points_of(measured: Sequence[Mapping[str, Any]]) -> list[FrontierPoint]:
    """Of the members of a `summary.json` or an `evaluation.json`, those that give finite numbers."""
    return [
        FrontierPoint(
            member["name"]
            if (at := member["diverged_at_step"]) is None
            else f"{member['name']} (diverged at step {at})",
            member["kind"],
            member["l0"],
            member["fvu"],
            member.get("ce_loss_score_zero_ablation"),
            member["features"],
        )
        for member in measured
        if member["fvu"] is not None
    ]


def frontier_figure(
    points: Sequence[FrontierPoint], pca: PcaCurve | None, title: str, linear: float | None = None
) -> Any:
    """FVU against L0, and loss recovered against L0 where it is known; the points of one kind and F are a line.

    Points have numbers, which a list beside the figure explains.

    Args:
        points: at least one.
        pca: of the same tokens, for the line of PCA with L0 directions; None: there is no such line.
        title: of the figure.
        linear: FVU of linear regression on what is read, for a line; None: there is none.

    Returns:
        A matplotlib `Figure`.
    """
    lines = list(dict.fromkeys(point.line for point in points))
    ordered = sorted(points, key=lambda point: (lines.index(point.line), point.l0))
    scored = any(point.ce_loss_score is not None for point in points)
    figure = new_figure(figsize=(15 if scored else 10, max(5.0, 1 + 0.22 * len(points))), layout="constrained")
    left, *right = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]

    if pca is not None:
        l0s = [point.l0 for point in points if point.l0 > 0]
        most = pca[0][-1] - 0.5  # with all D directions nothing is lost, which no logarithm shows
        directions = np.geomspace(min(min(l0s, default=1) / 1.5, most / 1.5), min(max(l0s, default=1) * 1.5, most), 200)
        left.plot(directions, np.interp(directions, *pca), "--", color=GREY, label="PCA, L0 directions")
    if linear is not None:
        left.axhline(linear, color=GREY, linestyle=":", label="linear regression")
    values: list[tuple[Any, list[float | None]]] = [(left, [point.fvu for point in ordered])]
    values += [(axes, [point.ce_loss_score for point in ordered]) for axes in right]
    for axes, heights in values:
        _draw_lines(axes, ordered, heights)
    left.set_yscale("log")
    if (lowest := min(point.fvu for point in points)) > 0:
        left.set_ylim(bottom=lowest / 1.5)
    plain_logarithms(left.yaxis)
    left.set_ylabel("FVU, logarithmic (lower is better)")
    left.legend(fontsize="small")
    for axes in right:
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set_ylabel("loss recovered, 0 as with zero ablation (higher is better)")
    looks = line_looks(lines)
    figure.legend(
        [
            left.plot([], [], color=looks[point.line].colour, marker=looks[point.line].marker, markersize=5)[0]
            for point in ordered
        ],
        [f"{number} {point.name}: {_shown(point)}" for number, point in enumerate(ordered, 1)],
        loc="outside right center",
        frameon=False,
        fontsize="x-small",
        title="L0, FVU" + (", loss recovered" if scored else ""),
        title_fontsize="small",
    )
    write_title(figure, title)
    figure.get_layout_engine().execute(figure)  # only then it is known what lies where, and it stays there
    figure.set_layout_engine("none")
    for axes, heights in values:
        _number_points(axes, [(point.l0, height) for point, height in zip(ordered, heights, strict=True)])
    return figure


def _shown(point: FrontierPoint) -> str:
    score = "" if point.ce_loss_score is None else f", {point.ce_loss_score:.3f}"
    return f"{point.l0:.1f}, {point.fvu:.3g}{score}"


def _draw_lines(axes: Any, ordered: Sequence[FrontierPoint], heights: Sequence[float | None]) -> None:
    """A line through the heights of each kind and F, over an axis that is logarithmic from 1 on and can show 0."""
    from matplotlib.ticker import SymmetricalLogLocator

    looks = line_looks([point.line for point in ordered])
    for (kind, F), look in looks.items():
        its = [
            (point.l0, height)
            for point, height in zip(ordered, heights, strict=True)
            if point.line == (kind, F) and height is not None
        ]
        of_several = sum(each == kind for each, _ in looks) > 1
        axes.plot(
            [l0 for l0, _ in its],
            [height for _, height in its],
            color=look.colour,
            marker=look.marker,
            label=f"{kind}, F = {F:,}" if of_several else kind,
        )
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(linthresh=1, base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("L0, mean active features of a token, logarithmic")
    axes.grid(alpha=0.3)


def _number_points(axes: Any, points: Sequence[tuple[float, float | None]]) -> None:
    """Write the number of each point beside it, where there is least below it: lines, markers and other numbers.

    Args:
        axes: whose layout is settled.
        points: x and y; without y a point is not there, but is counted.
    """
    pixels = axes.figure.dpi / 72  # of a point of print
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if len(line.get_xydata()) > 1]
    below = np.concatenate([np.zeros((0, 2)), *map(_along, lines)])
    there = {i: axes.transData.transform(point) for i, point in enumerate(points, 1) if point[1] is not None}
    markers = np.array([at for at in there.values() if np.isfinite(at).all()]).reshape(-1, 2)
    boxes = np.zeros((0, 4))  # centres and half the sizes of what may not be written over
    if (legend := axes.get_legend()) is not None:
        box = legend.get_window_extent()
        boxes = np.array([[*(box.min + box.max) / 2, *box.size / 2]])
    low, high = axes.bbox.min, axes.bbox.max
    for i, at in there.items():
        if not np.isfinite(at).all():
            continue
        half = np.array([2.3 * len(str(i)) + 0.7, 3.6]) * pixels
        centres = at + BESIDE * pixels

        def hit(places: np.ndarray, more: Any, centres: np.ndarray = centres, half: np.ndarray = half) -> np.ndarray:
            return (np.abs(centres[:, None] - places) < half + more).all(-1).sum(-1)

        outside = ((centres - half < low) | (centres + half > high)).any(-1)
        worst, bad = hit(boxes[:, :2], boxes[:, 2:]) + outside, hit(markers, 3.5 * pixels)
        ranks = np.arange(len(BESIDE)) / len(BESIDE)
        best = int(np.argmin(100 * worst + 10 * bad + 3 * (hit(below, 0) > 0) + ranks))
        boxes = np.concatenate([boxes, [[*centres[best], *half]]])
        axes.annotate(
            str(i),
            points[i - 1],
            BESIDE[best],
            textcoords="offset points",
            fontsize=7,
            color=ink(),
            ha="center",
            va="center",
        )


def _along(line: np.ndarray) -> np.ndarray:
    """Points [n, 2] along the straight parts of a line, at most 3 pixels from each other."""
    line = line[np.isfinite(line).all(1)]
    parts = [
        start + (end - start) * np.linspace(0, 1, int(np.abs(end - start).max() / 3) + 2)[:, None]
        for start, end in pairwise(line)
    ]
    return np.concatenate(parts or [np.zeros((0, 2))])
