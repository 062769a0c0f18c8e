"""A sweep computes for each member what the member computes alone."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import NO_CENTRES, initial

from jax_sae.autoencoder.kinds.relu import ReLU
from jax_sae.autoencoder.loss import squared_error
from jax_sae.autoencoder.model import decode, encode, init_params
from jax_sae.config import Initialization, Member, SweepConfig, TrainConfig
from jax_sae.sweep import update
from jax_sae.sweep.groups import Group, make_groups
from jax_sae.sweep.members import complete, sweep_members
from jax_sae.sweep.optimizer import clipping, make_optimizer, relative_learning_rate, traced_settings
from jax_sae.sweep.update import (
    METRICS,
    MemberState,
    SweepState,
    init_sweep,
    member_shapes,
    rows_at_a_time,
    terms_and_gradient,
    unstack,
    update_many,
)

D, B, STEPS = 24, 32, 12
TRAIN = TrainConfig(steps=STEPS, batch_tokens=B, schedule="cosine", warmup=0.25)


@pytest.fixture
def data() -> tuple[jax.Array, jax.Array]:
    """Batches [STEPS, B, D], and weights with some padding."""
    x = jax.random.normal(jax.random.key(0), (STEPS, B, D)) * jnp.linspace(2, 0.1, D)
    weights = jnp.ones((STEPS, B)).at[:, -3:].set(0)
    return x, weights


@pytest.mark.long
@pytest.mark.parametrize("initialization", ["torch", "orthogonal"])
def test_initial_values_are_the_same_float32_with_64_bits_switched_on(initialization: Initialization) -> None:
    """Else a member would begin elsewhere, or not at all, in a program that sets JAX_ENABLE_X64."""
    member = Member(5, 1, 1e-3, "gated", l1_coefficient=1.0, initialization=initialization)
    with jax.enable_x64(True):
        wide = initial(member, 4, TRAIN)
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(initial(member, 4, TRAIN)), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def many(
    state: SweepState,
    groups: tuple[Group, ...],
    data: tuple[jax.Array, jax.Array],
    first: int,
    last: int,
    train: TrainConfig = TRAIN,
) -> tuple[SweepState, jax.Array]:
    """The steps on batches first to last - 1 of a run that begins with the data."""
    forms = tuple(group.form for group in groups)
    return update_many(state, *data, first, last, first, forms=forms, train=train)


def trained(sweep: SweepConfig, data: tuple[jax.Array, jax.Array]) -> dict[str, tuple[MemberState, np.ndarray]]:
    """Each member's final state, trimmed to its own width, and its losses."""
    groups = make_groups(sweep_members(sweep))
    forms = tuple(group.form for group in groups)
    state, metrics = update_many(init_sweep(groups, D, TRAIN, NO_CENTRES), *data, 0, STEPS, 0, forms=forms, train=TRAIN)
    losses = metrics[..., METRICS.index("loss_per_element")]
    results, column = {}, 0
    for group, stacked in zip(groups, state, strict=True):
        for name, member in zip(group.names, unstack(stacked, member_shapes(group, D, TRAIN)), strict=True):
            results[name] = (member, np.asarray(losses[:, column]))
            column += 1
    return results


def test_member_equals_its_solo_run(data: tuple[jax.Array, jax.Array]) -> None:
    """F = 4, 23 and 24 in one sweep, 23 padded to 24 beside it, against each of these; seeds and rates differ too."""
    members = (Member(4, 0, 1e-2), Member(23, 1, 3e-3), Member(24, 2, 1e-2))
    sweep = SweepConfig(members=members, initialization=("torch",))
    assert [group.names for group in make_groups(members)] == [("F4",), ("F23", "F24")]
    together = trained(sweep, data)
    for member in members[1:]:
        [(alone, losses)] = trained(replace(sweep, members=(member,)), data).values()
        state, losses_together = together[f"F{member.features}"]
        np.testing.assert_allclose(losses_together, losses, rtol=0, atol=1e-6)
        for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
            assert found.shape == expected.shape
            largest = max(1.0, float(np.abs(expected).max()))  # averages of gradients are sums of terms that cancel
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)


