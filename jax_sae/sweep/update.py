"""One optimiser step: of a member, of a group (the only vmap), of the sweep; and many steps in one dispatch."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_sae.autoencoder.loss import loss_per_element, squared_error
from jax_sae.autoencoder.model import Autoencoder, Params, init_params, reconstruct
from jax_sae.config import Member, Precision, SweepConfig, TrainConfig
from jax_sae.sweep.members import Group
from jax_sae.sweep.optimizer import make_optimizer


class MemberState(NamedTuple):
    """What the next step of a member needs; in a group, each array has a leading axis M."""

    params: Params
    opt_state: Any
    learning_rate: jax.Array
    diverged: jax.Array
    """[] bool: a loss or a gradient was not finite, and the member stays as it was before that step."""


SweepState = tuple[MemberState, ...]
"""A stacked state for each group."""


def init_member(member: Member, width: int, sweep: SweepConfig, train: TrainConfig) -> MemberState:
    """The state of a member at step 0, at its own number of features."""
    model = Autoencoder(width, member.features, sweep.initialization, sweep.encoder_bias)
    params = init_params(model, member.seed)
    learning_rate = jnp.float32(member.learning_rate)
    return MemberState(params, make_optimizer(learning_rate, train).init(params), learning_rate, jnp.bool(False))


def stack(states: list[MemberState], padded: MemberState) -> MemberState:
    """Stack members of a group, each padded with zeros to the shapes of `padded`.

    Zeros stay zeros: a padded feature has pre-activation 0, so its activation, the gradients of its weights and bias,
    and what an optimiser makes of them are 0. `unstack` is the inverse.
    """

    def pad(like: jax.Array, *leaves: jax.Array) -> jax.Array:
        zeros = jnp.zeros(like.shape, like.dtype)
        return jnp.stack([zeros.at[tuple(slice(n) for n in leaf.shape)].set(leaf) for leaf in leaves])

    return jax.tree.map(pad, padded, *states)


def unstack(stacked: MemberState, shapes: list[MemberState]) -> list[MemberState]:
    """The members of a group, each trimmed to its own shapes."""

    def trim(i: int, like: jax.ShapeDtypeStruct, leaf: jax.Array) -> jax.Array:
        return leaf[i][tuple(slice(n) for n in like.shape)]

    return [jax.tree.map(partial(trim, i), shape, stacked) for i, shape in enumerate(shapes)]


def member_shapes(group: Group, width: int, sweep: SweepConfig, train: TrainConfig) -> list[MemberState]:
    """Shapes and dtypes of each member's state, at its own number of features; computes nothing."""
    return [jax.eval_shape(partial(init_member, member, width, sweep, train)) for member in group.members]


def padded_shape(shapes: list[MemberState]) -> MemberState:
    """The shapes of the widest member."""
    return max(shapes, key=lambda shape: shape.params["b_enc"].shape)


def init_sweep(groups: tuple[Group, ...], width: int, sweep: SweepConfig, train: TrainConfig) -> SweepState:
    """The state of every member at step 0; a member's initial values do not depend on the others."""
    return tuple(
        stack(
            [init_member(member, width, sweep, train) for member in group.members],
            padded_shape(member_shapes(group, width, sweep, train)),
        )
        for group in groups
    )


def update_member(
    state: MemberState, x: jax.Array, weights: jax.Array, *, train: TrainConfig
) -> tuple[MemberState, jax.Array]:
    """One optimiser step of one member on a batch x[B, D] with weights[B]; also its loss per element before it.

    A step whose squared error or squared gradient norm is not finite is not taken, nor is any after it: the member
    keeps its last finite state, and its loss is NaN from there on. No member sees another's numbers.
    """
    error, gradient = error_and_gradient(state.params, x, weights, train.precision)
    updates, opt_state = make_optimizer(state.learning_rate, train).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    diverged = state.diverged | ~jnp.isfinite(error + optax.tree.norm(gradient, squared=True))
    after = state._replace(params=params, opt_state=opt_state)
    after = jax.tree.map(lambda old, new: jnp.where(diverged, old, new), state, after)
    per_element = jnp.where(diverged, jnp.nan, loss_per_element(error, weights, x.shape[-1]))
    return after._replace(diverged=diverged), per_element


