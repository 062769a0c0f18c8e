"""Every kind computes, and is trained by, the formulas of its paper, written out here in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import initial

from jax_sae.autoencoder.kinds import kind_named, kind_names, topk
from jax_sae.autoencoder.loss import Terms
from jax_sae.autoencoder.model import Autoencoder, Params, encode, init_params, loss
from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.groups import Form, make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import MemberState, update_member

D, F, MORE_F, B, TOKENS = 7, 32, 3, 40, 33
K, MOST_K, ALPHA, LAMBDA, RAMP, TARGET, BANDWIDTH = 4, 9, 0.07, 0.3, 0.6, 5.0, 0.3
PREFIXES = (1, 3, 7, 15, 32)
WEIGHTS = (np.arange(B) % 6 != 3).astype(np.float32)
RNG = np.random.default_rng(0)
X = (RNG.normal(0.3, np.linspace(0.2, 2, D), (B, D)) * np.where(WEIGHTS > 0, 1, 100)[:, None]).astype(np.float32)
DEAD = np.isin(np.arange(F), (0, 4, 9, 10, 17, 25, 31))
EXTRA = {"jumprelu": ("b_enc", "log_threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
FORMS = {"jumprelu": ("lambda", "target", "frequency"), "topk": ("dense", "sparse")}
CASES = [(kind, form) for kind in kind_names() for form in FORMS.get(kind, ("",))]

READ = 9
WRITTEN: dict[str, tuple[int, ...]] = {
    "autoencoder": (),
    "transcoder": (D,),
    "skip_transcoder": (D,),
    "crosscoder": (3, 4),
}
"""Widths of the places that a dictionary writes. A transcoder reads READ numbers, all others D."""
MU, OFTEN = 0.02, 0.2

FloatParams = dict[str, np.ndarray]
Answer = tuple[float, float, FloatParams]
"""The squared error, the penalty, and the gradient of their sum."""


@pytest.fixture(autouse=True)
def sparse_where_the_form_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`topk` without dense work on inactive features wherever `model_of` asks for it, and only there."""
    monkeypatch.setattr(topk, "is_sparse_faster", lambda features, most_k: most_k == MOST_K + 1)


def model_of(kind: str, form: str, dictionary: str = "autoencoder") -> Autoencoder:
    """The module of a kind; with form 'sparse', that of `topk` that takes the other way."""
    reads = READ if dictionary.endswith("transcoder") else D
    written, skip = WRITTEN[dictionary], dictionary == "skip_transcoder"
    return kind_named(kind)(reads, F, written, skip, most_k=MOST_K + (form == "sparse"))


def parameters(kind: str, dictionary: str = "autoencoder") -> dict[str, Any]:
    """Parameters of a kind with every bias in use and directions of norms from about 0.3 to 3."""
    rng, reads = np.random.default_rng(1), READ if dictionary.endswith("transcoder") else D
    shapes = {"W_enc": (reads, F), "W_dec": (F, D), "b_dec": (D,)} | dict.fromkeys(EXTRA.get(kind, ("b_enc",)), (F,))
    if dictionary == "skip_transcoder":
        shapes["W_skip"] = (READ, D)
    params = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    params["W_dec"] *= np.geomspace(0.3, 3, F)[:, None]
    return {name: value.astype(np.float32) for name, value in params.items()}


def padded(params: Params) -> dict[str, Any]:
    """The same autoencoder with features of zeros, as it stands beside a wider one."""
    widths = {"W_enc": ((0, 0), (0, MORE_F)), "W_dec": ((0, MORE_F), (0, 0)), "b_dec": (0, 0)}
    return {name: np.pad(value, widths.get(name, (0, MORE_F))) for name, value in params.items()}


