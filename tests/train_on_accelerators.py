"""`train_all.py` as where there are accelerators, without room for the language model in one process.

Activations stay on the devices, each of which has a part of every weight; the next block is made in pieces meanwhile.
No row of a block can pass through the hosts.
"""

import sys

import jax

from jax_sae.activations import blocks, story_sources
from jax_sae.commands.train import main
from jax_sae.language_model import pretrained
from jax_sae.run import ahead, train

if __name__ == "__main__":
    pretrained.where_it_fits = lambda shapes: (jax.devices(), True)
    story_sources.stays_on_device = train.stays_on_device = ahead.in_pieces = lambda: True
    blocks.summed = None
    sys.exit(main(sys.argv[1:]))