def test_767_beside_768_equals_its_solo_run() -> None:
    """At the real sizes, a few steps: the widths of the starting experiment in one padded group."""
    width, train = 768, TrainConfig(steps=3, batch_tokens=64)
    sweep = SweepConfig(features=(767, 768))
    x = jax.random.normal(jax.random.key(1), (3, 64, width))
    group, *rest = make_groups(sweep_members(sweep))
    assert group.names == ("F767", "F768") and not rest
    start = init_sweep((group,), width, train, NO_CENTRES)
    (state,), _ = update_many(start, x, jnp.ones((3, 64)), 0, 3, 0, forms=(group.form,), train=train)
    together = unstack(state, member_shapes(group, width, train))[0]
    form = make_groups(group.members[:1])[0].form
    step = jax.jit(partial(update.update_member, form=form, train=train))
    alone = initial(group.members[0], width, train)
    for i, batch in enumerate(x):
        alone, _ = step(alone, batch, jnp.ones(64), i, False)
    for name, value in alone.params.items():
        assert value.shape == together.params[name].shape
        np.testing.assert_allclose(together.params[name], value, rtol=0, atol=1e-6)


def test_padded_features_stay_exactly_zero(data: tuple[jax.Array, jax.Array]) -> None:
    """Parameters and moments of the feature that F = 23 does not have, after training beside F = 24."""
    sweep = SweepConfig(features=(23, 24), learning_rates=(1e-2,))
    groups = make_groups(sweep_members(sweep))
    (state,), _ = many(init_sweep(groups, D, TRAIN, NO_CENTRES), groups, data, 0, STEPS)
    moments = state.opt_state[0]
    for tree in (state.params, moments.mu, moments.nu):
        for name, axis in [("W_enc", 1), ("b_enc", 0), ("W_dec", 0)]:
            assert not np.any(np.asarray(tree[name][0]).take(-1, axis)), name
            assert np.any(np.asarray(tree[name][1]).take(-1, axis)), name


def test_initial_values_do_not_depend_on_the_other_members() -> None:
    """A member of a sweep begins where it begins alone."""
    sweep = SweepConfig(features=(23, 24))
    groups = make_groups(sweep_members(sweep))
    (state,) = init_sweep(groups, D, TRAIN, NO_CENTRES)
    first, _ = unstack(state, member_shapes(groups[0], D, TRAIN))
    alone = initial(Member(23), D, TRAIN)
    assert all(np.array_equal(first.params[name], alone.params[name]) for name in alone.params)


def test_step_is_traced_once(data: tuple[jax.Array, jax.Array], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatches of different lengths, over the same shapes, trace the member's step once a group."""
    traces = []
    original = update.update_member

    def counting(*args: object, **kwargs: object) -> object:
        traces.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(update, "update_member", counting)
    sweep = SweepConfig(features=(23, 24))
    train = replace(TRAIN, beta1=0.85)  # of its own, so that nothing was compiled for it before
    groups = make_groups(sweep_members(sweep))
    state = init_sweep(groups, D, train, NO_CENTRES)
    for first, last in [(0, 1), (1, 5), (5, STEPS), (0, STEPS)]:
        state, _ = many(state, groups, data, first, last, train)
    assert len(traces) == 1


def test_dispatches_of_any_length_give_the_same_bits(data: tuple[jax.Array, jax.Array]) -> None:
    """What resuming bit for bit rests on."""
    sweep = SweepConfig(features=(23, 24))
    groups = make_groups(sweep_members(sweep))
    whole, losses = many(init_sweep(groups, D, TRAIN, NO_CENTRES), groups, data, 0, STEPS)
    state = init_sweep(groups, D, TRAIN, NO_CENTRES)
    for first, last in [(0, 1), (1, 2), (2, 9), (9, STEPS)]:
        state, some = many(state, groups, data, first, last)
        assert np.array_equal(some[first:last], losses[first:last])
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(whole)))


