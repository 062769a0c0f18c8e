"""Blocks of activations for the loop that trains: where the next one is made, and when.

On a CPU, when it is needed: the cores are busy with one of the two. On accelerators a thread makes the next block while
the batches of this one are trained on. Several processes make it in pieces, in the thread that trains, after each
dispatch: all of them have to give their devices programs in one order, which two threads do not.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Self

import jax

from jax_sae.activations.batches import BatchRun
from jax_sae.processes import several
from jax_sae.run.progress import Clock


def by_a_thread() -> bool:
    """Whether the next block is read and harvested by a thread while the batches of the one before are trained on."""
    return jax.default_backend() != "cpu" and not several()


def in_pieces() -> bool:
    """Whether it is done by the thread that trains, in pieces after each dispatch."""
    return jax.default_backend() != "cpu" and several()


class Ahead:
    """The runs that are made, one after the other, with what can be done of the next one while one is trained on.

    So there are two blocks at a time. As a context manager it ends its thread.
    """

    def __init__(self, made: Iterator[BatchRun | float], clock: Clock) -> None:
        """Take runs from `made`, in pieces, and keep the clock."""
        self._made, self._clock = made, clock
        self._thread = ThreadPoolExecutor(1, "harvest")
        self._by_thread: Future[tuple[BatchRun, float]] | None = None
        self._there: BatchRun | float = 0.0

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what the thread still makes."""
        self._thread.shutdown()

    def take(self) -> BatchRun:
        """The next run; training waits for what is not there of it."""
        start = time.perf_counter()
        if self._by_thread:
            run, seconds = self._by_thread.result()
        else:
            run, seconds = self._rest()
        self._by_thread = None
        self._clock.waited_seconds += time.perf_counter() - start
        self._clock.harvest_seconds += seconds
        self._clock.harvest_tokens += int(run.weights.sum())
        return run

    def begin(self) -> None:
        """Let the thread, if there is one, make the next run."""
        if by_a_thread():  # in a copy of the context, which knows whether it is quiet
            self._by_thread = self._thread.submit(copy_context().run, self._rest)

    def go_on(self, share: float, trained: Any) -> None:
        """If it is made in pieces, make the next run up to a share of it, 1 for all; the same in all processes.

        Until the array `trained` is there, nothing waits for it; then it is counted as time that training waited.
        """
        while in_pieces() and not isinstance(self._there, BatchRun) and self._there < share:
            start, beside = time.perf_counter(), not trained.is_ready()
            self._there = next(self._made)
            seconds = time.perf_counter() - start
            self._clock.harvest_seconds += seconds
            self._clock.waited_seconds += 0.0 if beside else seconds

    def _rest(self) -> tuple[BatchRun, float]:
        """The run of which some may be there, and the seconds that the rest took."""
        start = time.perf_counter()
        there = self._there
        while not isinstance(there, BatchRun):
            there = next(self._made)
        self._there = 0.0
        return there, time.perf_counter() - start
