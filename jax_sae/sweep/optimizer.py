"""A member's learning rate and the sweep's settings -> its Optax transformation."""

import jax
import jax.numpy as jnp
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


def scale_by_adam(beta1: float, beta2: float, epsilon: float = 1e-8) -> optax.GradientTransformation:
    """Gradients g -> m^ / (sqrt(v^) + epsilon), as `optax.scale_by_adam` and with its state, in fewer operations.

    m and v are the averages of g and of g^2; m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t) with the number of the
    step t, from 1. Optax divides three times for each parameter; here the two corrections are reciprocals, computed
    once. At small batches that is a fifth of a training step (docs/performance.md).
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.nu, gradients)
        correct_mu, correct_nu = 1 / (1 - beta1**count), 1 / (1 - beta2**count)
        updates = jax.tree.map(lambda m, v: m * correct_mu / (jnp.sqrt(v * correct_nu) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(learning_rate: jax.Array, train: TrainConfig) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) with the member's own, traced, learning rate.

    It is made inside the vmapped update, so that learning rates may differ between the members of a group.
    """
    relative = relative_schedule(train)

    def schedule(step: jax.Array) -> jax.Array:
        return learning_rate * relative(step)

    return optax.chain(scale_by_adam(train.beta1, train.beta2), optax.scale_by_learning_rate(schedule))
