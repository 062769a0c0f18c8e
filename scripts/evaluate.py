"""Say what the members of a run are worth on held-out stories: `jax-sae evaluate`."""

import sys

from jax_sae.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
