"""Say what the features of a run tell of labelled texts: `jax-sae probe`."""

import sys

from jax_sae.commands.probe import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
