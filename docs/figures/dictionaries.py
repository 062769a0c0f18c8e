"""Draw the picture of docs/results_demo.md from `evaluation.json` of a run of configs/demo_dictionaries.toml.

python docs/figures/dictionaries.py runs/demo_dictionaries docs/figures/demo_dictionaries.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from jax_sae.figures.drawing import COLOURS, MARKERS

run, picture = map(Path, sys.argv[1:])
members = {member["name"]: member for member in json.loads((run / "evaluation.json").read_text())["members"]}
layers, ks = range(4), (8, 16)

figure = Figure(figsize=(9, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)


def of(name: str, k: int, layer: int) -> dict:
    """A member of the run."""
    return members[f"{layer}.{name}-F256-k{k}"]


for i, (name, label) in enumerate((("transcoder", "transcoder"), ("skip_transcoder", "with a skip"))):
    for k, line in zip(ks, ("--", "-"), strict=True):
        recovered = [100 * of(name, k, layer)["ce_loss_score_zero_ablation"] for layer in layers]
        left.plot(layers, recovered, line, color=COLOURS[i], marker=MARKERS[i], linewidth=2, label=f"{label}, k = {k}")
linear = [100 * of("transcoder", 8, layer)["baselines"]["linear"]["ce_loss_score_zero_ablation"] for layer in layers]
left.plot(layers, linear, ":", color="grey", marker="x", linewidth=2, label="linear regression")
left.set(ylabel="loss recovered, %  (higher is better)", xlabel="MLP of layer", title="in place of an MLP")
for k, line in zip(ks, ("--", "-"), strict=True):
    alone = [100 * of("resid_post", k, layer)["fvu"] for layer in layers]
    crosscoder = [100 * members[f"crosscoder-F256-k{k}"]["at"][f"{layer}.resid_post"]["fvu"] for layer in layers]
    for i, (values, label) in enumerate(((alone, "an autoencoder each"), (crosscoder, "one crosscoder"))):
        style = {"color": COLOURS[3 + i], "marker": MARKERS[3 + i], "linewidth": 2, "label": f"{label}, k = {k}"}
        right.plot(layers, values, line, **style)
right.set(ylabel="variance lost, %  (lower is better)", xlabel="stream after layer", title="the stream at four layers")
for axes in (left, right):
    axes.set(xticks=list(layers))
    axes.set_ylim(*((50, 101) if axes is left else (0, None)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False, handlelength=3.5)
figure.savefig(picture, dpi=150)
