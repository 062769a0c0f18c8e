"""Draw the picture of the README from `evaluation.json` of a run of configs/demo_sparse.toml.

python docs/figures/readme_frontier.py runs/demo_sparse docs/figures/readme_frontier.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from jax_sae.figures.drawing import COLOURS, MARKERS

run, picture = map(Path, sys.argv[1:])
members = json.loads((run / "evaluation.json").read_text())["members"]
kinds = list(dict.fromkeys(member["kind"] for member in members))

figure = Figure(figsize=(9, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
for kind, colour, marker in zip(kinds, COLOURS, MARKERS, strict=False):
    its = sorted((member for member in members if member["kind"] == kind), key=lambda member: member["l0"])
    style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 2, "label": kind}
    left.plot([member["l0"] for member in its], [100 * member["fvu"] for member in its], **style)
    right.plot(
        [member["l0"] for member in its], [100 * member["ce_loss_score_zero_ablation"] for member in its], **style
    )
pca = sorted((member["l0"], member["baselines"]["pca_l0"]) for member in members)
style = {"color": "grey", "linestyle": "--", "linewidth": 2, "label": "PCA, as many\ndirections"}
left.plot([l0 for l0, _ in pca], [100 * its["fvu"] for _, its in pca], **style)
left.set(yscale="log", ylabel="variance lost, %  (lower is better)", yticks=[5, 10, 20, 50])
right.set(ylabel="loss recovered, %  (higher is better)")
for axes in (left, right):
    axes.set(xscale="log", xlabel="active features a token", xticks=[3, 4, 8, 16])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
left.yaxis.set_major_formatter("{x:g}")
figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
figure.savefig(picture, dpi=150)
