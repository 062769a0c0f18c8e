"""A real Chromium without a window, told what to do over a pipe by its DevTools protocol.

It is the first of `chromium`, `chromium-browser`, `google-chrome` and `chrome` on the path, or what CHROMIUM names.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")


def chromium() -> str | None:
    """Where a Chromium is, if there is one."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a Chromium."""

    def __init__(self, send: int, receive: int) -> None:
        """Over two ends of pipes."""
        self._send, self._receive = send, receive
        self._read, self._n, self._session = b"", 0, None
        self.complaints: list[str] = []
        """Errors, warnings and refused requests that the page told."""
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> Any:
        """Do something, and wait for what it gives."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == self._n:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        """What it says next; what is a complaint is kept."""
        end = time.monotonic() + seconds
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._receive], [], [], max(0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            self._read += (some := os.read(self._receive, 2**20))
            assert some, "Chromium has ended"
        message, _, self._read = self._read.partition(b"\0")
        found = json.loads(message)
        event, told = found.get("method"), found.get("params", {})
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"])[:500])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(told["args"])[:500])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not told["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            self.complaints.append(f"asked the network for {told['request']['url']}")
        return found

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, json.dumps(found["exceptionDetails"])[:800]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"waited in vain for {condition}"
            time.sleep(0.02)

    def open(self, file: Path, fragment: str = "") -> None:
        """Open a page from its file, as a double click does, and wait until it shows what the fragment asks for."""
        self.do("Page.navigate", url="about:blank")
        self.do("Page.navigate", url=f"file://{file}{fragment}")
        self.wait("document.documentElement?.dataset.ready")

    def go(self, fragment: str) -> None:
        """Follow a link within the page."""
        self.run(f"location.hash = {json.dumps(fragment)}")
        self.wait(f"document.documentElement.dataset.ready === {json.dumps(fragment)}")

    def press(self, key: str) -> None:
        """Press a key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.do("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.do("Input.dispatchKeyEvent", type="keyUp", key=key)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag the mouse with its left button."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Be a screen of that size, which likes it dark or light."""
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """A PNG of what is seen."""
        file.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium with a profile of its own, which ends with the block."""
    program = chromium()
    assert program, "there is no Chromium"
    (reads, send), (receive, writes) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (reads, writes)]
    # It reads and writes at 3 and 4.
    start = f"import os, sys; os.dup2({high[0]}, 3); os.dup2({high[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        arguments += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio"]
        arguments += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", start, program, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=high,
        )
        for each in (reads, writes, *high):
            os.close(each)
        try:
            yield Browser(send, receive)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(send)
            os.close(receive)
