"""Training steps of members as a function that can be timed."""

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp

from jax_sae.config import DecoderBias, TrainConfig
from jax_sae.sweep.groups import Group
from jax_sae.sweep.update import Centres, SweepState, init_sweep, update_many

NO_CENTRES: Centres = dict.fromkeys(get_args(DecoderBias), 0.0)
"""Nothing is added to an initial b_dec: there is no text to take a centre from."""


def initial_state(groups: tuple[Group, ...], width: int, train: TrainConfig) -> SweepState:
    """The state of the members at step 0."""
    return init_sweep(groups, width, train, NO_CENTRES)


def many(
    state: SweepState, groups: tuple[Group, ...], x: jax.Array, weights: jax.Array, last: int, train: TrainConfig
) -> tuple[SweepState, jax.Array]:
    """A step on each of the first `last` batches of x[steps, B, D]; the state after it, and METRICS [steps, M, 3]."""
    forms = tuple(group.form for group in groups)
    return update_many(state, x, weights, 0, last, 0, forms=forms, train=train)


def stepper(groups: tuple[Group, ...], train: TrainConfig, x: jax.Array) -> Callable[[], jax.Array]:
    """A function that goes on with a step on each batch of x[steps, B, D]; gives losses per element [steps, M]."""
    state = [initial_state(groups, x.shape[-1], train)]
    weights = jnp.ones(x.shape[:2])

    def run() -> jax.Array:
        state[0], metrics = many(state[0], groups, x, weights, len(x), train)
        return metrics[..., 0]

    return run
