"""`train_all.py` where no process has room for the language model: each device of all of them has a part of it.

And where no row of a block can pass through the hosts.
"""

import sys

import jax

from jax_sae.activations import blocks
from jax_sae.commands.train import main
from jax_sae.language_model import pretrained

if __name__ == "__main__":
    pretrained.where_it_fits = lambda shapes: (jax.devices(), True)
    blocks.summed = None
    sys.exit(main(sys.argv[1:]))