def values_of(form: str, features: int) -> dict[str, Any]:
    """Settings, ramp and dead features; jumprelu's penalty is of the form 'lambda' or 'target'."""
    numbers = {
        "l1_coefficient": LAMBDA,
        "l0_coefficient": 0.0 if form == "target" else LAMBDA,
        "target_l0": TARGET if form == "target" else 0.0,
        "auxk_coefficient": ALPHA,
        "frequency_coefficient": MU if form == "frequency" else 0.0,
        "frequency_limit": OFTEN,
        "bandwidth": BANDWIDTH,
        "ramp": RAMP,
    }
    dead = np.pad(DEAD, (0, features - F))
    return {name: np.float32(value) for name, value in numbers.items()} | {
        "k": np.int32(K),
        "features": np.int32(F),
        "dead": dead,
        "any_dead": np.bool(True),
    }


@functools.partial(jax.jit, static_argnames="model")
def terms_and_gradient(
    model: Autoencoder,
    params: Params,
    values: Params,
    x: np.ndarray,
    weights: np.ndarray,
    targets: np.ndarray | None = None,
) -> tuple[Terms, Params]:
    """The terms of the loss, and the gradient of the sum of squared error and penalty."""

    def total(params: Params) -> tuple[jax.Array, Terms]:
        terms = loss(model, params, values, x, weights, targets)
        return terms.squared_error + terms.penalty, terms

    gradient, terms = jax.grad(total, has_aux=True)(params)
    return terms, gradient


