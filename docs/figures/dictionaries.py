"""Draw the picture of docs/results_demo.md from `evaluation.json` of a run of configs/demo_dictionaries.toml.

python docs/figures/dictionaries.py runs/demo_dictionaries docs/figures/demo_dictionaries.png

An SVG stands beside the PNG, and NAME-dark.png and NAME-dark.svg are the same on dark paper.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jax_sae.figures.colours import GREY, OWN
from jax_sae.figures.drawing import new_figure, save_light_and_dark

run, picture = map(Path, sys.argv[1:])
members = {member["name"]: member for member in json.loads((run / "evaluation.json").read_text())["members"]}
layers, ks = range(4), (8, 16)


def of(name: str, k: int, layer: int) -> dict[str, Any]:
    """A member of the run."""
    return members[f"{layer}.{name}-F256-k{k}"]


def draw() -> Any:
    """Loss recovered in place of each MLP; variance lost at four layers. All are of one kind, so colours say more."""
    figure = new_figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for look, name, label in zip(OWN, ("transcoder", "skip_transcoder"), ("transcoder", "with a skip"), strict=False):
        for k, line in zip(ks, ("--", "-"), strict=True):
            recovered = [100 * of(name, k, layer)["ce_loss_score_zero_ablation"] for layer in layers]
            style = {"color": look.colour, "marker": look.marker, "linewidth": 2, "label": f"{label}, k = {k}"}
            left.plot(layers, recovered, line, **style)
    linear = [of("transcoder", 8, layer)["baselines"]["linear"]["ce_loss_score_zero_ablation"] for layer in layers]
    left.plot(
        layers, [100 * one for one in linear], ":", color=GREY, marker="x", linewidth=2, label="linear regression"
    )
    left.set(ylabel="loss recovered, %  (higher is better)", xlabel="MLP of layer", title="in place of an MLP")
    for k, line in zip(ks, ("--", "-"), strict=True):
        alone = [100 * of("resid_post", k, layer)["fvu"] for layer in layers]
        crosscoder = [100 * members[f"crosscoder-F256-k{k}"]["at"][f"{layer}.resid_post"]["fvu"] for layer in layers]
        sides = ((alone, "an autoencoder each"), (crosscoder, "one crosscoder"))
        for look, (values, label) in zip(OWN[2:], sides, strict=True):
            style = {"color": look.colour, "marker": look.marker, "linewidth": 2, "label": f"{label}, k = {k}"}
            right.plot(layers, values, line, **style)
    right.set(ylabel="variance lost, %  (lower is better)", xlabel="stream after layer")
    right.set(title="the stream at four layers")
    for axes in (left, right):
        axes.set(xticks=list(layers))
        axes.set_ylim(*((50, 101) if axes is left else (0, None)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False, handlelength=3.5)
    return figure


save_light_and_dark(draw, picture)
