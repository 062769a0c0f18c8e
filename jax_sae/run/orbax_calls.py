"""What Orbax needs around it: paths that it can take, its log kept from others, and what it leaves behind."""

import gc
import logging
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jax_sae.errors import BadInput

PLAIN_PATH = re.compile(r"(?!/(gs|s3|az|hf)(/|$))(/[\w.,+=@ -]+)+")
"""Absolute paths in which Orbax and TensorStore see nothing but names.

Elsewhere they take `[`, `*` and `?` for patterns, a backslash for a slash, `/gs/` and `gs:/` for addresses of a cloud,
and cannot take bytes that are not UTF-8.
"""


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """The path by which Orbax knows a directory: its own, or while the context lasts a link to it with a plain one."""
    if PLAIN_PATH.fullmatch(str(directory)):
        yield directory
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="jax_sae-")
    except OSError as error:
        raise _no_link(directory, error.strerror or str(error)) from error
    with folder as name:
        link = Path(name).absolute() / "checkpoints"
        if not PLAIN_PATH.fullmatch(str(link)):
            raise _no_link(directory, f"{name} has such characters too")
        link.symlink_to(directory, target_is_directory=True)
        yield link


def _no_link(directory: Path, why: str) -> BadInput:
    return BadInput(
        f"{directory} has characters that Orbax cannot write to, and a link to it cannot be made in the folder for "
        f"temporary files ({why}); give the run another name, or set TMPDIR to a folder with a plain name"
    )


class Orbax(logging.Filter):
    """What is changed in this process while any of its threads calls Orbax; all of it is undone after the last call.

    Orbax's log is kept from everyone else: below warnings it narrates, and errors come with an exception. And it reads
    and writes arrays side by side; when one fails, the others print that their event loop is gone.
    """

    def __init__(self) -> None:
        """Nothing is changed yet."""
        super().__init__()
        self._lock = threading.Lock()
        self._calls: list[tuple[int, list[logging.LogRecord]]] = []
        self._undo = ExitStack()

    @contextmanager
    def called(self) -> Iterator[list[logging.LogRecord]]:
        """For the time of calls to Orbax from this thread; yields a list that grows by what it logs as a warning."""
        call: tuple[int, list[logging.LogRecord]] = threading.get_ident(), []
        with self._lock:
            if not self._calls:
                self._change()
            self._calls.append(call)
        try:
            yield call[1]
        finally:
            with self._lock:
                self._calls = [other for other in self._calls if other is not call]
                if not self._calls:
                    self._undo.close()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether others see a record; one of a thread that Orbax itself began may belong to any of the calls."""
        if "orbax" not in Path(record.pathname).parts:
            return True
        if record.levelno >= logging.WARNING:
            calls = list(self._calls)
            for heard in [of for thread, of in calls if thread == record.thread] or [of for _, of in calls]:
                heard.append(record)
        return False

    def _change(self) -> None:
        hook, asyncio_logger, absl_logger = sys.unraisablehook, logging.getLogger("asyncio"), logging.getLogger("absl")

        def quieter(unraisable: Any) -> None:
            if "Event loop is closed" not in str(unraisable.exc_value):
                hook(unraisable)

        self._undo.callback(setattr, sys, "unraisablehook", hook)
        sys.unraisablehook = quieter
        self._undo.callback(setattr, asyncio_logger, "disabled", asyncio_logger.disabled)
        asyncio_logger.disabled = True
        self._undo.callback(absl_logger.removeFilter, self)
        absl_logger.addFilter(self)
        self._undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")


orbax = Orbax()


def wait_for_echoes() -> None:
    """Let the others fail, and drop the exceptions that nobody asked for."""
    time.sleep(0.1)
    gc.collect()
