"""When a run is asked to stop, and where the repository is."""

from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def stop_at(step: int) -> Callable[[int], bool]:
    """A `stop_requested` that asks for a stop once that many steps are done."""
    return lambda done: done >= step


def never(done: int) -> bool:
    """A `stop_requested` that does not."""
    return False
