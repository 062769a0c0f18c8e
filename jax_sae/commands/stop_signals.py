"""Ctrl-C, SIGTERM and SIGHUP: in training the first asks for a stop; elsewhere each is an exception."""

import gc
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from traceback import walk_stack
from types import FrameType
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)
"""What a terminal or an ssh session sends when it is closed, often twice; some systems do not have it."""

STOPPING = (signal.SIGINT, signal.SIGTERM) + ((HANGUP,) if HANGUP else ())


STOPPED = "stopped before it was done"


class Signals(AbstractContextManager["Signals"]):
    """Remembers the first signal of STOPPING within a `with` block; a second, other than SIGHUP, ends the process.

    Python's own handler has to wait until the compiler or a dispatch returns, which may take half a minute. The
    interpreter also writes the number of each signal to a socket, at once, and a thread reads it there.

    SIGHUP is left alone where it is ignored, as by `nohup`. In a thread other than the main one Python lets nobody
    listen: then nothing is heard, and `is_listening` is false.
    """

    def __init__(self) -> None:
        """Nothing is heard before the `with` block."""
        self.received = 0
        self.is_listening = False
        self._undo = ExitStack()

    def __enter__(self) -> "Signals":
        """Listen from now on."""
        self.is_listening = threading.current_thread() is threading.main_thread()
        if not self.is_listening:
            return self
        self._reader, writer = socket.socketpair()
        self._undo.callback(self._reader.close)
        writer.setblocking(False)
        thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        thread.start()
        self._undo.callback(thread.join)
        self._undo.callback(writer.close)  # which ends the thread
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
        for number in STOPPING:
            if number != HANGUP or not _is_ignored(number):
                self._undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return self

    def __exit__(self, *_: object) -> None:
        """Signals have their usual effect again."""
        self._undo.close()

    def _listen(self) -> None:
        while number := int.from_bytes(self._reader.recv(1)):
            if number not in STOPPING:
                continue
            if not self.received:
                self.received = number
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping: saving first; once more to end at once\n")
            elif number != HANGUP:
                os._exit(128 + number)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def raising_signals() -> Iterator[None]:
    """Within it the signals of STOPPING raise `KeyboardInterrupt(number)`, so that what is half-written is removed.

    Only where they would end the process anyway, and in the main thread. While a module is imported the process ends at
    once: libraries in C abort there, or swallow the exception, and nothing is written yet.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if any("importlib" in each.f_code.co_filename for each, _ in walk_stack(frame)):
            with suppress(OSError):
                os.write(2, f"\n{STOPPED}\n".encode())
            os._exit(128 + number)
        raise KeyboardInterrupt(number)

    hook = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):  # it came while memory was freed, where nobody hears it
            number = (*unraisable.exc_value.args, signal.SIGINT)[0]
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            hook(unraisable)

    with ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            undo.callback(setattr, sys, "unraisablehook", hook)
            sys.unraisablehook = again
            for number in STOPPING:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    undo.callback(signal.signal, number, signal.signal(number, interrupt))
        yield


def free_quietly(error: BaseException) -> None:
    """Let go of what an exception holds on to; what libraries say of being interrupted half-way is dropped."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error.__traceback__ = error.__context__ = None
            gc.collect()
            time.sleep(0.1)  # for their threads
            gc.collect()
    finally:
        sys.unraisablehook = hook
