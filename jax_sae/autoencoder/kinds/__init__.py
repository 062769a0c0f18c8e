"""The kinds of autoencoders: a file each, whose name is the kind's; `KIND` in it is the subclass of `Autoencoder`.

Each says in its docstring what it computes and minimises, with its paper. `docs/add_a_kind.md` adds one. A class from
elsewhere is a kind too, by the name `module:Class`.
"""

import pkgutil
import sys
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from inspect import signature
from typing import Any

from jax_sae.autoencoder.model import Autoencoder
from jax_sae.config import SETTINGS
from jax_sae.errors import BadInput


def kind_names() -> list[str]:
    """Every kind there is: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def kind_name(kind: str | type[Autoencoder]) -> str:
    """The name by which settings and checkpoints know a kind: its file's here, `module:Class` of one from elsewhere.

    Raises:
        BadInput: if it is no kind, or its name means another one.
    """
    if isinstance(kind, str):
        kind_named(kind)
        return kind
    _refuse_improper(kind, getattr(kind, "__name__", repr(kind)))
    name = f"{kind.__module__}:{kind.__qualname__}"
    package, _, file = kind.__module__.rpartition(".")
    if package == __name__ and kind_named(file) is kind:
        return file
    if kind_named(name) is not kind:
        raise BadInput(f"the name {name} now means another class than the one that is given; give the one it means")
    return name


def kind_named(name: str) -> type[Autoencoder]:
    """The class of a kind; the module of one from elsewhere is imported.

    Raises:
        BadInput: if there is none of that name.
    """
    if ":" in name:
        return _refuse_improper(_from_elsewhere(name), name)
    file = f"{__name__}.{name}"
    if file not in sys.modules and name not in kind_names():  # which looks at the disk, but each use asks for its kind
        kinds = ", ".join(kind_names())
        raise BadInput(f"there is no kind {name!r}; the kinds are {kinds}, and module:Class is one of your own")
    kind: type[Autoencoder] = import_module(file).KIND  # sys.modules has it half made while another thread imports it
    return kind


def _from_elsewhere(name: str) -> Any:
    """What `module:Class` means: in that module, else, as for a class inside a function, among all that are defined."""
    module, _, path = name.partition(":")
    problem = f"module {module!r} has no {path!r}"
    try:
        return reduce(getattr, path.split("."), import_module(module))
    except AttributeError:
        pass
    except Exception as error:  # whatever the module does when it is imported
        problem = f"module {module!r} cannot be imported ({type(error).__name__}: {error})"
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if not is_missing:  # but broken, or lacks another module: an older class must not take its place
            raise BadInput(f"there is no kind {name!r}: {problem}; correct that") from error
    living = [kind for kind in _subclasses(Autoencoder) if f"{kind.__module__}:{kind.__qualname__}" == name]
    if len(living) == 1:
        return living[0]
    if living:
        raise BadInput(f"kind {name!r} means {len(living)} classes; give each a name of its own, outside of functions")
    raise BadInput(
        f"there is no kind {name!r}: {problem}; import or define the class first, or put its folder on PYTHONPATH"
    )


def _subclasses(cls: type[Autoencoder]) -> Iterator[type[Autoencoder]]:
    for kind in cls.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def _refuse_improper(kind: Any, name: str) -> type[Autoencoder]:
    """The kind; raise BadInput if it is not a whole one."""
    if not (isinstance(kind, type) and issubclass(kind, Autoencoder)):
        raise BadInput(f"kind {name} is not a subclass of jax_sae.autoencoder.model.Autoencoder; docs/add_a_kind.md")
    missing = [method for method in ("encode", "loss") if getattr(kind, method) is getattr(Autoencoder, method)]
    if missing:
        raise BadInput(
            f"kind {name} has no {' and no '.join(missing)} of its own; docs/add_a_kind.md says what it needs"
        )
    if len(takes := list(signature(kind.loss).parameters)) != 5:
        raise BadInput(
            f"the loss of kind {name} takes ({', '.join(takes)}); (self, x, targets, weights, values) was expected: "
            "the error is that of targets, which are x for an autoencoder; docs/add_a_kind.md"
        )
    if unknown := [each for each in kind.settings if each not in SETTINGS]:
        raise BadInput(
            f"kind {name} has the setting {unknown[0]!r}, which no member has; known are {', '.join(SETTINGS)}; what "
            "is the same for all may be an attribute of the class"
        )
    return kind
