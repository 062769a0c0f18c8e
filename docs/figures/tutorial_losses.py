"""Draw the losses of docs/tutorial.md from a run of configs/demo.toml.

python docs/figures/tutorial_losses.py runs/demo docs/figures/tutorial_losses.png

An SVG stands beside the PNG, and NAME-dark.png and NAME-dark.svg are the same on dark paper.
"""

import sys
from pathlib import Path

import numpy as np

import jax_sae
from jax_sae.figures.curves import loss_figure, member_colours
from jax_sae.figures.drawing import save_light_and_dark

directory, picture = map(Path, sys.argv[1:])
run = jax_sae.open_run(directory)
metrics, members = run.metrics(), run.members
losses = np.stack([metrics[name]["loss_per_element"] for name in members], axis=1)
# Of normalised activations, whose variance per element is 1, the loss that PCA leaves is its FVU.
floors = [member["pca_floor_fvu"] for member in run.summary["members"]]
colours = member_colours(list(members.values()))

title = "four autoencoders of activations of width 64, while training"
save_light_and_dark(lambda: loss_figure(list(members), colours, losses, floors, title, zoomed=True), picture)
