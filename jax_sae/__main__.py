"""`python -m jax_sae` is `jax-sae`."""

import sys

from jax_sae.commands import main

if __name__ == "__main__":
    sys.exit(main())
