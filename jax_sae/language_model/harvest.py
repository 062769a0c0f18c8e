"""Token ids -> activations, batched by length so that little padding is computed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.devices import LAUNCHING, devices_of, in_rows, seen_by_all

TOKENS_AT_A_TIME_ON_CPU = 1024
PADDED_TO_MULTIPLES_OF = {256: 16, 512: 64, 1024: 128}
"""Up to so many tokens; of 256 beyond."""


def tokens_at_a_time() -> int:
    """Tokens of a forward pass, padding included.

    On a CPU the arrays of 1024 tokens stay in the caches and in memory that the process already has: half as fast again
    as 8192 tokens (docs/LOG.md). An accelerator needs more to be filled.
    """
    return TOKENS_AT_A_TIME_ON_CPU if jax.default_backend() == "cpu" else 32_768


def stays_on_device() -> bool:
    """Whether activations of a text stay on the device from the language model to the batches.

    Not on a CPU, where NumPy sees the same memory, and is as fast.
    """
    return jax.default_backend() != "cpu"


def padded_length(n_tokens: int) -> int:
    """The length that a story is padded to.

    The next multiple of 16 up to 256 tokens, of 64 up to 512, of 128 up to 1024 and of 256 beyond: little padding for
    most stories, and few shapes to compile.
    """
    step = next((step for most, step in PADDED_TO_MULTIPLES_OF.items() if n_tokens <= most), 256)
    return -(-n_tokens // step) * step


@jax.jit(static_argnums=(0, 1))
def read_places(
    model: Decoder,
    places: tuple[str, ...],
    params: Mapping[str, Any],
    token_ids: jax.Array,
    segments: jax.Array | None = None,
) -> jax.Array:
    """token_ids[B, T] -> what stands at the places, side by side, [B, T, sum of their widths] float32.

    The parts of the last block that none of them needs are not computed.
    """
    found: dict[str, jax.Array] = {}

    def tap(place: str, x: jax.Array) -> jax.Array:
        if place in places:
            found[place] = x
        return x

    stream = cast(jax.Array, model.apply({"params": params}, token_ids, tap, segments))
    found.setdefault(f"{model.layer}.resid_pre", stream)  # of a block that need not be there
    return found[places[0]] if len(places) == 1 else jnp.concatenate([found[place] for place in places], axis=-1)


def harvest(
    model: Decoder,
    places: tuple[str, ...],
    params: Mapping[str, Any],
    stories: Sequence[np.ndarray],
    segments: Sequence[np.ndarray | None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Run the language model over whole stories, as `harvest_on_device` does.

    Yields:
        (number of the story in `stories`, its activations [T, sum of widths] float32), longest stories first; a story
        without tokens yields nothing. The array is a view of a larger one: copy what you keep.
    """
    for batch, x in harvest_on_device(model, places, params, stories, segments):
        activations = np.asarray(seen_by_all(x))
        for row, i in enumerate(batch):
            yield i, activations[row, : len(stories[i])]


def harvest_on_device(
    model: Decoder,
    places: tuple[str, ...],
    params: Mapping[str, Any],
    stories: Sequence[np.ndarray],
    segments: Sequence[np.ndarray | None] | None = None,
) -> Iterator[tuple[list[int], jax.Array]]:
    """Run the language model over whole stories, several of about the same length at a time.

    Args:
        model: with the blocks that the places need.
        places: that are read, in one pass.
        params: its parameters.
        stories: token ids [T] of one story each, T from 0 to the positions of the model.
        segments: for each story None, or the number of its document for each token [T], as `Decoder` takes them.

    Yields:
        (numbers in `stories` of those in the first rows, their activations [rows, T, sum of widths] float32), longest
        stories first; a story without tokens is in none. rows and T take few values, so that few programs are compiled.
    """
    devices = devices_of(params)
    longest_first = sorted((i for i in range(len(stories)) if len(stories[i])), key=lambda i: -len(stories[i]))
    while longest_first:
        length = min(padded_length(len(stories[longest_first[0]])), model.architecture.max_position_embeddings)
        rows = min(max(1, tokens_at_a_time() // length), 1 << (len(longest_first) - 1).bit_length())
        if len(devices) > 1:  # so many tokens on each of them
            rows = len(devices) * min(max(1, tokens_at_a_time() // length), -(-len(longest_first) // len(devices)))
        batch, longest_first = longest_first[:rows], longest_first[rows:]
        token_ids = np.zeros((rows, length), np.int32)  # the model is causal: what is right of a story does not matter
        its = None if segments is None else np.zeros((rows, length), np.int32)
        for row, i in enumerate(batch):
            token_ids[row, : len(stories[i])] = stories[i]
            if its is not None and segments is not None and (of_story := segments[i]) is not None:
                its[row, : len(stories[i])] = of_story
        with LAUNCHING:
            x = read_places(model, places, params, *in_rows(devices, token_ids, its))
        yield batch, x
        del x  # a batch is gone before the next one is computed