def error_and_gradient(
    params: Params, x: jax.Array, weights: jax.Array, precision: Precision
) -> tuple[jax.Array, Params]:
    """The squared error of a member on a batch x[B, D] with weights[B], and its gradient; summed a part at a time."""

    def error(params: Params, x: jax.Array, weights: jax.Array) -> jax.Array:
        return squared_error(x, reconstruct(params, x, precision), weights)

    rows = rows_at_a_time(len(x))
    if rows == len(x):
        return jax.value_and_grad(error)(params, x, weights)

    def add_part(i: jax.Array, sums: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        part = (jax.lax.dynamic_slice_in_dim(each, i * rows, rows) for each in (x, weights))
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(error)(params, *part))

    return jax.lax.fori_loop(0, len(x) // rows, add_part, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)))


def rows_at_a_time(batch_tokens: int) -> int:
    """Rows of a batch whose activations are held at once.

    On a CPU the largest divisor of B from 256 to 1024, so that the passes between the products stay in the caches
    (docs/performance.md); where there is none, and on other devices, which want large products, all of them.
    """
    if batch_tokens <= 1024 or jax.default_backend() != "cpu":
        return batch_tokens
    return max((rows for rows in range(256, 1025) if batch_tokens % rows == 0), default=batch_tokens)


def update_sweep(
    state: SweepState, x: jax.Array, weights: jax.Array, *, train: TrainConfig
) -> tuple[SweepState, jax.Array]:
    """One step of every member of every group on the same batch; also losses per element [M], in groups' order."""
    states, losses = zip(*[update_group(group, x, weights, train=train) for group in state], strict=True)
    return tuple(states), jnp.concatenate(losses)


def update_group(
    group: MemberState, x: jax.Array, weights: jax.Array, *, train: TrainConfig
) -> tuple[MemberState, jax.Array]:
    """One step of every member of a group on the same batch; also losses per element [M].

    The members of a group are computed at once; on a CPU one after another, so that what one of them needs stays in the
    caches (docs/performance.md). The values are the same.
    """
    update = partial(update_member, train=train)
    if jax.default_backend() != "cpu":
        return jax.vmap(update, in_axes=(0, None, None))(group, x, weights)
    return jax.lax.map(lambda member: update(member, x, weights), group)


@jax.jit
def snapshot(state: SweepState) -> SweepState:
    """A copy of a state, to be saved while `update_many` goes on and donates the original."""
    return jax.tree.map(jnp.copy, state)


@partial(jax.jit, static_argnames="train", donate_argnames="state")
def update_many(
    state: SweepState, x: jax.Array, weights: jax.Array, first: jax.Array, last: jax.Array, *, train: TrainConfig
) -> tuple[SweepState, jax.Array]:
    """A step on each of the batches first, ..., last - 1 of a run, in one dispatch.

    The number of steps is traced (`lax.fori_loop`, which compiles to the same loop as `lax.scan`), so that one compiled
    program serves up to the next checkpoint as well as the whole run, and a resumed run computes the same bits.

    Args:
        state: is donated.
        x: [batches, B, D].
        weights: [batches, B].
        first: number of the first batch to use.
        last: number after the last.
        train: settings of the run.

    Returns:
        The state after them, and losses per element [batches, M], 0 outside first to last.
    """
    n_members = sum(group.learning_rate.shape[0] for group in state)

    def body(i: jax.Array, carry: tuple[SweepState, jax.Array]) -> tuple[SweepState, jax.Array]:
        state, losses = carry
        state, loss = update_sweep(state, x[i], weights[i], train=train)
        return state, losses.at[i].set(loss)

    return jax.lax.fori_loop(first, last, body, (state, jnp.zeros((x.shape[0], n_members), jnp.float32)))
