"""What a language model loses when an activation is replaced by its reconstruction.

At every real token the activation x at the autoencoder's place is replaced, the rest of the network is run, and its
predictions of the next tokens are compared with those without replacement: by cross-entropy and by KL divergence, in
nats a token. The last token of a story predicts nothing and is not scored, nor is padding. Two ablations, x replaced by
0 and by the mean activation, give the scale: a score is 1 where nothing is lost, 0 where as much as by the ablation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_sae.activations.norms import token_norms
from jax_sae.errors import BadInput
from jax_sae.language_model.decoder import Decoder, untouched
from jax_sae.language_model.harvest import harvest, padded_length, tokens_at_a_time
from jax_sae.language_model.places import layer_of, place_of_layer, read_place, stream_layer, width_of
from jax_sae.language_model.pretrained import LOGITS_AT_A_TIME, LanguageModel, Text

MOST_TOKENS_AT_A_TIME = 8192
"""All reconstructions of so many tokens are in memory at once."""

Reconstruct = Callable[[np.ndarray, np.ndarray], ArrayLike]
"""(x[B, T, D], activations of stories, zeros right of their ends; lengths [B]) -> x_hat[B, T, D]."""


class Autoencoder(Protocol):
    """Encodes and decodes activations in the language model's own scale."""

    def encode(self, x: ArrayLike, /) -> Any:
        """x[..., D] -> features [..., F]."""

    def decode(self, features: ArrayLike, /) -> Any:
        """features [..., F] -> x_hat[..., D]."""


@dataclass(frozen=True)
class LossRecovered:
    """Losses of a language model with and without replacement; plain numbers, ready for JSON.

    Means are over the tokens that predict a next one. CE is the cross-entropy of those, -log p(next token), and KL is
    sum p_without (log p_without - log p_with), both in nats. A score is None where its denominator is 0.
    """

    predictions: int
    """Tokens that are scored: all but the last one of each story."""
    replaced_tokens: int
    """Tokens whose activation is replaced, the last ones of stories included."""
    untouched_tokens: int
    """Excluded first tokens and tokens over the norm limit: they keep their activation in every column."""
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_zero_ablation: float
    ce_loss_with_mean_ablation: float
    ce_loss_score_zero_ablation: float | None
    """(CE_ablation - CE_sae) / (CE_ablation - CE_without) with x replaced by 0: SAELens' `ce_loss_score`."""
    ce_loss_score_mean_ablation: float | None
    """The same with x replaced by the mean activation, a harder one to beat."""
    kl_div_with_sae: float
    kl_div_with_zero_ablation: float
    kl_div_with_mean_ablation: float
    kl_div_score_zero_ablation: float | None
    """(KL_ablation - KL_sae) / KL_ablation with x replaced by 0: SAELens' `kl_div_score`."""
    kl_div_score_mean_ablation: float | None


def batch_at_once(autoencoder: Autoencoder) -> Reconstruct:
    """Reconstruct whole batches, for an autoencoder that takes each token by itself: decode(encode(x))."""
    return lambda x, lengths: autoencoder.decode(autoencoder.encode(x))


