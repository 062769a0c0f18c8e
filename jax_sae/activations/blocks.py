"""Activations of items -> rows of a block, normalised: put there by NumPy, or on the device that computes them.

Where activations stay on the device (`harvest.stays_on_device`), compiled programs measure them and put them into the
block, and only what is known of each token or story comes to the host. Rows, their order and their bits are those that
NumPy makes of the same activations, but for two roundings: the 'story' normalisation is estimated in float32, by NumPy
in float64, and so are norms, so that a token may lie on the other side of a `norm_limit` that its norm nearly equals.
Memory there: the block, and one batch of the language model; where several devices share stories, each has its part.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae.activations.normalize import (
    Normalization,
    estimate_stories,
    for_story,
    normalize,
    refuse_equal,
)
from jax_sae.activations.norms import token_norms
from jax_sae.activations.places import Place
from jax_sae.config import ActivationsConfig
from jax_sae.config import Normalization as Kind
from jax_sae.errors import BadInput
from jax_sae.language_model.devices import LAUNCHING, ROWS, mesh_of_rows, seen_by_all
from jax_sae.processes import gathered, own_share, several, summed, together

if TYPE_CHECKING:
    from jax_sae.activations.sources import Item, Source

OnDevice = Iterator[tuple[jax.Array, list[tuple[int, np.ndarray]]]]
"""Batches x[R, T, D] float32 on the device, in the model's scale; and of the first rows of each the number of the item
that stands there, and which of the T are its tokens, [its length] int. What else is in x does not count."""


T = TypeVar("T")
Making = Generator[float, None, T]
"""Makes something in pieces, and tells after each how much is there, from 0 to 1; what it returns is all of it."""


class Taken(NamedTuple):
    """What a block takes of an item."""

    first: int
    last: int
    """Its tokens `first` to `last` - 1."""
    rows: np.ndarray
    """[last - first] int, the rows of the block where these go."""


def filled(
    source: "Source",
    items: Sequence["Item"],
    taken: Sequence[Taken],
    shape: tuple[int, int],
    fitted: Normalization,
    activations: ActivationsConfig,
) -> "Making[tuple[np.ndarray | jax.Array, np.ndarray]]":
    """A block with what is taken of items, normalised; 0 where nothing is, and where a norm is over the `norm_limit`.

    It is made in pieces where activations stay on devices, a batch of the language model at a time.

    Args:
        source: of the items.
        items: that have tokens.
        taken: of each of them; rows are counted through all batches.
        shape: (batches, B).
        fitted: the normalisation, where it is one for all stories.
        activations: its `normalization` and `norm_limit` are used.

    Returns:
        The block [batches, B, D] float32, a JAX array where activations stay on the device; and the norms [batches * B]
        float64 in the model's scale, 0 where no row is and where there is no limit.

    Raises:
        BadInput: if an activation is not finite, or a story cannot be normalised by itself.
    """
    norms = np.zeros(shape[0] * shape[1])
    batches = on_device(source, items)
    if batches is not None:
        return (yield from _filled_on_device(source, batches, taken, shape, norms, fitted, activations))
    if several():
        return _filled_by_several(source, items, taken, shape, norms, fitted, activations)
    x = _filled_here(source, items, taken, norms, fitted, activations)
    return x.reshape(*shape, -1), norms


def _filled_by_several(
    source: "Source",
    items: Sequence["Item"],
    taken: Sequence[Taken],
    shape: tuple[int, int],
    norms: np.ndarray,
    fitted: Normalization,
    activations: ActivationsConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """`filled` by several processes: each reads some of the items, and their rows, 0 in all others, are summed."""
    own = np.flatnonzero(own_share(len(items))).tolist()
    with together():
        x = _filled_here(source, [items[i] for i in own], [taken[i] for i in own], norms, fitted, activations)
    return summed(x).reshape(*shape, -1), gathered(norms).sum(0) if activations.norm_limit else norms


def _filled_here(
    source: "Source",
    items: Sequence["Item"],
    taken: Sequence[Taken],
    norms: np.ndarray,
    fitted: Normalization,
    activations: ActivationsConfig,
) -> np.ndarray:
    """The rows of a block [rows, D] with what is taken of items; their norms are put into `norms`."""
    x = np.zeros((len(norms), source.width), np.float32)
    for i, story in finite_activations(source, items):
        first, last, into = taken[i]
        rows = story[first:last]
        if activations.norm_limit:
            norms[into] = token_norms(rows)
            within = norms[into] <= activations.norm_limit
            rows, into = rows[within], into[within]
        x[into] = normalize(for_story(activations.normalization, fitted, story, source.places), rows)
    return x


def _filled_on_device(
    source: "Source",
    batches: OnDevice,
    taken: Sequence[Taken],
    shape: tuple[int, int],
    norms: np.ndarray,
    fitted: Normalization,
    activations: ActivationsConfig,
) -> "Making[tuple[jax.Array, np.ndarray]]":
    """`filled` for activations on the device; a batch is done before the next one is computed."""
    block: jax.Array | None = None
    of_all, done = max(1, sum(its.last - its.first for its in taken)), 0
    for x, stories in batches:
        mesh = mesh_of_rows(x)
        used = np.zeros(x.shape[:2], bool)
        into = np.full(x.shape[:2], -1)
        for row, (i, tokens) in enumerate(stories):
            first, last, rows = taken[i]
            used[row, tokens] = True
            into[row, tokens[first:last]] = rows
        if block is None:
            block = _empty((*shape, source.width), mesh)
        with LAUNCHING:
            own, seen = _measured(x, used, activations.normalization, source.places)
            seen = jax.tree.map(seen_by_all, seen)
        not_finite, is_equal, its_norms = jax.device_get(seen)
        for row, (_, tokens) in enumerate(stories):
            _refuse_not_finite(source.name, not_finite[row], len(tokens))
            for place, equal in zip(source.places, is_equal, strict=False):
                refuse_equal(equal[row], len(tokens), place.name if len(source.places) > 1 else "")
        if activations.norm_limit:
            norms[into[into >= 0]] = its_norms[into >= 0]
            into[its_norms > activations.norm_limit] = -1
        # Where a row does not go it has the number of no row, each another one: programs may count on that.
        nowhere = len(norms) + np.arange(into.size).reshape(into.shape)
        into = np.where(into >= 0, into, nowhere).astype(np.int32)
        with LAUNCHING:
            block = _with_rows(block, x, into, own or fitted, mesh)
        del x  # so that there is one batch at a time
        done += sum(taken[i].last - taken[i].first for i, _ in stories)
        yield done / of_all
    return _empty((*shape, source.width), None) if block is None else block, norms


def _empty(shape: tuple[int, int, int], mesh: Mesh | None) -> jax.Array:
    """A block of zeros; on several devices, which made its rows, as many rows of each batch on each of them.

    Where they do not divide the rows, or there is one batch, of which stories are taken, it is whole on each.
    """
    if mesh is None:
        return jnp.zeros(shape, jnp.float32)
    return jnp.zeros(shape, jnp.float32, device=NamedSharding(mesh, _lies(shape, mesh)))


def _lies(shape: tuple[int, ...], mesh: Mesh) -> P:
    return P(None, ROWS) if shape[0] > 1 and shape[1] % mesh.size == 0 else P()


@partial(jax.jit, static_argnames=("kind", "places"))
def _measured(
    x: jax.Array, used: jax.Array, kind: Kind, places: tuple[Place, ...]
) -> tuple[Normalization | None, tuple[jax.Array, list[jax.Array], jax.Array]]:
    """Of x[R, T, D]: each story's own normalisation, if it has one; and what is looked at on the host.

    That is how many of its used tokens are not finite [R], for each place whether its numbers are all equal [R], and
    the norms [R, T].
    """
    own, is_equal = estimate_stories(x, used, places) if kind == "story" else (None, [])
    not_finite = jnp.sum(used & ~jnp.isfinite(x).all(-1), axis=-1)
    largest = jnp.abs(x).max(-1, keepdims=True)  # divided by it, no square is beyond float32
    norms = largest[..., 0] * jnp.linalg.norm(x / jnp.where(largest > 0, largest, 1), axis=-1)
    return own, (not_finite, is_equal, norms)


@partial(jax.jit, static_argnames="mesh", donate_argnames="block")
def _with_rows(
    block: jax.Array, x: jax.Array, into: jax.Array, normalization: Normalization, mesh: Mesh | None
) -> jax.Array:
    """The block [batches, B, D] with x[R, T, D], normalised, at its rows into[R, T]; in its place in memory.

    On several devices each has some rows of x and some of the block: all of x goes round, from each to the next, and
    each takes what belongs to it.
    """
    rows = normalize(normalization, x)
    if mesh is None:
        return _put(block, rows, into)
    n, B, lies = mesh.size, block.shape[1], _lies(block.shape, mesh)

    def on_each(block: jax.Array, rows: jax.Array, into: jax.Array) -> jax.Array:
        own, here = jax.lax.axis_index(ROWS), block.shape[1]
        nowhere = len(block) * here + jnp.arange(into[0].size).reshape(into[0].shape)

        def take(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            block, rows = state
            at = into[(own - i) % n]  # where the rows go that this device has now
            is_here = (at < len(block) * B) & ((at % B // here == own) | (here == B))
            block = _put(block, rows, jnp.where(is_here, at // B * here + at % here, nowhere))
            return block, jax.lax.ppermute(rows, ROWS, [(each, (each + 1) % n) for each in range(n)])

        return jax.lax.fori_loop(0, n, take, (block, rows))[0]

    spread = jax.shard_map(on_each, mesh=mesh, in_specs=(lies, P(ROWS), P()), out_specs=lies, check_vma=False)
    return spread(block, rows, into.reshape(n, -1, into.shape[1]))


def _put(block: jax.Array, rows: jax.Array, into: jax.Array) -> jax.Array:
    D = block.shape[-1]
    placed = block.reshape(-1, D).at[into.ravel()].set(rows.reshape(-1, D), mode="drop", unique_indices=True)
    return placed.reshape(block.shape)


def part(block: np.ndarray | jax.Array, first: int, length: int) -> np.ndarray | jax.Array:
    """Rows of a block [1, N, D] -> [1, length, D]; on a device by one program for each length."""
    if isinstance(block, np.ndarray):
        return block[:, first : first + length]
    return jax.lax.dynamic_slice_in_dim(block, first, length, axis=1)


def on_device(source: "Source", items: Sequence["Item"]) -> OnDevice | None:
    """The activations of items where they are computed; None where they are NumPy's, as those of arrays always are.

    A source with a method `on_device(items)` says so itself.
    """
    own = getattr(source, "on_device", None)
    return None if own is None else own(items)


def finite_activations(source: "Source", items: Sequence["Item"]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number in `items`, activations [T, D] float32, in the model's scale) of each item.

    Raises:
        BadInput: if an activation is not finite.
    """
    for i, x in source.activations(items):
        _refuse_not_finite(source.name, int((~np.isfinite(x).all(-1)).sum()), len(x))
        yield i, x


def _refuse_not_finite(name: str, not_finite: int, tokens: int) -> None:
    if not_finite:
        raise BadInput(
            f"{name}: {not_finite} of {tokens} adjacent activations are not finite; "
            "export them again in float32, and leave out texts on which the language model overflows"
        )
