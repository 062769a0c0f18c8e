"""Train every autoencoder of a sweep at once; `--help` says how. Without flags: configs/demo.toml, in minutes."""

import sys
from pathlib import Path

from jax_sae.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default_config=Path(__file__).parent.parent / "configs" / "demo.toml"))