def keep(c: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest of an array's numbers stand, of equal ones the first, if they are above 0."""
    order = np.argsort(-c.ravel(), kind="stable")
    return (np.isin(np.arange(c.size), order[:count]).reshape(c.shape)) & (c > 0)


def keep_of_rows(c: np.ndarray, count: int) -> np.ndarray:
    """The same for each row."""
    return np.stack([keep(row, count) for row in c])


def norms_and_units(W: np.ndarray, written: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The sum over written places of a direction's norm there, [F], and its gradient [F, D]."""
    parts = np.split(W, np.cumsum(written or (W.shape[1],))[:-1], axis=1)
    norms = [np.sqrt((part**2).sum(1, keepdims=True)) for part in parts]
    return sum(norms)[:, 0], np.concatenate([part / norm for part, norm in zip(parts, norms, strict=True)], axis=1)


def relu_by_hand(
    p: FloatParams, x: np.ndarray, w: np.ndarray, form: str, y: np.ndarray, its: tuple[int, ...]
) -> Answer:
    """|x - x_hat|^2 + lambda sum_i f_i |W_dec_i| (Anthropic, April 2024)."""
    z = x @ p["W_enc"] + p["b_enc"]
    f = np.maximum(z, 0)
    norms, units = norms_and_units(p["W_dec"], its)
    e = f @ p["W_dec"] + p["b_dec"] - y
    g = 2 * w * e
    d_z = (g @ p["W_dec"].T + RAMP * LAMBDA * w * norms) * (z > 0)
    of_norms = RAMP * LAMBDA * (w * f).sum(0)[:, None] * units
    return (
        (w * e**2).sum(),
        RAMP * LAMBDA * (w * f * norms).sum(),
        {
            "W_enc": x.T @ d_z,
            "b_enc": d_z.sum(0),
            "W_dec": f.T @ g + of_norms,
            "b_dec": g.sum(0),
        },
    )


def topk_by_hand(
    p: FloatParams, x: np.ndarray, w: np.ndarray, form: str, y: np.ndarray, its: tuple[int, ...]
) -> Answer:
    """The k largest of each token (Gao et al. 2024, equations 3 to 7 and A.2)."""
    return of_kept(p, x, w, y, its, lambda c: keep_of_rows(c, K), (F,))


def batchtopk_by_hand(
    p: FloatParams, x: np.ndarray, w: np.ndarray, form: str, y: np.ndarray, its: tuple[int, ...]
) -> Answer:
    """The k largest a token of the batch, without padding (Bussmann et al. 2024, equations 2 to 4)."""
    return of_kept(p, x, w, y, its, lambda c: keep(c * w, K * TOKENS), (F,))


def matryoshka_by_hand(
    p: FloatParams, x: np.ndarray, w: np.ndarray, form: str, y: np.ndarray, its: tuple[int, ...]
) -> Answer:
    """The errors of all prefixes, summed; the features are those of batchtopk (Bussmann et al. 2025, equation 4)."""
    return of_kept(p, x, w, y, its, lambda c: keep(c * w, K * TOKENS), PREFIXES)


def of_kept(
    p: FloatParams,
    x: np.ndarray,
    w: np.ndarray,
    y: np.ndarray,
    its: tuple[int, ...],
    kept: Callable[[np.ndarray], np.ndarray],
    prefixes: tuple[int, ...],
) -> Answer:
    """Errors of prefixes, and alpha |e - e_hat|^2 with the D / 2 largest dead features, e without a gradient.

    Those of several places are kept by what they write there, f_i times the sum of its norms (Minder et al. 2025).
    """
    seen = x if its else x - p["b_dec"]
    c = np.maximum(seen @ p["W_enc"] + p["b_enc"], 0)
    f = c * kept(c * norms_and_units(p["W_dec"], its)[0] if len(its) > 1 else c)
    errors, d_f, d_W_dec, d_b_dec = [], np.zeros_like(f), np.zeros_like(p["W_dec"]), np.zeros(D)
    for m in prefixes:
        e = f[:, :m] @ p["W_dec"][:m] + p["b_dec"] - y
        errors.append((w * e**2).sum())
        g = 2 * w * e
        d_f[:, :m] += g @ p["W_dec"][:m].T
        d_W_dec[:m] += f[:, :m].T @ g
        d_b_dec += g.sum(0)
    a = c * keep_of_rows(c * DEAD, D // 2)
    e_of_dead = a @ p["W_dec"] + e  # the last prefix is everything; e is x_hat - x
    g_of_dead = 2 * ALPHA * w * e_of_dead
    d_c = d_f * (f > 0) + (g_of_dead @ p["W_dec"].T) * (a > 0)
    return (
        errors[-1],
        sum(errors[:-1]) + ALPHA * (w * e_of_dead**2).sum(),
        {
            "W_enc": seen.T @ d_c,
            "b_enc": d_c.sum(0),
            "W_dec": d_W_dec + a.T @ g_of_dead,
            "b_dec": d_b_dec - (0 if its else p["W_enc"] @ d_c.sum(0)),
        },
    )


def jumprelu_by_hand(
    p: FloatParams, x: np.ndarray, w: np.ndarray, form: str, y: np.ndarray, its: tuple[int, ...]
) -> Answer:
    """Lambda |f|_0 or D (L0 / target - 1)^2 (Rajamanoharan et al. 2024, equations 9 to 12), with |x|^2 about D."""
    z = x @ p["W_enc"] + p["b_enc"]
    theta, width = np.exp(p["log_threshold"]), BANDWIDTH * np.sqrt(x.shape[1])
    f = z * (z > theta)
    e = f @ p["W_dec"] + p["b_dec"] - y
    g = 2 * w * e
    d_f = g @ p["W_dec"].T
    in_window = np.abs((z - theta) / width) < 0.5
    active = (w * (z > theta)).sum()
    off = active / TOKENS / TARGET - 1
    penalty, d_active = (TOKENS * D * off**2, 2 * D * off / TARGET) if form == "target" else (LAMBDA * active, LAMBDA)
    if form == "frequency":
        excess = (w * (z > theta)).sum(0) / TOKENS / OFTEN - 1
        penalty, d_active = (
            penalty + MU * TOKENS * D * np.maximum(excess, 0).sum(),
            d_active + MU * D / OFTEN * (excess > 0),
        )
        assert 0 < (excess > 0).sum() < F
    d_theta = -(theta / width * in_window * d_f).sum(0) - RAMP * d_active * (w * in_window).sum(0) / width
    d_z = d_f * (z > theta)
    return (
        (w * e**2).sum(),
        RAMP * penalty,
        {
            "W_enc": x.T @ d_z,
            "b_enc": d_z.sum(0),
            "log_threshold": theta * d_theta,
            "W_dec": f.T @ g,
            "b_dec": g.sum(0),
        },
    )


def gated_by_hand(
    p: FloatParams, x: np.ndarray, w: np.ndarray, form: str, y: np.ndarray, its: tuple[int, ...]
) -> Answer:
    """|x - x_hat|^2 + lambda |relu(g)|_1 + |x - x_hat_frozen|^2 (Rajamanoharan et al. 2024, equations 6 to 8)."""
    seen = x if its else x - p["b_dec"]
    s = seen @ p["W_enc"]
    gate, m = s + p["b_gate"], s * np.exp(p["r_mag"]) + p["b_mag"]
    f, opened = (gate > 0) * np.maximum(m, 0), np.maximum(gate, 0)
    norms, units = norms_and_units(p["W_dec"], its)
    e, e_of_gate = (each @ p["W_dec"] + p["b_dec"] - y for each in (f, opened))
    g = 2 * w * e
    d_m = (g @ p["W_dec"].T) * (gate > 0) * (m > 0)
    d_gate = (2 * w * e_of_gate @ p["W_dec"].T + RAMP * LAMBDA * w * norms) * (gate > 0)
    d_s = d_m * np.exp(p["r_mag"]) + d_gate
    of_norms = RAMP * LAMBDA * (w * opened).sum(0)[:, None] * units
    return (
        (w * e**2).sum(),
        RAMP * LAMBDA * (w * opened * norms).sum() + (w * e_of_gate**2).sum(),
        {
            "W_enc": seen.T @ d_s,
            "b_gate": d_gate.sum(0),
            "b_mag": d_m.sum(0),
            "r_mag": (d_m * s * np.exp(p["r_mag"])).sum(0),
            "W_dec": f.T @ g + of_norms,
            "b_dec": g.sum(0) - (0 if its else p["W_enc"] @ d_s.sum(0)),
        },
    )


BY_HAND = {
    "relu": relu_by_hand,
    "topk": topk_by_hand,
    "batchtopk": batchtopk_by_hand,
    "matryoshka": matryoshka_by_hand,
    "jumprelu": jumprelu_by_hand,
    "gated": gated_by_hand,
}


def in_float64(tree: Params) -> FloatParams:
    """The same numbers as NumPy arrays."""
    return {name: np.asarray(value, np.float64) for name, value in tree.items()}


@pytest.mark.parametrize(
    ("kind", "form", "dictionary"),
    [(*case, dictionary) for case in CASES for dictionary in ("autoencoder", "skip_transcoder", "crosscoder")],
)
def test_loss_and_gradients_are_the_formulas(kind: str, form: str, dictionary: str) -> None:
    """Both terms, and the gradient of every parameter to 5e-6 of the largest, with padded tokens and a ramp of 0.6.

    Directions have norms other than 1, k is below the largest of its group, and some features are dead. With a skip the
    loss is that of what W_skip leaves of the targets y: its gradient is x^T 2 (y_hat - y), of no frozen term. Of a
    transcoder without a skip these three have all.
    """
    params, model = parameters(kind, dictionary), model_of(kind, form, dictionary)
    x, p = X, in_float64(params)
    if dictionary.endswith("transcoder"):
        x = (np.concatenate([X, X[:, :2] ** 2], 1)).astype(np.float32)
    targets = None if x is X else X
    terms, gradient = terms_and_gradient(model, params, values_of(form, F), x, WEIGHTS, targets)
    y = X.astype(np.float64)
    if model.skip:
        y = y - x.astype(np.float64) @ p["W_skip"]
    weights = WEIGHTS[:, None].astype(np.float64)
    squared_error, penalty, expected = BY_HAND[kind](p, x.astype(np.float64), weights, form, y, WRITTEN[dictionary])
    if model.skip:
        f = features_by_hand(kind, p | {"b_dec": np.zeros(READ)}, x.astype(np.float64), weights, training=True)
        prefixes = PREFIXES if kind == "matryoshka" else (F,)
        g = sum(2 * weights * (f[:, :m] @ p["W_dec"][:m] + p["b_dec"] - y) for m in prefixes)
        expected["W_skip"] = x.T.astype(np.float64) @ g
    assert terms.squared_error == pytest.approx(squared_error, rel=2e-6)
    assert terms.penalty == pytest.approx(penalty, rel=2e-6)
    assert gradient.keys() == expected.keys()
    for name in expected:
        assert np.any(expected[name]), name
        np.testing.assert_allclose(
            gradient[name], expected[name], rtol=0, atol=5e-6 * np.abs(expected[name]).max(), err_msg=name
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "form"), [case for case in CASES if "auxk_coefficient" in kind_named(case[0]).settings]
)
def test_without_dead_features_there_is_no_auxk(kind: str, form: str) -> None:
    """Neither a penalty of it nor a gradient, also where it is computed because others of the group have dead ones."""
    params, model = parameters(kind), model_of(kind, form)
    values = values_of("", F) | {"dead": np.zeros(F, bool)}
    found = terms_and_gradient(model, params, values, X, WEIGHTS)
    without = terms_and_gradient(model.clone(weighs=()), params, values, X, WEIGHTS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-4), found, without)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "form"), [case for case in CASES if kind_named(case[0]).pads])