def test_update_is_optax_on_the_gradient(data: tuple[jax.Array, jax.Array]) -> None:
    """One step of a member against Optax applied by hand to the formula of the gradient."""
    x, weights = data[0][0], data[1][0]
    member = complete(Member(7, learning_rate=1e-2, initialization="torch"))
    state = initial(member, D, TRAIN)
    p = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    pre = np.asarray(x, np.float64) @ p["W_enc"] + p["b_enc"]
    features = np.maximum(pre, 0)
    error = features @ p["W_dec"] + p["b_dec"] - np.asarray(x, np.float64)
    g = 2 * np.asarray(weights)[:, None] * error
    g_pre = (g @ p["W_dec"].T) * (pre > 0)
    gradient = {"W_enc": x.T @ g_pre, "b_enc": g_pre.sum(0), "W_dec": features.T @ g, "b_dec": g.sum(0)}
    expected_loss = (np.asarray(weights)[:, None] * error**2).sum() / (float(weights.sum()) * D)
    optimizer = make_optimizer(traced_settings(member, TRAIN), TRAIN)
    gradient = {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}
    updates, _ = optimizer.update(gradient, optimizer.init(state.params), state.params)
    form = make_groups((member,))[0].form
    new, metrics = jax.jit(partial(update.update_member, form=form, train=TRAIN))(state, x, weights, 0, False)
    l0 = (pre[:-3] > 0).sum(1).mean()
    np.testing.assert_allclose(metrics, [expected_loss, 0, l0], rtol=1e-5)
    for name, value in optax.apply_updates(state.params, updates).items():
        np.testing.assert_allclose(new.params[name], value, atol=2e-6)


