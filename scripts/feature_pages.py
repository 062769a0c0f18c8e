"""Write pages on the features of a run's members: `jax-sae pages`."""

import sys

from jax_sae.commands.pages import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
