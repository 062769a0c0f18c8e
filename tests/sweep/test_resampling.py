"""Dead features, and nothing else, are set to activations that are reconstructed badly."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import initial

from jax_sae.autoencoder.kinds import kind_named, kind_names
from jax_sae.autoencoder.model import Autoencoder, Params
from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.resampling import resample, resampling_steps
from jax_sae.sweep.update import MemberState, update_member

D, F, PADDED_F, B = 6, 12, 2, 20
DEAD = np.isin(np.arange(F + PADDED_F), (0, 4, 5, 11))
LIVES = ~DEAD & (np.arange(F + PADDED_F) < F)
PADDED_TOKENS, WORST = (3, 19), 7
WEIGHTS = (~np.isin(np.arange(B), PADDED_TOKENS)).astype(np.float32)
SCALES = np.ones((B, 1), np.float32)
SCALES[PADDED_TOKENS, :], SCALES[WORST] = 1e6, 1e4
X = np.random.default_rng(0).normal(0.2, 1, (B, D)).astype(np.float32) * SCALES
"""One token has almost all the loss; those of padding would have more."""
VALUES = {
    "k": jnp.int32(3),
    "threshold": jnp.float32(0.5),
    "initial_threshold": jnp.float32(0.02),
    "features": jnp.int32(F),
}
NEEDED: dict[str, dict[str, Any]] = {
    "relu": {"l1_coefficient": 0.1},
    "jumprelu": {"l0_coefficient": 0.1},
    "gated": {"l1_coefficient": 0.1},
}
"""Settings without which a kind cannot be trained, or is not as it is used."""


def resampled(
    kind: str, dead: np.ndarray, seed: int = 0
) -> tuple[Params, optax.ScaleByAdamState, Params, optax.ScaleByAdamState]:
    """Parameters and moments of numbers, with two padded features at the end, before and after."""
    model = kind_named(kind)(D, F + PADDED_F, most_k=3)
    rng = np.random.default_rng(seed)
    own = np.arange(F + PADDED_F) < F

    def numbers(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        value = rng.normal(0.1, 1, like.shape).astype(np.float32)
        return value if name == "b_dec" else value * (own[:, None] if name == "W_dec" else own)

    shapes = jax.eval_shape(partial(kind_params, model))
    params, mu, nu = ({name: numbers(name, like) for name, like in shapes.items()} for _ in range(3))
    params["b_dec"] += 1
    moments = optax.ScaleByAdamState(jnp.int32(9), mu, nu)
    after = jax.jit(partial(resample, model))(params, moments, VALUES, dead, X, WEIGHTS, jax.random.key(1))
    return params, moments, *after


def kind_params(model: Autoencoder) -> Params:
    """Initial parameters."""
    return dict(model.init(jax.random.key(0), jnp.zeros((1, model.features)), method="decode")["params"])


def of_features(name: str, value: Any) -> np.ndarray:
    """A parameter or moment with the features along the first axis."""
    return np.asarray(value).T if name == "W_enc" else np.asarray(value)


@pytest.mark.parametrize("kind", kind_names())
def test_what_a_dead_feature_becomes(kind: str) -> None:
    """The direction of the worst token from b_dec, of the mean norm of the living ones, the encoder 0.2 of theirs.

    Biases are as at the start and Adam's moments 0. The living, the padded and b_dec keep every bit, Adam its count.
    """
    before, moments, after, moments_after = resampled(kind, DEAD)
    away = X[WORST].astype(np.float64) - before["b_dec"]
    direction = away / np.linalg.norm(away)
    for name, value in after.items():
        found, old = of_features(name, value), of_features(name, before[name])
        if name == "b_dec":
            np.testing.assert_array_equal(found, old)
            continue
        if name in ("W_dec", "W_enc"):
            norm = np.linalg.norm(old[LIVES].astype(np.float64), axis=1).mean() * (0.2 if name == "W_enc" else 1)
            np.testing.assert_allclose(found[DEAD], np.tile(norm * direction, (DEAD.sum(), 1)), rtol=1e-5, atol=1e-6)
        else:
            start = np.log(0.02 * np.sqrt(D)) if name == "log_threshold" else 0
            np.testing.assert_allclose(found[DEAD], start, rtol=1e-6)
        np.testing.assert_array_equal(found[~DEAD], old[~DEAD], err_msg=name)
    assert moments_after.count == moments.count
    for found, old in ((moments_after.mu, moments.mu), (moments_after.nu, moments.nu)):
        assert found.keys() == before.keys()
        for name in found:
            is_dead = DEAD if name != "b_dec" else np.zeros(D, bool)
            expected = of_features(name, old[name]).copy()
            expected[is_dead] = 0
            np.testing.assert_array_equal(of_features(name, found[name]), expected, err_msg=name)


def test_where_all_are_dead_they_have_the_norms_that_they_had() -> None:
    """There is no living feature whose norm could be taken, and one of norm 0 would never live again."""
    before, _, after, _ = resampled("relu", np.arange(F + PADDED_F) < F)
    for name, part in (("W_dec", 1.0), ("W_enc", 0.2)):
        norms = np.linalg.norm(of_features(name, after[name]), axis=1)
        mean = np.linalg.norm(of_features(name, before[name])[:F], axis=1).mean()
        np.testing.assert_allclose(norms[:F], part * mean, rtol=1e-5)
        assert not np.any(norms[F:])


def test_without_dead_features_nothing_changes() -> None:
    """No bit of a parameter or of a moment."""
    before, moments, *after = resampled("relu", np.zeros(F + PADDED_F, bool))
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves((before, moments))))


@pytest.mark.long
def test_tokens_are_drawn_in_proportion_to_their_squared_loss() -> None:
    """|x - x_hat|^4, among 20,000 dead features: each share within 4 standard deviations; padding is never drawn."""
    many, norms = 20_000, np.array([1.0, 1.2, 0.0, 9.0, 1.5, 0.7])
    x = np.diag(norms).astype(np.float32)  # each token has a direction of its own
    weights = np.float32([1, 1, 1, 0, 1, 1])
    params = {
        "W_enc": jnp.ones((6, many)),
        "b_enc": jnp.full(many, -100.0),  # nothing fires: x_hat = b_dec = 0
        "W_dec": jnp.ones((many, 6)),
        "b_dec": jnp.zeros(6),
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    dead = np.arange(many) > 0
    moments = optax.ScaleByAdamState(jnp.int32(0), zeros, zeros)
    new, _ = resample(kind_named("relu")(6, many), params, moments, {}, dead, x, weights, jax.random.key(0))
    drawn = np.argmax(np.asarray(new["W_dec"])[1:], 1)
    shares = weights * norms**4 / (weights * norms**4).sum()
    expected, counts = shares * (many - 1), np.bincount(drawn, minlength=6)
    assert counts[2] == counts[3] == 0
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - shares)))


def test_steps_are_evenly_spread() -> None:
    """Neither at the start nor at the end; none where none is asked for."""
    np.testing.assert_array_equal(resampling_steps(3, 100), [25, 50, 75])
    np.testing.assert_array_equal(resampling_steps(2, 16), [5, 11])
    assert resampling_steps(0, 100).size == 0


def silenced(state: MemberState, features: list[int]) -> MemberState:
    """The state with these features off for every token."""
    params = dict(state.params)
    name = "b_gate" if "b_gate" in params else "b_enc"
    return state._replace(params=params | {name: params[name].at[jnp.array(features, int)].set(-100)})


def test_only_the_dead_change_and_only_at_the_steps() -> None:
    """Step by step against the same step without resampling; tokens without firing are counted without padding.

    18 tokens a step, dead after 54: of the silent features, one that is silent since step 7 is not dead after step 8,
    but is after step 12.
    """
    train = TrainConfig(steps=16, batch_tokens=B, schedule="constant", warmup=0.0)
    member = complete(Member(F, 0, 1e-3, "topk", k=9, dead_after_tokens=54, resamples=3))
    step = jax.jit(partial(update_member, form=make_groups((member,))[0].form, train=train))

    def without(state: MemberState, *batch: Any) -> tuple[MemberState, jax.Array]:
        return step(state._replace(settings=state.settings | {"resampled_after": np.full(3, 99, np.int32)}), *batch)

    state, since_fired = initial(member, D, train), np.zeros(F, int)
    changed_at = []
    for number in range(16):
        state = silenced(state, [2, 7] if number < 6 else [2, 7, 9])
        x = np.random.default_rng(number).normal(0, 1, (B, D)).astype(np.float32)
        batch = (x, WEIGHTS, jnp.int32(number), jnp.bool(False))
        plain, metrics = without(state, *batch)
        after, same_metrics = step(state, *batch)
        np.testing.assert_allclose(metrics, same_metrics, rtol=1e-6)
        fired = np.asarray(plain.memory["tokens_since_fired"]) == 0
        since_fired = np.where(fired, 0, since_fired + 18)
        np.testing.assert_array_equal(plain.memory["tokens_since_fired"], since_fired)
        dead = since_fired >= 54
        assert dead[2] == (number % 4 >= 2 or number >= 14) or number < 2
        if number + 1 in (4, 8, 12):
            changed_at.append(number + 1)
            assert dead[2] and dead[7] and dead[9] == (number + 1 == 12) and not dead.all()
            since_fired = np.where(dead, 0, since_fired)
        else:
            dead = np.zeros(F, bool)
        np.testing.assert_array_equal(after.memory["tokens_since_fired"], since_fired)
        for old, new in zip(
            (plain.params, *plain.opt_state[0][1:]), (after.params, *after.opt_state[0][1:]), strict=True
        ):
            for name in old:
                is_dead = dead if name != "b_dec" else np.zeros(D, bool)
                before, now = of_features(name, old[name]), of_features(name, new[name])
                np.testing.assert_allclose(now[~is_dead], before[~is_dead], rtol=1e-5, atol=1e-7, err_msg=name)
        for name in ("W_enc", "W_dec"):
            before, now = (of_features(name, each.params[name])[dead] for each in (plain, after))
            assert np.all(now != before)
        state = after
    assert changed_at == [4, 8, 12]


def test_a_dead_feature_of_a_transcoder_reads_one_direction_and_writes_another() -> None:
    """That of x, and that of what the skip leaves of the targets, from b_dec; W_skip keeps every bit."""
    rng, wide = np.random.default_rng(4), D + 2
    model = kind_named("relu")(D, F, (wide,), True)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, wide), "b_dec": (wide,), "W_skip": (D, wide)}
    params = {name: rng.normal(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    y = rng.normal(0, 1, (B, wide)).astype(np.float32)
    y[WORST] *= 1e6
    moments = optax.ScaleByAdamState(jnp.int32(9), dict(params), dict(params))
    x, dead = X / SCALES, DEAD[:F]
    new, _ = jax.jit(partial(resample, model))(params, moments, {}, dead, x, WEIGHTS, jax.random.key(1), y)
    left = y[WORST] - x[WORST] @ params["W_skip"] - params["b_dec"]
    for name, direction in (("W_enc", x[WORST]), ("W_dec", left)):
        found = of_features(name, new[name])[dead]
        cosines = found @ direction / np.linalg.norm(found, axis=1) / np.linalg.norm(direction)
        np.testing.assert_allclose(cosines, 1, rtol=1e-5)
    np.testing.assert_array_equal(new["W_skip"], params["W_skip"])
