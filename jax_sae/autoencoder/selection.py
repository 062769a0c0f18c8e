"""Keeping the largest features, exactly: ties go to the first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BOUNDS = (16, 64, 256)
"""Of k, for each of which there is a program where k is not known when it is compiled."""


def keep_largest_of_rows(candidates: jax.Array, k: jax.Array, most_k: int) -> jax.Array:
    """Keep the k largest of each row, set the others to 0; of equal ones, the first.

    Args:
        candidates: [..., F] float32, none below 0; those that are 0 are off anyway.
        k: [] int32, from 1 to `most_k`; it may be traced.
        most_k: at most F.
    """
    largest, places = jax.lax.top_k(jax.lax.stop_gradient(candidates), most_k)
    last = jnp.broadcast_to(k - 1, (*candidates.shape[:-1], 1))
    value, place = (jnp.take_along_axis(each, last, -1) for each in (largest, places))
    is_before = jnp.arange(candidates.shape[-1]) <= place
    return jnp.where((candidates > value) | ((candidates == value) & is_before), candidates, 0.0)


def keep_largest_of_any(candidates: jax.Array, k: jax.Array) -> jax.Array:
    """`keep_largest_of_rows` without a bound on k, from 1 to F: the time it takes follows k."""
    F = candidates.shape[-1]
    bounds = [bound for bound in BOUNDS if bound < F]

    def halving(candidates: jax.Array) -> jax.Array:
        rows = jax.vmap(keep_largest_of_batch, (0, None))(candidates.reshape(-1, F), k)
        return rows.reshape(candidates.shape)

    def within(bound: int) -> Callable[[jax.Array], jax.Array]:
        return lambda candidates: keep_largest_of_rows(candidates, jnp.minimum(k, bound), bound)

    smallest_bound = jnp.sum(k > jnp.array(bounds, jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(smallest_bound, [*map(within, bounds), halving], candidates)


def keep_largest_of_batch(candidates: jax.Array, count: jax.Array) -> jax.Array:
    """Keep the `count` largest of all numbers, set the others to 0; of equal ones, the first.

    Where fewer are above 0, those are kept. The smallest one to keep is found by halving an interval of float32s, whose
    bits, read as integers, have the same order; a pass over the numbers each, about 20 of them. Sorting costs more.

    Args:
        candidates: [B, F] float32, none below 0.
        count: [] int32, at least 1.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(candidates), jnp.int32)
    one = jnp.int32(1)  # the bits of the smallest number above 0

    def narrow(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, of_low = state
        middle = low + (high - low) // 2
        found = jnp.sum(bits >= middle, dtype=jnp.int32)
        enough = found >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, found, of_low)

    positive = jnp.sum(bits >= one, dtype=jnp.int32)
    smallest, _, found = jax.lax.while_loop(
        lambda state: (state[2] > count) & (state[1] - state[0] > 1), narrow, (one, jnp.max(bits) + 1, positive)
    )

    # More than `count` are left only if several are equal to the smallest: of these, the first ones are kept.
    is_tie, surplus = bits == smallest, found - count
    order = jnp.arange(bits.size, dtype=jnp.int32).reshape(bits.shape)

    def narrow_ties(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state  # at least `surplus` of the equal ones stand from `low` on, fewer from `high` on
        middle = low + (high - low) // 2
        enough = jnp.sum(is_tie & (order >= middle), dtype=jnp.int32) >= surplus
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    from_there, _ = jax.lax.while_loop(
        lambda state: (surplus > 0) & (state[1] - state[0] > 1), narrow_ties, (jnp.int32(0), jnp.int32(bits.size))
    )
    dropped = (surplus > 0) & is_tie & (order >= from_there)
    return jnp.where((bits >= smallest) & ~dropped, candidates, 0.0)
