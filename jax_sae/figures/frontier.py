"""The frontier of sparsity and quality: FVU, and loss recovered, against L0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_sae.autoencoder.baselines import PcaCurve
from jax_sae.figures.drawing import COLOURS, MARKERS, new_figure, write_title

BESIDE = ((0, 8), (-11, 3), (11, -8), (11, 3), (-11, -8), (0, 14), (0, -14))
"""Of the points of each kind, where their numbers stand, in points of print."""


@dataclass(frozen=True)
class FrontierPoint:
    """One autoencoder in the figure of the frontier."""

    name: str
    kind: str
    l0: float
    fvu: float
    ce_loss_score: float | None = None
    """Against the zero ablation, as in SAELens; None where there was no language model."""


def points_of(measured: Sequence[Mapping[str, Any]]) -> list[FrontierPoint]:
    """Of the members of a `summary.json`, those that give finite numbers."""
    return [
        FrontierPoint(member["name"], member["kind"], member["l0"], member["fvu"])
        for member in measured
        if member["fvu"] is not None
    ]


def frontier_figure(
    points: Sequence[FrontierPoint], pca: PcaCurve | None, title: str, linear: float | None = None
) -> Any:
    """FVU against L0, and loss recovered against L0 where it is known; each kind is a line.

    Points have numbers, which a list beside the figure explains.

    Args:
        points: at least one.
        pca: of the same tokens, for the line of PCA with L0 directions; None: there is no such line.
        title: of the figure.
        linear: FVU of linear regression on what is read, for a line; None: there is none.

    Returns:
        A matplotlib `Figure`.
    """
    kinds = list(dict.fromkeys(point.kind for point in points))
    ordered = sorted(points, key=lambda point: (kinds.index(point.kind), point.l0))
    scored = any(point.ce_loss_score is not None for point in points)
    figure = new_figure(figsize=(15 if scored else 10, max(5.0, 1 + 0.22 * len(points))), layout="constrained")
    left, *right = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]

    if pca is not None:
        l0s = [point.l0 for point in points if point.l0 > 0]
        most = pca[0][-1] - 0.5  # with all D directions nothing is lost, which no logarithm shows
        directions = np.geomspace(min(min(l0s, default=1) / 1.5, most / 1.5), min(max(l0s, default=1) * 1.5, most), 200)
        left.plot(directions, np.interp(directions, *pca), "--", color="grey", label="PCA, L0 directions")
    if linear is not None:
        left.axhline(linear, color="grey", linestyle=":", label="linear regression")
    _draw_lines(left, kinds, [(number, point, point.fvu) for number, point in enumerate(ordered, 1)])
    left.set_yscale("log")
    if (lowest := min(point.fvu for point in points)) > 0:
        left.set_ylim(bottom=lowest / 2)
    left.set_ylabel("FVU, logarithmic (lower is better)")
    left.legend(fontsize="small")
    for axes in right:
        _draw_lines(axes, kinds, [(number, point, point.ce_loss_score) for number, point in enumerate(ordered, 1)])
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylabel("loss recovered, 0 as with zero ablation (higher is better)")
    lines = [f"{number} {point.name}: {_shown(point)}" for number, point in enumerate(ordered, 1)]
    colours = [_colour_and_marker(kinds, point.kind)[0] for point in ordered]
    figure.legend(
        [left.plot([], [], color=colour, linewidth=3)[0] for colour in colours],
        lines,
        loc="outside right center",
        frameon=False,
        fontsize="x-small",
        title="L0, FVU" + (", loss recovered" if scored else ""),
        title_fontsize="small",
    )
    write_title(figure, title)
    return figure


def _shown(point: FrontierPoint) -> str:
    score = "" if point.ce_loss_score is None else f", {point.ce_loss_score:.3f}"
    return f"{point.l0:.1f}, {point.fvu:.3g}{score}"


def _colour_and_marker(kinds: Sequence[str], kind: str) -> tuple[str, str]:
    i = kinds.index(kind) % len(COLOURS)
    return COLOURS[i], MARKERS[i]


def _draw_lines(axes: Any, kinds: Sequence[str], values: Sequence[tuple[int, FrontierPoint, float | None]]) -> None:
    """One line of each kind through its values, over an axis that is logarithmic from 1 on and can show 0."""
    from matplotlib.ticker import SymmetricalLogLocator

    for kind in kinds:
        of_kind = [
            (number, point.l0, value) for number, point, value in values if point.kind == kind and value is not None
        ]
        colour, marker = _colour_and_marker(kinds, kind)
        axes.plot(
            [l0 for _, l0, _ in of_kind], [value for *_, value in of_kind], color=colour, marker=marker, label=kind
        )
        for number, l0, value in of_kind:
            away = BESIDE[kinds.index(kind) % len(BESIDE)]  # so that numbers of equal points stand side by side
            axes.annotate(
                str(number), (l0, value), away, textcoords="offset points", fontsize=7, color=colour, ha="center"
            )
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(linthresh=1, base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("L0, mean active features, logarithmic")
    axes.grid(alpha=0.3)
