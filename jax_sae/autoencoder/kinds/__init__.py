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
    module = sys.modules.get(f"{__name__}.{name}")  # without a look at the disk, as each use of an autoencoder asks
    if module is None:
        if name not in kind_names():
            raise BadInput(f"there is no kind {name!r}; the kinds are {', '.join(kind_names())}")
        module = import_module(f"{__name__}.{name}")
    kind: type[Autoencoder] = module.KIND
    return kind
