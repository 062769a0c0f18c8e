"""Loss curves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jax_sae.config import Member
from jax_sae.figures.colours import GREY, shades
from jax_sae.figures.drawing import new_figure, plain_logarithms, write_title
from jax_sae.sweep.update import METRICS

CURVE_POINTS = 500


def member_colours(members: Sequence[Member]) -> list[str]:
    """Each kind has its colour, in shades from light to full; of one kind, each F has one of a sequence.

    Members that differ in their seed alone share one.
    """
    variants = [replace(member, seed=0) for member in members]
    return shades([member.kind for member in members], [member.features for member in members], variants)


PANELS = (
    ("reconstruction loss per element", "loss_per_element"),
    ("penalty per element: all else that is minimised", "penalty_per_element"),
    ("proportion of active features", "l0"),
)


def training_figure(
    names: Sequence[str],
    colours: Sequence[str],
    metrics: np.ndarray,
    features: Sequence[int],
    title: str,
) -> Any:
    """Reconstruction loss, penalty and proportion of active features over steps, logarithmic.

    Args:
        names: of the members.
        colours: of the members.
        metrics: [steps, M, METRICS] of every step; NaN from the step on at which a member diverged.
        features: F of the members.
        title: of the figure.

    Returns:
        A matplotlib `Figure`.
    """
    steps, curves, width = _means(metrics)
    figure = new_figure(figsize=(15, max(4.5, 0.2 * len(names))), layout="constrained")
    panels: Any = figure.subplots(1, len(PANELS))
    for axes, (label, metric) in zip(panels, PANELS, strict=True):
        values = curves[..., METRICS.index(metric)]
        if metric == "l0":
            values = values / np.asarray(features)
        shown = np.where(values > 0, values, np.nan)  # a logarithm shows no zero
        lines = [axes.plot(steps, shown[:, i], color=colours[i], linewidth=1.2)[0] for i in range(len(names))]
        if np.isfinite(shown).any():
            axes.set_yscale("log")
            plain_logarithms(axes.yaxis)
        else:
            axes.text(0.5, 0.5, "0 for all members", ha="center", transform=axes.transAxes)
        _over_steps(axes, len(metrics), width)
        axes.set_ylabel(label)
    figure.legend(lines, names, loc="outside right center", frameon=False, fontsize="small")
    write_title(figure, title)
    return figure


def _means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of [steps, ...] at most about CURVE_POINTS means over adjacent steps: at which steps, the means, of how many."""
    width = max(1, len(values) // CURVE_POINTS)
    n = len(values) // width
    return (np.arange(n) + 0.5) * width, values[: n * width].reshape(n, width, *values.shape[1:]).mean(1), width


def _over_steps(axes: Any, steps: int, width: int) -> None:
    """An axis of that many steps, below curves of means of `width`, and a grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, steps)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step" if width == 1 else f"step (means of {width})")
    axes.grid(alpha=0.3)


def loss_figure(
    names: Sequence[str],
    colours: Sequence[str],
    losses: np.ndarray,
    floors: Sequence[float],
    title: str,
    *,
    zoomed: bool,
) -> Any:
    """Losses over steps, from 0 to the first one; `zoomed`, logarithmic, which tells small losses apart.

    Args:
        names: of the members.
        colours: of the members.
        losses: [steps, M], loss per element of every step; NaN from the step on at which a member diverged.
        floors: of the members, least loss per element on the held-out tokens; 0 where F >= D.
        title: of the figure.
        zoomed: whether the axis of losses is logarithmic.

    Returns:
        A matplotlib `Figure`.
    """
    steps, curves, width = _means(losses)
    first = curves[0][np.isfinite(curves[0])]
    entries = len(names) + len({floor for floor in floors if floor > 0}) + 1
    figure = new_figure(figsize=(9, max(5.0, 0.26 * entries)), layout="constrained")
    axes: Any = figure.subplots()
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        finite = np.isfinite(losses[:, i])
        last = f"{curves[-1, i]:.2g}" if finite.all() else f"diverged at step {finite.argmin() + 1}"
        axes.plot(steps, curves[:, i], color=colour, linewidth=1.5, label=f"{name}: {last}")
        if floors[i] > 0 and floors[i] not in floors[:i]:  # members of one width have one floor
            of = {its for its, floor in zip(colours, floors, strict=True) if floor == floors[i]}
            axes.axhline(
                floors[i],
                color=colour if len(of) == 1 else GREY,
                linestyle="--",
                linewidth=1,
                label=f"   PCA floor: {floors[i]:.2g}",
            )
    axes.set_yscale("log" if zoomed else "linear")
    if not zoomed and len(first):
        axes.set_ylim(0, 1.05 * first.max())
    if zoomed:
        plain_logarithms(axes.yaxis)
    _over_steps(axes, len(losses), width)
    axes.set_ylabel("loss per element (normalised units)" + (", logarithmic" if zoomed else ""))
    write_title(figure, title)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title="member: last loss")
    return figure
