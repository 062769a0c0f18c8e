"""Keeping the largest features, exactly: ties go to the first."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jax_sae.autoencoder.shards import WHOLE, Shards

BOUNDS = (16, 64, 256)
"""Of k, for each of which there is a program where k is not known when it is compiled."""

MOST_SENT = 1024
"""Candidates of a row that parts of the features send each other; instead of more they send counts, some 30 times."""


def keep_largest_of_rows(candidates: jax.Array, k: jax.Array, most_k: int, shards: Shards = WHOLE) -> jax.Array:
    """Keep the k largest of each row, set the others to 0; of equal ones, the first.

    Args:
        candidates: [..., F] float32, none below 0; those that are 0 are off anyway.
        k: [] int32, from 1 to `most_k`; it may be traced.
        most_k: at most F, of all parts of the features.
        shards: in how many parts features lie; F is the number of this part's.
    """
    F = candidates.shape[-1]
    if sends_counts(F, most_k, shards):
        return kept_by_counts(candidates, k, shards)
    largest, places = jax.lax.top_k(jax.lax.stop_gradient(candidates), min(most_k, F))
    value, place = last_kept(largest, places, F, k, most_k, shards)
    is_before = jnp.arange(F) <= place
    return jnp.where((candidates > value) | ((candidates == value) & is_before), candidates, 0.0)


def sends_counts(F: int, most_k: int, shards: Shards) -> bool:
    """Whether parts of F features each, which send their largest, would send more than MOST_SENT numbers of a row."""
    return shards.feature > 1 and shards.feature * min(most_k, F) > MOST_SENT


def kept_by_counts(candidates: jax.Array, k: jax.Array, shards: Shards) -> jax.Array:
    """`keep_largest_of_rows` where parts of the features send each other counts, for any number of candidates."""
    of_row = partial(keep_largest_of_batch, shards=Shards(feature=shards.feature))
    rows = jax.vmap(of_row, (0, None))(candidates.reshape(-1, candidates.shape[-1]), k)
    return rows.reshape(candidates.shape)


def last_kept(
    largest: jax.Array, places: jax.Array, F: int, k: jax.Array, most_k: int, shards: Shards
) -> tuple[jax.Array, jax.Array]:
    """The smallest value of a row that is kept [..., 1], and up to which of the F features of this part it is kept.

    A part of the features sends its own largest values, and no more: the k-th of them all is the k-th of the row. Of
    equal values those of the parts before this one are kept, and none of the parts after the one that has the last.

    Args:
        largest: [..., K] float32, the K = min(most_k, F) largest of this part, in falling order.
        places: [..., K] int32, where they stand, of equal ones the first before the others.
        F: features of this part.
        k: [] int32.
        most_k: the largest k there may be.
        shards: in how many parts features lie.
    """
    last = jnp.broadcast_to(k - 1, (*largest.shape[:-1], 1))
    if shards.feature == 1:
        value, place = (jnp.take_along_axis(each, last, -1) for each in (largest, places))
        return value, place
    K = largest.shape[-1]
    of_all, sent_at = jax.lax.top_k(shards.of_features(largest), most_k)
    value, at = (jnp.take_along_axis(each, last, -1) for each in (of_all, sent_at))
    part, here = at // K, shards.feature_part()
    place = jnp.take_along_axis(places, at % K, -1)
    return value, jnp.where(part == here, place, jnp.where(part > here, F, -1))


def keep_largest_of_any(candidates: jax.Array, k: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """`keep_largest_of_rows` without a bound on k, from 1 to F: the time it takes follows k; in parts, by counts."""
    if shards.feature > 1:
        return kept_by_counts(candidates, k, shards)
    F = candidates.shape[-1]
    bounds = [bound for bound in BOUNDS if bound < F]

    def halving(candidates: jax.Array) -> jax.Array:
        rows = jax.vmap(keep_largest_of_batch, (0, None))(candidates.reshape(-1, F), k)
        return rows.reshape(candidates.shape)

    def within(bound: int) -> Callable[[jax.Array], jax.Array]:
        return lambda candidates: keep_largest_of_rows(candidates, jnp.minimum(k, bound), bound)

    smallest_bound = jnp.sum(k > jnp.array(bounds, jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(smallest_bound, [*map(within, bounds), halving], candidates)


def keep_largest_of_batch(candidates: jax.Array, count: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """Keep the `count` largest of all numbers, set the others to 0; of equal ones, the first.

    Where fewer are above 0, those are kept. The smallest one to keep is found by halving an interval of float32s, whose
    bits, read as integers, have the same order; a pass over the numbers each, about 20 of them. Sorting costs more.
    Where tokens or features lie in several parts, a pass sends a number, how many there are.

    Args:
        candidates: [B, F] or [F] float32, none below 0, fewer than 2^31 of all parts.
        count: [] int32, at least 1.
        shards: in how many parts tokens and features lie; B and F are the numbers of this part's.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(candidates), jnp.int32)
    one = jnp.int32(1)  # the bits of the smallest number above 0

    def narrow(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, of_low = state
        middle = low + (high - low) // 2
        found = shards.over_all(jnp.sum(bits >= middle, dtype=jnp.int32))
        enough = found >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, found, of_low)

    positive = shards.over_all(jnp.sum(bits >= one, dtype=jnp.int32))
    smallest, _, found = jax.lax.while_loop(
        lambda state: (state[2] > count) & (state[1] - state[0] > 1),
        narrow,
        (one, shards.largest(jnp.max(bits)) + 1, positive),
    )

    # More than `count` are left only if several are equal to the smallest: of these, the first ones are kept.
    is_tie, surplus = bits == smallest, found - count
    order, size = _order(bits.shape, shards)

    def narrow_ties(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state  # at least `surplus` of the equal ones stand from `low` on, fewer from `high` on
        middle = low + (high - low) // 2
        enough = shards.over_all(jnp.sum(is_tie & (order >= middle), dtype=jnp.int32)) >= surplus
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    from_there, _ = jax.lax.while_loop(
        lambda state: (surplus > 0) & (state[1] - state[0] > 1), narrow_ties, (jnp.int32(0), jnp.int32(size))
    )
    dropped = (surplus > 0) & is_tie & (order >= from_there)
    return jnp.where((bits >= smallest) & ~dropped, candidates, 0.0)


def _order(shape: tuple[int, ...], shards: Shards) -> tuple[jax.Array, int]:
    """Where each number of this part stands among those of all parts, row by row, int32; and how many these are."""
    size = math.prod(shape) * shards.data * shards.feature
    if shards == WHOLE:
        return jnp.arange(size, dtype=jnp.int32).reshape(shape), size
    columns = shards.feature_numbers(shape[-1])
    if len(shape) == 1:
        return columns.astype(jnp.int32), size
    B, F = shape
    rows = jnp.arange(B) + B * shards.data_part()
    return (rows[:, None] * (F * shards.feature) + columns).astype(jnp.int32), size
