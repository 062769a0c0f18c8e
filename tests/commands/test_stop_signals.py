"""Ctrl-C, SIGTERM and SIGHUP, in this process: what is heard, what is raised, and that all is as before afterwards."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from jax_sae.commands.process import run_script
from jax_sae.commands.stop_signals import STOPPING, Signals, raising_signals


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Handlers, the wake-up socket, the hook and the threads."""
    handlers, threads, hook = [signal.getsignal(n) for n in STOPPING], threading.active_count(), sys.unraisablehook
    yield
    assert [signal.getsignal(number) for number in STOPPING] == handlers and sys.unraisablehook == hook
    assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1


def wait_until(condition: Callable[[], bool]) -> None:
    """At most 10 seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_remembered_within_the_block_only(number: int) -> None:
    """A closed terminal sends SIGHUP again and again; that is no wish to end at once."""
    with Signals() as signals:
        assert signals.is_listening and signals.received == 0
        os.kill(os.getpid(), number)
        wait_until(lambda: signals.received > 0)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert signals.received == number


def test_nohup_keeps_ignoring_a_hangup() -> None:
    """In training and in every other command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals, raising_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert signals.received == 0
        with raising_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_heard_and_nothing_fails() -> None:
    """Python lets the main thread alone have handlers; no thread of ours is left behind either."""
    seen = []

    def listen() -> None:
        with Signals() as signals, raising_signals():
            seen.append((signals.is_listening, signals.received, threading.active_count()))

    before = threading.active_count()
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(False, 0, before + 1)]


@pytest.mark.long
@pytest.mark.parametrize("number", STOPPING)
def test_elsewhere_a_signal_ends_the_work_in_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What is open is closed, as after any exception; the exit code is the signal's."""
    closed = []

    def work() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            closed.append(True)
        return 0

    assert run_script([], work) == 128 + number and closed
    assert capsys.readouterr().err == "\nstopped before it was done\n"


def test_a_signal_that_comes_while_memory_is_freed_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """There Python swallows exceptions: it is sent again."""

    class Freed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    def work() -> int:
        freed = Freed()
        del freed
        time.sleep(10)
        return 0

    assert run_script([], work) == 130
    assert capsys.readouterr().err == "\nstopped before it was done\n"
