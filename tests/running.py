"""When a run is asked to stop, and where the repository is."""

from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def stop_at(step: int) -> Callable[[], bool]:
    """A `stop_requested` that asks for a stop at a step, where every step is a dispatch (log_every = 1)."""
    calls = iter(range(1, 10**9))
    return lambda: next(calls) >= step


def never() -> bool:
    """A `stop_requested` that does not."""
    return False
