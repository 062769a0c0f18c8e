"""Loss curves."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_sae.config import Member
from jax_sae.figures.drawing import COLOURS, import_matplotlib, new_figure, write_title
from jax_sae.sweep.update import METRICS

CURVE_POINTS = 500


def member_colours(members: Sequence[Member], width: int) -> list[str]:
    """Green, blue, red and orange for F far below, one below, equal to and above D, as in the starting experiment.

    The first member of each such width has its colour; the others share out cividis, a colour-blind-safe map, from dark
    blue to yellow. Where there are several kinds, each has its colour of the frontier, in shades from light to full.
    """
    matplotlib = import_matplotlib()
    kinds = list(dict.fromkeys(member.kind for member in members))
    if len(kinds) > 1:
        return [_shade(kinds, members, i) for i in range(len(members))]
    free = {"tab:green", "tab:blue", "tab:red", "tab:orange"}
    colours = []
    for member in members:
        difference = member.features - width
        colour = "tab:red" if difference == 0 else "tab:orange" if difference > 0 else "tab:green"
        colour = "tab:blue" if difference == -1 else colour
        colours.append(colour if colour in free else "")
        free.discard(colour)
    further = iter(np.linspace(0, 0.95, max(2, colours.count(""))))
    cividis = matplotlib.colormaps["cividis"]
    return [colour or matplotlib.colors.to_hex(cividis(next(further))) for colour in colours]


def _shade(kinds: Sequence[str], members: Sequence[Member], i: int) -> str:
    """The colour of the kind of member i, the lighter, the earlier it stands among those of its kind."""
    from matplotlib.colors import to_hex, to_rgb

    alike = [j for j, member in enumerate(members) if member.kind == members[i].kind]
    full = np.array(to_rgb(COLOURS[kinds.index(members[i].kind) % len(COLOURS)]))
    white = 0.6 * (1 - (alike.index(i) + 1) / len(alike))
    red, green, blue = (full + white * (1 - full)).tolist()
    return to_hex((red, green, blue))


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
            axes.axhline(floors[i], color=colour, linestyle="--", linewidth=1, label=f"   PCA floor: {floors[i]:.2g}")
    axes.set_yscale("log" if zoomed else "linear")
    if not zoomed and len(first):
        axes.set_ylim(0, 1.05 * first.max())
    _over_steps(axes, len(losses), width)
    axes.set_ylabel("loss per element (normalised units)" + (", logarithmic" if zoomed else ""))
    write_title(figure, title)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title="member: last loss")
    return figure