def story_by_story(reconstruct: Callable[[np.ndarray], ArrayLike]) -> Reconstruct:
    """Reconstruct one story x[T, D] after the other, for an autoencoder that needs whole stories without padding.

    Such as one whose run normalised per story. Slow: each length is compiled by itself.
    """

    def stories(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        x_hat = np.zeros_like(x)
        for i in np.flatnonzero(lengths):
            x_hat[i, : lengths[i]] = reconstruct(x[i, : lengths[i]])
        return x_hat

    return stories


def loss_recovered(
    lm: LanguageModel,
    texts: Iterable[Text],
    autoencoders: Mapping[str, Reconstruct],
    mean: np.ndarray,
    exclude_first_tokens: int = 0,
    norm_limit: float = 0.0,
    place: str | None = None,
) -> dict[str, LossRecovered]:
    """Splice reconstructions into a language model, all autoencoders' in one pass over the text.

    Stories are whole, and padded on the right to a few lengths, for each of which one program is compiled. Sums are
    float64, the network float32.

    Args:
        lm: the language model; blocks that were not loaded are loaded here.
        texts: strings or token ids, one a story; those with fewer than 2 tokens predict nothing and are left out.
        autoencoders: by name, from `batch_at_once` or `story_by_story`.
        mean: [D], what the mean ablation puts in place of x.
        exclude_first_tokens: activations of that many first tokens of each story stay as they are.
        norm_limit: so do those of tokens with a larger norm; 0 for no limit.
        place: where they are replaced, such as "9.mlp_out"; without it, the one place that `lm` reads.

    Returns:
        For each name its numbers; those without an autoencoder are the same in all.

    Raises:
        BadInput: if no text predicts a token, all activations stay as they are, `mean` or a reconstruction has another
            shape or is not finite, there is no such place or none is said, or the texts are none for this language
            model.
    """
    model, params = lm.whole
    architecture = model.architecture
    if place is None and len(lm.places) != 1:
        raise BadInput(f"{lm.name} reads {', '.join(lm.places)}; say at which place reconstructions are put in")
    place = read_place(lm.places[0] if place is None else place, architecture, lm.model_type)
    D = width_of(place, architecture)
    mean = np.asarray(mean, np.float32)
    if mean.shape != (D,) or not np.isfinite(mean).all():
        raise BadInput(f"the mean has the shape {mean.shape}; {D} finite numbers were expected: its width")
    # The network goes on from `first`: with what is put into the stream there, or else with the stream as it is, and
    # what is put in further on.
    in_stream = stream_layer(place, architecture)
    first = layer_of(place, architecture) - 1 if in_stream is None else in_stream
    read = (place,) if in_stream is not None else (place_of_layer(first, architecture), place)
    texts = list(texts)  # which may be a generator
    stories = sorted((story for story in lm.token_ids(texts) if len(story) > 1), key=len, reverse=True)
    if not stories:
        raise BadInput(f"none of the {len(texts)} texts has 2 tokens or more, so no next token is predicted; give more")
    S = 2 + len(autoencoders)
    losses, divergences = np.zeros(1 + S), np.zeros(S)
    n_tokens = predictions = replaced_tokens = 0
    while stories:
        T = min(padded_length(len(stories[0])), architecture.max_position_embeddings)
        B = max(1, min(tokens_at_a_time(), MOST_TOKENS_AT_A_TIME) // T)  # rows without a story count for nothing
        batch, stories = stories[:B], stories[B:]
        token_ids, lengths = np.zeros((B, T), np.int32), np.zeros(B, int)
        both = np.zeros((B, T, sum(width_of(each, architecture) for each in read)), np.float32)
        for i, activations in harvest(model, read, params, batch):
            lengths[i] = len(batch[i])
            token_ids[i, : lengths[i]], both[i, : lengths[i]] = batch[i], activations
        stream, x = np.split(both, [both.shape[-1] - D], axis=-1)
        at = np.arange(T)
        replaced = (at < lengths[:, None]) & (at >= exclude_first_tokens)
        if norm_limit:
            replaced &= token_norms(x.reshape(B * T, -1)).reshape(B, T) <= norm_limit
        replaced_tokens += int(replaced.sum())
        others = [np.zeros_like(x), np.broadcast_to(mean, x.shape)]
        others += [_reconstruction(name, autoencoders[name], x, lengths, replaced) for name in autoencoders]
        spliced = np.where(replaced[:, :, None], np.stack(others), x)
        inside = None if in_stream is not None else place
        loss, divergence = _losses_and_divergences(model, first, inside, params, stream, x, spliced, token_ids)
        scored = at[:-1] < lengths[:, None] - 1
        losses += np.asarray(loss, np.float64)[:, scored].sum(1)
        divergences += np.asarray(divergence, np.float64)[:, scored].sum(1)
        n_tokens += int(lengths.sum())
        predictions += int(scored.sum())
    if not replaced_tokens:
        raise BadInput(
            f"all {n_tokens:,} tokens are excluded first tokens or over the norm limit, so nothing is replaced; "
            "exclude fewer, or give longer stories"
        )
    without, with_zero, with_mean, *with_each = (losses / predictions).tolist()
    kl_zero, kl_mean, *kl_each = (divergences / predictions).tolist()
    return {
        name: LossRecovered(
            predictions=predictions,
            replaced_tokens=replaced_tokens,
            untouched_tokens=n_tokens - replaced_tokens,
            ce_loss_without_sae=without,
            ce_loss_with_sae=loss,
            ce_loss_with_zero_ablation=with_zero,
            ce_loss_with_mean_ablation=with_mean,
            ce_loss_score_zero_ablation=_score(loss, with_zero, without),
            ce_loss_score_mean_ablation=_score(loss, with_mean, without),
            kl_div_with_sae=kl,
            kl_div_with_zero_ablation=kl_zero,
            kl_div_with_mean_ablation=kl_mean,
            kl_div_score_zero_ablation=_score(kl, kl_zero, 0.0),
            kl_div_score_mean_ablation=_score(kl, kl_mean, 0.0),
        )
        for name, loss, kl in zip(autoencoders, with_each, kl_each, strict=True)
    }


def _reconstruction(
    name: str, reconstruct: Reconstruct, x: np.ndarray, lengths: np.ndarray, replaced: np.ndarray
) -> np.ndarray:
    """x_hat[B, T, D], finite where it replaces something."""
    x_hat = np.asarray(reconstruct(x, lengths), np.float32)
    if x_hat.shape != x.shape:
        raise BadInput(f"{name} gives reconstructions of the shape {x_hat.shape} for activations of {x.shape}")
    if not np.isfinite(x_hat[replaced]).all():
        raise BadInput(f"{name} gives a reconstruction that is not finite; take a checkpoint before it diverged")
    return x_hat


@jax.jit(static_argnums=(0, 1, 2))
def _losses_and_divergences(
    model: Decoder,
    first: int,
    place: str | None,
    params: Mapping[str, Any],
    stream: jax.Array,
    x: jax.Array,
    spliced: jax.Array,
    token_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of each token but the last: -log p(next token) with x and with each of spliced[S, B, T, D], KL(x || spliced).

    They stand at `place`, which the network comes to after `first` blocks and stream[B, T, D]; or, if that is None,
    they are the stream there.

    Returns:
        ([1 + S, B, T - 1], [S, B, T - 1]). Logits are large: they are made of some tokens at a time, and of one
        replacement after the other.
    """

    def apply(method: str, *arguments: Any) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, *arguments, method=method))

    def rest(y: jax.Array) -> jax.Array:
        start, tap = (y, untouched) if place is None else (stream, lambda at, x: y if at == place else x)
        return apply("rest", start, first, tap)[:, :-1]

    def compare(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        without, others, targets = rows

        def loss(log_p: jax.Array) -> jax.Array:
            return -jnp.take_along_axis(log_p, targets[:, None], -1)[..., 0]

        def with_replacement(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_q = jax.nn.log_softmax(apply("head", y))
            return loss(log_q), jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

        log_p = jax.nn.log_softmax(apply("head", without))
        losses, divergences = jax.lax.map(with_replacement, others)
        return jnp.concatenate([loss(log_p)[None], losses]), divergences

    S, (B, T) = len(spliced), token_ids.shape
    without, others, targets = rest(x), jax.lax.map(rest, spliced), token_ids[:, 1:]
    N, D = B * (T - 1), without.shape[-1]
    at_a_time = min(N, max(16, LOGITS_AT_A_TIME // model.architecture.vocab_size))
    parts = -(-N // at_a_time)
    more = parts * at_a_time - N
    rows = (
        jnp.pad(without.reshape(N, D), ((0, more), (0, 0))).reshape(parts, at_a_time, D),
        jnp.pad(others.reshape(S, N, D), ((0, 0), (0, more), (0, 0))).reshape(S, parts, at_a_time, D).swapaxes(0, 1),
        jnp.pad(targets.reshape(N), (0, more)).reshape(parts, at_a_time),
    )
    losses, divergences = jax.lax.map(compare, rows)
    return tuple(
        y.swapaxes(0, 1).reshape(-1, parts * at_a_time)[:, :N].reshape(-1, B, T - 1) for y in (losses, divergences)
    )


def _score(with_sae: float, with_ablation: float, without: float) -> float | None:
    """1 where as good as without replacement, 0 where as bad as the ablation."""
    return (with_ablation - with_sae) / (with_ablation - without) if with_ablation != without else None
