"""Let a language model write with a feature raised, set or taken away: `jax-sae steer`."""

import sys

from jax_sae.commands.steer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
