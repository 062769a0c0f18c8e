"""The kinds of autoencoders: a file each, whose name is the kind's; `KIND` in it is the subclass of `Autoencoder`.

Each says in its docstring what it computes and minimises, with its paper. `docs/add_a_kind.md` adds one.
"""

import pkgutil
import sys
from importlib import import_module

from jax_sae.autoencoder.model import Autoencoder
from jax_sae.errors import BadInput


def kind_names() -> list[str]:
    """Every kind there is: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def kind_named(name: str) -> type[Autoencoder]:
    """The class of a kind.

    Raises:
        BadInput: if there is none of that name.
    """
    file = f"{__name__}.{name}"
    if file not in sys.modules and name not in kind_names():  # which looks at the disk, but each use asks for its kind
        raise BadInput(f"there is no kind {name!r}; the kinds are {', '.join(kind_names())}")
    kind: type[Autoencoder] = import_module(file).KIND  # sys.modules has it half made while another thread imports it
    return kind
