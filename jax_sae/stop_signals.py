"""Ctrl-C and SIGTERM: the first asks for a stop, the second ends the process."""

import os
import signal
import socket
import threading
from contextlib import AbstractContextManager

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Signals(AbstractContextManager["Signals"]):
    """Remembers the first SIGINT or SIGTERM within a `with` block; a second one ends the process at once.

    Python's own handler has to wait until the compiler or a dispatch returns, which may take half a minute. The
    interpreter also writes the number of each signal to a socket, at once, and a thread reads it there.
    """

    def __init__(self) -> None:
        """Nothing is heard before the `with` block."""
        self.received = 0

    def __enter__(self) -> "Signals":
        """Listen from now on."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno())
        self._before = [signal.signal(number, lambda *_: None) for number in STOPPING]
        return self

    def __exit__(self, *_: object) -> None:
        """Signals have their usual effect again."""
        for number, handler in zip(STOPPING, self._before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while number := int.from_bytes(self._reader.recv(1)):
            if number not in STOPPING:
                continue
            if self.received:
                os._exit(128 + number)
            self.received = number
            os.write(2, b"\nstopping: saving first; once more to end at once\n")
