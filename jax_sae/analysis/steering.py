"""A feature is raised, held or taken away while a language model reads and writes: a tap; what it writes; what changes.

A feature f_i adds f_i d_i to what its dictionary writes, d_i its direction in the language model's own scale. So to add
S means x + S d_i, and to clamp it to S means x + (S - f_i) d_i: what the dictionary leaves out of x stays as it is.
"""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.decoder import Decoder, Tap
from jax_sae.language_model.generate import continued
from jax_sae.language_model.places import when
from jax_sae.language_model.pretrained import LOGITS_AT_A_TIME
from jax_sae.rows import is_traced
from jax_sae.trained import TrainedAutoencoder


class Intervention(NamedTuple):
    """What is done to a feature, besides the numbers; the same one is compiled once."""

    clamp: bool
    """Whether the feature is set to the strength; else the strength is added to it."""
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def steer(
    sae: TrainedAutoencoder, feature: int, strength: Any, *, clamp: bool = False, place: str | None = None
) -> Tap:
    """A tap that adds `strength` to a feature of each token, or sets it to that, at the places its dictionary writes.

        lm.generate("Once upon a time", tap=jax_sae.steer(sae, 17, 8.0))
        jax.jit(lambda s: lm.run(token_ids, jax_sae.steer(sae, 17, s, clamp=True)))(0.0)

    Args:
        sae: a dictionary that takes each token by itself.
        feature: its number.
        strength: what is added, or what it is set to, in the units of `sae.encode`; it may be traced.
        clamp: set it: x + (strength - f) d in place of x + strength d. With 0 the feature is taken away.
        place: where the activations of an autoencoder are from, if its run does not say.

    Raises:
        BadInput: if there is no such feature or place, the strength is not finite or overflows float32, the run
            normalised each story by itself, or with `clamp`, it writes a place before it has read all of its own, as
            crosscoders do. While the language model runs, if that has no such place.
    """
    what = intervention(sae, clamp, place)
    refuse_overflow(sae, feature, strength)
    return tap_of(sae, feature, strength, what)


def intervention(sae: TrainedAutoencoder, clamp: bool, place: str | None = None) -> Intervention:
    """Where a dictionary reads and writes, checked. Errors as for `steer`."""
    reads, writes = (tuple(name or place or "" for name in names) for names in (sae.reads, sae.writes))
    if "" in writes:
        raise BadInput(f"the run of {sae.name} does not say where its activations are from; give place='9.mlp_out'")
    for name in (*reads, *writes):
        if when(name) is None:
            raise BadInput(f"{sae.name} belongs to {name!r}, which is no place of a language model; see docs/places.md")
    last = max(reads, key=_when)
    if clamp and (early := [name for name in writes if _when(name) < _when(last)]):
        raise BadInput(
            f"{sae.name} writes {early[0]} before it has read {last}, so its features are not known there and none can "
            "be set; add to one instead"
        )
    return Intervention(clamp, reads, writes)


def _when(place: str) -> tuple[float, int]:
    found = when(place)
    assert found is not None
    return found


def refuse_overflow(sae: TrainedAutoencoder, feature: int, strength: Any) -> None:
    """Raise BadInput if a known strength is not finite, or so large that float32 does not hold what it adds."""
    direction = sae.direction(feature)
    if is_traced(strength, direction):
        return
    most = np.sqrt(np.finfo(np.float32).max) / max(float(jnp.linalg.norm(direction)), 1e-30)
    if not abs(float(strength)) < most:
        raise BadInput(
            f"strength is {float(strength):g}; a number from {-most:.2g} to {most:.2g} was expected: with more, the "
            "square of what is added is beyond float32"
        )


def tap_of(sae: TrainedAutoencoder, feature: Any, strength: Any, what: Intervention) -> Tap:
    """`steer` of checked arguments, in which all but `what` may be traced."""
    ends = list(accumulate(sae.written or (sae.written_width,)))
    rows = jnp.split(sae.direction(feature), ends[:-1])
    directions = dict(zip(what.writes, rows, strict=True))
    read: dict[str, jax.Array] = {}
    written: set[str] = set()

    def tap(place: str, x: jax.Array) -> jax.Array:
        if place in what.reads:
            read[place] = x
        if place in directions:
            written.add(place)
            change = jnp.float32(strength)
            if what.clamp:
                features = sae.encode(jnp.concatenate([read[name] for name in what.reads], -1))
                change = change - features[..., feature, None]
            x = x + change * directions[place]
        if place == "final_norm":  # the last one: the next pass begins anew
            lacking = [name for name in what.writes if name not in written]
            read.clear()
            written.clear()
            if lacking:
                raise BadInput(f"the language model has no place {lacking[0]}, where the dictionary writes")
        return x

    return tap


