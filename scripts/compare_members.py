"""Write a page on the members of a run beside each other: `jax-sae compare`."""

import sys

from jax_sae.commands.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
