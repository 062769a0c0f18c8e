"""A folder that is written as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_sae.errors import BadInput, RunFailed


def check_new_folder(folder: Path) -> None:
    """Raise BadInput unless a folder can be made: nothing is in it, and what it is to stand in can be written."""
    absolute = folder.absolute()
    try:
        there = next(path for path in (absolute, *absolute.parents) if path.exists())
        if not there.is_dir():
            raise BadInput(f"{folder} cannot be made a folder: {there} is a file; give another by --to")
        if there == absolute and any(there.iterdir()):
            raise BadInput(f"{folder} is not empty; give a new folder by --to, or empty this one")
    except OSError as error:
        raise BadInput(f"{folder} cannot be made a folder ({error}); give another by --to") from error
    beside = there.parent if there == absolute else there
    if not os.access(beside, os.W_OK | os.X_OK):
        raise BadInput(f"{folder} cannot be made a folder ({beside} is read-only); give another by --to")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it to write into, which becomes `folder` when all is done, and is removed if it is not.

    Raises:
        BadInput: as `check_new_folder`.
        RunFailed: if a file cannot be written.
    """
    check_new_folder(folder)
    absolute = folder.absolute()
    partial = absolute.with_name(f".{absolute.name}.partial-{os.getpid()}")
    try:
        try:
            absolute.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            os.replace(partial, absolute)
        except OSError as error:
            raise RunFailed(
                f"{folder} could not be written ({error.strerror or error}); nothing is left of it: make room, or give "
                "another by --to"
            ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