@partial(jax.jit, static_argnames=("model", "room", "what"))
def texts_written(
    model: Decoder,
    params: Mapping[str, Any],
    sae: TrainedAutoencoder,
    feature: jax.Array | int,
    strength: jax.Array | float,
    prompt: jax.Array,
    tokens: jax.Array | int,
    most: jax.Array | int,
    until: jax.Array | int,
    temperature: jax.Array | float,
    top_p: jax.Array | float,
    seeds: jax.Array,
    *,
    room: int,
    what: Intervention,
) -> tuple[jax.Array, jax.Array]:
    """What follows a prompt, for each of seeds[R]: token ids [R, room], and how many of these are tokens [R].

    All are written at once. Arguments as of `continued`, whose tap is `tap_of` the others; of its own, each text is the
    one that `LanguageModel.generate` writes with that seed and tap.
    """

    def one(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        tap, key = tap_of(sae, feature, strength, what), jax.random.key(seed)
        return continued(model, params, prompt, tokens, most, until, temperature, top_p, key, room=room, tap=tap)

    return jax.vmap(one)(seeds)


@partial(jax.jit, static_argnames=("model", "what"))
def predictions_compared(
    model: Decoder,
    params: Mapping[str, Any],
    sae: TrainedAutoencoder,
    feature: jax.Array | int,
    strength: jax.Array | float,
    token_ids: jax.Array,
    *,
    what: Intervention,
) -> tuple[jax.Array, jax.Array]:
    """Of each token of token_ids[R, T] but the last, what the model predicts by itself and what with the tap.

    Returns:
        (-log p(next token) by itself [R, T - 1], KL(by itself || with the tap) [R, T - 1]), in nats; NaN where a
        prediction is not finite. Logits are large: they are made of some tokens at a time.
    """

    def apply(*arguments: Any, **method: Any) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, *arguments, **method))

    def compare(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, steered, targets = rows
        log_p, log_q = (jax.nn.log_softmax(apply(y, method="head")) for y in (own, steered))
        loss = -jnp.take_along_axis(log_p, targets[:, None], -1)[..., 0]
        return loss, jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

    R, T = token_ids.shape
    own, steered = apply(token_ids), apply(token_ids, tap_of(sae, feature, strength, what))
    N = R * (T - 1)
    at_a_time = min(N, max(16, LOGITS_AT_A_TIME // model.architecture.vocab_size))
    more = -N % at_a_time
    rows = tuple(
        jnp.pad(y.reshape(N, *y.shape[2:]), ((0, more), *((0, 0),) * (y.ndim - 2))).reshape(-1, at_a_time, *y.shape[2:])
        for y in (own[:, :-1], steered[:, :-1], token_ids[:, 1:])
    )
    loss, divergence = jax.lax.map(compare, rows)
    return loss.reshape(-1)[:N].reshape(R, T - 1), divergence.reshape(-1)[:N].reshape(R, T - 1)


@partial(jax.jit, static_argnames=("model", "what"))
def next_predictions(
    model: Decoder,
    params: Mapping[str, Any],
    sae: TrainedAutoencoder,
    feature: jax.Array | int,
    strength: jax.Array | float,
    prompt: jax.Array,
    tokens: jax.Array | int,
    *,
    what: Intervention,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities [V] of the token after the first `tokens` of prompt[T]: by itself, and with the tap."""

    def probabilities(*tap: Tap) -> jax.Array:
        x = cast(jax.Array, model.apply({"params": params}, prompt[None], *tap))
        return jax.nn.softmax(cast(jax.Array, model.apply({"params": params}, x[0, tokens - 1], method="head")))

    return probabilities(), probabilities(tap_of(sae, feature, strength, what))
