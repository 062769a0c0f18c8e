"""Ctrl-C, SIGTERM and SIGHUP: in training the first asks for a stop; elsewhere each is an exception."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)
"""What a terminal or an ssh session sends when it is closed, often twice; some systems do not have it."""

STOPPING = (signal.SIGINT, signal.SIGTERM) + ((HANGUP,) if HANGUP else ())


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
    """Within it SIGTERM and SIGHUP raise `KeyboardInterrupt(number)`, as Ctrl-C does, so that what is open is closed.

    Only where they would end the process at once, and in the main thread.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    with ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) == signal.SIG_DFL:
                    undo.callback(signal.signal, number, signal.signal(number, interrupt))
        yield
