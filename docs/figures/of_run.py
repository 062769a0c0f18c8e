"""Draw the frontier or the training of a finished run for a page.

python docs/figures/of_run.py runs/demo_sparse frontier docs/figures/demo_sparse_frontier.png

An SVG stands beside the PNG, and NAME-dark.png and NAME-dark.svg are the same on dark paper.
"""

import sys
from pathlib import Path

import jax_sae
from jax_sae.figures.drawing import save_light_and_dark

run, what, picture = jax_sae.open_run(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
save_light_and_dark({"frontier": run.plot_frontier, "training": run.plot_training}[what], picture)
