"""Draw the picture of the README from `evaluation.json` of a run of configs/demo_sparse.toml.

python docs/figures/readme_frontier.py runs/demo_sparse docs/figures/readme_frontier.png

An SVG stands beside the PNG, and NAME-dark.png and NAME-dark.svg are the same on dark paper.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jax_sae.figures.colours import GREY, looks
from jax_sae.figures.drawing import new_figure, save_light_and_dark

run, picture = map(Path, sys.argv[1:])
members = json.loads((run / "evaluation.json").read_text())["members"]


def draw() -> Any:
    """Variance lost and loss recovered against L0, a line for each kind; PCA beside them."""
    figure = new_figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, look in looks(member["kind"] for member in members).items():
        its = sorted((member for member in members if member["kind"] == kind), key=lambda member: member["l0"])
        l0s = [member["l0"] for member in its]
        style = {"color": look.colour, "marker": look.marker, "markersize": 7, "linewidth": 2, "label": kind}
        left.plot(l0s, [100 * member["fvu"] for member in its], **style)
        right.plot(l0s, [100 * member["ce_loss_score_zero_ablation"] for member in its], **style)
    pca = sorted((member["l0"], member["baselines"]["pca_l0"]["fvu"]) for member in members)
    label = "PCA, as many\ndirections"
    left.plot([l0 for l0, _ in pca], [100 * fvu for _, fvu in pca], "--", color=GREY, linewidth=2, label=label)
    left.set(yscale="log", ylabel="variance lost, %  (lower is better)", yticks=[5, 10, 20, 50])
    right.set(ylabel="loss recovered, %  (higher is better)")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="active features a token", xticks=[3, 4, 8, 16])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    left.yaxis.set_major_formatter("{x:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


save_light_and_dark(draw, picture)
