"""A member's learning rate, its schedule and the warm-up of its penalty; Adam."""

import typing
from dataclasses import asdict
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_sae.autoencoder.model import Values
from jax_sae.config import SETTINGS, Member, Moments, Precision, Schedule, TrainConfig
from jax_sae.sweep.members import settings_of
from jax_sae.sweep.resampling import resampling_steps


class Compiled(Protocol):
    """Settings of [train] for which a step is compiled; all others are traced, in `MemberState.settings`."""

    @property
    def precision(self) -> Precision:
        """Of the products."""

    @property
    def moments(self) -> Moments:
        """What Adam's are kept in."""

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


def scale_by_adam(
    beta1: float, beta2: float, epsilon: float = 1e-8, moments: Moments = "float32"
) -> optax.GradientTransformation:
    """Gradients g -> m^ / (sqrt(v^) + epsilon), as `optax.scale_by_adam` and with its state, in fewer operations.

    m and v are the averages of g and of g^2; m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t) with the number of the
    step t, from 1. Optax divides three times for each parameter; here the two corrections are reciprocals, computed
    once. At small batches that is a fifth of a training step (docs/performance.md).

    With `moments` 'bfloat16' m and v are kept in 16 bits. A step changes v by less than these can tell, so v is rounded
    up or down at random, in proportion: on average it is right. The same step rounds the same way each time.
    """
    dtype = jnp.dtype(moments)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        def zeros() -> optax.Updates:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

        return optax.ScaleByAdamState(jnp.int32(0), zeros(), zeros())

    def update(
        gradients: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m.astype(jnp.float32) + (1 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v.astype(jnp.float32) + (1 - beta2) * jnp.square(g), state.nu, gradients)
        correct_mu, correct_nu = (1 / (1 - jnp.float32(beta) ** count) for beta in (beta1, beta2))
        updates = jax.tree.map(lambda m, v: m * correct_mu / (jnp.sqrt(v * correct_nu) + epsilon), mu, nu)
        if moments == "bfloat16":
            mu = jax.tree.map(lambda m: m.astype(dtype), mu)
            nu = jax.tree.map(lambda v, g: rounded_at_random(v, g, count), nu, gradients)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def rounded_at_random(v: jax.Array, g: jax.Array, count: jax.Array) -> jax.Array:
    """v, float32 and none below 0, as bfloat16: up or down in proportion to how near it is, so right on average.

    The 16 bits that are lost are compared with 16 that are mixed of the step's number and of the bits of g: random for
    most purposes, without a generator's cost, and the same each time (the mixing is that of MurmurHash3, A. Appleby).
    """
    bits = jax.lax.bitcast_convert_type(g, jnp.uint32) ^ (count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(factor)
        bits = bits ^ (bits >> shift)
    up = jax.lax.bitcast_convert_type(v, jnp.uint32) + (bits & jnp.uint32(0xFFFF))
    return jax.lax.bitcast_convert_type(up & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def make_optimizer(settings: Values, train: Compiled) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) with the member's own, traced, learning rate.

    It is made inside the vmapped update, so that learning rates and schedules may differ between members of a group.
    """

    def schedule(step: jax.Array) -> jax.Array:
        return settings["learning_rate"] * relative_learning_rate(step, settings)

    return optax.chain(
        scale_by_adam(train.beta1, train.beta2, moments=train.moments), optax.scale_by_learning_rate(schedule)
    )
