"""Write a member of a run in the layout of another tool: `jax-sae export`."""

import sys

from jax_sae.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
