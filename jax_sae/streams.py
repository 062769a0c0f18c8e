"""What the user is told: lines and progress, in a terminal, a notebook or a log file.

The standard streams of a command may be closed, on a full disk, in ASCII, or read by nobody any more.
"""

import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

SECONDS_A_LINE = 30.0
"""Seconds between two lines of progress in a log file."""

WARNING = "warning       "
"""How a line begins that is a warning."""

_is_quiet = ContextVar("is_quiet", default=False)
_warns = ContextVar("warns", default=True)


@contextmanager
def quiet(is_quiet: bool = True, warns: bool = True) -> Iterator[None]:
    """Within it, in this thread, nothing is printed and there is no bar; lines that warn become Python's warnings.

    Unless it `warns`, they do not: another process of the run prints them.
    """
    tokens = (_is_quiet, _is_quiet.set(is_quiet)), (_warns, _warns.set(warns))
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def say(lines: Sequence[str]) -> None:
    """Print lines, above a progress bar if there is one."""
    if _is_quiet.get():
        for line in lines:
            if line.startswith(WARNING) and _warns.get():
                warnings.warn(line.removeprefix(WARNING), stacklevel=2)
    elif lines and sys.stdout is not None:
        tqdm.write("\n".join(lines))
        sys.stdout.flush()


class Lasting(io.FileIO):
    """An open file to which every write succeeds: what cannot be written is dropped, and `lost` says why.

    A command must not lose what it computes because it cannot print.
    """

    lost = 0
    """The `errno` of the first write that failed; 0: nothing was dropped."""

    def write(self, data: Any) -> int:
        """Write the bytes, or drop them."""
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error.errno or errno.EIO
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within it standard output and error are `Lasting`, and characters that their encoding does not have are escaped.

    What is written to a closed one (`>&-`, pythonw) is dropped. Streams that a program put in their place are kept.
    """
    _occupy_missing_descriptors()
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            stack.callback(setattr, sys, name, stream)
            if stream is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", errors="backslashreplace")))
            elif isinstance(_raw(stream), io.FileIO):
                with suppress(OSError):
                    stream.flush()
                lasting = io.TextIOWrapper(
                    io.BufferedWriter(Lasting(stream.fileno(), "w", closefd=False)),
                    encoding=stream.encoding,
                    errors="backslashreplace",
                    line_buffering=True,
                )
                stack.callback(lasting.flush)
                setattr(sys, name, lasting)
        yield


def _occupy_missing_descriptors() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise the next file that is opened gets the number of one, and all that libraries write to that stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


def _raw(stream: Any) -> Any:
    """The open file below a text stream; with PYTHONUNBUFFERED there is no buffer between them."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def lost_output() -> set[int]:
    """Why some output could not be written, as values of `errno`; empty if all of it was."""
    return {getattr(_raw(stream), "lost", 0) for stream in (sys.stdout, sys.stderr)} - {0}


def reader_is_gone() -> bool:
    """Whether the program that reads the output has ended, as in `| head -1`."""
    return errno.EPIPE in lost_output()


def in_notebook() -> bool:
    """Whether what is shown goes to a notebook, which is not the case within `quiet`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return not _is_quiet.get() and hasattr(shell, "kernel")


class Shown:
    """One output of a cell of a notebook, in whose place others are shown; a notebook keeps the last one."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._handle: Any = None

    def show(self, content: Any) -> None:
        """Show this, in place of what was shown before."""
        if self._handle is None:
            self._handle = sys.modules["IPython"].display.display(content, display_id=True)
        else:
            self._handle.update(content)


def progress_bar(**settings: Any) -> tqdm:
    """A progress bar: a line in a notebook or a terminal; in a file, lines now and then."""
    if _is_quiet.get() or sys.stderr is None:
        return tqdm(**settings, disable=True)
    if in_notebook():
        return _InNotebook(**{"mininterval": 0.5} | settings)
    if not sys.stderr.isatty():
        return _Lines(**settings | {"mininterval": SECONDS_A_LINE})
    return tqdm(**settings)


class _Text(str):
    """A text that a notebook shows as it stands."""

    def __repr__(self) -> str:
        return str(self)


class _InNotebook(tqdm):
    """Progress as one output of a cell."""

    disable: bool
    leave: bool
    _shown: Shown | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show it in place of what was shown before."""
        self._shown = self._shown or Shown()
        self._shown.show(_Text(self if msg is None else msg))

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: it is in nobody's way."""

    def close(self) -> None:
        """Show the last of it; nothing, if the bar is one that goes away."""
        if self.disable:
            return
        self.display(None if self.leave else "")
        self.disable = True
        self._decr_instances(self)


class _Lines(tqdm):
    """Progress in lines of text, without control characters."""

    disable: bool
    leave: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line."""
        self.fp.write(f"{self if msg is None else msg}\n")

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a line stays."""

    def close(self) -> None:
        """Write the last line, unless the bar is one that goes away."""
        if self.disable:
            return
        if self.leave:
            self.display()
        self.disable = True
        self._decr_instances(self)