@pytest.mark.parametrize("bandwidth", [BANDWIDTH, 3.0])
def test_padded_features_have_exactly_no_gradient(kind: str, form: str, bandwidth: float) -> None:
    """Nor do they change what the others have, nor fire, however wide the window around a threshold is."""
    params, model = parameters(kind), model_of(kind, form)
    of_own = {"bandwidth": np.float32(bandwidth)}
    alone, own = terms_and_gradient(model, params, values_of(form, F) | of_own, X, WEIGHTS)
    wider = model.clone(features=F + MORE_F)
    terms, gradient = terms_and_gradient(wider, padded(params), values_of(form, F + MORE_F) | of_own, X, WEIGHTS)
    for found, expected in zip(terms, alone, strict=True):
        np.testing.assert_allclose(found[..., :F] if found.ndim else found, expected, rtol=1e-6)
    assert not np.any(terms.fired[F:])
    for name, value in gradient.items():
        its, padding = np.split(np.asarray(value), [F], {"W_enc": 1, "b_dec": 0}.get(name, 0))
        assert not np.any(padding), name
        np.testing.assert_allclose(its, own[name], rtol=0, atol=2e-6 * float(np.abs(own[name]).max()), err_msg=name)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_padded_tokens_of_any_value_change_no_bit(kind: str, form: str) -> None:
    """Neither of the terms nor of a gradient, whatever stands in them; their squares need not be finite."""
    params, model = parameters(kind), model_of(kind, form)
    changed = np.where(WEIGHTS[:, None] > 0, X, np.float32(-1e28) * X)
    results = [terms_and_gradient(model, params, values_of(form, F), x, WEIGHTS) for x in (X, changed)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, results)))


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_terms_tell_how_often_features_fire(kind: str, form: str) -> None:
    """`fired` counts the tokens, without padding, on which each feature is active in training."""
    params, model = parameters(kind), model_of(kind, form)
    terms, _ = terms_and_gradient(model, params, values_of("lambda", F), X, WEIGHTS)
    p, x = in_float64(params), X.astype(np.float64)
    active = features_by_hand(kind, p, x, WEIGHTS[:, None], training=True) > 0
    np.testing.assert_array_equal(terms.fired, active[WEIGHTS > 0].sum(0))


