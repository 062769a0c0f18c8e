"""When a run is asked to stop, where the repository is, members at step 0, and runs that learn nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import METRICS, MemberState, init_member

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


@contextmanager
def nothing_learned() -> Iterator[None]:
    """Steps leave members as they are, and each metric is 1.

    A sweep's steps are the program that takes longest to compile, and what they do stands in tests of its own. Much can
    be said of a run, its files and its evaluation, whatever it learned.
    """

    def unchanged(state: Any, x: Any, *_: Any, **__: Any) -> tuple[Any, np.ndarray]:
        return state, np.ones((len(x), sum(len(group.diverged) for group in state), len(METRICS)), np.float32)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jax_sae.run.train.update_many", unchanged)
        yield
