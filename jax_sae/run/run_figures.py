"""Which figures a run has: of every place its losses, its training and, of a sparse sweep, the frontier."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jax_sae.autoencoder.baselines import pca_curve
from jax_sae.figures.curves import loss_figure, member_colours, training_figure
from jax_sae.figures.drawing import Figures
from jax_sae.figures.frontier import frontier_figure, points_of
from jax_sae.run.held_out import HeldOut, side_by_side
from jax_sae.run.progress import Progress, Setup
from jax_sae.sweep.members import placement_labels


def run_figures(
    out: Path,
    setup: Setup,
    progress: Progress,
    held_out: Sequence[HeldOut],
    measured: Sequence[dict[str, Any]],
) -> Figures:
    """What draws the figures of a run; `measured` are its members in the sweep's order. Nothing is drawn yet.

    Losses and FVUs at different places are no measure of each other, so each place has its own figures.
    """
    at_place = dict(zip(setup.places, held_out, strict=True))
    labels = placement_labels(setup.members())
    figures: Figures = {}
    for label in dict.fromkeys(labels):
        group = next(group for group in setup.groups if setup.members()[labels.index(label)] in group.members)
        its = side_by_side([at_place[place] for place in setup.writes(group)])
        here = [i for i in setup.in_order() if labels[i] == label]
        rows = [row for i, row in zip(setup.in_order(), measured, strict=True) if labels[i] == label]
        name = label if len(setup.places) > 1 else ""
        figures |= _figures_at_a_place(out, setup, progress, its, rows, here, name)
    return figures | training_figures(out, setup, progress)


def _figures_at_a_place(
    out: Path,
    setup: Setup,
    progress: Progress,
    held_out: HeldOut,
    measured: Sequence[dict[str, Any]],
    here: Sequence[int],
    place: str = "",
) -> Figures:
    names, members = [setup.names()[i] for i in here], [setup.members()[i] for i in here]
    width, folder = held_out.x.shape[1], out / "figures"
    behind, run = f"-{place}" if place else "", f"{out.name}, {place}" if place else out.name
    losses = progress.losses[:, here]
    floors = [0.0 if member.skip else held_out.loss_floor(member.features) for member in members]
    title = f"{run}: reconstruction of activations of width {width}"

    def curves() -> tuple[list[str], list[str]]:
        return names, member_colours(members)

    figures: Figures = {
        folder / f"loss{behind}.png": lambda: loss_figure(*curves(), losses, floors, title, zoomed=False),
        folder / f"loss_zoomed{behind}.png": lambda: loss_figure(*curves(), losses, floors, title, zoomed=True),
    }
    points = points_of(measured)
    if points and any(group.form.is_sparse for group in setup.groups):
        tokens, pca = f"{run}: {len(held_out.x):,} held-out tokens", pca_curve(held_out.eigenvalues)
        figures[folder / f"frontier{behind}.png"] = lambda: frontier_figure(points, pca, tokens)
    return figures


def training_figures(out: Path, setup: Setup, progress: Progress) -> Figures:
    """What draws losses, penalties and active features of all steps so far; each place has a figure of its own."""
    labels = placement_labels(setup.members())
    figures: Figures = {}
    for label in dict.fromkeys(labels):
        here = [i for i in setup.in_order() if labels[i] == label]
        members, metrics = [setup.members()[i] for i in here], progress.metrics[: progress.step, here]
        behind, run = (f"-{label}", f"{out.name}, {label}") if len(setup.places) > 1 else ("", out.name)
        names, features = [setup.names()[i] for i in here], [member.features for member in members]
        figures[out / "figures" / f"training{behind}.png"] = partial(
            training_figure, names, member_colours(members), metrics, features, f"{run}: training"
        )
    return figures
