"""Say what a run's directory holds: `jax-sae inspect`."""

import sys

from jax_sae.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
