"""The optimiser against Optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import NO_CENTRES

from jax_sae.config import Member, SweepConfig, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.optimizer import rounded_at_random, scale_by_adam
from jax_sae.sweep.update import init_sweep, update_many


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.0, 0.99), (0.9, 0.0)])
def test_adam_equals_optaxs(beta1: float, beta2: float) -> None:
    """Forty steps with gradients of very different sizes, some of them zero: updates and state."""
    ours, theirs = scale_by_adam(beta1, beta2), optax.scale_by_adam(beta1, beta2)
    params = {"W": jnp.zeros((7, 5)), "b": jnp.zeros(5)}
    state, expected_state = ours.init(params), theirs.init(params)
    update = jax.jit(ours.update)
    for key in jax.random.split(jax.random.key(0), 40):
        g = {"W": jax.random.normal(key, (7, 5)) * 10.0 ** jnp.arange(-6, 1)[:, None], "b": jnp.arange(5.0)}
        updates, state = update(g, state)
        expected, expected_state = theirs.update(g, expected_state)
        for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)  # averages may cancel
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert found.dtype == wanted.dtype
        largest = np.abs(wanted).max(-1, keepdims=True) if wanted.ndim else 0
        assert (np.abs(found - wanted) <= 1e-6 * largest).all()


def test_second_moments_in_bfloat16_are_right_on_average() -> None:
    """A step changes them by a thousandth, which 8 bits cannot tell; rounded to the nearest they would never change."""
    v = np.float32(0.731)
    gradients = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    all_equal = jnp.full(len(gradients), v)
    rounded = np.asarray(rounded_at_random(all_equal, jnp.asarray(gradients), jnp.int32(7)), np.float32)
    assert len(set(rounded.tolist())) == 2 and rounded.min() < v < rounded.max()
    assert abs(rounded.mean() / v - 1) < 1e-5
    # A dead feature has the same gradient at each step, 0, and v still falls as it should.
    of_steps = jax.vmap(lambda step: rounded_at_random(jnp.float32(v), jnp.float32(0), step))(jnp.arange(2000))
    of_steps = np.asarray(of_steps, np.float32)
    assert abs(of_steps.mean() / v - 1) < 2e-4


@pytest.mark.long
def test_moments_in_bfloat16_take_half_the_memory_and_train_as_well() -> None:
    member = Member(features=24, kind="topk", k=4)
    x = np.random.default_rng(0).standard_normal((300, 64, 12)).astype(np.float32)
    weights, found = np.ones((300, 64), np.float32), {}
    for moments in ("float32", "bfloat16"):
        train = TrainConfig(steps=300, batch_tokens=64, moments=moments)
        groups = make_groups(sweep_members(SweepConfig(members=(member,))))
        state = init_sweep(groups, 12, train, NO_CENTRES)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0].opt_state[0].mu)} == {moments}
        forms = tuple(group.form for group in groups)
        _, metrics = update_many(state, x, weights, 0, 300, 0, forms=forms, train=train)
        found[moments] = float(np.asarray(metrics)[-50:, 0, 0].mean())
    assert abs(found["bfloat16"] / found["float32"] - 1) < 0.02
