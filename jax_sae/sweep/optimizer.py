"""A member's learning rate, its schedule and the warm-up of its penalty; Adam."""

import typing
from dataclasses import asdict
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_sae.autoencoder.model import Values
from jax_sae.config import SETTINGS, Member, Precision, Schedule, TrainConfig
from jax_sae.sweep.members import settings_of
from jax_sae.sweep.resampling import resampling_steps


class Compiled(Protocol):
    """Settings of [train] for which a step is compiled; all others are traced, in `MemberState.settings`."""

    @property
    def precision(self) -> Precision:
        """Of the products."""

    @property
    def beta1(self) -> float:
        """Adam's."""

    @property
    def beta2(self) -> float:
        """Adam's."""


MOST_TOKENS_TO_DIE = 10_000_000
"""After so many tokens without firing a feature is dead (Gao et al. 2024, A.2), or after a tenth of a shorter run."""

SCHEDULES: tuple[str, ...] = typing.get_args(Schedule)


def traced_settings(member: Member, train: TrainConfig) -> dict[str, Any]:
    """The settings that a step of a complete member needs, as scalars that may be traced and differ in a group.

    They are those that `config.SETTINGS` says are traced, NumPy's scalars of its dtypes. Parts of the steps become
    `warmup_steps`, `decay_steps` and `penalty_warmup_steps`; `schedule` is its place in `config.Schedule`, all int32;
    `dead_after_tokens` is a tenth of the run's, MOST_TOKENS_TO_DIE at most, where the member does not say it. What the
    kind does not have is 0. A member that is resampled has `resampled_after`, [resamples] int32, too.
    """
    tenth_of_the_run = max(1, train.steps * train.batch_tokens // 10)
    unless_said = {**asdict(train), "dead_after_tokens": min(MOST_TOKENS_TO_DIE, tenth_of_the_run)}
    given = unless_said | settings_of(member)
    warmup_steps = round(given["warmup"] * train.steps)
    of_schedules = {
        "schedule": SCHEDULES.index(given["schedule"]),
        "warmup_steps": warmup_steps,
        "decay_steps": round(given["decay"] * (train.steps - warmup_steps)),
        "steps": train.steps,
        "penalty_warmup_steps": round(given["penalty_warmup"] * train.steps),
    }
    traced = {name: facts.traced for name, facts in SETTINGS.items() if facts.traced}
    return {
        **{name: np.dtype(dtype).type(given.get(name, 0)) for name, dtype in traced.items()},
        **{name: np.int32(value) for name, value in of_schedules.items()},
        **({"resampled_after": resampling_steps(member.resamples, train.steps)} if member.resamples else {}),
    }


def relative_learning_rate(step: jax.Array | int, settings: Values) -> jax.Array:
    """The learning rate at a step, counted from 0, as a part of the member's peak.

    (step + 1) / (W + 1) during the warm-up of W steps; then 1, and in the last `decay_steps` falling to 0 at the end of
    the run: cosine (1 + cos(pi t)) / 2 or linear 1 - t, t from 0 to 1.
    """
    W, decay, steps = (settings[name] for name in ("warmup_steps", "decay_steps", "steps"))
    t = jnp.clip(jnp.float32(step - (steps - decay)) / jnp.maximum(decay, 1), 0, 1)
    falling = jnp.stack([jnp.ones_like(t), (1 + jnp.cos(jnp.pi * t)) / 2, 1 - t])
    after = jnp.take_along_axis(falling, settings["schedule"][None], 0)[0]
    return jnp.where(step < W, jnp.float32(step + 1) / (W + 1), after)


def penalty_ramp(step: jax.Array, settings: Values) -> jax.Array:
    """The part of the penalty that counts at a step, counted from 0: (step + 1) / (W + 1) in W steps, then 1."""
    W = settings["penalty_warmup_steps"]
    return jnp.minimum(jnp.float32(step + 1) / (W + 1), 1)


def clipping(squared_norm: jax.Array, tokens: jax.Array, clip: jax.Array) -> jax.Array:
    """What the gradient g of a loss summed over `tokens` is multiplied by: min(1, clip / |g / tokens|); 1 if clip is 0.

    So a batch with a few very large tokens moves the parameters no further than others. The unit of `clip` is that of
    the loss averaged over tokens, with |x|^2 equal to D on average, and does not depend on B. Pascanu et al. 2013
    (https://arxiv.org/abs/1211.5063), section 3.2; Anthropic, "Circuits Updates - April 2024", clips to 1.

    Args:
        squared_norm: [] |g|^2, over all parameters of one member.
        tokens: [] of the batch.
        clip: [] largest norm.
    """
    norm = jnp.sqrt(squared_norm) / jnp.maximum(tokens, 1)
    return jnp.where((clip > 0) & (norm > clip), clip / norm, 1.0)


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
        correct_mu, correct_nu = (1 / (1 - jnp.float32(beta) ** count) for beta in (beta1, beta2))
        updates = jax.tree.map(lambda m, v: m * correct_mu / (jnp.sqrt(v * correct_nu) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(settings: Values, train: Compiled) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) with the member's own, traced, learning rate.

    It is made inside the vmapped update, so that learning rates and schedules may differ between members of a group.
    """

    def schedule(step: jax.Array) -> jax.Array:
        return settings["learning_rate"] * relative_learning_rate(step, settings)

    return optax.chain(scale_by_adam(train.beta1, train.beta2), optax.scale_by_learning_rate(schedule))
