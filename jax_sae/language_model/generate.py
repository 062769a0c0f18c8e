"""A text goes on: one token after the other, with the keys and values of those before kept."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.decoder import Decoder, Tap, empty_caches


def refuse_generation(tokens: int, max_new_tokens: int, positions: int, temperature: float, top_p: float) -> None:
    """Raise BadInput unless a prompt of so many tokens can go on by so many, and the settings are in range."""
    if not tokens:
        raise BadInput("the prompt has no tokens; give at least one")
    if max_new_tokens < 1 or tokens + max_new_tokens > positions:
        raise BadInput(
            f"max_new_tokens is {max_new_tokens}; 1 to {positions - tokens} was expected: the prompt has "
            f"{tokens} tokens, the model {positions} positions"
        )
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise BadInput(
            f"temperature is {temperature:g} and top_p {top_p:g}; 0 or more, and above 0 up to 1, were expected"
        )


def text_of(tokenizer: Any, prompt: str, ids: np.ndarray, tokens: np.ndarray) -> str:
    """The prompt as it was given, with token ids `ids`, and what follows it in `tokens`, which begin with those."""
    before, text = (tokenizer.decode(each, skip_special_tokens=True) for each in (ids, tokens))
    return prompt + str(text).removeprefix(str(before))  # decoded by themselves, the new ones may lose a space


def continued(
    model: Decoder,
    params: Mapping[str, Any],
    prompt: jax.Array,
    tokens: jax.Array | int,
    most: jax.Array | int,
    until: jax.Array | int,
    temperature: jax.Array | float,
    top_p: jax.Array | float,
    key: jax.Array,
    *,
    room: int,
    tap: Tap,
) -> tuple[jax.Array, jax.Array]:
    """The prompt and what follows it, [room] int32, and how many of these are tokens.

    Token n is drawn with the n-th key folded from `key`, so it does not matter how many are asked for. `continued_text`
    is the same, compiled.

    Args:
        model: with all blocks.
        params: its parameters.
        prompt: token ids [T], T at most `room`.
        tokens: how many of them are the prompt; the rest is padding.
        most: prompt and new tokens together, at most `room`.
        until: the token after which it ends; below 0 for none.
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
        top_p: it is drawn among the likeliest tokens that together have at least this probability.
        key: of the random numbers.
        room: how many tokens there is room for.
        tap: sees and may change every place: of the whole prompt first, then of one token at a time.
    """

    def step(ids: jax.Array, start: Any, caches: Any) -> Any:
        return model.apply({"params": params}, ids[None], start, caches, tap, method="step")

    def drawn(x_D: jax.Array, position: Any) -> jax.Array:
        logits = cast(jax.Array, model.apply({"params": params}, x_D, method="head"))
        sampled = jax.random.categorical(jax.random.fold_in(key, position), _nucleus(logits, temperature, top_p))
        return jnp.where(temperature > 0, sampled, jnp.argmax(logits)).astype(jnp.int32)

    def goes_on(state: Any) -> jax.Array:
        ids, n, _, _ = state
        return (n < most) & ((n == tokens) | (ids[n - 1] != until))

    def one_more(state: Any) -> Any:
        ids, n, x_D, caches = state
        token = drawn(x_D, n)
        x, caches = step(token[None], n, caches)
        return ids.at[n].set(token), n + 1, x[0, -1], caches

    # what padding leaves in the caches is written over before a token sees it
    x, caches = step(prompt, 0, empty_caches(model.architecture, 1, room))
    ids = jnp.zeros(room, jnp.int32).at[: len(prompt)].set(prompt)
    ids, n, _, _ = jax.lax.while_loop(goes_on, one_more, (ids, jnp.asarray(tokens), x[0, tokens - 1], caches))
    return ids, n


continued_text = jax.jit(continued, static_argnames=("model", "room", "tap"))


def _nucleus(logits: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float) -> jax.Array:
    """Logits [V] at the temperature, -inf for tokens that are not among the likeliest with `top_p` together.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    in_order = jnp.sort(scaled, descending=True)
    p = jax.nn.softmax(in_order)
    least = jnp.where(jnp.cumsum(p) - p < top_p, in_order, jnp.inf).min()  # the likeliest is always kept
    return jnp.where(scaled >= least, scaled, -jnp.inf)
