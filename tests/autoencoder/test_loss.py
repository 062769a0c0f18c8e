"""The loss and its gradient are the formulas, padding counts for nothing, and a step of training is Adam's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import initial

from jax_sae.autoencoder.kinds.relu import ReLU
from jax_sae.autoencoder.loss import loss_per_element, squared_error
from jax_sae.autoencoder.model import Params, decode, encode
from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import update_member

D, F, PADDED_F, B, TOKENS = 7, 11, 3, 40, 33
WEIGHTS = (np.arange(B) < TOKENS).astype(np.float32)
RNG = np.random.default_rng(0)
X = RNG.normal(0.3, np.linspace(0.2, 2, D), (B, D)).astype(np.float32)
PARAMS = {
    name: jnp.asarray(RNG.normal(0, 0.5, shape), jnp.float32)
    for name, shape in [("W_enc", (D, F)), ("b_enc", (F,)), ("W_dec", (F, D)), ("b_dec", (D,))]
}
PADDED = {
    "W_enc": jnp.pad(PARAMS["W_enc"], ((0, 0), (0, PADDED_F))),
    "b_enc": jnp.pad(PARAMS["b_enc"], (0, PADDED_F)),
    "W_dec": jnp.pad(PARAMS["W_dec"], ((0, PADDED_F), (0, 0))),
    "b_dec": PARAMS["b_dec"],
}
"""The same autoencoder with features of zeros, as it stands beside a wider one."""

FloatParams = dict[str, np.ndarray]


@jax.jit
def loss_and_gradient(params: Params, x: np.ndarray, weights: np.ndarray) -> tuple[jax.Array, jax.Array, Params]:
    """The squared error, the loss per element, and the gradient of the former."""

    def loss(params: Params) -> jax.Array:
        model = ReLU(*params["W_enc"].shape)
        return squared_error(x, decode(model, params, encode(model, params, {}, x)), weights)

    error, gradient = jax.value_and_grad(loss)(params)
    return error, loss_per_element(error, jnp.sum(weights), x.shape[1]), gradient


def by_hand(params: FloatParams, x: np.ndarray, weights: np.ndarray) -> tuple[float, FloatParams]:
    """The squared error sum_b w_b |x_b - x_hat_b|^2 and its gradient, in float64, token by token."""
    gradient = {name: np.zeros(value.shape) for name, value in params.items()}
    error = 0.0
    for row, weight in zip(x.astype(np.float64), weights.astype(np.float64), strict=True):
        pre = row @ params["W_enc"] + params["b_enc"]
        features = np.maximum(pre, 0)
        residual = features @ params["W_dec"] + params["b_dec"] - row
        error += weight * residual @ residual
        g = 2 * weight * residual
        g_pre = np.where(pre > 0, params["W_dec"] @ g, 0)
        for name, part in [("W_enc", np.outer(row, g_pre)), ("b_enc", g_pre), ("W_dec", np.outer(features, g))]:
            gradient[name] += part
        gradient["b_dec"] += g
    return error, gradient


def in_float64(params: Params) -> FloatParams:
    """The same numbers as NumPy arrays."""
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


def same_bits(a: object, b: object) -> bool:
    """Whether two trees of arrays hold the same numbers."""
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_squared_error_is_a_sum_and_loss_per_element_its_mean_over_tokens_and_width() -> None:
    """By hand, on numbers that are exact: 2 * 3 elements are off by 1, 2 * 3 by 2, and a padded token by 10."""
    x_hat = np.repeat(np.float32([1, 2, 1, 2, 10]), 3).reshape(5, 3)
    weights = np.float32([1, 1, 1, 1, 0])
    error = squared_error(jnp.zeros((5, 3)), jnp.asarray(x_hat), weights)
    assert error == 6 * 1 + 6 * 4
    assert loss_per_element(error, jnp.sum(weights), 3) == np.float32(2.5)


@pytest.mark.parametrize("params", [PARAMS, PADDED], ids=["own width", "padded features"])
def test_gradient_is_the_formula(params: Params) -> None:
    """Of all four parameters, with padded tokens, against float64 to 2e-6 of the largest; padded features have none."""
    error, per_element, gradient = loss_and_gradient(params, X, WEIGHTS)
    expected_error, expected = by_hand(in_float64(params), X, WEIGHTS)
    assert error == pytest.approx(expected_error, rel=1e-6)
    assert per_element == pytest.approx(expected_error / (TOKENS * D), rel=1e-6)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_allclose(gradient[name], expected[name], rtol=0, atol=2e-6 * np.abs(expected[name]).max())
    assert not np.any(gradient["W_enc"][:, F:]) and not np.any(gradient["b_enc"][F:])
    assert not np.any(gradient["W_dec"][F:])


@pytest.mark.parametrize("value", [0.0, -1.0, 1e4, 1e20, -1e30])
def test_padded_tokens_of_any_value_change_no_bit(value: float) -> None:
    """Neither of the loss, nor of its gradient, nor of the loss per element; their squares need not be finite."""
    changed = np.where(WEIGHTS[:, None] > 0, X, np.float32(value) * (1 + np.abs(X)))
    for params in (PARAMS, PADDED):
        assert same_bits(loss_and_gradient(params, changed, WEIGHTS), loss_and_gradient(params, X, WEIGHTS))


@pytest.mark.parametrize("more", [0, 1, 12, 479])
def test_padded_tokens_of_any_number_change_nothing(more: int) -> None:
    """No bit where sums are exact, of whole numbers; else what float32 sums in another order differ by."""
    x, weights = X[:TOKENS], np.ones(TOKENS, np.float32)
    padding = np.random.default_rng(more).normal(0, 9, (more, D)).astype(np.float32)
    longer, longer_weights = np.concatenate([x, padding]), np.concatenate([weights, np.zeros(more, np.float32)])
    whole = jax.tree.map(lambda value: jnp.round(4 * value), PADDED)
    assert same_bits(
        loss_and_gradient(whole, np.round(longer * 4), longer_weights),
        loss_and_gradient(whole, np.round(x * 4), weights),
    )
    for found, expected in zip(
        jax.tree.leaves(loss_and_gradient(PADDED, longer, longer_weights)),
        jax.tree.leaves(loss_and_gradient(PADDED, x, weights)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("initialization", ["torch", "orthogonal"])
def test_steps_of_training_are_adams(initialization: str) -> None:
    """Four steps of a member, through warm-up and decay, against Kingma and Ba's algorithm 1 in float64.

    The rates are lr / 2, lr, then lr (1 - t) for t = 0, 1/4: a warm-up of 1 of 5 steps, then a line to zero.
    """
    lr, beta1, beta2, epsilon = 1e-2, 0.8, 0.95, 1e-8
    train = TrainConfig(steps=5, warmup=0.2, schedule="linear", decay=1.0, beta1=beta1, beta2=beta2)
    bias = 0.5 if initialization == "orthogonal" else 0.0
    member = complete(Member(F, 3, lr, initialization=initialization, encoder_bias=bias))  # type: ignore[arg-type]
    state = initial(member, D, train)
    step = jax.jit(partial(update_member, form=make_groups((member,))[0].form, train=train))
    params = in_float64(state.params)
    m = {name: np.zeros(value.shape) for name, value in params.items()}
    v = {name: np.zeros(value.shape) for name, value in params.items()}
    for t, rate in enumerate([lr / 2, lr, lr * 3 / 4, lr / 2], start=1):
        x = np.random.default_rng(t).normal(0.3, np.linspace(0.2, 2, D), (B, D)).astype(np.float32)
        error, gradient = by_hand(params, x, WEIGHTS)
        state, metrics = step(state, x, WEIGHTS, t - 1, False)
        assert metrics[0] == pytest.approx(error / (TOKENS * D), rel=1e-5)
        for name, g in gradient.items():
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
            params[name] = params[name] - rate * m_hat / (np.sqrt(v_hat) + epsilon)
            np.testing.assert_allclose(state.params[name], params[name], rtol=0, atol=1e-6, err_msg=f"{name}, step {t}")
