"""The TopK autoencoder without dense work on features that are 0, beside its dense form."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.autoencoder.model import product
from jax_sae.autoencoder.sparse import topk_reconstruct
from jax_sae.config import Precision

B, D, F, MOST_K = 24, 10, 40, 6
NAMES = ("x", "W_enc", "b_enc", "W_dec", "b_dec")
Arrays = dict[str, jax.Array]
Function = Callable[[Arrays, jax.Array], jax.Array]


def arrays(seed: int = 0) -> Arrays:
    shapes = {"x": (B, D), "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def sparse(a: Arrays, k: jax.Array, precision: Precision = "float32") -> jax.Array:
    return topk_reconstruct(*(a[name] for name in NAMES), k, MOST_K, precision)[0]


def dense(a: Arrays, k: jax.Array, precision: Precision = "float32") -> jax.Array:
    return product(dense_features(a, k, precision), a["W_dec"], precision) + a["b_dec"]


def dense_features(a: Arrays, k: jax.Array, precision: Precision = "float32") -> jax.Array:
    f = jax.nn.relu(product(a["x"] - a["b_dec"], a["W_enc"], precision) + a["b_enc"])
    falling = jnp.argsort(-f, axis=1, stable=True)  # of equal ones, the first come first
    return jnp.where(jnp.argsort(falling, axis=1) < k, f, 0)


def value_and_gradients(function: Function, a: Arrays, k: jax.Array) -> dict[str, jax.Array]:
    """x_hat, and the gradient of a nonlinear function of it with respect to every array."""

    def total(a: Arrays) -> tuple[jax.Array, jax.Array]:
        x_hat = function(a, k)
        return jnp.sum(jnp.sin(x_hat) * jnp.cos(jnp.arange(x_hat.size).reshape(x_hat.shape))), x_hat

    gradients, x_hat = jax.grad(total, has_aux=True)(a)
    return {"x_hat": x_hat, **gradients}


COMPILED = {form: jax.jit(partial(value_and_gradients, form)) for form in (sparse, dense)}


def assert_same(a: Arrays, k: int) -> Arrays:
    """Sparse and dense agree, compiled with a traced k; returns what the sparse form gives."""
    found, expected = COMPILED[sparse](a, jnp.int32(k)), COMPILED[dense](a, jnp.int32(k))
    assert_close(found, expected)
    return found


def assert_close(found: Arrays, expected: Arrays, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == jnp.float32
        assert np.isfinite(found[name]).all(), name
        scale = np.abs(expected[name]).max() + 1e-6
        np.testing.assert_allclose(found[name], expected[name], atol=tolerance * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("k", [1, 4, MOST_K])
def test_value_and_every_gradient_are_those_of_the_dense_form(k: int) -> None:
    """For a traced k up to most_k, with respect to x and all parameters."""
    found = assert_same(arrays(), k)
    assert all(np.abs(found[name]).max() > 0.1 for name in found)


def test_features_are_the_largest_in_falling_order() -> None:
    """Values and indices, written into zeros, are the dense features; from the k-th on values are 0."""
    a, k = arrays(), 4
    _, values, indices = topk_reconstruct(*(a[name] for name in NAMES), jnp.int32(k), MOST_K, "float32")
    written = jnp.zeros((B, F)).at[jnp.arange(B)[:, None], indices].set(values)
    np.testing.assert_allclose(written, dense_features(a, jnp.int32(k)), rtol=1e-6)
    assert (values[:, k:] == 0).all() and (jnp.diff(values) <= 0).all() and (values[:, :k] > 0).all()


@pytest.mark.parametrize("run", ["vmap", "map"])
def test_members_together_are_members_alone(run: str) -> None:
    """Members with k of their own on the same x give what the dense form of each gives, under vmap and lax.map."""
    ks = jnp.array([1, 3, MOST_K])
    members = [{name: array for name, array in arrays(seed).items() if name != "x"} for seed in range(3)]
    stacked, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), arrays()["x"]

    def of_sparse(a: Arrays, k: jax.Array) -> Arrays:
        return value_and_gradients(sparse, {**a, "x": x}, k)

    together = {"vmap": jax.vmap(of_sparse), "map": lambda a, k: jax.lax.map(lambda each: of_sparse(*each), (a, k))}
    found = jax.jit(together[run])(stacked, ks)
    for i, member in enumerate(members):
        alone = COMPILED[dense]({**member, "x": x}, ks[i])
        assert_close({name: found[name][i] for name in found}, alone)


def test_features_of_zeros_have_no_gradient() -> None:
    """A padded member: its last features keep gradients that are exactly 0, even where they are among the largest."""
    a = arrays()
    own = 4  # fewer than k: features of zeros are taken too
    padded = a | {"W_enc": a["W_enc"].at[:, own:].set(0), "b_enc": a["b_enc"].at[own:].set(0)}
    padded["W_dec"] = a["W_dec"].at[own:].set(0)
    found = assert_same(padded, MOST_K)
    for padding in (found["W_enc"][:, own:], found["b_enc"][own:], found["W_dec"][own:]):
        assert (padding == 0).all()
    trimmed = padded | {"W_enc": a["W_enc"][:, :own], "b_enc": a["b_enc"][:own], "W_dec": a["W_dec"][:own]}
    np.testing.assert_allclose(found["x_hat"], dense(trimmed, jnp.int32(own)), rtol=1e-5, atol=1e-5)


def test_of_equal_features_the_first_are_kept() -> None:
    """Where several features are equal to the k-th largest, those with the lowest index count, and no other."""
    a = arrays()
    # features 5, 6, 7 are equal and above all others
    equal = a | {"W_enc": a["W_enc"].at[:, 5:8].set(0.0), "b_enc": a["b_enc"].at[5:8].set(100.0)}
    found = assert_same(equal, 2)
    assert (found["b_enc"][5:7] != 0).all() and found["b_enc"][7] == 0


def test_features_that_are_0_have_no_gradient() -> None:
    """Where fewer than k features of a token are above 0, or none at all, the rest are 0 and get no gradient."""
    a = arrays()
    few = a | {"b_enc": a["b_enc"] - 7}
    active = np.asarray((dense_features(few, jnp.int32(F)) > 0).sum(1))
    assert (active < MOST_K).any() and (active > 0).any() and (active == 0).any()
    assert_same(few, MOST_K)
    none = assert_same(a | {"b_enc": a["b_enc"] - 1000}, MOST_K)
    np.testing.assert_array_equal(none["x_hat"], jnp.broadcast_to(a["b_dec"], (B, D)))
    assert all((none[name] == 0).all() for name in ("x", "W_enc", "b_enc", "W_dec"))


@pytest.mark.long
def test_precision() -> None:
    """bfloat16 rounds what the dense form rounds; only the gradient of b_dec, a sum, is float32's."""
    a = arrays()
    k = jnp.int32(MOST_K)
    found, expected = (value_and_gradients(partial(form, precision="bfloat16"), a, k) for form in (sparse, dense))
    assert_close({"b_dec": found.pop("b_dec")}, {"b_dec": expected.pop("b_dec")}, 1e-2)
    assert_close(found, expected)
    assert np.abs(found["x_hat"] - sparse(a, k)).max() > 1e-3


def test_two_dense_products_are_left() -> None:
    """x W_enc, and W_enc times a vector; and there is no array [B, most_k, D]."""
    text = str(jax.make_jaxpr(partial(value_and_gradients, sparse))(arrays(), jnp.int32(2)))
    assert text.count("dot_general") == 2
    assert f"f32[{B},{MOST_K}]" in text and f"f32[{B},{MOST_K},{D}]" not in text
