"""The largest features are kept, exactly as many as asked for, and of equal ones the first."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import loss
from jax_sae.autoencoder.selection import keep_largest_of_batch, keep_largest_of_rows

B, F, MOST_K = 6, 9, 7
FEW = settings(max_examples=150, derandomize=True, database=None, deadline=None)

rows = jax.jit(keep_largest_of_rows, static_argnames="most_k")
batch = jax.jit(keep_largest_of_batch)

NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0]),  # massive ties
    st.floats(0, 2.0**127, width=32, allow_subnormal=False),
    st.sampled_from([1.0, float(np.nextafter(np.float32(1), np.float32(2)))]),
)
CANDIDATES = arrays(np.float32, (B, F), elements=NUMBERS)
ZEROS, ONES = np.zeros((B, F), np.float32), np.ones((B, F), np.float32)
LARGE = np.random.default_rng(0).exponential(1, (64, 48)).astype(np.float32)


def by_sorting(candidates: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest of all numbers by a stable sort, the others 0."""
    order = np.argsort(-candidates.ravel(), kind="stable")[:count]
    kept = np.zeros(candidates.size, np.float32)
    kept[order] = candidates.ravel()[order]
    return kept.reshape(candidates.shape)


def rows_by_sorting(candidates: np.ndarray, k: int) -> np.ndarray:
    """The same for each row."""
    return np.stack([by_sorting(row, k) for row in candidates])


@FEW
@example(ZEROS, 3)
@example(ONES, 3)
@given(CANDIDATES, st.integers(1, MOST_K))
def test_rows_keep_what_a_stable_sort_keeps(candidates: np.ndarray, k: int) -> None:
    """For a traced k up to the static one, with ties, zeros and fewer positive numbers than asked for."""
    np.testing.assert_array_equal(rows(candidates, jnp.int32(k), most_k=MOST_K), rows_by_sorting(candidates, k))


@FEW
@example(ZEROS, 5)
@example(ONES, 5)
@example(ONES, B * F)
@example(ONES * np.float32(2.0**-126), 50)
@given(CANDIDATES, st.integers(1, B * F))
def test_batch_keeps_what_a_stable_sort_keeps(candidates: np.ndarray, count: int) -> None:
    """From the single largest number to all of them, with ties, zeros and fewer positive numbers than asked for."""
    np.testing.assert_array_equal(batch(candidates, jnp.int32(count)), by_sorting(candidates, count))


@pytest.mark.parametrize("levels", [1, 3, 50, 10**9])
def test_numbers_that_few_or_many_share(levels: int) -> None:
    """At a size at which every halving counts: 3,072 numbers of 1, 3, 50 values, or all different."""
    candidates = np.maximum(np.ceil(LARGE * levels) / levels - 1, 0).astype(np.float32)
    for count in (1, 2, 63, 64, 65, 500, 3071, 3072):
        np.testing.assert_array_equal(batch(candidates, jnp.int32(count)), by_sorting(candidates, count))
    for k in (1, 5, 47, 48):
        np.testing.assert_array_equal(rows(candidates, jnp.int32(k), most_k=48), rows_by_sorting(candidates, k))


def test_as_many_as_there_are_keeps_all() -> None:
    """k = F, and a count of all numbers or more, change nothing."""
    candidates = np.round(LARGE, 1)
    np.testing.assert_array_equal(rows(candidates, jnp.int32(48), most_k=48), candidates)
    for count in (candidates.size, 10 * candidates.size):
        np.testing.assert_array_equal(batch(candidates, jnp.int32(count)), candidates)


@pytest.mark.parametrize("over_members", ["vmap", "map"])
@pytest.mark.parametrize(
    ("keep", "expected"),
    [(functools.partial(keep_largest_of_rows, most_k=30), rows_by_sorting), (keep_largest_of_batch, by_sorting)],
    ids=["rows", "batch"],
)
def test_members_of_a_group_keep_each_their_own_number(
    over_members: str, keep: Callable[..., jax.Array], expected: Callable[..., np.ndarray]
) -> None:
    """At once and one after another, each with its own traced number, which takes each its own number of halvings."""
    counts = np.array([30, 1, 7, 12], np.int32)
    scales = np.float32([1e-20, 1, 1e20, 0])[:, None, None]
    candidates = np.round(LARGE, 2) * scales
    if over_members == "vmap":
        found = jax.jit(jax.vmap(keep))(candidates, counts)
    else:
        found = jax.jit(lambda *each: jax.lax.map(lambda pair: keep(*pair), each))(candidates, counts)
    for member, count, of_member in zip(candidates, counts, found, strict=True):
        np.testing.assert_array_equal(of_member, expected(member, int(count)))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(functools.partial(keep_largest_of_rows, most_k=9), rows_by_sorting), (keep_largest_of_batch, by_sorting)],
    ids=["rows", "batch"],
)
def test_gradient_reaches_what_is_kept_alone(
    keep: Callable[..., jax.Array], expected: Callable[..., np.ndarray]
) -> None:
    """1 for a number that is kept, 0 for the others, also among equal ones."""
    candidates = np.round(LARGE, 1) + np.float32(0.1)
    gradient = jax.jit(jax.grad(lambda c: jnp.sum(keep(c, jnp.int32(9)))))(candidates)
    np.testing.assert_array_equal(gradient, expected(candidates, 9) > 0)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_a_batch_has_exactly_k_active_features_a_token_on_average(kind: str, ties: bool) -> None:
    """In training, with padded rows whose candidates are the largest, and where all tokens are the same."""
    tokens, padding, D, k = 50, 14, 48, 5
    x = np.concatenate([LARGE[:tokens], 100 + LARGE[tokens : tokens + padding]])
    if ties:
        x[:tokens] = x[0]
    weights = (np.arange(len(x)) < tokens).astype(np.float32)
    params = {"W_enc": jnp.eye(D), "b_enc": jnp.zeros(D), "W_dec": jnp.eye(D), "b_dec": jnp.zeros(D)}
    model = kind_named(kind)(D, D, most_k=k, weighs=())
    values = {"k": jnp.int32(k)}
    terms = jax.jit(lambda *batch: loss(model, params, values, *batch))(x, weights)
    assert jnp.sum(terms.fired) == k * tokens
    assert terms.smallest == np.sort(x[:tokens].ravel())[-k * tokens]