def features_by_hand(kind: str, p: FloatParams, x: np.ndarray, w: np.ndarray, training: bool) -> np.ndarray:
    """The features of a kind; those of a batch where it is trained, of a threshold 0.9 where it is used."""
    z = (x - p["b_dec"] * (kind not in ("relu", "jumprelu"))) @ p["W_enc"]
    if kind == "gated":
        return (z + p["b_gate"] > 0) * np.maximum(z * np.exp(p["r_mag"]) + p["b_mag"], 0)
    z = z + p["b_enc"]
    if kind == "jumprelu":
        return z * (z > np.exp(p["log_threshold"]))
    c = np.maximum(z, 0)
    if kind == "topk":
        return c * keep_of_rows(c, K)
    if kind in ("batchtopk", "matryoshka"):
        return c * (keep(c * w, K * TOKENS) if training else c > 0.9)
    return c


@pytest.mark.parametrize("kind", kind_names())
def test_encode_is_the_formula(kind: str) -> None:
    """Of a batch, and of one token, which for each kind does not depend on the others."""
    params, model = parameters(kind), model_of(kind, "")
    values = values_of("lambda", F) | {"threshold": np.float32(0.9)}
    expected = features_by_hand(kind, in_float64(params), X.astype(np.float64), WEIGHTS[:, None], training=False)
    assert np.any(expected[1] > 0) and np.any(expected[1] == 0)
    compiled = jax.jit(functools.partial(encode, model))
    np.testing.assert_allclose(compiled(params, values, X), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(compiled(params, values, X[1]), expected[1], rtol=1e-5, atol=1e-4)


PLANE = np.stack(np.meshgrid(*[np.linspace(-2, 2, 501)] * 2), -1).reshape(-1, 2)
"""Tokens of width 2, so many and so even that a sum over them is as smooth as an integral."""
ON_PLANE = {
    "W_enc": np.array([[1.0137, -0.3291], [0.4183, 0.7907]]),  # no z of a token on the edge of a window
    "b_enc": np.array([0.1071, -0.0523]),
    "W_dec": np.array([[0.7, 0.2], [-0.4, 0.9]]),
    "b_dec": np.array([0.1, -0.2]),
    "log_threshold": np.log([0.5123, 0.8077]),
}


def on_plane(theta: np.ndarray) -> tuple[float, float]:
    """The sums over all tokens of |x - x_hat|^2 and of |f|_0, with these thresholds [2]."""
    z = PLANE @ ON_PLANE["W_enc"] + ON_PLANE["b_enc"]
    x_hat = (z * (z > theta)) @ ON_PLANE["W_dec"] + ON_PLANE["b_dec"]
    return float(((PLANE - x_hat) ** 2).sum()), float((z > theta).sum())


@functools.lru_cache
def smoothed_derivatives(width: float) -> np.ndarray:
    """d/dtheta_i [2, 2] of both sums once each is averaged over theta_i - width / 2 to theta_i + width / 2.

    That is the convolution of the step with a rectangle. The derivative of such an average is the difference between
    its ends divided by the width: a central difference of the sums themselves.
    """
    theta, ends = np.exp(ON_PLANE["log_threshold"]), np.eye(2) * width / 2
    return np.array([np.subtract(on_plane(theta + end), on_plane(theta - end)) / width for end in ends])


def threshold_gradient(width: float, **settings: float) -> np.ndarray:
    """d/dtheta [2] of what training minimises on the plane, as it estimates it with a window of that width."""
    params = {name: value.astype(np.float32) for name, value in ON_PLANE.items()}
    values = {"l0_coefficient": 0.0, "target_l0": 0.0, "bandwidth": width / np.sqrt(2), "ramp": 1.0, "features": 2}
    x, model = PLANE.astype(np.float32), kind_named("jumprelu")(2, 2, weighs=("l0_coefficient", "target_l0"))
    _, gradient = terms_and_gradient(model, params, values | settings, x, np.ones(len(x), np.float32))
    return np.asarray(gradient["log_threshold"], np.float64) / np.exp(ON_PLANE["log_threshold"])


@pytest.mark.parametrize("width", [0.4, 0.1, 0.025])
def test_thresholds_follow_the_smoothed_number_of_active_features(width: float) -> None:
    """Their gradient of lambda |f|_0 is that of the smoothed objective, whatever the width of the window."""
    of_l0 = threshold_gradient(width, l0_coefficient=3.0) - threshold_gradient(width)
    np.testing.assert_allclose(of_l0, 3.0 * smoothed_derivatives(width)[:, 1], rtol=1e-3)


def test_thresholds_follow_the_smoothed_distance_to_the_target() -> None:
    """Their gradient of D (L0 / target - 1)^2 a token is its derivative at the L0 of the batch times that of L0."""
    width, target = 0.1, 0.4
    l0 = on_plane(np.exp(ON_PLANE["log_threshold"]))[1] / len(PLANE)
    found = threshold_gradient(width, target_l0=target) - threshold_gradient(width)
    expected = 2 * 2 * (l0 / target - 1) / target * smoothed_derivatives(width)[:, 1]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_thresholds_follow_the_smoothed_error_the_better_the_narrower_the_window() -> None:
    """Their gradient of |x - x_hat|^2 differs from that of the smoothed objective by at most as much as the width."""
    widths = np.array([0.4, 0.2, 0.1, 0.05])
    off = [
        np.abs(threshold_gradient(width) / smoothed_derivatives(width)[:, 0] - 1).max() for width in map(float, widths)
    ]
    assert np.all(off < widths) and off[-1] < 0.3 * off[0]


@functools.lru_cache
def step_of(form: Form, train: TrainConfig) -> Callable[..., tuple[MemberState, jax.Array]]:
    """One optimiser step of a member, compiled."""
    return jax.jit(functools.partial(update_member, form=form, train=train))


def batchtopk_member() -> tuple[MemberState, Callable[..., tuple[MemberState, jax.Array]]]:
    """A member at step 0, and its step on x[B, D], weights[B]."""
    member, train = complete(Member(16, 3, 1e-2, "batchtopk", k=K)), TrainConfig(steps=10)
    return initial(member, D, train), step_of(make_groups((member,))[0].form, train)


def test_threshold_is_the_mean_over_batches_of_the_smallest_kept_feature() -> None:
    """One that forgets, 0.99 to the power of a batch's age each, after every one of 6 steps of training."""
    state, step = batchtopk_member()
    smallest: list[float] = []
    for number in range(6):
        p = in_float64(state.params)
        x = np.random.default_rng(number).normal(0, 1 + number, (B, D)).astype(np.float32)
        c = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0) * WEIGHTS[:, None]
        smallest.append(c[keep(c, K * TOKENS)].min())
        state, metrics = step(state, x, WEIGHTS, np.int32(number), np.bool(False))
        assert metrics[2] == K
        weights = 0.99 ** np.arange(number, -1, -1)
        assert state.memory["threshold"] == pytest.approx(weights @ smallest / weights.sum(), rel=2e-6)
    assert max(smallest) > 2 * min(smallest)