def test_a_clip_limits_the_norm_of_the_members_own_mean_gradient(data: tuple[jax.Array, jax.Array]) -> None:
    """min(1, clip / |g|) of the gradient of the mean loss, which does not depend on B."""
    x, weights = data[0][0], data[1][0]
    moments = {}
    step = jax.jit(partial(update.update_member, form=make_groups((complete(Member(7)),))[0].form, train=TRAIN))
    for clip in (0.0, 1e-3, 1e6):
        member = complete(Member(7, learning_rate=1e-2, initialization="torch", clip=clip))
        state, _ = step(initial(member, D, TRAIN), x, weights, 0, False)
        moments[clip] = state.opt_state[0].mu
    assert all(map(np.array_equal, jax.tree.leaves(moments[0.0]), jax.tree.leaves(moments[1e6])))
    norm = {clip: float(optax.tree.norm(mu)) / (1 - TRAIN.beta1) for clip, mu in moments.items()}
    assert norm[1e-3] == pytest.approx(1e-3 * float(weights.sum()), rel=1e-4) and norm[0.0] > 2 * norm[1e-3]
    for clipped, whole in zip(jax.tree.leaves(moments[1e-3]), jax.tree.leaves(moments[0.0]), strict=True):
        np.testing.assert_allclose(clipped / norm[1e-3], whole / norm[0.0], rtol=1e-3, atol=1e-7)  # the same direction
    once, twice = (clipping(jnp.float32(n) ** 2 * 9, jnp.float32(n * 4), jnp.float32(0.5)) for n in (1, 2))
    assert float(once) == float(twice) == pytest.approx(0.5 / 0.75)
    assert float(clipping(jnp.float32(0), jnp.float32(0), jnp.float32(0.5))) == 1


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_schedule_rises_to_one_and_ends_as_it_says(schedule: str) -> None:
    """Warm-up from above 0 to 1, then constant, or 0 at the end."""
    train = TrainConfig(steps=100, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    settings = traced_settings(complete(Member(1)), train)
    values = np.array([relative_learning_rate(step, settings) for step in range(101)])
    assert 0 < values[0] < 0.1 + 1e-6 and values[10] == 1
    assert np.all(np.diff(values[:11]) > 0) and np.all(np.diff(values[10:]) <= 1e-7)
    assert values[100] == pytest.approx(1 if schedule == "constant" else 0, abs=1e-6)


def test_groups_hold_members_of_nearly_equal_width() -> None:
    """Narrowest first; names say what tells members of one width apart."""
    members = (Member(1000), Member(768, 1, 1e-3), Member(767), Member(100), Member(768, 0, 1e-2), Member(768, 0, 1e-3))
    groups = make_groups(members)
    assert [group.features for group in groups] == [100, 768, 1000]
    assert groups[1] == Group(
        (members[2], members[1], members[4], members[5]),
        ("F767", "F768-seed1-lr0.001", "F768-seed0-lr0.01", "F768-seed0-lr0.001"),
    )  # fmt: skip


def test_model_is_what_it_says() -> None:
    """decode(encode(x)) is the call; features are never negative; torch's bounds hold for every parameter."""
    model = ReLU(width=9, features=400)
    params = initial(Member(400, initialization="torch"), 9, TRAIN).params
    x = jax.random.normal(jax.random.key(3), (5, 9))
    features = encode(model, params, {}, x)
    assert float(jnp.min(features)) == 0
    expected = np.maximum(x @ params["W_enc"] + params["b_enc"], 0) @ params["W_dec"] + params["b_dec"]
    np.testing.assert_allclose(decode(model, params, features), expected, atol=1e-6)
    for name, fan_in in [("W_enc", 9), ("b_enc", 9), ("W_dec", 400), ("b_dec", 400)]:
        largest = float(jnp.max(jnp.abs(params[name])))
        assert 0.5 * fan_in**-0.5 < largest <= fan_in**-0.5, name


@pytest.mark.long
def test_orthogonal_initialisation_reconstructs_what_its_active_features_span() -> None:
    """With every feature active and F >= D nothing is lost; 0 is always reconstructed as 0."""
    x = jax.random.normal(jax.random.key(4), (6, 9))
    for features, lost in [(9, 0.0), (12, 0.0), (5, None)]:
        params = initial(Member(features, initialization="orthogonal", encoder_bias=50.0), 9, TRAIN).params
        model = ReLU(9, features)
        of_zero, of_x = (decode(model, params, encode(model, params, {}, each)) for each in (jnp.zeros((1, 9)), x))
        assert np.allclose(of_zero, 0, atol=1e-4)
        error = jnp.square(of_x - x).mean()
        assert error < 1e-6 if lost == 0.0 else error > 0.1


def test_members_at_once_equal_members_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does, whole batches and vmap, and what a CPU does, parts and members in turn."""
    sweep = SweepConfig(features=(23, 24), seeds=(0, 1), initialization=("torch",))
    train = TrainConfig(batch_tokens=2048)
    groups = make_groups(sweep_members(sweep))
    [group] = init_sweep(groups, D, train, NO_CENTRES)
    x, weights = jax.random.normal(jax.random.key(0), (4, 2048, D)), jnp.ones((4, 2048))
    results = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert rows_at_a_time(2048) == (1024 if backend == "cpu" else 2048)
        steps = partial(update.update_group, form=groups[0].form, train=train)
        results.append(jax.jit(lambda group, steps=steps: steps(group, x, weights, 1, 3, 0))(group))
    assert not np.any(results[0][1][:, [0, 3]]) and np.all(results[0][1][:, 1:3, 0])
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        largest = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * largest)


def test_a_large_batch_is_summed_in_parts() -> None:
    """The parts divide the batch, and error and gradient are those of the whole batch, padding included."""
    batches = (256, 1024, 4096, 1500, 1031)
    assert [rows_at_a_time(each) for each in batches] == [256, 1024, 1024, 750, 1031]
    batch_tokens = 1500
    x = jax.random.normal(jax.random.key(0), (batch_tokens, 6))
    weights = (jax.random.uniform(jax.random.key(1), (batch_tokens,)) < 0.9).astype(jnp.float32)
    model = ReLU(6, 9, weighs=())
    params = init_params(model, 0)
    terms, gradient = jax.jit(partial(terms_and_gradient, model, values={}))(params, x=x, weights=weights)
    features = encode(model, params, {}, x)
    error = jax.value_and_grad(lambda p: squared_error(x, decode(model, p, encode(model, p, {}, x)), weights))
    whole = jax.jit(error)(params)
    np.testing.assert_allclose(terms.squared_error, whole[0], rtol=1e-5)
    assert np.array_equal(terms.fired, ((features > 0) & (weights[:, None] > 0)).sum(0))
    for name, expected in whole[1].items():
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-4, atol=1e-3)
