"""Train every autoencoder of a sweep at once: `jax-sae train`."""

import sys

from jax_sae.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
