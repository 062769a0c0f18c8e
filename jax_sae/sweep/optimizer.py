"""A member's learning rate and the sweep's settings -> its Optax transformation."""

import jax
import optax

from jax_sae.config import TrainConfig


def relative_schedule(train: TrainConfig) -> optax.Schedule:
    """The learning rate at each step (counted from 0) as a fraction of the member's peak.

    (step + 1) / (W + 1) during the warm-up of W = warmup * steps, rounded, steps; then 1, or falling to 0 at the end of
    the run: cosine (1 + cos(pi t)) / 2 or linear 1 - t, t from 0 to 1.
    """
    warmup_steps = round(train.warmup * train.steps)
    remaining = max(1, train.steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, remaining),
        "linear": optax.linear_schedule(1.0, 0.0, remaining),
    }[train.schedule]
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(1 / (warmup_steps + 1), 1.0, warmup_steps), after], [warmup_steps]
    )


def make_optimizer(learning_rate: jax.Array, train: TrainConfig) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) with the member's own, traced, learning rate.

    It is made inside the vmapped update, so that learning rates may differ between the members of a group.
    """
    relative = relative_schedule(train)

    def schedule(step: jax.Array) -> jax.Array:
        return learning_rate * relative(step)

    return optax.adam(schedule, b1=train.beta1, b2=train.beta2)
