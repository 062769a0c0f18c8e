"""Write a GPT-Neo's activations to disk: `jax-sae harvest`."""

import sys

from jax_sae.commands.harvest import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