def test_a_batch_with_nothing_active_leaves_the_threshold() -> None:
    """Also if it is the first; and a batch after it counts as if it had not been there."""
    state, step = batchtopk_member()
    x, number = X[:, :D], np.int32(0)
    silent = state._replace(params=state.params | {"b_enc": np.full(16, -1e6, np.float32)})
    after, metrics = step(silent, x, WEIGHTS, number, np.bool(False))
    assert metrics[2] == 0 and not after.diverged
    for name in ("threshold", "threshold_weight"):
        assert after.memory[name] == state.memory[name] == 0
    first, _ = step(state, x, WEIGHTS, number, np.bool(False))
    silent = first._replace(params=silent.params)
    for name in ("threshold", "threshold_weight"):
        assert step(silent, x, WEIGHTS, number, np.bool(False))[0].memory[name] == first.memory[name] > 0


def test_threshold_of_used_features_is_what_training_remembered() -> None:
    """`encode` with the memory of a member keeps what exceeds its threshold: about k features a token of such data."""
    state, step = batchtopk_member()
    for number in range(6):
        x = np.random.default_rng(number).normal(0, 1, (400, D)).astype(np.float32)
        state, _ = step(state, x, np.ones(400, np.float32), np.int32(number), np.bool(False))
    features = encode(kind_named("batchtopk")(D, 16), state.params, state.memory, x)
    p = in_float64(state.params)
    c = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    np.testing.assert_allclose(features, c * (c > float(state.memory["threshold"])), rtol=1e-5, atol=1e-5)
    assert np.count_nonzero(features) / len(x) == pytest.approx(K, rel=0.2)


@pytest.mark.parametrize("kind", kind_names())
def test_initial_parameters_are_all_that_the_kind_declares(kind: str) -> None:
    """Nothing is computed to find them: they have the bits that a use of the autoencoder would give them."""
    model = model_of(kind, "")
    used = model.init(jax.random.key(3), jnp.zeros((1, F)), method="decode")["params"]
    found = init_params(model, 3)
    assert set(found) == {"W_enc", "W_dec", "b_dec", *EXTRA.get(kind, ("b_enc",))}
    assert all(np.asarray(found[name]).tobytes() == np.asarray(used[name]).tobytes() for name in used)
