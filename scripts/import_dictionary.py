"""Import a dictionary that another tool wrote into a new run: `jax-sae import`."""

import sys

from jax_sae.commands.import_ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
