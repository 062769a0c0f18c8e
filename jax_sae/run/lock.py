"""One process at a time in a run's directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from jax_sae.errors import BadInput


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out/.lock`, in a directory that is made if need be; the system lets go of it when the process ends or dies.

    Raises:
        BadInput: if another process holds it, or the directory cannot be written to.
    """
    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise BadInput(
            f"{out} is in use: another process is training there; wait until it has ended, or give --out another name"
        ) from error
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written to: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
