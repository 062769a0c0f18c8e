"""One optimiser step of a member; many steps of a group (the only vmap), and of the sweep, in one dispatch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_sae.autoencoder.loss import Terms, loss_per_element
from jax_sae.autoencoder.model import Autoencoder, Params, Values, along_the_sphere, init_params, loss, unit_rows
from jax_sae.autoencoder.shards import DATA, FEATURE, WHOLE, Shards
from jax_sae.config import SETTINGS, DecoderBias, Member, TrainConfig
from jax_sae.sweep.groups import Form, Group, inputs_and_targets
from jax_sae.sweep.members import settings_of
from jax_sae.sweep.mesh import computed_on, of_members, shards_of, specs, spread
from jax_sae.sweep.optimizer import Compiled, clipping, make_optimizer, penalty_ramp, traced_settings
from jax_sae.sweep.resampling import OF_NO_FEATURE, resample

METRICS = ("loss_per_element", "penalty_per_element", "l0")
"""What is told of each step: the squared error and all else that is minimised, both per token and per element of x, in
(normalised units)^2, before the step; and the mean number of active features a token."""

Centres = Mapping[DecoderBias, np.ndarray | float]
"""By its name, what is added to an initial b_dec: [D] of a batch, in normalised units."""


class MemberState(NamedTuple):
    """What the next step of a member needs; in a group, each array has a leading axis M."""

    params: Params
    opt_state: Any
    settings: dict[str, jax.Array]
    """As `traced_settings` gives them; they do not change."""
    memory: dict[str, jax.Array]
    """What its kind remembers, and `tokens_since_fired` [F] int32 where dead features matter."""
    diverged: jax.Array
    """[] bool: a loss or a gradient was not finite, and the member stays as it was before that step."""


SweepState = tuple[MemberState, ...]
"""A stacked state for each group."""


def init_member(
    member: Member, width: int, train: TrainConfig, centres: Centres, written: tuple[int, ...] = ()
) -> MemberState:
    """The state of a complete member at step 0, at its own number of features F.

    Args:
        member: as `sweep_members` completes it.
        width: D, of what it reads.
        train: its steps, schedules and batch size become the state's `settings`, its `precision` the products'.
        centres: of what it writes, normalised; what `decoder_bias` names is added to b_dec.
        written: widths of the places that it writes; none of an autoencoder.
    """
    form = Group((member,), ("",)).form
    start = {name: value for name, value in settings_of(member).items() if SETTINGS[name].initial}
    model = form.model(width, train.precision).clone(**start, written=written)
    params = init_params(model, member.seed)
    params["b_dec"] = params["b_dec"] + centres[member.decoder_bias or "zero"]
    if form.unit_decoder:
        params["W_dec"] = unit_rows(params["W_dec"])
    memory = model.initial_memory()
    if form.counts_tokens:
        memory["tokens_since_fired"] = jnp.zeros(member.features, jnp.int32)
    settings = traced_settings(member, train)
    return MemberState(params, make_optimizer(settings, train).init(params), settings, memory, jnp.bool(False))


def stack(states: list[MemberState], padded: MemberState) -> MemberState:
    """Stack members of a group, each padded with zeros to the shapes of `padded`, in NumPy: nothing is compiled.

    Zeros stay zeros: a padded feature has pre-activation 0, so its activation, the gradients of its weights and bias,
    and what an optimiser makes of them are 0. `unstack` is the inverse.
    """

    def pad(like: jax.Array, *leaves: jax.Array) -> np.ndarray:
        stacked = np.zeros((len(leaves), *like.shape), like.dtype)
        for i, leaf in enumerate(leaves):
            place: Any = (i, *map(slice, leaf.shape))
            stacked[place] = leaf
        return stacked

    return jax.tree.map(pad, padded, *states)


def stack_traced(states: list[MemberState], padded: MemberState) -> MemberState:
    """`stack` of members that are traced."""

    def pad(like: jax.Array, *leaves: jax.Array) -> jax.Array:
        zeros = jnp.zeros((len(leaves), *like.shape), like.dtype)
        for i, leaf in enumerate(leaves):
            zeros = zeros.at[(i, *map(slice, jnp.shape(leaf)))].set(leaf)
        return zeros

    return jax.tree.map(pad, padded, *states)


def unstack(stacked: MemberState, shapes: list[MemberState]) -> list[MemberState]:
    """The members of a group, each trimmed to its own shapes."""

    def trim(i: int, like: jax.ShapeDtypeStruct, leaf: jax.Array) -> jax.Array:
        return leaf[i][tuple(slice(n) for n in like.shape)]

    return [jax.tree.map(partial(trim, i), shape, stacked) for i, shape in enumerate(shapes)]


def member_shapes(group: Group, width: int, train: TrainConfig) -> list[MemberState]:
    """Shapes and dtypes of each member's state, at its own number of features; computes nothing.

    `width` is that of the batches, as for `init_sweep`.
    """
    return [_member_shape(member, group.form, group.width(width), train) for member in group.members]


@cache  # tracing takes a tenth of a second, and each save of a checkpoint asks
def _member_shape(member: Member, form: Form, width: int, train: TrainConfig) -> MemberState:
    """Of one; its form holds its class, so that one that is defined anew under the same name has its own shapes."""
    zero: Centres = dict.fromkeys(get_args(DecoderBias), 0.0)
    return jax.eval_shape(partial(init_member, member, width, train, zero, form.written))


def padded_shape(shapes: list[MemberState]) -> MemberState:
    """The shapes of the widest member."""
    return max(shapes, key=lambda shape: shape.params["W_enc"].shape)


def init_sweep(
    groups: tuple[Group, ...], width: int, train: TrainConfig, centres: Centres, mesh: Mesh | None = None
) -> SweepState:
    """The state of every member at step 0; a member's initial values do not depend on the others.

    Arguments are as for `init_member`, but `width` and `centres` are those of the batches, which may have the columns
    of several places. Of each group, every array has a leading axis M, and F of the widest member; `unstack` gives back
    the members at their own. On a `mesh` each device is given its part; where features lie in parts, no device ever
    holds more.
    """

    def own(group: Group) -> Centres:
        return {
            name: inputs_and_targets(centre, group)[1] if np.ndim(centre) else centre
            for name, centre in centres.items()
        }

    def begun(combine: Callable[[list[MemberState], MemberState], MemberState]) -> SweepState:
        return tuple(
            combine(
                [
                    init_member(member, group.width(width), train, own(group), group.form.written)
                    for member in group.members
                ],
                padded_shape(member_shapes(group, width, train)),
            )
            for group in groups
        )

    if mesh is None:
        return jax.device_put(begun(stack))
    if mesh.shape[FEATURE] == 1:
        return spread(begun(stack), mesh)
    return computed_on(mesh, partial(begun, stack_traced))


def update_member(
    state: MemberState,
    x: jax.Array,
    weights: jax.Array,
    step: jax.Array,
    any_dead: jax.Array | bool = True,
    targets: jax.Array | None = None,
    *,
    form: Form,
    train: Compiled,
) -> tuple[MemberState, jax.Array]:
    """One optimiser step of one member on a batch x[B, D] with weights[B]; also its METRICS [3], float32.

    A pure function, to be compiled, mapped or scanned over.

    A step whose loss or squared gradient norm is not finite is not taken, nor is any after it: the member keeps its
    last finite state, and its metrics are NaN from there on. No member sees another's numbers.

    Args:
        state: of the member.
        x: [B, D] float32, what it reads, normalised: mean 0, and |x|^2 is D on average.
        weights: [B] float32, 1 for a token, 0 for padding.
        step: [] int32, steps before this one; schedules go by it.
        any_dead: [] bool, whether AuxK is worth computing; True is always right.
        targets: [B, D_written] float32, what it is to write, normalised likewise; None: x.
        form: what the member shares with those that are computed together, as its group gives it.
        train: the settings that the state was made with.
    """
    targets = x if targets is None else targets
    model = form.model(x.shape[-1], train.precision)
    shards = form.shards
    dead = dead_features(state, shards)
    ramp = penalty_ramp(step, state.settings)
    values: dict[str, Any] = {**state.settings, **state.memory, "ramp": ramp, "dead": dead, "any_dead": any_dead}
    terms, gradient = terms_and_gradient(model, state.params, values, x, weights, targets)
    tokens = jnp.sum(weights)
    if shards.data > 1:  # the only time that gradients are sent, all at once
        sums = (terms._replace(smallest=jnp.float32(0)), gradient, tokens)
        of_all, gradient, tokens = jax.lax.psum(sums, DATA)
        terms = of_all._replace(smallest=terms.smallest)
    if form.unit_decoder:
        gradient["W_dec"] = along_the_sphere(gradient["W_dec"], state.params["W_dec"])
    squared_norm = squared_norm_of(gradient, shards)
    factor = clipping(squared_norm, tokens, state.settings["clip"])
    gradient = jax.tree.map(lambda g: factor * g, gradient)
    updates, opt_state = make_optimizer(state.settings, train).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if form.unit_decoder:
        params["W_dec"] = unit_rows(params["W_dec"])
    memory = dict(model.remember(state.memory, terms))
    if form.counts_tokens:
        memory["tokens_since_fired"] = count_tokens(state.memory["tokens_since_fired"], terms.fired, tokens)
    after = state._replace(params=params, opt_state=opt_state, memory=memory)
    if form.resamples:
        after = resample_at_its_steps(after, x, targets, weights, step, form=form, train=train)
    total = terms.squared_error + terms.penalty
    diverged = state.diverged | ~jnp.isfinite(total + squared_norm)
    after = jax.tree.map(lambda old, new: jnp.where(diverged, old, new), state, after)
    metrics = jnp.stack(
        [
            loss_per_element(terms.squared_error, tokens, targets.shape[-1]),
            loss_per_element(terms.penalty, tokens, targets.shape[-1]),
            shards.over_features(jnp.sum(terms.fired)) / jnp.maximum(tokens, 1),
        ]
    )
    return after._replace(diverged=diverged), jnp.where(diverged, jnp.nan, metrics)


def squared_norm_of(gradient: Params, shards: Shards) -> jax.Array:
    """|g|^2, over all parameters of a member."""
    if shards.feature == 1:
        return optax.tree.norm(gradient, squared=True)
    of_features = {name: g for name, g in gradient.items() if name not in OF_NO_FEATURE}
    shared = {name: g for name, g in gradient.items() if name in OF_NO_FEATURE}
    own, also = (optax.tree.norm(each, squared=True) for each in (of_features, shared))
    return shards.over_features(own) + also


def terms_and_gradient(
    model: Autoencoder,
    params: Params,
    values: Values,
    x: jax.Array,
    weights: jax.Array,
    targets: jax.Array | None = None,
) -> tuple[Terms, Params]:
    """The terms of a member's loss on a batch x[B, D] with weights[B], and its gradient.

    Without `targets`[B, D_written], or where they are x itself, x is what is to be written. Summed a part of the batch
    at a time, unless the kind couples tokens.
    """

    def total(
        params: Params, weights: jax.Array, x: jax.Array, targets: jax.Array | None = None
    ) -> tuple[jax.Array, Terms]:
        terms = loss(model, params, values, x, weights, targets)
        return terms.squared_error + terms.penalty, terms

    def of_rows(*rows: jax.Array) -> tuple[Terms, Params]:
        (_, terms), gradient = jax.value_and_grad(total, has_aux=True)(params, *rows)
        return terms, gradient

    batch = (weights, x) if targets is None or targets is x else (weights, x, targets)
    rows = rows_at_a_time(len(x), model.couples_tokens or model.shards.feature > 1)  # what is sent is sent at once
    if rows == len(x):
        return of_rows(*batch)

    def add_part(i: jax.Array, sums: tuple[Terms, Params]) -> tuple[Terms, Params]:
        part = (jax.lax.dynamic_slice_in_dim(each, i * rows, rows) for each in batch)
        return jax.tree.map(jnp.add, sums, of_rows(*part))

    shapes = jax.eval_shape(of_rows, *(each[:rows] for each in batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, len(x) // rows, add_part, zeros)


def rows_at_a_time(batch_tokens: int, couples_tokens: bool = False) -> int:
    """Rows of a batch whose activations are held at once.

    On a CPU the largest divisor of B from 256 to 1024, so that the passes between the products stay in the caches
    (docs/performance.md); where there is none, on other devices, which want large products, and for kinds whose loss is
    no sum over tokens, all of them.
    """
    if couples_tokens or batch_tokens <= 1024 or jax.default_backend() != "cpu":
        return batch_tokens
    return max((rows for rows in range(256, 1025) if batch_tokens % rows == 0), default=batch_tokens)


def dead_features(state: MemberState, shards: Shards = WHOLE) -> jax.Array:
    """Features [F] that have not fired for `dead_after_tokens` tokens; none of padding, or where it is not counted."""
    F = state.params["W_enc"].shape[-1]
    if "tokens_since_fired" not in state.memory:
        return jnp.zeros(F, bool)
    is_own = shards.feature_numbers(F) < state.settings["features"]
    return is_own & (state.memory["tokens_since_fired"] >= state.settings["dead_after_tokens"])


def count_tokens(since_fired: jax.Array, fired: jax.Array, tokens: jax.Array) -> jax.Array:
    """`tokens_since_fired` after a batch with so many tokens, on `fired`[F] of which each fired; at most 2^31 - 1."""
    new = tokens.astype(jnp.int32)
    return jnp.where(fired > 0, 0, jnp.minimum(since_fired, np.iinfo(np.int32).max - new) + new)


def resample_at_its_steps(
    state: MemberState,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    step: jax.Array,
    *,
    form: Form,
    train: Compiled,
) -> MemberState:
    """The state with dead features resampled, after the steps `resampled_after`; else as it is."""
    model = form.model(x.shape[-1], train.precision)

    def resampled(state: MemberState) -> MemberState:
        dead = dead_features(state, form.shards)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.settings["seed"]), step)
        values = {**state.settings, **state.memory}
        adam, *rest = state.opt_state
        params, adam = resample(model, state.params, adam, values, dead, x, weights, key, targets)
        since_fired = jnp.where(dead, 0, state.memory["tokens_since_fired"])
        memory = {**state.memory, "tokens_since_fired": since_fired}
        return state._replace(params=params, opt_state=(adam, *rest), memory=memory)

    is_due = jnp.any(state.settings["resampled_after"] == step + 1)
    return jax.lax.cond(is_due, resampled, lambda state: state, state)


def update_group(
    group: MemberState,
    x: jax.Array,
    weights: jax.Array,
    first: int | jax.Array,
    last: int | jax.Array,
    step: int | jax.Array,
    *,
    form: Form,
    train: Compiled,
) -> tuple[MemberState, jax.Array]:
    """A step of every member of a group on each of the batches first, ..., last - 1; also METRICS [M, batches, 3].

    The members are computed at once; on a CPU one after another, each all of its steps, so that its state stays in the
    caches (docs/performance.md), unless they send something to other devices, which they do at once. The values are the
    same. Arguments are as for `update_many`.
    """
    update = partial(update_member, form=form, train=train)
    M, batches = len(group.diverged), len(x)

    def of_member(member: MemberState) -> tuple[MemberState, jax.Array]:
        def body(i: jax.Array, carry: tuple[MemberState, jax.Array]) -> tuple[MemberState, jax.Array]:
            member, metrics = carry
            inputs, targets = inputs_and_targets(x[i], form)
            any_dead = jnp.any(dead_features(member))
            member, of_step = update(member, inputs, weights[i], step + i - first, any_dead, targets)
            return member, metrics.at[i].set(of_step)

        return jax.lax.fori_loop(first, last, body, (member, jnp.zeros((batches, len(METRICS)), jnp.float32)))

    def of_all(i: jax.Array, carry: tuple[MemberState, jax.Array]) -> tuple[MemberState, jax.Array]:
        group, metrics = carry
        any_dead = form.shards.any_feature(jax.vmap(partial(dead_features, shards=form.shards))(group))
        inputs, targets = inputs_and_targets(x[i], form)
        at_once = jax.vmap(lambda member: update(member, inputs, weights[i], step + i - first, any_dead, targets))
        group, of_step = at_once(group)
        return group, metrics.at[:, i].set(of_step)

    if jax.default_backend() == "cpu" and form.shards == WHOLE:
        return jax.lax.map(of_member, group)
    return jax.lax.fori_loop(first, last, of_all, (group, jnp.zeros((M, batches, len(METRICS)), jnp.float32)))


@jax.jit
def snapshot(state: SweepState) -> SweepState:
    """A copy of a state, to be saved while `update_many` goes on and donates the original."""
    return jax.tree.map(jnp.copy, state)


def update_many(
    state: SweepState,
    x: jax.Array,
    weights: jax.Array,
    first: int | jax.Array,
    last: int | jax.Array,
    step: int | jax.Array,
    *,
    forms: tuple[Form, ...],
    train: TrainConfig,
    mesh: Mesh | None = None,
) -> tuple[SweepState, jax.Array]:
    """A step on each of the batches first, ..., last - 1 of a run, in one dispatch.

    The number of steps is traced (`lax.fori_loop`, which compiles to the same loop as `lax.scan`), so that one compiled
    program serves up to the next checkpoint as well as the whole run, and a resumed run computes the same bits. It is
    compiled once for all runs whose members have these forms, Adam's betas and the products' precision.

    Args:
        state: as `init_sweep` gives it. It is donated: use the one that comes back.
        x: [batches, B, D] float32, normalised: mean 0, and |x|^2 is D on average. With groups at several places these
            stand side by side, each normalised by itself, as `make_groups` was told.
        weights: [batches, B] float32, 1 for a token, 0 for padding.
        first: number of the first batch to use.
        last: number after the last.
        step: steps before the first of them; schedules go by it.
        forms: of the groups, in their order.
        train: the settings that the state was made with.
        mesh: on which the state and the batches lie, as `mesh.spread` and `mesh.batches_on` put them there.

    Returns:
        The state after them, and METRICS [batches, M, 3] float32, 0 outside first to last; M are the members of all
        groups, in the groups' order. On a mesh each group's are followed by those that fill its last part.
    """
    compiled_for = TrainConfig(
        precision=train.precision, moments=train.moments, beta1=train.beta1, beta2=train.beta2
    )  # the rest is traced
    return _update_many(state, x, weights, first, last, step, forms=forms, train=compiled_for, mesh=mesh)


@partial(jax.jit, static_argnames=("forms", "train", "mesh"), donate_argnames="state")
def _update_many(
    state: SweepState, *batches: Any, forms: tuple[Form, ...], train: Compiled, mesh: Mesh | None
) -> tuple[SweepState, jax.Array]:
    def here(state: SweepState, *batches: Any) -> tuple[SweepState, jax.Array]:
        """On one device, or what each device of a mesh does with its part of all that is given."""
        parts = WHOLE if mesh is None else shards_of(mesh)
        results = [
            update_group(group, *batches, form=replace(form, shards=parts), train=train)
            for group, form in zip(state, forms, strict=True)
        ]
        states, metrics = zip(*results, strict=True)
        if mesh is not None:  # once for all steps
            metrics = tuple(of_members(mesh, its) for its in metrics)
        return tuple(states), jnp.concatenate(metrics).swapaxes(0, 1)

    if mesh is None:
        return here(state, *batches)
    where = specs(state)
    of_batches = (P(None, DATA, None), P(None, DATA), P(), P(), P())
    # JAX's check of what is equal on which devices knows nothing of `Shards`, which says so itself.
    on_each = jax.shard_map(here, mesh=mesh, in_specs=(where, *of_batches), out_specs=(where, P()), check_vma=False)
    return on_each(state, *batches)
