"""When a run is asked to stop, where the repository is, and members at step 0."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import MemberState, init_member

REPOSITORY = Path(__file__).parent.parent
NO_CENTRES: Any = {"zero": 0.0, "mean": 0.0, "geometric_median": 0.0}
"""Nothing is added to an initial b_dec."""


def initial(member: Member, width: int, train: TrainConfig) -> MemberState:
    """The state of a member at step 0; what it does not say is its kind's default."""
    return init_member(complete(member), width, train, NO_CENTRES)


def stop_at(step: int) -> Callable[[int], bool]:
    """A `stop_requested` that asks for a stop once that many steps are done."""
    return lambda done: done >= step


def never(done: int) -> bool:
    """A `stop_requested` that does not."""
    return False
