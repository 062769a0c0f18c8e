"""Write the activations of any Hugging Face causal language model to disk, with torch: `jax-sae export-activations`."""

import sys

from jax_sae.commands.export_activations import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
